"""A LoRA out of two full checkpoints: what tuning added to each matrix, as far as a budget goes.

The difference of every matrix is formed in float32 of the stored values, factored by itself and measured;
vectors and what else has no low-rank form are kept whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adaptmerge.adapters.experts import FUSED, LAYOUTS
from adaptmerge.adapters.graph import Adapter, Bundle, Edit, Kind, Note
from adaptmerge.adapters.stored_edits import saved_module
from adaptmerge.adapters.weight_edits import factor_of
from adaptmerge.algebra.fit import Budget
from adaptmerge.bases.base import Base
from adaptmerge.bases.open import open_base
from adaptmerge.commands.extract.settle import Outcome, settle
from adaptmerge.commands.extract.tuned import FULL, LORA, SKIP, Wanted, as_adapter
from adaptmerge.errors import CannotStore, UsageError
from adaptmerge.files import hub
from adaptmerge.files.listing import Listing
from adaptmerge.formats.format import Format, Stores, WriteOptions
from adaptmerge.formats.inputs import Input, InputSpec
from adaptmerge.merging.heads.policies import Policies
from adaptmerge.merging.plan import Step
from adaptmerge.merging.storable import as_storable, unstorable
from adaptmerge.methods.method import Member
from adaptmerge.outputs.adapters import DEFAULT, said_of_heads
from adaptmerge.outputs.described import described_input, modules_of, portable, version_of
from adaptmerge.outputs.report import (
    EXTRACT,
    Report,
    check_strict,
    missed_budget,
    site_lines,
    totals,
)
from adaptmerge.outputs.session import Result, writing
from adaptmerge.outputs.target import like_library, target_of
from adaptmerge.parallel import Progress, silent, workers_default
from adaptmerge.tensors import dtypes
from adaptmerge.tensors.dtypes import DType, default_dtype
from adaptmerge.tensors.walk import refs_of

COMMAND = EXTRACT
INPUT = "tuned"
TOLD = 1e-3  # share of a delta that can be rounding of the checkpoint, and is worth a word


@dataclass(frozen=True, slots=True)
class Extraction:
    """What a user may ask of an extraction; see the command line's help for each."""

    budget: Budget = Budget()
    embeddings: str = LORA
    vectors: str = FULL
    experts: str | None = None
    dtype: str | None = None
    target: str | None = None
    ranks: str = "per-site"
    version: str | None = None
    strict: bool = False
    force: bool = False
    jobs: int | None = None

    @property
    def wanted(self) -> Wanted:
        """What becomes of which parameters."""
        return Wanted(self.embeddings, self.vectors, self.experts or FUSED)

    @property
    def workers(self) -> int:
        """How many sites are worked on at once."""
        return self.jobs or workers_default()


@dataclass(frozen=True)
class Prepared:
    """Both checkpoints compared, and what is to be done, before anything is computed or written."""

    base: Base
    source: str
    item: Input
    steps: Sequence[Step]
    target: Format
    stores: Stores
    dtype: DType
    notes: Sequence[Note]
    options: Extraction


def _nothing(*_: Any) -> Any:
    raise AssertionError("a full checkpoint is read by open_base")


CHECKPOINT = Format("checkpoint", "A full checkpoint", "", detect=_nothing, read=_nothing)


def open_tuned(source: str, base: Base, wanted: Wanted, workers: int | None = None) -> Input:
    """A tuned checkpoint as an input: an adapter of the base that holds all that differs."""
    tuned = open_base(source)
    path, revision = hub.resolve(source)
    adapter = as_adapter(base, tuned, wanted, workers or workers_default())
    spec = InputSpec(source, INPUT)
    return Input(INPUT, spec, Listing.of(path, source), CHECKPOINT, adapter, revision)


def prepare(base: str, tuned: str, output: Path, options: Extraction) -> Prepared:
    """What an extraction will do. Raises every error that can be told before it computes."""
    _check(options)
    target = target_of(output, options.target, options.version, lambda: like_library(output))
    assert target.stores is not None
    stores = target.stores(WriteOptions(options.ranks))
    model = open_base(base)
    item = open_tuned(tuned, model, options.wanted, options.workers)
    named = replace(item.adapter.base, name=base_name(model, base))
    adapter = replace(item.adapter, base=named)
    dtype = _dtype(adapter, stores, options)
    _check_target(adapter, target, stores, dtype, model, options)
    steps = tuple(_step(edit, options.budget) for edit in adapter.edits)
    labelled = [replace(s, labels=adapter.labels.get(saved_module(s.edit))) for s in steps]
    item = replace(item, adapter=adapter)
    return Prepared(model, base, item, labelled, target, stores, dtype, adapter.notes, options)


def _step(edit: Any, budget: Budget) -> Step:
    action = "pass" if factor_of(edit) is None else "fit"
    return Step(action, edit, (Member(INPUT, 1.0, edit),), budget)


def _check(options: Extraction) -> None:
    words = {
        "embeddings": (LORA, FULL, SKIP),
        "vectors": (FULL, SKIP),
        "ranks": ("uniform", "per-site"),
        "experts": (None, *LAYOUTS),
        "dtype": (None, *dtypes.SPELLINGS),
    }
    for name, known in words.items():
        found = getattr(options, name)
        if found not in known:
            expected = ", ".join(word for word in known if word)
            raise UsageError(f"--{name} {found}: expected one of {expected}")


