"""What a plan changes in a base, by parameter; heads that are tied to embeddings among them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from adaptmerge.adapters.graph import Site
from adaptmerge.adapters.module_paths import OUTPUTS
from adaptmerge.adapters.stored_edits import stores_rows, stores_value
from adaptmerge.adapters.weight_edits import factor_of
from adaptmerge.algebra.factors import Factor
from adaptmerge.bases.base import Base, TensorPlace
from adaptmerge.errors import CannotMerge
from adaptmerge.merging.plan import Plan, Step
from adaptmerge.methods.method import Method
from adaptmerge.rounding.matrix import Part
from adaptmerge.tensors.compare import same_values
from adaptmerge.tensors.refs import TensorRef

MERGED = "merged"  # what a method adds that is no sum over adapters
Tokens = tuple[tuple[int, ...], TensorRef]  # rows by their numbers


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to one parameter, or one matrix of a stack: a new value, then what is added to it, then
    rows put in its place."""

    site: Site
    value: TensorRef | None = None
    parts: tuple[Part, ...] = ()
    tokens: tuple[Tokens, ...] = ()

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


def settle_tied(changes: Changes, base: Base) -> list[tuple[str, ...]]:
    """Settles parameters that are one matrix: one still, or several from now on; returns the tensors that
    are several."""
    edited = {place.name.rpartition(".")[0] for place in changes}
    if not any(map(base.may_be_tied, edited)):
        return []
    groups = [_known(names, changes, base) for names in base.tied]
    return [names for names in groups if _come_apart(names, changes, base)]


def _known(names: tuple[str, ...], changes: Changes, base: Base) -> tuple[str, ...]:
    """The tensors that are surely one: without the class of a model those that are stored or changed, or
    the usual head."""
    if base.ties.by_class:
        return names
    found = [name for name in names if name in base.tensors or TensorPlace(name) in changes]
    return tuple(found) if len(found) > 1 else (*found, f"{OUTPUTS[0]}.weight")


def _come_apart(names: tuple[str, ...], changes: Changes, base: Base) -> bool:
    """Whether these tensors are no longer one; sees to it that each of them has its change."""
    found = {name: changes[TensorPlace(name)] for name in names if TensorPlace(name) in changes}
    if not found:
        return False
    each = {name: found.get(name) or _unchanged(name) for name in names}
    if base.embedding in found:  # rows that are trained of it are trained of all that it is tied to
        rows = found[base.embedding].tokens
        each = {n: replace(one, tokens=one.tokens or rows) for n, one in each.items()}
    first, *others = each.values()
    one_still = all(_alike(first, other) for other in others)
    for name, one in each.items():
        changes.pop(TensorPlace(name), None)
        if name in base.tensors or not one_still:
            changes[TensorPlace(name)] = one
    return not one_still


def store_apart(names: tuple[str, ...], changes: Changes) -> None:
    """Has tensors stored by themselves that are one now, as they are."""
    for name in names:
        changes.setdefault(TensorPlace(name), _unchanged(name))


def _unchanged(name: str) -> Change:
    module, _, param = name.rpartition(".")
    return Change(Site(module, param))


def _alike(one: Change, other: Change) -> bool:
    """Whether two parameters are changed to the same values."""
    if one.tokens != other.tokens:
        return False
    if one.value is None or other.value is None:
        return one.only_tokens and other.only_tokens
    return not (one.parts or other.parts) and same_values(one.value, other.value)
