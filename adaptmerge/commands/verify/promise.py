"""What a report promises, recomputed densely in float64 from the inputs' own tensors.

Sums of deltas are summed here, without the methods. What has no delta (scales, rotations, prompts, and
the two parts of a DoRA) is what the method's rule says, evaluated by its definition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from adaptmerge.adapters.graph import Adapter, Edit, Key, Labels, Site, fields_of, key_of
from adaptmerge.adapters.module_paths import other_versions
from adaptmerge.adapters.stored_edits import owner_of, with_value
from adaptmerge.adapters.weight_edits import (
    Add,
    Effect,
    delta_of,
    delta_on,
    factor_of,
    norms_rows,
    refitted,
)
from adaptmerge.algebra.by_rows import row_ranges
from adaptmerge.algebra.factors import Factor, Rows
from adaptmerge.algebra.forms import Form, form_of
from adaptmerge.algebra.low_rank import as_low_rank
from adaptmerge.bases.base import Base
from adaptmerge.commands.verify.stored import policies_in, promised_edit, promised_labels
from adaptmerge.errors import InputError, VerificationFailed
from adaptmerge.files.typed import built
from adaptmerge.lazy import torch
from adaptmerge.merging.align import layer_count
from adaptmerge.merging.resolve import WHOLE
from adaptmerge.merging.weights import SiteRule, Weights
from adaptmerge.methods.method import EXACT, Meeting, Member
from adaptmerge.methods.registry import method_named
from adaptmerge.outputs.report import Report, SiteLine
from adaptmerge.tensors.caches import remembered
from adaptmerge.tensors.dtypes import F32
from adaptmerge.tensors.refs import TensorRef, constant
from adaptmerge.tensors.walk import mapped, refs_of


@dataclass(frozen=True, slots=True)
class Promised:
    """One promised edit: `edit` gives its kind and site, `terms` the weighted deltas it sums.

    weight: the base's, where the deltas are what edits add to it. by_value: the tensors of `edit` are
    themselves the promise.
    """

    line: SiteLine
    edit: Edit
    terms: tuple[tuple[float, Factor], ...] = ()
    weight: TensorRef | None = None
    by_value: bool = False
    labels: Labels | None = None


@dataclass(frozen=True, slots=True)
class AddedTo:
    """A delta on one base's weight, of which rows of that weight are a part."""

    kind: ClassVar[str] = "add"
    site: Site
    factor: Factor
    weight: TensorRef

    def delta(self) -> Factor | None:
        return self.factor

    def form_on(self, weight: torch.Tensor) -> Form | None:
        """The delta; the weight at hand is the base's own."""
        return form_of(self.factor, self.weight)

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        return Add(self.site, self.factor).apply(weight)


@dataclass(frozen=True, slots=True)
class Projected:
    """A promise cut to the column and row spaces of what is stored: its best low-rank fit there."""

    whole: Factor
    stored: Factor

    @property
    def shape(self) -> tuple[int, int]:
        return self.whole.shape

    def dense(self, rows: Rows = None) -> torch.Tensor:
        left, right = self.sides()
        return (left[slice(*rows)] if rows else left) @ right

    def sides(self) -> tuple[torch.Tensor, torch.Tensor]:
        return _projected(self.whole, self.stored)

    def thin(self) -> Any:
        raise NotImplementedError("a promise is only ever dense")


