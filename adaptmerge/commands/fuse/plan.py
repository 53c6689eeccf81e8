"""Every decision of a fusion that headers can tell, as printable and hashable data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from adaptmerge import __version__
from adaptmerge.adapters.graph import Adapter, Edit, Kind, Note
from adaptmerge.adapters.stored_edits import stores_value
from adaptmerge.adapters.weight_edits import WeightEdit
from adaptmerge.bases.base import Base, replicated
from adaptmerge.bases.open import open_base
from adaptmerge.commands.fuse.anew import anew
from adaptmerge.commands.fuse.calibration import Inputs, inputs_of
from adaptmerge.commands.fuse.kept_wide import can_mix, check_growth, plain, spared
from adaptmerge.commands.fuse.on_base.bases import Bases
from adaptmerge.commands.fuse.on_base.moved_scales import with_moved_scales
from adaptmerge.commands.fuse.on_base.provenance import ORIGINAL, QUANTISED, as_trained, provenance
from adaptmerge.commands.fuse.on_base.smoothing import smoothing_of
from adaptmerge.commands.fuse.on_base.stored_whole import stored_whole
from adaptmerge.commands.fuse.options import SAME, SMOOTHED, FuseOptions, check_options, check_view
from adaptmerge.commands.fuse.pieces.layout import Shard, files_of, shards_of
from adaptmerge.commands.fuse.targets import Targets, Wishes, targets_of
from adaptmerge.errors import CannotMerge
from adaptmerge.formats.format import Format, Stores
from adaptmerge.formats.inputs import Input, Source, as_specs
from adaptmerge.merging.align import align
from adaptmerge.merging.base_names import on_another_base
from adaptmerge.merging.plan import Plan, make_plan
from adaptmerge.merging.prepare import Opened, open_merging
from adaptmerge.merging.weights import Weights
from adaptmerge.rounding.codes import CodedMatrix
from adaptmerge.rounding.error_feedback import ADAPTIVE
from adaptmerge.rounding.floats import AUTO
from adaptmerge.rounding.scales import SOLVE, check_free
from adaptmerge.runtime.linears import quantised_modules
from adaptmerge.schemes.scheme import quantisers
from adaptmerge.schemes.view import View, running_dtype, view_of
from adaptmerge.tensors import dtypes
from adaptmerge.tensors.dtypes import DType

EVERYTHING = frozenset(dtype.name for dtype in dtypes.BY_NAME.values())


@dataclass(frozen=True)
class FusePlan:
    """The files of the output with every tensor's making, and what goes beside them."""

    bases: Bases
    view: View
    opened: Opened
    shards: Sequence[Shard]
    targets: Targets
    plan: Plan
    options: FuseOptions
    notes: tuple[Note, ...] = ()
    trained_on: str | None = None
    plain: tuple[str, ...] = ()  # weights that are not quantised, though others are
    moments: Inputs | None = None  # of what flows into layers

    @property
    def inputs(self) -> Sequence[Input]:
        """The opened adapters."""
        return self.opened.inputs

    @property
    def weights(self) -> Weights:
        """What each adapter counts, where."""
        return self.opened.weights

    @property
    def quantised(self) -> bool:
        """Whether linear layers are quantised anew."""
        return self.options.quant in quantisers()

    @property
    def running(self) -> DType | None:
        """What a quantised output computes with its weights in; None for float32."""
        if self.view.scheme is None and not self.quantised:
            return None
        return running_dtype({**self.view.on_disk.config, **self.targets.config})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensor files."""
        return sum(shard.nbytes for shard in self.shards)

    def key(self, digests: Mapping[str, Mapping[str, str]]) -> str:
        """A hash of all that decides the bytes of the output: what resumes must be of the same plan.

        digests: the sha256 of every file of each adapter.
        """
        stats = {path: Path(path).stat() for path in files_of(self.view.on_disk)}
        stamps = [(Path(p).name, found.st_size, found.st_mtime_ns) for p, found in stats.items()]
        options = replace(
            self.options,
            original=None,
            calibration=None,
            jobs=None,
            force=False,
            strict=False,
            executor="local",
        )
        said = (
            self.view.on_disk.fingerprint,
            None if self.bases.original is None else self.bases.original.fingerprint,
            stamps,
            sorted((name, sorted(found.items())) for name, found in digests.items()),
            repr(options),
            [(shard.name, hashlib.sha256(shard.header).hexdigest()) for shard in self.shards],
            repr(self.weights),
            None if self.moments is None else self.moments.sha256,
            __version__,
            version("torch"),
        )
        return hashlib.sha256(repr(said).encode()).hexdigest()


def _never(*_: Any) -> Any:
    raise AssertionError("a base is no adapter")


STORES = Stores(
    kinds=frozenset({"add", "replace", "rows"}),
    layers=frozenset({"linear", "embedding", "conv", "experts", "parameter", "norm"}),
    one_family=False,
    low_rank=False,
    scale="site",
    params=None,
    dtypes=EVERYTHING,
)
TARGET = Format("a base checkpoint", "", "", lambda _: False, _never, stores=lambda _: STORES)


def plan_fusion(
    base_source: str | Path, sources: Source | Sequence[Source], options: FuseOptions
) -> FusePlan:
    """The plan of a fusion. Raises every error that headers can tell."""
    specs = as_specs(sources)
    check_options(specs, options)
    view = view_of(open_base(base_source))
    check_view(view, options)
    opened = open_merging(specs, options, view.values)
    values, adapters = _on_copies(view, opened.adapters, options.quant)
    notes = [*_fingerprints(adapters, view.on_disk, options), *_trained_on(view, options)]
    notes += on_another_base(adapters, view.on_disk, options.allow)
    trained_on, said = provenance(adapters, options.trained_on)
    trained = as_trained(values, trained_on, _linears(values) if trained_on else ())
    planned = _plan_edits(opened, adapters, trained)
    bases = Bases(view.on_disk, values, trained, planned.original)
    wishes = _wishes(planned.plan, view, options)
    landing, moved = _landing(planned.plan, bases, view, options)
    laid = _laid_out(landing, bases, view, wishes, options)
    notes += [*said, *planned.notes, *planned.plan.notes, *moved, *laid.notes]
    notes += [*opened.weight_notes, *opened.input_notes]
    _refuse_unfusing(opened.weights, planned.plan)
    return FusePlan(
        bases,
        view,
        opened,
        laid.shards,
        laid.targets,
        planned.plan,
        options,
        tuple(notes),
        trained_on,
        tuple(laid.plain),
        laid.moments,
    )


class _Planned(NamedTuple):
    """What becomes of every site; what a smoothed base was quantised from, and Notes on that."""

    plan: Plan
    original: Base | None
    notes: list[Note]


def _plan_edits(opened: Opened, adapters: Mapping[str, Adapter], base: Base) -> _Planned:
    """What becomes of every site, as a merge plans it for a target that is the base itself, and how that is
    smoothed."""
    options = opened.merging
    assert isinstance(options, FuseOptions)
    groups, notes = align(adapters, base, options.allow, base.expert_layout)
    smoothing = smoothing_of(base, options.original, [group.site for group in groups])
    _refuse_activations([edit for group in groups for _, edit in group.members])
    request = opened.request(adapters, smoothing.undone(base), TARGET, STORES)
    plan = make_plan(groups, request, list(adapters))
    _refuse_several(plan)
    return _Planned(smoothing.redone(plan, base), smoothing.original, [*smoothing.notes, *notes])


def _wishes(plan: Plan, view: View, options: FuseOptions) -> Wishes:
    """How weights are to be written, those in 16 bits among them that an adapter stores whole."""
    asked = dtypes.SPELLINGS[options.dtype] if options.dtype else None
    quantised = anew(view, options.quant, asked)
    wide = quantised.dtype if quantised else dtypes.SPELLINGS.get(options.quant)
    check_growth(options.max_growth, view, quantised)
    whole = stored_whole(plan, view.values, view.coded) if wide is None and can_mix(view) else []
    return Wishes(
        asked,
        options.keep_tied,
        view.coded,
        wide,
        view.stored_as,
        quantised,
        plain(whole, (), view, None) if whole else None,
    )


class _Laid(NamedTuple):
    """What changes, the files that it goes into, and the weights that stay in 16 bits to keep adapters."""

    targets: Targets
    shards: Sequence[Shard]
    plain: Sequence[str]
    moments: Inputs

    @property
    def notes(self) -> list[Note]:
        return [*self.targets.notes, *self.moments.notes(self.shards)]


def _laid_out(plan: Plan, bases: Bases, view: View, wishes: Wishes, options: FuseOptions) -> _Laid:
    """The files of the output; laid out again where layers that lose most stay in 16 bits."""
    moments = inputs_of(options.calibration, bases.values)
    targets, shards = _files(plan, bases, view, wishes, moments)
    made = [one for tensor in targets.tensors.values() for one in tensor.made]
    check_free([one.weight for one in made if isinstance(one, CodedMatrix)], options.scales)
    sparing = spared(shards, options)
    if sparing:
        whole = [] if wishes.plain is None else list(wishes.plain.growth)
        wide = plain([*whole, *sparing], shards, view, wishes.anew)
        targets, shards = _files(plan, bases, view, replace(wishes, plain=wide), moments)
    return _Laid(targets, shards, sparing, moments)


def _files(
    plan: Plan, bases: Bases, view: View, wishes: Wishes, moments: Inputs
) -> tuple[Targets, list[Shard]]:
    """What changes, and the files that it goes into."""
    targets = targets_of(plan, bases, wishes)
    own_names = view.stored_as or (view.coded and wishes.wide is None)
    kept = bases.on_disk if own_names else bases.values
    shards = shards_of(kept, targets.tensors, targets.added, wishes.dtype, targets.gone)
    return targets, moments.attached(shards)


def _landing(plan: Plan, bases: Bases, view: View, options: FuseOptions) -> tuple[Plan, list[Note]]:
    """The plan as weights take it up: on a quantised base scales go where codes can stay."""
    free = options.rounding in (AUTO, ADAPTIVE) and options.scales == SOLVE
    if options.quant != SAME or not view.coded or not free:
        return plan, []
    return with_moved_scales(plan, bases.values, view.coded)


def _on_copies(
    view: View, adapters: Mapping[str, Adapter], quant: str
) -> tuple[Base, dict[str, Adapter]]:
    """The base with the copies of layers that the adapters are for, where all are for the same."""
    base = view.values
    ranges = {adapter.base.replication for adapter in adapters.values()}
    if len(ranges) != 1 or ranges == {()}:
        return base, dict(adapters)
    if view.coded or quant in quantisers():
        raise CannotMerge(
            "copies of layers cannot be made where a base is quantised, or is to be: give the original "
            "base, and fuse without --quant first"
        )
    flat = {n: replace(a, base=replace(a.base, replication=())) for n, a in adapters.items()}
    return replicated(base, ranges.pop()), flat


def _trained_on(view: View, options: FuseOptions) -> list[Note]:
    """A word on bases that adapters may not have been trained on as they are."""
    if view.scheme is not None and options.trained_on == ORIGINAL:
        what = "trained on the original weights: what quantising changed in the base stays"
        return [Note(Kind.INFO, what)]
    if view.scheme != SMOOTHED[0] or options.trained_on is not None:
        return []
    what = (
        "taken to be trained on this quantised base, whose layers take other inputs than the original's "
        f"(smoothing): pass --trained-on {QUANTISED} if so; else --trained-on {ORIGINAL} --original DIR"
    )
    return [Note(Kind.ASSUMED, what)]


def _fingerprints(adapters: Mapping[str, Adapter], base: Base, options: FuseOptions) -> list[Note]:
    """Raises CannotMerge for adapters that say they were made for other weights."""
    other = [
        name
        for name, adapter in adapters.items()
        if adapter.base.fingerprint not in (None, base.fingerprint)
    ]
    what = f"{', '.join(other)}: made for a base with another fingerprint than {base.path.name}"
    if other and "base" not in options.allow:
        raise CannotMerge(
            f"{what}: give that base, or pass --allow base if it has the same weights"
        )
    return [Note(Kind.ASSUMED, f"{what}, which was allowed")] if other else []


def _refuse_activations(edits: Sequence[Edit]) -> None:
    """Raises CannotMerge for edits that no weight can hold."""
    kinds = sorted(
        {
            edit.kind
            for edit in edits
            if not isinstance(edit, WeightEdit) or not hasattr(edit, "apply")
        }
    )
    if kinds:
        raise CannotMerge(
            f"{' and '.join(kinds)} edits change what flows through the model, no weights: they cannot be "
            "fused and stay an adapter"
        )


def _refuse_several(plan: Plan) -> None:
    """Raises CannotMerge where heads are to be kept apart: a model has one of each."""
    names = sorted({step.adapter for step in plan.steps if step.adapter})
    if names:
        raise CannotMerge(
            f"--heads separate makes a head for each of {', '.join(names)}, and a fused model has one: "
            "keep one by its input's name, or use concat or average"
        )


def _linears(base: Base) -> frozenset[str]:
    """The modules of the checkpoint whose weights bitsandbytes would quantise."""
    found = (base.locate(module) for module in quantised_modules(base.path))
    return frozenset(module for module in found if module is not None)


def _refuse_unfusing(weights: Weights, plan: Plan) -> None:
    """Raises CannotMerge where adapters are taken out that stored something whole."""
    whole = {
        member.adapter
        for step in plan.steps
        if stores_value(step.edit)
        for member in step.members
        if member.weight < 0
    }
    if whole:
        raise CannotMerge(
            f"{', '.join(sorted(whole))}: stores parameters whole, so what was there before cannot be "
            "computed back: pass --heads drop"
        )
