"""Writing every variant of LORA: two sides per site, one rank and scale or patterns of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from adaptmerge.adapters.families.alora import Alora
from adaptmerge.adapters.families.bdlora import BlockDiagonal
from adaptmerge.adapters.families.initialised import Initialised
from adaptmerge.adapters.families.kasa import Kasa
from adaptmerge.adapters.families.qalora import Pooled
from adaptmerge.adapters.families.training_state import WithState
from adaptmerge.adapters.graph import Adapter, Edit, Site
from adaptmerge.adapters.module_paths import is_suffix
from adaptmerge.adapters.stored_edits import ReplaceRows
from adaptmerge.adapters.weight_edits import Dora, factor_of, family_of
from adaptmerge.algebra.factors import Factor, Product
from adaptmerge.algebra.low_rank import as_low_rank
from adaptmerge.formats.format import WriteOptions
from adaptmerge.formats.peft import target_parameters
from adaptmerge.formats.peft.config import exactly
from adaptmerge.formats.peft.config_problems import VARIANTS
from adaptmerge.formats.peft.target_parameters import is_target
from adaptmerge.formats.peft.tuner import Spelling
from adaptmerge.tensors.refs import TensorRef, constant, join

Tensors = dict[str, TensorRef]
IN_PROJ = "in_proj_weight"
KASA = {"beta": 1e-4, "gamma": 1e-3}  # of training only; PEFT's defaults


class Sides(NamedTuple):
    """What a module stores: up and down as canonical matrices where they are, the scale, and what the
    edit or factor is that holds them. module: as PEFT's config names it."""

    site: Site
    module: str
    up: TensorRef
    down: TensorRef
    scale: float
    holder: Any

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def write(adapter: Adapter, options: WriteOptions) -> Spelling:
    """The edits of an adapter, lowered for up and down."""
    pairs = _pairs(adapter)
    return Spelling(_tensors(adapter, pairs), _config(adapter, pairs))


def is_bias(edit: Edit) -> bool:
    """Whether an edit is a LoRA's own bias delta."""
    return edit.kind in ("add", Alora.kind) and edit.site.param == "bias"


def _own(adapter: Adapter) -> list[Edit]:
    return [edit for edit in adapter.edits if family_of(edit) == "lora"]


def _modules(adapter: Adapter) -> list[Edit]:
    return [edit for edit in _own(adapter) if not is_target(edit)]


def _targets(adapter: Adapter) -> list[Edit]:
    return [edit for edit in adapter.edits if is_target(edit)]


def _pairs(adapter: Adapter) -> list[Sides]:
    attention = {edit.site.module for edit in adapter.edits if edit.site.param == IN_PROJ}
    found = [_sides(edit, attention) for edit in _modules(adapter) if not is_bias(edit)]
    inside = {m: [pair for pair in found if pair.module == m] for m in attention}
    return [_levelled(pair, inside.get(pair.module, [])) for pair in found]


def _levelled(pair: Sides, both: Sequence[Sides]) -> Sides:
    """The pair with the scale of the first of both and the higher rank: attention has one of each."""
    if not both:
        return pair
    more, scale = max(other.rank for other in both) - pair.rank, both[0].scale
    up = pair.up.scaled(pair.scale / scale)
    if not more:
        return pair._replace(up=up, scale=scale)
    zeros = [
        constant(0.0, shape, up.dtype)
        for shape in ((up.shape[0], more), (more, pair.down.shape[1]))
    ]
    up, down = join([up, zeros[0]], 1), join([pair.down, zeros[1].cast(pair.down.dtype)], 0)
    return pair._replace(up=up, down=down, scale=scale)


def _sides(edit: Edit, attention: set[str]) -> Sides:
    """The two sides of an edit; what PEFT adds twice is stored once."""
    holder: Any = edit if factor_of(edit) is None else factor_of(edit)
    pair = None if holder is edit else as_low_rank(holder)
    owner, _, leaf = edit.site.module.rpartition(".")
    inner = leaf == "out_proj" and owner in attention
    module = owner if inner else edit.site.module
    if pair is None:
        return Sides(edit.site, module, holder.up, holder.down, holder.scale, holder)
    up = pair.up.scaled(0.5) if inner else pair.up
    return Sides(edit.site, module, up, pair.down, pair.scale, edit)


