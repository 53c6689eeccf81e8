"""Mixtures of experts: one linear module per expert (transformers 4), or one parameter that stacks the
matrices of all of them (transformers 5, where gate and up are moreover one matrix, gate's rows first).

The table is that of transformers' own conversion at load; in gpt-oss and others that were always stacked
the rows lie otherwise, and there is nothing to convert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from adaptmerge.adapters.graph import Adapter, Edit, Layer, Site
from adaptmerge.adapters.weight_edits import factor_of, refitted
from adaptmerge.algebra.factors import Factor, Place, Sum
from adaptmerge.algebra.low_rank import LowRank, as_low_rank, low_rank
from adaptmerge.errors import CannotMerge, InputError
from adaptmerge.tensors.refs import TensorRef, constant, join

LAYOUTS = FUSED, PER_EXPERT = "fused", "per-expert"
GATE, UP, DOWN = "gate", "up", "down"
STACKED = {"gate_up_proj": (GATE, UP), "down_proj": (DOWN,)}


@dataclass(frozen=True, slots=True)
class Style:
    """How architectures name the three matrices of an expert, and the block before and after fusing."""

    leaves: Mapping[str, str]
    block: str = ""
    fused_block: str = ""

    def __hash__(self) -> int:
        return hash((*self.leaves.values(), self.block))


_LETTERS = {GATE: "w1", UP: "w3", DOWN: "w2"}
_PROJ = {GATE: "gate_proj", UP: "up_proj", DOWN: "down_proj"}
MIXTRAL = Style(_LETTERS, "block_sparse_moe", "mlp")
LFM2 = Style(_LETTERS)
QWEN2_MOE = Style(_PROJ)
# Architectures by the model_type of their config.
STYLES: Mapping[str, Style] = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2", "phimoe"), MIXTRAL),
    "lfm2_moe": LFM2,
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "deepseek_v32")
        + ("afmoe", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite")
        + ("glm4v_moe", "hunyuan_v1_moe", "jamba", "longcat_flash", "mellum", "olmoe", "solar_open")
        + ("qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker"),
        QWEN2_MOE,
    ),
}
# Architectures that stack experts as (experts, in, out), and say so (is_transposed).
TRANSPOSED = frozenset({"aria", "aria_text", "gpt_oss", "openai_privacy_filter"})

PARTS = {leaf: part for style in (MIXTRAL, QWEN2_MOE) for part, leaf in style.leaves.items()}
ONE = re.compile(rf"(?P<block>.+)\.experts\.(?P<expert>\d+)\.(?P<leaf>{'|'.join(PARTS)})$")


class ExpertMatrix(NamedTuple):
    """One matrix of one expert; `block` is the module that holds the experts."""

    block: str
    expert: int
    part: str

    @property
    def fused(self) -> Site:
        """The stacked parameter that has it."""
        block = re.sub(rf"(?<=\.){MIXTRAL.block}$", MIXTRAL.fused_block, self.block)
        param = next(name for name, parts in STACKED.items() if self.part in parts)
        return Site(f"{block}.experts", param, expert=self.expert)


def matrix_of(module: str) -> ExpertMatrix | None:
    """What the module of one expert's matrix is; None for all other modules."""
    found = ONE.match(module)
    return (
        ExpertMatrix(found["block"], int(found["expert"]), PARTS[found["leaf"]]) if found else None
    )


def module_of(site: Site, part: str, style: Style) -> str:
    """The module of one part of a stacked site's expert."""
    block = site.module.removesuffix(".experts")
    if style.block:
        block = re.sub(rf"(?<=\.){style.fused_block}$", style.block, block)
    return f"{block}.experts.{site.expert}.{style.leaves[part]}"


def layout_of(site: Site) -> str | None:
    """The layout that a site is spelled in; None for what is no expert's matrix in both layouts."""
    if matrix_of(site.module) is not None:
        return PER_EXPERT
    is_stacked = site.expert is not None and site.param in STACKED
    return FUSED if is_stacked and site.module.endswith(".experts") else None


