"""Adapters of the original model on a base that was smoothed before it was quantised.

Such a base stores diag(t) W diag(s) for W. What an adapter of the original adds to W is there
diag(t) dW diag(s). Adapters are merged as if for the original; what comes of it is scaled for the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from adaptmerge.adapters.graph import Edit, Kind, Note, Site
from adaptmerge.adapters.module_paths import layer_index
from adaptmerge.adapters.weight_edits import factor_of, refitted
from adaptmerge.algebra.factors import Diag, Factor, Leaf, Product, Sum
from adaptmerge.bases.base import Base
from adaptmerge.bases.open import open_base
from adaptmerge.commands.fuse.on_base.row_column_scales import (
    Factors,
    Norm,
    ScaledPair,
    Scaling,
    scaling_of,
    unscaled,
)
from adaptmerge.errors import CannotMerge
from adaptmerge.lazy import torch
from adaptmerge.merging.plan import Plan, Step
from adaptmerge.rounding.codes import coded_error
from adaptmerge.schemes.coded import Dequantised
from adaptmerge.tensors.compare import same_values
from adaptmerge.tensors.refs import TensorRef, computed

FAR, MORE = 4.0, 0.01  # a weight is this many times its grid's error, and more, from what it was
MOST = 0.7  # but no further: one that has nothing to do with it is 1 away


@dataclass(frozen=True)
class Smoothing:
    """The linears of a base, by module, whose rows or columns are scaled; itself nothing where none is.

    original: the model that the base was quantised from, where it is known.
    """

    pairs: Mapping[str, ScaledPair] = field(default_factory=dict)
    original: Base | None = None
    notes: tuple[Note, ...] = ()

    def undone(self, base: Base) -> Base:
        """The base as the original has it, but for rounding: the one that adapters were trained on."""
        tensors = dict(base.tensors)
        for module, pair in self.pairs.items():
            name = f"{module}.weight"
            ref = unscaled(pair, name)
            tensors[name] = ref.T if base.is_transposed(Site(module)) else ref
        return replace(base, tensors=tensors)

    def redone(self, plan: Plan, base: Base) -> Plan:
        """The plan, made for the original, with all that it adds scaled for the base.

        Raises CannotMerge for parameters that are stored whole and were scaled.
        """
        if self.original is None:
            return plan
        problems: list[str] = []
        steps = tuple(self._redone(step, base, problems) for step in plan.steps)
        if problems:
            raise CannotMerge(problems)
        return replace(plan, steps=steps)

    def _redone(self, step: Step, base: Base, problems: list[str]) -> Step:
        site, pair = step.site, self.pairs.get(base.locate(step.site.module) or "")
        own = base.weight(site)
        linear = str(site) == site.module and own is not None and len(own.shape) == 2
        if factor_of(step.edit) is not None and (linear or site.param == "bias"):
            return step if pair is None else _scaled_step(step, pair, own)
        if (pair is not None) if linear else self._changed(site, own):
            problems.append(
                f"{site}: smoothing changed it, and the adapter stores it whole or moves it: fuse into the "
                "original, then quantise"
            )
        return step

    def _changed(self, site: Site, own: TensorRef | None) -> bool:
        """Whether a parameter of the base has other values than that of the original."""
        assert self.original is not None
        before = self.original.weight(site)
        return own is not None and before is not None and not _alike(own, before)


def _scaled_step(step: Step, pair: ScaledPair, own: TensorRef | None) -> Step:
    members = tuple(replace(m, edit=_scaled(m.edit, pair, own)) for m in step.members)
    return replace(step, edit=_scaled(step.edit, pair, own), members=members)


def _scaled(edit: Edit, pair: ScaledPair, own: TensorRef | None) -> Edit:
    """The edit with what it adds scaled; that of a bias by the factors of the outputs alone."""
    factor = factor_of(edit)
    if factor is None:
        return edit
    found = scaling_of(pair)
    whole = edit.site.param == "weight"
    around = _Around(
        (Diag(computed(Factors(pair, "outputs"))),) if found.outputs is not None else (),
        (Diag(computed(Factors(pair, "inputs"))),) if whole and found.inputs is not None else (),
        unscaled(pair, pair.stored.name) if whole else own,
        own,
    )
    return refitted(edit, around.put(factor))


@dataclass(frozen=True, slots=True)
class _Around:
    """diag(t) and diag(s), where these are not 1; the layer's own parameter before and after scaling."""

    left: tuple[Diag, ...]
    right: tuple[Diag, ...]
    before: TensorRef | None
    own: TensorRef | None

    def put(self, factor: Factor) -> Factor:
        """diag(t) factor diag(s); diagonals around the layer's own weight commute with these, which turn
        that into the stored one."""
        if isinstance(factor, Sum):
            return Sum(tuple(map(self.put, factor.parts)))
        if not isinstance(factor, Product):
            return Product((*self.left, factor, *self.right))
        if len(factor.parts) == 1 and isinstance(factor.parts[0], Sum | Product):
            return replace(factor, parts=(self.put(factor.parts[0]),))
        if len(factor.parts) > 1 and all(
            isinstance(p, Diag) or self._is_own(p) for p in factor.parts
        ):
            return replace(factor, parts=tuple(map(self._stored, factor.parts)))
        return replace(factor, parts=(*self.left, *factor.parts, *self.right))

    def _is_own(self, part: Factor) -> bool:
        return (
            isinstance(part, Leaf)
            and self.before is not None
            and part.ref.source == self.before.source
        )

    def _stored(self, part: Factor) -> Factor:
        if isinstance(part, Diag) or self.own is None:
            return part
        return Leaf(self.own.reshape(*part.shape))


