"""Writing PEFT LoRA and DoRA adapters: one rank, one scale, the shortest exact list of targets."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from adaptmerge.edits import Add, Dora, Replace, ReplaceRows
from adaptmerge.factors import Factor, LowRank, Product, as_low_rank
from adaptmerge.files.refs import TensorRef, constant
from adaptmerge.formats.peft.config import CONFIG, METADATA_KEY, WEIGHTS, exactly
from adaptmerge.formats.peft.keys import PREFIX
from adaptmerge.graph import Adapter, Bundle, Edit, Site
from adaptmerge.names import exact_suffixes, is_suffix
from adaptmerge.registry import Output, Stores, WriteOptions

# Fields that describe training or the old layout; with the written tensors they are no longer true.
STALE = (
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "exclude_modules",
    "loftq_config",
    "corda_config",
    "eva_config",
    "lora_ga_config",
    "peft_version",
    "trainable_token_indices",
    "use_rslora",
)

Tensors = dict[str, TensorRef]


def stores(options: WriteOptions) -> Stores:
    """One rank and one scale for all sites, unless patterns are asked for."""
    per_site = options.ranks == "per-site"
    return Stores(
        kinds=frozenset({"add", "dora", "replace", "rows"}),
        exclusive=frozenset({"add", "dora"}),
        scale="site" if per_site else "adapter",
        one_rank=not per_site,
        dtypes=frozenset({"F64", "F32", "F16", "BF16"}),
    )


def refuses(edits: Sequence[Edit], options: WriteOptions) -> list[str]:
    """Biases of a LoRA lie beside its two sides: PEFT ignores one where there are none."""
    adapted = {edit.site.module for edit in edits if edit.kind == "add" and not _is_bias(edit)}
    alone = [str(e.site) for e in edits if _is_bias(e) and e.site.module not in adapted]
    return [f"peft has no place for {bias} without a delta of its weight" for bias in alone[:1]]


def _is_bias(edit: Edit) -> bool:
    return edit.kind == "add" and edit.site.param == "bias"


def write(bundle: Bundle, output: Output, options: WriteOptions) -> str:
    """Writes the adapter, lowered for `stores`; returns the name of the tensor file."""
    adapter = bundle.single
    tensors = _tensors(adapter)
    config = _config(adapter, options)
    metadata = {"format": "pt", **output.metadata}
    if output.single:
        metadata[METADATA_KEY] = json.dumps(config, sort_keys=True)
    else:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        output.path(CONFIG).write_text(text, encoding="utf-8")
    name = output.single or WEIGHTS[0]
    output.safetensors(name, dict(sorted(tensors.items())), metadata)
    return name


def _low_rank(factor: Factor) -> LowRank:
    found = as_low_rank(factor)
    assert found is not None, "lowered for a target that stores up and down"
    return found


def _tensors(adapter: Adapter) -> Tensors:
    adapted = {edit.site.module for edit in adapter.edits if edit.kind in ("add", "dora")}
    has_bias = _has_bias(adapter)
    tensors: Tensors = {}
    for edit in adapter.edits:
        match edit:
            case Add(site=Site(param="bias"), factor=factor):
                tensors[f"{PREFIX}{edit.site.module}.lora_B.bias"] = _bias(factor)
            case Add(factor=factor) | Dora(factor=factor):
                tensors |= _sides(edit.site, _low_rank(factor))
                if has_bias:
                    tensors.setdefault(*_no_bias(edit.site, factor))
                if isinstance(edit, Dora):
                    key = f"{PREFIX}{edit.site.module}.lora_magnitude_vector"
                    tensors[key] = edit.magnitude
            case Replace():
                infix = ".base_layer" if _beside(edit, adapted) else ""
                tensors[f"{PREFIX}{edit.site.module}{infix}.{edit.site.param}"] = edit.value
            case ReplaceRows(values=values):
                key = f"{edit.site.module}.token_adapter.trainable_tokens_delta"
                tensors[PREFIX + key] = values
    return tensors


def _has_bias(adapter: Adapter) -> bool:
    return any(_is_bias(edit) for edit in adapter.edits)


def _beside(edit: Replace, adapted: set[str]) -> bool:
    return edit.role == "base copy" or (edit.role == "bias" and edit.site.module in adapted)


def _sides(site: Site, pair: LowRank) -> Tensors:
    path, rank = PREFIX + site.module, pair.rank
    if site.layer.kind == "embedding":
        return {f"{path}.lora_embedding_A": pair.up.T, f"{path}.lora_embedding_B": pair.down.T}
    up, down = pair.up, pair.down
    if site.layer.kind == "conv":
        kernel = site.layer.kernel
        up = up.reshape(up.shape[0], rank, *(1 for _ in kernel))
        down = down.reshape(rank, down.shape[1] // math.prod(kernel), *kernel)
    return {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}


def _bias(factor: Factor) -> TensorRef:
    """The vector of a bias delta, which the run settles as one column."""
    while isinstance(factor, Product):
        factor = factor.parts[0]
    ref = cast("Any", factor).ref
    return cast("TensorRef", ref.reshape(ref.count))


def _no_bias(site: Site, factor: Factor) -> tuple[str, TensorRef]:
    dtype = _low_rank(factor).up.dtype
    return f"{PREFIX}{site.module}.lora_B.bias", constant(0.0, (factor.shape[0],), dtype)


def _config(adapter: Adapter, options: WriteOptions) -> dict[str, Any]:
    kept = {k: v for k, v in adapter.hints.get("peft", {}).items() if k not in STALE}
    pairs = {
        edit.site.module: _low_rank(edit.factor)
        for edit in adapter.edits
        if isinstance(edit, (Add, Dora)) and edit.site.param == "weight"
    }
    return {
        "auto_mapping": None,
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "task_type": None,
        **kept,
        **_ranks(pairs),
        "base_model_name_or_path": adapter.base.name,
        "revision": adapter.base.revision,
        "bias": _bias_mode(adapter, pairs),
        "inference_mode": True,
        "lora_bias": _has_bias(adapter),
        "modules_to_save": _saved_modules(adapter),
        "peft_type": "LORA",
        "target_modules": _targets(adapter, pairs, options),
        "trainable_token_indices": _token_indices(adapter),
        "use_dora": any(edit.kind == "dora" for edit in adapter.edits),
        "use_rslora": False,
    }


def _ranks(pairs: Mapping[str, LowRank]) -> dict[str, Any]:
    """r and alpha of the commonest rank and scale; the others as patterns of full module paths."""
    ranks = {module: pair.rank for module, pair in pairs.items()}
    alphas = {module: pair.scale * pair.rank for module, pair in pairs.items()}
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


def _bias_mode(adapter: Adapter, pairs: Mapping[str, LowRank]) -> str:
    biased = {e.site.module for e in adapter.edits if isinstance(e, Replace) and e.role == "bias"}
    if not biased:
        return "none"
    return "lora_only" if biased <= set(pairs) else "all"


def _saved_modules(adapter: Adapter) -> list[str] | None:
    owners = {e.owner for e in adapter.edits if isinstance(e, Replace) and e.role == "head"}
    return sorted(owners) or None


def _targets(
    adapter: Adapter, pairs: Mapping[str, LowRank], options: WriteOptions
) -> list[str] | str:
    """Suffixes that select exactly the adapted modules; a regular expression where none can."""
    others = (options.modules or frozenset()) - set(pairs)
    known = adapter.covers if options.modules is None else None
    found = exact_suffixes(list(pairs), others, known)
    if any(is_suffix(target, other) for target in found for other in others):
        return "|".join(re.escape(module) for module in sorted(pairs))
    return found


def _token_indices(adapter: Adapter) -> dict[str, list[int]] | None:
    rows = [edit for edit in adapter.edits if isinstance(edit, ReplaceRows)]
    return {edit.site.module: list(edit.rows) for edit in rows} or None
