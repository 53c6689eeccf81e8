"""The weighted sum of each kind of edit: what the linear methods are made of.

Every rule returns one edit that adds to any base what the members add together, each times its weight,
or the documented analogue where an edit adds nothing that can be summed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from adaptmerge.adapters.families.beft import Beft
from adaptmerge.adapters.graph import Edit, fields_of
from adaptmerge.adapters.stored_edits import stored_value, with_value
from adaptmerge.adapters.weight_edits import Scale, delta_of, refitted
from adaptmerge.algebra.factors import Factor, Leaf, Product, Sum, values
from adaptmerge.errors import CannotMerge
from adaptmerge.methods.dora import dora_sum
from adaptmerge.methods.geodesic import mean_boft, mean_hra, mean_oft
from adaptmerge.methods.method import Meeting, Member, Rule
from adaptmerge.methods.shared_sides import nearest_vera
from adaptmerge.tensors.refs import TensorRef, constant, join


def weighted_sum(meeting: Meeting) -> Edit:
    """Sum of w * delta, as an expression of the members' own factors."""
    deltas = [_delta(member) for member in meeting.members]
    if all(isinstance(delta, Beft) for delta in deltas):
        return _one_vector(meeting, [delta.vector for delta in deltas if isinstance(delta, Beft)])
    terms = tuple(
        Product((delta,), member.weight)
        for delta, member in zip(deltas, meeting.members, strict=True)
    )
    return refitted(meeting.members[0].edit, Sum(terms))


def _one_vector(meeting: Meeting, vectors: Sequence[TensorRef]) -> Edit:
    """The sum of vectors added to a bias, which is one again."""
    weights = [member.weight for member in meeting.members]
    total = columns(list(zip(weights, vectors, strict=True)))
    return refitted(meeting.members[0].edit, Beft(values(total, vectors[0])))


def _delta(member: Member) -> Factor:
    factor = delta_of(member.edit)
    assert factor is not None
    return factor


def from_the_base(meeting: Meeting) -> Edit:
    """b + sum of w (value - b) with the base's own value b, for vectors that replace it."""
    stored = [(m.weight, stored_value(m.edit)) for m in meeting.members]
    if meeting.rest and meeting.weight is None:
        raise CannotMerge(
            f"values that replace the base's, with weights that sum to {meeting.total:g}, need the "
            "base's own: pass --base DIR that has it, or weights that sum to 1 over all inputs",
            where=str(meeting.site),
        )
    if meeting.rest and meeting.weight is not None:
        stored.append((meeting.rest, meeting.weight))
    first = meeting.members[0].edit
    return with_value(first, values(columns(stored), stored[0][1]))


def weighted_values(meeting: Meeting) -> Edit:
    """Sum of w * value of parameters stored whole."""
    first = meeting.members[0].edit
    stored = [(m.weight, stored_value(m.edit)) for m in meeting.members]
    return with_value(first, values(columns(stored), stored[0][1]))


def columns(terms: Sequence[tuple[float, TensorRef]]) -> Sum:
    """The weighted sum of tensors of one size, as a column."""
    return Sum(tuple(Product((Leaf(v.reshape(v.count, 1)),), w) for w, v in terms))


def scale_deviation(meeting: Meeting) -> Edit:
    """l = 1 + sum of w (l_i - 1), the sum of the effects on any base: a missing one counts as 1."""
    vectors = _vectors(meeting)
    ones = constant(1.0, vectors[0][1].shape, vectors[0][1].dtype)
    total = columns([*vectors, (1.0 - meeting.total, ones)])
    return _scaled(meeting, total)


def _vectors(meeting: Meeting) -> list[tuple[float, TensorRef]]:
    return [(m.weight, _scale(m).vector) for m in meeting.members]


def _scale(member: Member) -> Scale:
    assert isinstance(member.edit, Scale)
    return member.edit