def _tensors(adapter: Adapter, pairs: Sequence[Sides]) -> Tensors:
    scales = {pair.site.module: pair.scale for pair in pairs}
    biases = {
        edit.site.module: _bias(edit, scales[edit.site.module])
        for edit in _own(adapter)
        if is_bias(edit)
    }
    tensors = {f"{module}.lora_B.bias": bias for module, bias in biases.items()}
    tensors |= target_parameters.tensors(_targets(adapter))
    for pair in pairs:
        inner = ".base_layer.out_proj" if pair.module != pair.site.module else ""
        path = f"{pair.module}{inner}"
        extra: Callable[[Any], Tensors] = EXTRAS.get(type(pair.holder), _nothing)
        leaves = {**_stored_sides(pair), **extra(pair.holder)}
        tensors |= {f"{path}.{leaf}": ref for leaf, ref in leaves.items()}
        if biases and pair.site.layer.kind != "embedding":
            zero = constant(0.0, (pair.up.shape[0],), pair.up.dtype)
            tensors.setdefault(f"{path}.lora_B.bias", zero)
    return tensors


def _stored_sides(pair: Sides) -> Tensors:
    up, down, layer = pair.up, pair.down, pair.site.layer
    if layer.kind == "embedding":
        return {"lora_embedding_A": up.T, "lora_embedding_B": down.T}
    if layer.kind == "conv":
        kernel = layer.kernel
        up = up.reshape(*up.shape, *(1 for _ in kernel))
        down = down.reshape(pair.rank, down.count // pair.rank // math.prod(kernel), *kernel)
    return {"lora_A.weight": down, "lora_B.weight": up}


def _bias(edit: Edit, scale: float) -> TensorRef:
    """The vector of a bias delta, which the run settles as one column; its module's scale is not in it."""
    factor: Factor | None = factor_of(edit)
    own = 1.0
    while isinstance(factor, Product):
        own *= factor.scale
        factor = factor.parts[0]
    ref = cast("Any", factor).ref
    return cast("TensorRef", ref.reshape(ref.count).scaled(own / scale if scale else 1.0))


def _nothing(holder: Any) -> dict[str, Any]:
    return {}


EXTRAS: Mapping[type, Callable[[Any], Tensors]] = {
    Dora: lambda edit: {"lora_magnitude_vector": edit.magnitude},
    Kasa: lambda edit: {"lora_diag": edit.values},
    WithState: lambda factor: dict(factor.state),
}


def _config(adapter: Adapter, pairs: Sequence[Sides]) -> dict[str, Any]:
    hints = adapter.hints.get("peft", {})
    unused = {name: False if name == "use_qalora" else None for name in VARIANTS if name in hints}
    return {
        "lora_dropout": 0.0,
        **_ranks(adapter, pairs),
        "lora_bias": any(is_bias(edit) for edit in _own(adapter)),
        "trainable_token_indices": _token_indices(adapter),
        "use_rslora": False,
        **unused,
        "use_dora": any(isinstance(pair.holder, Dora) for pair in pairs),
        **_replication(adapter),
        **target_parameters.settings(_targets(adapter), adapter),
        **_variant_fields(pairs, hints),
    }


def _replication(adapter: Adapter) -> dict[str, Any]:
    ranges = adapter.base.replication
    return {"layer_replication": [list(pair) for pair in ranges]} if ranges else {}


def _variant_fields(pairs: Sequence[Sides], hints: Mapping[str, Any]) -> dict[str, Any]:
    """What the config must say for PEFT to compute the variant that all pairs are of."""
    found: dict[str, Any] = {}
    for pair in pairs:
        found |= FIELDS.get(type(pair.holder), _nothing)(pair.holder)
    holders = {type(pair.holder) for pair in pairs}
    if BlockDiagonal in holders:
        found["use_bdlora"] = _block_patterns(pairs)
    kept = [name for holder in holders for name in TRAINED.get(holder, ())]
    return found | {name: hints[name] for name in kept if hints.get(name) is not None}


# Fields of variants that say how they were trained.
TRAINED: Mapping[type, Sequence[str]] = {
    Kasa: ("kasa_config",),
    WithState: ("velora_config", "monteclora_config"),
}
FIELDS: Mapping[type, Callable[[Any], dict[str, Any]]] = {
    Alora: lambda edit: {"alora_invocation_tokens": list(edit.tokens)},
    Initialised: lambda edit: {"init_lora_weights": edit.init},
    Kasa: lambda _: {"kasa_config": KASA},
    Pooled: lambda factor: {"use_qalora": True, "qalora_group_size": factor.group},
}


def _block_patterns(pairs: Sequence[Sides]) -> dict[str, Any]:
    """PEFT looks for each pattern anywhere in a module's path; whole paths are the surest."""
    cut = {p.module: p.holder for p in pairs if isinstance(p.holder, BlockDiagonal)}
    return {
        "target_modules_bd_a": sorted(m for m, factor in cut.items() if factor.side == "down"),
        "target_modules_bd_b": sorted(m for m, factor in cut.items() if factor.side == "up"),
        "nblocks": next(iter(cut.values())).blocks,
        "match_strict": len(cut) == len(pairs),
    }


def refused(edits: Sequence[Edit]) -> list[str]:
    """Why edits of LORA cannot be in one file of PEFT, whose config names one variant for all."""
    weights = [edit for edit in edits if edit.site.param != "bias"]
    linear = [edit for edit in weights if edit.site.layer.kind == "linear" and _is_pair(edit)]
    marks = {_mark(edit) for edit in linear}
    blocks = {mark for mark in marks if mark.startswith("blocks")}
    if len(marks) > 1 and not (len(blocks) == 1 and marks - blocks == {"plain"}):
        return [
            f"a config names one variant of LoRA for all modules, here are {_listed(marks)}: "
            "--as lora makes plain ones of all"
        ]
    return _ambiguous_blocks(weights) if blocks else []


def _is_pair(edit: Edit) -> bool:
    return edit.kind in ("add", "dora") or family_of(edit) == "lora"


def _listed(marks: set[str]) -> str:
    return " and ".join(sorted(marks))


def _mark(edit: Edit) -> str:
    factor = factor_of(edit)
    holder: Any = edit if factor is None or isinstance(edit, Alora) else factor
    return MARKS.get(type(holder), lambda holder: "plain")(holder)


MARKS: Mapping[type, Callable[[Any], str]] = {
    Alora: lambda edit: f"aLoRA for tokens {list(edit.tokens)}",
    BlockDiagonal: lambda factor: f"blocks ({factor.blocks}) of BD-LoRA",
    Initialised: lambda edit: f"{edit.init}",
    Kasa: lambda edit: "KaSA",
    Pooled: lambda factor: f"QA-LoRA of groups of {factor.group}",
}


def _ambiguous_blocks(edits: Sequence[Edit]) -> list[str]:
    """Paths that are found inside of other paths, which PEFT would take for block-diagonal, too."""
    named = {e.site.module: e for e in edits if isinstance(factor_of(e), BlockDiagonal)}
    others = sorted({e.site.module for e in edits if _is_pair(e)})
    return [
        f"PEFT finds the block-diagonal {inner} inside of {outer}, too"
        for inner in named
        for outer in others
        if inner != outer and inner in outer
    ][:1]


def _ranks(adapter: Adapter, pairs: Sequence[Sides]) -> dict[str, Any]:
    """r and alpha of the commonest rank and scale; the others as patterns of full paths."""
    found: dict[str, Any] = {pair.module: pair for pair in pairs}
    found |= target_parameters.pairs(_targets(adapter))
    ranks = {path: pair.rank for path, pair in found.items()}
    alphas = {path: pair.scale * pair.rank for path, pair in found.items()}
    rank, alpha = _commonest(ranks.values(), 1), _commonest(alphas.values(), 1.0)
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {exactly(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {exactly(m): _plain(a) for m, a in alphas.items() if a != alpha},
    }


def _commonest(values: Iterable[Any], default: Any) -> Any:
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], -value)) if counts else default


def _plain(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha


def _token_indices(adapter: Adapter) -> dict[str, list[int]] | None:
    rows = [edit for edit in adapter.edits if isinstance(edit, ReplaceRows)]
    return {edit.site.module: list(edit.rows) for edit in rows} or None


def finish(edits: Sequence[Edit], config: dict[str, Any]) -> dict[str, Any]:
    """The output projection of an attention module is adapted with it, and no target of its own."""
    owners = {edit.site.module for edit in edits if edit.site.param == IN_PROJ}
    inner = {f"{owner}.out_proj" for owner in owners}
    targets = config.get("target_modules")
    if not inner or not isinstance(targets, list):
        return config
    rest = {edit.site.module for edit in edits} - inner
    kept = [t for t in targets if any(is_suffix(t, module) for module in rest)]
    return {**config, "target_modules": kept}
