"""What a plan changes in a base, by parameter; heads that are tied to embeddings among them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from adaptmerge.adapters.graph import Site
from adaptmerge.adapters.stored_edits import stores_rows, stores_value
from adaptmerge.adapters.weight_edits import factor_of
from adaptmerge.algebra.factors import Factor
from adaptmerge.bases.base import Base, TensorPlace
from adaptmerge.errors import CannotMerge
from adaptmerge.merging.heads.policies import is_vocabulary
from adaptmerge.merging.plan import Plan, Step
from adaptmerge.methods.method import Method
from adaptmerge.rounding.matrix import Part
from adaptmerge.tensors.compare import same_values
from adaptmerge.tensors.refs import TensorRef

HEADS = ("lm_head", "embed_out", "output_embeddings")  # heads that a config can untie
MERGED = "merged"  # what a method adds that is no sum over adapters


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to one parameter, or one matrix of a stack: a new value, then what is added to it, then
    rows put in its place."""

    site: Site
    value: TensorRef | None = None
    parts: tuple[Part, ...] = ()
    tokens: tuple[tuple[tuple[int, ...], TensorRef], ...] = ()

    @property
    def only_tokens(self) -> bool:
        """Whether nothing but rows changes."""
        return self.value is None and not self.parts and bool(self.tokens)


Changes = dict[TensorPlace, Change]


def changes_of(plan: Plan, base: Base) -> Changes:
    """What a plan changes, by where it is stored. Raises CannotMerge with all sites that have no place."""
    changes: Changes = {}
    problems = []
    for step in plan.steps:
        place = base.place(step.site) or _new_place(step, base)
        if place is None:
            problems.append(
                f"{step.site}: the base {base.path.name} stores no such parameter: is the adapter for "
                "another model?"
            )
            continue
        before = changes.get(place, Change(step.site))
        changes[place] = _with(before, step, plan.method)
    if problems:
        raise CannotMerge(problems)
    return changes


def _new_place(step: Step, base: Base) -> TensorPlace | None:
    """A parameter that is stored whole may be new to the base: a head."""
    if not stores_value(step.edit) or step.site.expert is not None:
        return None
    module = base.locate(step.site.module) or step.site.module
    return TensorPlace(f"{module}.{step.site.param}")


def _with(change: Change, step: Step, method: Method) -> Change:
    """The change with one more step of the plan."""
    edit = step.edit
    factor = factor_of(edit)
    if factor is not None:
        return replace(change, parts=change.parts + _parts(step, factor, method))
    if stores_rows(edit):
        return replace(change, tokens=(*change.tokens, (edit.rows, edit.values)))
    if not stores_value(edit):
        raise CannotMerge(
            f"{edit.kind} edits change what flows through the model, no weights: they stay an adapter",
            where=str(step.site),
        )
    return replace(change, value=edit.value)


def _parts(step: Step, factor: Factor, method: Method) -> tuple[Part, ...]:
    """What each adapter adds, where the method sums; else what the method has made of them."""
    own = [(member, factor_of(member.edit)) for member in step.members]
    parts = tuple(Part(m.adapter, m.weight, one) for m, one in own if one is not None)
    summed = method.promise is None and len(parts) == len(own)
    return parts if summed else (Part(MERGED, 1.0, factor),)


def settle_tied(changes: Changes, base: Base) -> list[tuple[str, str]]:
    """Settles heads that share the embedding's matrix: one matrix still, or two from now on; returns the
    (head, embedding) tensors that are two."""
    apart = []
    for head, embedding in _tied_pairs(base):
        inner, outer = changes.get(TensorPlace(embedding)), changes.get(TensorPlace(head))
        if inner is None and outer is None:
            continue
        rows = inner.tokens if inner is not None else ()
        outer = outer or Change(Site(head.rpartition(".")[0]))
        if rows and not outer.tokens:
            outer = replace(outer, tokens=rows)
        if inner is not None and _alike(inner, outer):
            changes.pop(TensorPlace(head), None)
            if head in base.tensors:
                changes[TensorPlace(head)] = outer
            continue
        apart.append((head, embedding))
        changes[TensorPlace(head)] = outer
    return apart


def _tied_pairs(base: Base) -> list[tuple[str, str]]:
    """(head, embedding) tensors that are one matrix."""
    heads = [m for m in sorted(base.modules) if m.rpartition(".")[2] in HEADS]
    stored = [name for name in base.tensors if is_vocabulary(name.removesuffix(".weight"))]
    inner = [n for n in stored if n.removesuffix(".weight").rpartition(".")[2] not in HEADS]
    return [(f"{head}.weight", inner[0]) for head in heads if inner]


def _alike(inner: Change, outer: Change) -> bool:
    """Whether an embedding and its head are changed to the same values."""
    if inner.tokens != outer.tokens:
        return False
    if inner.value is None or outer.value is None:
        return inner.only_tokens and outer.only_tokens
    return not (inner.parts or outer.parts) and same_values(inner.value, outer.value)