def _scaled(meeting: Meeting, vector: Factor) -> Edit:
    first = _scale(meeting.members[0])
    return replace(first, vector=values(vector, first.vector, neutral=1.0))


def scale_values(meeting: Meeting) -> Edit:
    """l = sum of w l_i, as PEFT sums them: weights that do not sum to 1 rescale the base."""
    return _scaled(meeting, columns(_vectors(meeting)))


def averaged(field: str, *alike: str) -> Rule:
    """The rule that averages one tensor of edits that agree in the other fields `alike`."""

    def rule(meeting: Meeting) -> Edit:
        first = meeting.members[0].edit
        refs: list[tuple[float, TensorRef]] = [
            (m.weight, fields_of(m.edit)[field]) for m in meeting.members
        ]
        _same_fields(meeting, alike)
        _same_shapes(meeting, [ref for _, ref in refs])
        if meeting.rest:
            raise CannotMerge(
                f"an average of {first.kind} edits needs weights that sum to 1, found "
                f"{meeting.total:g}: they add to no base",
                where=str(meeting.site),
            )
        return replace(first, **{field: values(columns(refs), refs[0][1])})

    return rule


def side_by_side(field: str, *alike: str) -> Rule:
    """The rule that puts one tensor of edits one after the other; weights do not count."""

    def rule(meeting: Meeting) -> Edit:
        first = meeting.members[0].edit
        _same_fields(meeting, alike)
        refs: list[TensorRef] = [fields_of(m.edit)[field] for m in meeting.members]
        if fields_of(first).get("parts", 1) > 1:
            raise CannotMerge(
                "prompts of an encoder and a decoder lie in one tensor, which does not go side by side",
                where=str(meeting.site),
            )
        if len({ref.shape[1:] for ref in refs}) > 1 or len({ref.dtype for ref in refs}) > 1:
            found = ", ".join(f"{list(ref.shape)} {ref.dtype}" for ref in refs)
            raise CannotMerge(f"shapes or dtypes differ: {found}", where=str(meeting.site))
        return replace(first, **{field: join(refs, 0)})

    return rule


def _same_fields(meeting: Meeting, names: Sequence[str]) -> None:
    first = meeting.members[0]
    for name in names:
        wanted = fields_of(first.edit)[name]
        for member in meeting.members[1:]:
            if fields_of(member.edit)[name] != wanted:
                raise CannotMerge(
                    f"{name} differs between {first.adapter} and {member.adapter}",
                    where=str(meeting.site),
                )


def _same_shapes(meeting: Meeting, refs: Sequence[TensorRef]) -> None:
    if len({ref.shape for ref in refs}) > 1:
        found = ", ".join(
            f"{m.adapter} {list(r.shape)}" for m, r in zip(meeting.members, refs, strict=True)
        )
        raise CannotMerge(
            f"lengths differ: {found}; --method cat puts them one after the other",
            where=str(meeting.site),
        )


def alike(rule: Rule, *names: str) -> Rule:
    """The rule for edits that first must agree in some fields."""

    def checked(meeting: Meeting) -> Edit:
        _same_fields(meeting, names)
        return rule(meeting)

    return checked


SUMS: dict[str, Callable[[Meeting], Edit]] = {
    "add": weighted_sum,
    "dora": dora_sum,
    "scale": scale_deviation,
    "oft": mean_oft,
    "boft": mean_boft,
    "hra": mean_hra,
    "replace": weighted_values,
    "ln_tuning": from_the_base,
    "alora": alike(weighted_sum, "tokens"),
    "prompt": averaged("values", "parts"),
    "prefix": averaged("values", "parts", "layers", "heads"),
}
FORMS: dict[str, Rule] = {"lora": weighted_sum, "vera": nearest_vera}
STACKED = {
    **SUMS,
    "prompt": side_by_side("values", "parts"),
    "prefix": side_by_side("values", "parts", "layers", "heads"),
}