@remembered
def _projected(whole: Factor, stored: Factor) -> tuple[torch.Tensor, torch.Tensor]:
    """The thin sides of P whole Q, P and Q projecting on the spaces of the stored sides."""
    pair = as_low_rank(stored)
    assert pair is not None
    left = _orthonormal(pair.up.read().double())
    right = _orthonormal(pair.down.read().double().T)
    form = form_of(whole)
    if form is not None:
        return left, (left.T @ form.up) @ (form.down @ right) @ right.T
    inside = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for start, stop in row_ranges(whole):
        inside += left[start:stop].T @ (whole.dense((start, stop)) @ right)
    return left, inside @ right.T


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the span of the columns; zero columns are padding and span nothing."""
    basis: torch.Tensor = torch.linalg.qr(columns[:, columns.any(dim=0)]).Q
    return basis


Weigh = Callable[[str, Site, str], float]


def promises(report: Report, inputs: Mapping[str, Adapter], base: Base | None) -> list[Promised]:
    """The promised edits of a report. Raises VerificationFailed when the inputs lack what it names, have
    what it says nothing about, or when its weights are not those of its options."""
    found, problems = [], []
    weigh = _weighing(report, inputs)
    unnamed = {name: _by_key(adapter) for name, adapter in inputs.items()}
    for line in report.sites:
        taken = {name: _taken(unnamed.get(name, {}), line, name) for name in line.weights}
        members = [
            Member(name, line.weights[name], edits[0], tuple(edits))
            for name, edits in taken.items()
            if edits
        ]
        if not members or {member.adapter for member in members} != set(line.weights):
            problems.append(f"{line.site}: the report names inputs that have no such edit")
            continue
        problems += _wrong_weights(line, members, weigh)
        found.append(
            _stored_whole(report, line, members, inputs, base)
            or _promised(report, line, members, base)
        )
    problems += _unaccounted(report, unnamed, weigh, base)
    if problems:
        raise VerificationFailed(problems)
    return found


def _weighing(report: Report, inputs: Mapping[str, Adapter]) -> Weigh:
    """The weight that the options of a report give an input at a site."""
    rules = tuple(built(SiteRule, rule, "rules") for rule in report.options["rules"])
    weights = Weights(report.options["weights"], rules)
    layers = layer_count(edit.site for adapter in inputs.values() for edit in adapter.edits)
    return lambda name, site, kind: weights.at(name, site, kind, layers)


def _by_key(adapter: Adapter) -> dict[Key, list[Edit]]:
    found: dict[Key, list[Edit]] = {}
    for edit in adapter.edits:
        found.setdefault(key_of(edit), []).append(edit)
    return found


def _taken(edits: dict[Key, list[Edit]], line: SiteLine, name: str) -> list[Edit]:
    """The edits of a line, taken off, in the order they act."""
    kinds = dict.fromkeys(line.kinds_in.get(name) or (line.kind,))
    return [edit for kind in kinds for edit in _of_kind(edits, line, kind)]


def _of_kind(edits: dict[Key, list[Edit]], line: SiteLine, kind: str) -> list[Edit]:
    """With a base, sites get its names, longer or shorter by one or of another version."""
    site = line.key.site
    names = (site.module, _shorter(site.module), *other_versions(site.module))
    keys = [Key(replace(site, module=name), kind) for name in names]
    if not any(key in edits for key in keys):
        keys = [k for k in edits if _without_prefix(k) == keys[0]]
    return next((edits.pop(key) for key in keys if key in edits), [])


def _without_prefix(key: Key) -> Key:
    return key._replace(site=replace(key.site, module=_shorter(key.site.module)))


def _shorter(module: str) -> str:
    return module.partition(".")[2]


def _wrong_weights(line: SiteLine, members: Sequence[Member], weigh: Weigh) -> list[str]:
    site = line.key.site
    return [
        f"{line.site}: the report says that {member.adapter} counts {member.weight:g} there, its "
        "options say otherwise"
        for member in members
        if weigh(member.adapter, site, member.kinds[0]) != member.weight
    ]


def _unaccounted(
    report: Report,
    unnamed: Mapping[str, Mapping[Key, list[Edit]]],
    weigh: Weigh,
    base: Base | None,
) -> list[str]:
    """Edits of inputs that no line names, though their weight is not 0 and no Note says so."""
    noted = {note.site for note in report.notes if "left out" in note.what}
    lines = {line.key for line in report.sites}
    heads = policies_in(report)
    return [
        f"{edits[0].site}: the report says nothing of what {name} has there"
        for name, keyed in unnamed.items()
        for key, edits in keyed.items()
        if str(edits[0].site) not in noted
        and not _is_on_nothing(edits[0].site, base)
        and weigh(name, *key) != 0.0
        and not (key in lines and heads.chosen(owner_of(edits[0])) and key.kind in WHOLE)
    ]


def _is_on_nothing(site: Site, base: Base | None) -> bool:
    """Whether the base has no such bias: what scales it does nothing."""
    return base is not None and site.param == "bias" and base.weight(site) is None


def _stored_whole(
    report: Report,
    line: SiteLine,
    members: Sequence[Member],
    inputs: Mapping[str, Adapter],
    base: Base | None,
) -> Promised | None:
    """The promise of a line on a head or on token rows; None for what sums by a method's rule."""
    if line.kind not in WHOLE:
        return None
    edit = promised_edit(report, line, members, inputs, base)
    if edit is None:
        return None
    order = [item["name"] for item in report.inputs]
    labels = promised_labels(line, members, inputs, order) if line.kind == "replace" else None
    return Promised(line, edit, by_value=line.action != "pass", labels=labels)