def _dtype(adapter: Adapter, stores: Stores, options: Extraction) -> DType:
    if options.dtype:
        return dtypes.SPELLINGS[options.dtype]
    sides = [ref.dtype for edit in adapter.edits for ref in refs_of(factor_of(edit))]
    found = default_dtype(sides)
    return found if found.name in stores.dtypes else dtypes.F32


def _check_target(
    adapter: Adapter, target: Format, stores: Stores, dtype: DType, base: Base, options: Extraction
) -> None:
    """Raises CannotStore with every reason why the target cannot hold the result."""
    refused = unstorable(adapter.edits, stores, target.name)
    if not refused and target.refuses is not None:
        refused += target.refuses(adapter.edits, WriteOptions(base=base))
    if dtype.name not in stores.dtypes:
        refused.append(f"{target.name} does not store {dtype}")
    if refused:
        free = ["--vectors skip"] * (options.vectors != SKIP)
        free += ["--embeddings lora"] * (options.embeddings == FULL)
        advice = f"; {' and '.join(free)} can leave out what is no low-rank delta" if free else ""
        raise CannotStore([*refused[:-1], f"{refused[-1]}{advice}"])


def base_name(base: Base, source: str) -> str:
    """What the adapter calls its base: the hub's name, or the source without folders of this machine."""
    if not Path(source).exists():
        return source.partition("//")[0].partition("@")[0]
    said = base.config.get("_name_or_path")
    return str(said) if said and not Path(str(said)).is_absolute() else portable(source)


def extract(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    options: Extraction = Extraction(),
    progress: Progress = silent,
) -> Report:
    """Writes what `tuned` adds to `base` as an adapter into `output`, and returns the report.

    Raises AdaptmergeError; then nothing was written. Notes are fatal under `options.strict`.
    """
    base, tuned, output = hub.as_id(str(base)), hub.as_id(str(tuned)), Path(output)
    _check(options)
    if options.budget.unlimited:
        raise UsageError("how much is to be kept? pass --rank, --energy or --max-error")
    paths = [hub.resolve(source)[0] for source in (base, tuned)]
    with writing(output, paths, force=options.force, strict=options.strict) as session:
        prepared = prepare(base, tuned, output, options)
        check_strict(prepared.notes, options.strict)
        with session.scratch([str(step.site) for step in prepared.steps]) as scratch:
            outcome = settle(
                prepared.steps, options.budget, prepared.dtype, scratch, options.workers, progress
            )
            report = _report(prepared, outcome)
            how = WriteOptions(options.ranks, prepared.base, version=options.version)
            edits = [item.edit for item in outcome.settled]
            result = result_of(prepared.item, prepared.target, how, edits)
            return session.write(result, report, scratch)


def result_of(item: Input, target: Format, how: WriteOptions, edits: Sequence[Edit]) -> Result:
    """What is written of the edits of a tuned checkpoint."""
    assert target.stores is not None
    full = item.adapter.with_edits(edits)
    adapter = replace(as_storable(full, target.stores(how)), name=DEFAULT)
    how = replace(how, modules=modules_of(how.base, adapter))
    return Result(Bundle({adapter.name: adapter}), target, how, [item])


def _report(prepared: Prepared, outcome: Outcome) -> Report:
    options, base = prepared.options, prepared.base
    found = totals(outcome.settled, [INPUT])
    lines = site_lines(outcome.settled)
    notes = [*prepared.notes, *_doubts(prepared, outcome)]
    notes += missed_budget(options.budget, found, lines)
    return Report(
        command=COMMAND,
        method="linear",
        format=prepared.target.name,
        options=said(options),
        inputs=[_described(prepared.item)],
        base={
            "name": base.path.name,
            "source": portable(prepared.source),
            "fingerprint": base.fingerprint,
        },
        versions={name: version_of(name) for name in ("adaptmerge", "torch")},
        totals=found,
        sites=lines,
        notes=sorted(set(notes)),
        output={
            "dtype": str(prepared.dtype),
            "ranks": options.ranks,
            "checkpoint_rounding": outcome.noise,
            **said_of_heads(outcome.settled, Policies()),
        },
    )


def _doubts(prepared: Prepared, outcome: Outcome) -> list[Note]:
    """A word where much of the delta can be what saving the tuned model in a narrow dtype did to it."""
    if outcome.noise < TOLD:
        return []
    narrow = {
        str(ref.dtype)
        for step in prepared.steps
        for ref in refs_of(factor_of(step.edit))
        if ref.dtype.bits < 32
    }
    what = (
        f"about {100 * outcome.noise:.3g} % of the delta's norm can be rounding of the tuned checkpoint to "
        f"{' and '.join(sorted(narrow))}, which no rank can tell from training"
    )
    return [Note(Kind.INFO, what)]


def said(options: Extraction) -> dict[str, Any]:
    """What a report says of options."""
    return {
        "weights": {INPUT: 1.0},
        "rules": [],
        "budget": asdict(options.budget),
        "dtype": options.dtype,
        "heads": None,
        "form": None,
        "version": options.version,
        "allow": [],
        COMMAND: asdict(options.wanted),
    }


def _described(item: Input) -> Mapping[str, Any]:
    fingerprint = open_base(item.spec.source).fingerprint
    return {**described_input(item, {}), "fingerprint": fingerprint}