def smoothing_of(base: Base, source: str | None, sites: Iterable[Site]) -> Smoothing:
    """How the linears at these sites are scaled beside the original model at `source`.

    Raises CannotMerge where that is not what the base was quantised from.
    """
    if source is None:
        return Smoothing()
    original = open_base(source)
    norms = _norms(base, original)
    problems: list[str] = []
    found: dict[str, Scaling] = {}
    pairs: dict[str, ScaledPair] = {}
    for module in sorted({m for site in sites if (m := base.locate(site.module)) is not None}):
        near = norms.get(layer_index(module), ())
        pair = _pair(base, original, module, near, problems)
        if pair is not None:
            pairs[module], found[module] = pair, scaling_of(pair)
            problems += _misfit(module, pair, found[module])
    if problems:
        raise CannotMerge(problems)
    kept = {module: pair for module, pair in pairs.items() if not found[module].is_one}
    return Smoothing(kept, original, tuple(_notes({m: found[m] for m in kept}, len(found))))


def _pair(
    base: Base, original: Base, module: str, norms: Iterable[Norm], problems: list[str]
) -> ScaledPair | None:
    """A linear in both; None for one of which the base has the original's own bits, or none."""
    stored, before = base.weight(Site(module)), original.weight(Site(module))
    if stored is None or len(stored.shape) != 2:
        return None
    if before is None or before.shape != stored.shape:
        shape = "no such weight" if before is None else f"the shape {list(before.shape)} there"
        problems.append(
            f"{module}: has {shape} in --original {original.path.name}, and {list(stored.shape)} in the "
            "base: give the model that the base was quantised from"
        )
        return None
    if same_values(before.cast(stored.dtype), stored):
        return None
    own = (norm for norm in norms if norm[0].shape == stored.shape[1:])
    return ScaledPair(stored, before, tuple(own))


def _norms(base: Base, original: Base) -> dict[int | None, list[Norm]]:
    """The norms of each layer, as stored and as they were."""
    found: dict[int | None, list[Norm]] = {}
    for name, ref in base.tensors.items():
        owner, _, param = name.rpartition(".")
        if len(ref.shape) == 1 and param == "weight":
            before = original.parameter(Site(owner))
            if before is not None and before.shape == ref.shape:
                found.setdefault(layer_index(owner), []).append((ref, before))
    return found


def _misfit(module: str, pair: ScaledPair, found: Scaling) -> list[str]:
    """A problem where a weight is further from its original than rounding explains."""
    source = pair.stored.source
    grid = coded_error(source.weight) if isinstance(source, Dequantised) else pair.stored.dtype.eps
    positive = all(bool((side > 0).all()) for side in found[:2] if side is not None)
    if positive and found.apart <= min(MOST, FAR * grid + MORE):
        return []
    return [
        f"{module}: is {100 * found.apart:.3g} % away from that of --original in whatever scaling, and its "
        f"grid explains {100 * grid:.2g} %: give the model that the base was quantised from"
    ]


def _notes(found: Mapping[str, Scaling], count: int) -> list[Note]:
    if not found:
        return [Note(Kind.INFO, "the base is not smoothed: its layers read the original's inputs")]
    what = (
        f"{len(found)} of {count} layers of the base are smoothed: what is added is scaled likewise"
    )
    notes = [Note(Kind.INFO, what)]
    guessed = {module: one.error for module, one in found.items() if one.error > 0}
    if guessed:
        worst = max(guessed, key=lambda module: guessed[module])
        what = (
            f"the scales of {len(guessed)} layers were estimated from their weights, to about "
            f"{100 * guessed[worst]:.2g} % of what is added or better"
        )
        notes.append(Note(Kind.APPROXIMATED, what, site=worst))
    return notes


def _alike(one: TensorRef, two: TensorRef) -> bool:
    """Whether two tensors are the same but for the rounding of the first."""
    if one.shape != two.shape or same_values(two.cast(one.dtype), one):
        return one.shape == two.shape
    eps = one.dtype.eps if one.dtype.is_float else 0.0
    return torch.allclose(one.read().double(), two.read().double(), rtol=2 * eps, atol=1e-30)
