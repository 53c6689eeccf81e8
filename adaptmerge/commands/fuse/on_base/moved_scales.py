"""Scales of the inputs of a feed-forward layer, moved into the rows of the layer before.

IA3 scales what goes into `down_proj`. The columns of a quantised weight share scales with others, so that
would cost new codes. In a gated MLP, down(act(gate(x)) * up(x)), the rows of `up_proj` have the same
factors, exactly, and in them block scales take these up: every code stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from adaptmerge.adapters.graph import Kind, Note, Site
from adaptmerge.adapters.weight_edits import Add, factor_of
from adaptmerge.algebra.factors import Diag, Factor, Leaf, Product, Sum
from adaptmerge.bases.base import Base
from adaptmerge.merging.plan import Plan, Step
from adaptmerge.methods.method import Member
from adaptmerge.schemes.coded import CodedWeight
from adaptmerge.tensors.refs import TensorRef

# Architectures whose MLP is down_proj(act(gate_proj(x)) * up_proj(x)) and nothing else.
GATED = frozenset(
    ("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text")
    + ("granite", "olmo", "olmo2", "olmo3", "cohere", "cohere2", "smollm3", "stablelm", "exaone4")
    + ("helium", "seed_oss", "ernie4_5")
)
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


@dataclass(frozen=True, slots=True)
class RowsBefore:
    """The layer whose rows take the scales up: its name in the adapter, its weight and its bias."""

    module: str
    weight: TensorRef
    bias: TensorRef | None


def with_moved_scales(
    plan: Plan, base: Base, coded: Mapping[str, CodedWeight]
) -> tuple[Plan, list[Note]]:
    """The plan with scales of inputs as scales of the rows before, wherever that is exact and spares the
    codes of a coded weight."""
    if base.architecture not in GATED or plan.method.promise is not None:
        return plan, []
    taken = {base.locate(step.site.module) for step in plan.steps}
    steps: list[Step] = []
    moved: list[str] = []
    for step in plan.steps:
        rows = _rows_before(step, base, coded)
        found = (
            None if rows is None or base.locate(rows.module) in taken else _moved(step, rows, base)
        )
        steps += [step] if found is None else found
        moved += [] if found is None else [str(step.site)]
    if not moved:
        return plan, []
    others = f" (and of {len(moved) - 1} layers more)" if len(moved) > 1 else ""
    what = f"the scales of its inputs{others} are moved into the rows of {UP}, whose codes stay"
    return replace(plan, steps=tuple(steps)), [Note(Kind.INFO, what, site=moved[0])]


def _rows_before(step: Step, base: Base, coded: Mapping[str, CodedWeight]) -> RowsBefore | None:
    parent, _, name = step.site.module.rpartition(".")
    if name != DOWN or str(step.site) != step.site.module:
        return None
    named = [base.locate(f"{parent}.{one}") for one in (GATE, UP, DOWN)]
    if None in named or not all(f"{module}.weight" in coded for module in named[1:]):
        return None
    if not _takes_factors(coded[f"{named[1]}.weight"]):
        return None
    tensors = base.tensors
    return RowsBefore(
        f"{parent}.{UP}", tensors[f"{named[1]}.weight"], tensors.get(f"{named[1]}.bias")
    )


def _takes_factors(weight: CodedWeight) -> bool:
    """Whether the scales of a coded weight can be multiplied row by row."""
    _, grid = weight.grid((0, 1))
    return grid.offset is None and weight.nearest_scales(grid.scale, (0, 1)) is not None


def _moved(step: Step, rows: RowsBefore, base: Base) -> list[Step] | None:
    """The steps at the layer before; None where the step is more than scales of inputs."""
    own = base.weight(step.site)
    targets = [(Site(rows.module), rows.weight)]
    if rows.bias is not None:
        targets.append((Site(rows.module, "bias"), rows.bias.reshape(rows.bias.count, 1)))
    found = []
    for site, ref in targets:
        edit = _turned(factor_of(step.edit), own, ref)
        members = [(m, _turned(factor_of(m.edit), own, ref)) for m in step.members]
        if edit is None or any(factor is None for _, factor in members):
            return None
        made = tuple(Member(m.adapter, m.weight, Add(site, f), m.made_of) for m, f in members if f)
        found.append(replace(step, edit=Add(site, edit), members=made))
    return found


def _turned(factor: Factor | None, own: TensorRef | None, rows: TensorRef) -> Factor | None:
    """W diag(v) of the layer's own weight as diag(v) W' of the one before; None for anything else."""
    if isinstance(factor, Sum):
        parts = [_turned(part, own, rows) for part in factor.parts]
        return None if None in parts else Sum(tuple(part for part in parts if part is not None))
    if not isinstance(factor, Product):
        return None
    match factor.parts:
        case (inner,):
            turned = _turned(inner, own, rows)
            return None if turned is None else replace(factor, parts=(turned,))
        case (Leaf(ref=ref), Diag() as scales) if ref == own:
            return replace(factor, parts=(scales, Leaf(rows)))
    return None