def in_layout(adapter: Adapter, layout: str, style: Style | None, count: int = 0) -> Adapter:
    """The adapter with all experts in one layout, exactly the same deltas.

    style: needed for per-expert modules. count: how many experts there are, where that is known.
    Raises CannotMerge for edits that have no exact form in it.
    """
    if layout == FUSED:
        return adapter.with_edits(_all_fused(adapter.edits, count))
    if style is None:
        raise CannotMerge(
            "experts of this architecture have no spelling per expert that is known: expected one of "
            f"{', '.join(sorted(STYLES))}"
        )
    split = [_apart(edit, style) for edit in adapter.edits]
    return adapter.with_edits(edit for edits in split for edit in edits)


def _apart(edit: Edit, style: Style) -> list[Edit]:
    """An edit of a stacked matrix as edits of its parts, which share its down."""
    if layout_of(edit.site) != FUSED:
        return [edit]
    pair = _pair(edit)
    parts = STACKED[edit.site.param]
    rows = pair.up.shape[0] // len(parts)
    found = []
    for number, part in enumerate(parts):
        up = pair.up.slice(0, number * rows, (number + 1) * rows)
        site = Site(module_of(edit.site, part, style))
        found.append(_moved(edit, site, low_rank(up, pair.down, pair.scale)))
    return found


def _all_fused(edits: Sequence[Edit], count: int) -> list[Edit]:
    """Gate and up as one block-diagonal edit where the first of them was; rank adds up."""
    gathered = _gathered(edits)
    most = max((site.expert or 0 for site in gathered), default=-1) + 1
    layer = Layer("experts", stacked=max(count, most))
    result: list[Edit] = []
    for edit in edits:
        found = _of_expert(edit)
        if found is None:
            result.append(edit)
        elif groups := gathered.pop(found.fused, None):
            site = replace(found.fused, layer=layer)
            result += [_together(site, parts) for parts in groups]
    return result


def _gathered(edits: Sequence[Edit]) -> dict[Site, list[dict[str, Edit]]]:
    """Edits by the stacked site that has them: of several edits of one matrix the n-th of each part go
    together, so that none takes another's place."""
    gathered: dict[Site, list[dict[str, Edit]]] = {}
    for edit in edits:
        if (found := _of_expert(edit)) is not None:
            groups = gathered.setdefault(found.fused, [])
            free = next((parts for parts in groups if found.part not in parts), None)
            if free is None:
                groups.append(free := {})
            free[found.part] = edit
    return gathered


def _of_expert(edit: Edit) -> ExpertMatrix | None:
    """The matrix of one expert's module that an edit is of."""
    return matrix_of(edit.site.module) if edit.site.param == "weight" else None


def _together(site: Site, edits: Mapping[str, Edit]) -> Edit:
    names = STACKED[site.param]
    first = next(iter(edits.values()))
    factors = {name: _factor(edits[name]) for name in names if name in edits}
    if len(names) == 1:
        return _moved(first, site, factors[names[0]])
    pairs = {part: pair for part, f in factors.items() if (pair := as_low_rank(f)) is not None}
    alike = {(p.scale, p.up.dtype, p.down.dtype) for p in pairs.values()}
    if len(pairs) == len(factors) and len(alike) == 1:
        return _moved(first, site, _block_diagonal(pairs, names))
    return _moved(first, site, _placed(factors, names))


def _block_diagonal(pairs: Mapping[str, LowRank], names: Sequence[str]) -> Factor:
    """The stored sides themselves, with zeros where one part does not reach the other's rows."""
    scale = next(iter(pairs.values())).scale
    ups, downs = [], []
    for part, pair in pairs.items():
        blank = constant(0.0, pair.up.shape, pair.up.dtype)
        ups.append(join([pair.up if name == part else blank for name in names], axis=0))
        downs.append(pair.down)
    return low_rank(join(ups, axis=1), join(downs, axis=0), scale)