def _promised(
    report: Report, line: SiteLine, members: Sequence[Member], base: Base | None
) -> Promised:
    first = members[0].edit
    if line.action == "pass":
        factor = factor_of(first)
        return Promised(line, first, () if factor is None else ((1.0, factor),))
    rules = method_named(report.method).rules
    if line.action == "value" and line.kind != "add":
        weight = base.weight(first.site) if base else None
        met = Meeting(first.site, (*members, *_rest(line, members, base)), weight)
        return Promised(line, rules[line.kind](met), by_value=True)
    if line.kind != "add":
        return _joined(report, line, members, base)
    members = [_as_delta(line, member, base) for member in members]
    promise = method_named(report.method).promise
    if promise is not None:
        meant = factor_of(promise(Meeting(first.site, tuple(members))))
        assert meant is not None
        return Promised(line, members[0].edit, ((1.0, meant),))
    terms = [(m.weight, f) for m in members if (f := factor_of(m.edit)) is not None]
    return Promised(line, members[0].edit, tuple(terms))


def _rest(line: SiteLine, members: Sequence[Member], base: Base | None) -> tuple[Member, ...]:
    """The base's own share of a stored parameter, where the weights leave one."""
    first = members[0].edit
    rest = 1.0 - sum(member.weight for member in members)
    if line.kind != "replace" or abs(rest) <= EXACT:
        return ()
    stored = base.parameter(first.site) if base else None
    if stored is None:
        raise _needs_base(
            line, "its weights do not sum to 1 here, so the base's own value went into it"
        )
    return (Member("base", rest, with_value(first, stored)),)


def _needs_base(line: SiteLine, why: str) -> InputError:
    return InputError(f"{why}: pass --base DIR", where=line.site)


def _as_delta(line: SiteLine, member: Member, base: Base | None) -> Member:
    """A member as what its edits add, on the base where they depend on it."""
    edits = member.made_of
    if len(edits) == 1 and edits[0].kind == "add":
        return member
    weight = base.weight(edits[0].site) if base else None
    if weight is not None:
        delta: Factor | None = delta_on(edits, weight)
    else:
        delta = delta_of(edits[0]) if len(edits) == 1 else None
    if delta is None:
        raise _needs_base(line, "what its inputs add depends on the base")
    return replace(member, edit=Add(edits[0].site, delta))


def _joined(
    report: Report, line: SiteLine, members: Sequence[Member], base: Base | None
) -> Promised:
    """A sum that is no plain delta: by what it adds to the base, or without one by its parts."""
    weight = base.weight(members[0].edit.site) if base and report.base is not None else None
    if weight is None and report.base is not None:
        raise _needs_base(line, "it was made for a base, on which its inputs depend")
    site = members[0].edit.site
    edit = method_named(report.method).rules[line.kind](Meeting(site, tuple(members), weight))
    if weight is None:
        factor = factor_of(edit)
        return Promised(line, edit, () if factor is None else ((1.0, factor),))
    terms = [(m.weight, added_to(weight, m.made_of)) for m in members]
    return Promised(line, edit, tuple(terms), weight)


def added_to(weight: TensorRef, edits: Sequence[Edit]) -> Factor:
    """What the edits of one adapter add to a base weight; what norms it, by its definition alone."""
    normed = len(edits) == 1 and norms_rows(edits[0])
    return Effect(tuple(edits), weight) if normed else delta_on(edits, weight)


def settings(edit: Edit) -> dict[str, Any]:
    """What an edit says besides tensors and its place: token ids, sides, activations, roles."""
    made_of = ("site", "factor")
    return {n: mapped(v, _blank) for n, v in fields_of(edit).items() if n not in made_of}


def _blank(ref: TensorRef) -> TensorRef:
    """A tensor's place, without the tensor."""
    return constant(0.0, (), F32)


def other_tensors(edit: Edit) -> dict[str, TensorRef]:
    """The tensors of an edit outside its factor, by field: magnitudes, vectors, stored values."""
    return {
        name if len(refs) == 1 else f"{name}.{number}": ref
        for name, value in fields_of(edit).items()
        if name not in ("site", "factor")
        for refs in [list(refs_of(value))]
        for number, ref in enumerate(refs)
    }


def expected_edit(promised: Promised, factor: Factor | None) -> Edit:
    """The promised edit as something a model can be run with."""
    if factor is None or promised.by_value:
        return promised.edit
    if promised.weight is not None:
        return AddedTo(promised.edit.site, factor, promised.weight)
    return refitted(promised.edit, factor)