def _placed(factors: Mapping[str, Factor], names: Sequence[str]) -> Factor:
    """Parts of other forms, scales or dtypes, each at its rows."""
    rows, columns = next(factor.shape for factor in factors.values())
    shape = (rows * len(names), columns)
    blocks = (Place(f, shape, names.index(part) * rows) for part, f in factors.items())
    return Sum(tuple(blocks))


def _moved(edit: Edit, site: Site, factor: Factor) -> Edit:
    return replace(refitted(edit, factor), **{"site": site})


def _factor(edit: Edit) -> Factor:
    factor = factor_of(edit)
    if factor is None or edit.kind != "add":
        raise CannotMerge(
            f"{edit.kind} edits of experts have no exact form in the other layout",
            where=str(edit.site),
        )
    return factor


def _pair(edit: Edit) -> LowRank:
    found = as_low_rank(_factor(edit))
    if found is None:
        raise CannotMerge(
            "only low-rank deltas of experts have an exact form in the other layout: convert the "
            "adapter to LoRA first",
            where=str(edit.site),
        )
    return found


def style_of(architecture: str | None, names: Iterable[str] = ()) -> Style | None:
    """The style of an architecture, or of modules that are spelled per expert."""
    known = STYLES.get(architecture or "")
    if known is not None:
        return known
    found = next((match for name in names if (match := ONE.match(name))), None)
    if found is None:
        return None
    if found["leaf"] in _PROJ.values():
        return QWEN2_MOE
    return MIXTRAL if found["block"].endswith(MIXTRAL.block) else LFM2


class Checkpoint(NamedTuple):
    """Stored tensors, asked for experts in either layout; modules are named as the checkpoint does."""

    tensors: Mapping[str, TensorRef]
    transposed: bool

    def matrix(self, module: str, param: str, expert: int) -> TensorRef | None:
        """One expert's matrix of a stacked parameter, as it lies: a slice, or its parts joined."""
        whole = self.tensors.get(f"{module}.{param}")
        if whole is not None and len(whole.shape) == 3:
            if expert >= whole.shape[0]:
                return None
            return whole.slice(0, expert, expert + 1).reshape(*whole.shape[1:])
        for leaves in (_LETTERS, _PROJ):
            names = [f"{module}.{expert}.{leaves[part]}.weight" for part in STACKED.get(param, ())]
            if names and all(name in self.tensors for name in names):
                return _joined([self.tensors[name] for name in names])
        return None

    def stack(self, module: str, param: str, count: int) -> TensorRef | None:
        """All experts' matrices as one tensor (experts, ...)."""
        found = [self.matrix(module, param, expert) for expert in range(count)]
        parts = [ref.reshape(1, *ref.shape) for ref in found if ref is not None]
        return _joined(parts) if parts and len(parts) == count else None

    def part(self, module: str) -> TensorRef | None:
        """The matrix of one expert's module out of a stacked parameter: its rows, (out, in)."""
        found = matrix_of(module)
        if found is None or self.transposed:
            return None
        param = found.fused.param
        whole = self.matrix(f"{found.block}.experts", param, found.expert)
        if whole is None:
            return None
        names = STACKED[param]
        rows, number = whole.shape[0] // len(names), names.index(found.part)
        return whole.slice(0, number * rows, (number + 1) * rows)


def _joined(parts: list[TensorRef]) -> TensorRef:
    """Matrices of a base one below the other. Raises InputError naming those that do not go together."""
    if (
        any(not ref.shape for ref in parts)
        or len({(*ref.shape[1:], ref.dtype) for ref in parts}) > 1
    ):
        shapes = ", ".join(f"{ref.name} {ref.dtype} {list(ref.shape)}" for ref in parts)
        raise InputError(f"the experts of the base do not go together: {shapes}")
    return join(parts, axis=0)
