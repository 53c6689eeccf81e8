"""The whole way: open inputs, align, plan, settle, write, commit. `convert` is a merge of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adaptmerge.adapters.experts import LAYOUTS
from adaptmerge.adapters.graph import Adapter, Bundle, Edit, Kind, Labels, Note
from adaptmerge.adapters.module_paths import is_suffix
from adaptmerge.algebra.fit import Budget
from adaptmerge.bases.base import Base
from adaptmerge.errors import UsageError
from adaptmerge.files.scratch import Keeps
from adaptmerge.formats.format import Format, WriteOptions
from adaptmerge.formats.inputs import Input, InputSpec, Source, as_specs, paths_of
from adaptmerge.merging.align import align
from adaptmerge.merging.base_names import on_another_base
from adaptmerge.merging.plan import Plan, make_plan
from adaptmerge.merging.prepare import Merging, Opened, check_merging, open_merging
from adaptmerge.merging.request import Request
from adaptmerge.merging.settle import Settled, run
from adaptmerge.merging.storable import as_storable
from adaptmerge.methods.registry import method_named
from adaptmerge.outputs import companions
from adaptmerge.outputs.adapters import (
    by_adapter,
    check_several,
    label_notes,
    labels_of,
    said_of_heads,
    tokens_of,
)
from adaptmerge.outputs.described import described_input, described_result, modules_of, version_of
from adaptmerge.outputs.report import (
    Report,
    check_strict,
    missed_budget,
    sanity_notes,
    site_lines,
    totals,
)
from adaptmerge.outputs.session import Result, writing
from adaptmerge.outputs.target import is_file_name, like_input, target_of
from adaptmerge.parallel import Progress, silent, workers_default
from adaptmerge.schemes.view import open_values
from adaptmerge.tensors import dtypes

ALLOWABLE = ("base", "nonfinite", "approximate", "labels")


@dataclass(frozen=True, slots=True)
class Options(Merging):
    """What a user may ask of a merge; see the command line's help for each."""

    budget: Budget = Budget()
    dtype: str | None = None
    target: str | None = None
    form: str | None = None
    ranks: str = "uniform"
    version: str | None = None
    experts: str | None = None
    base: str | None = None
    strict: bool = False
    force: bool = False
    jobs: int | None = None


@dataclass(frozen=True)
class Prepared:
    """Opened inputs and the plan made of them, before anything is computed or written."""

    opened: Opened
    plan: Plan
    target: Format
    base: Base | None
    notes: tuple[Note, ...]
    options: Options

    @property
    def inputs(self) -> Sequence[Input]:
        """The opened inputs."""
        return self.opened.inputs


def prepare(sources: Source | Sequence[Source], output: Path, options: Options) -> Prepared:
    """The plan of a merge. Raises every error that headers can tell."""
    specs = as_specs(sources)
    _check(specs, options)
    base = open_values(options.base) if options.base else None
    opened = open_merging(specs, options, base)
    groups, notes = align(opened.adapters, base, options.allow, options.experts)
    own = opened.inputs[0].format
    target = target_of(output, options.target, options.version, lambda: like_input(output, own))
    plan = make_plan(groups, _request(opened, options, target, base), list(opened.adapters))
    check_several(plan, target, single=is_file_name(output))
    notes += on_another_base(opened.adapters, base, options.allow)
    said = [*opened.weight_notes, *notes, *plan.notes, *label_notes(plan, target)]
    said += [Note(Kind.INFO, caution) for caution in [plan.method.caution] if caution]
    said += opened.input_notes
    return Prepared(opened, plan, target, base, tuple(said), options)


def _check(specs: Sequence[InputSpec], options: Options) -> None:
    check_merging(specs, options, ALLOWABLE, "no input was given: name at least one adapter")
    if options.ranks not in ("uniform", "per-site"):
        raise UsageError(f"--ranks {options.ranks}: expected uniform or per-site")
    if options.experts not in (None, *LAYOUTS):
        raise UsageError(f"--experts {options.experts}: expected {' or '.join(LAYOUTS)}")
    if options.dtype is not None and options.dtype not in dtypes.SPELLINGS:
        raise UsageError(f"--dtype {options.dtype}: expected {', '.join(dtypes.SPELLINGS)}")


def _request(opened: Opened, options: Options, target: Format, base: Base | None) -> Request:
    assert target.stores is not None
    method = method_named(options.method)
    if options.form is not None and options.form not in method.forms:
        known = " or ".join(method.forms) or "nothing with this method"
        raise UsageError(f"--as {options.form}: expected {known}")
    stores = target.stores(WriteOptions(ranks=options.ranks))
    if stores.base and base is None:
        raise UsageError(f"{target.name} needs the base model to name its tensors: pass --base DIR")
    return replace(
        opened.request(opened.adapters, base, target, stores),
        budget=options.budget,
        dtype=dtypes.SPELLINGS[options.dtype] if options.dtype else None,
        form=options.form,
    )


def combine(
    sources: Source | Sequence[Source],
    output: str | Path,
    options: Options = Options(),
    progress: Progress = silent,
    command: str = "combine",
) -> Report:
    """Merges the inputs into `output` (a folder, or one file by its suffix) and returns the report.

    Raises AdaptmergeError; then nothing was written. Notes are fatal under `options.strict`.
    """
    output = Path(output)
    prepared = prepare(sources, output, options)
    check_strict(prepared.notes, options.strict)
    paths = paths_of(prepared.inputs)
    paths += [prepared.base.path] if prepared.base else []
    sites = [str(step.site) for step in prepared.plan.steps]
    with (
        writing(output, paths, force=options.force, strict=options.strict) as session,
        session.scratch(sites, len(prepared.inputs)) as scratch,
    ):
        result, report = settled_result(prepared, scratch, progress, command)
        return session.write(result, report, scratch)


def settled_result(
    prepared: Prepared, scratch: Keeps, progress: Progress, command: str
) -> tuple[Result, Report]:
    """All computed, its tensors in the scratch, and the report of it. Raises InputError for inputs that are
    not finite."""
    with ThreadPoolExecutor(max_workers=1) as hasher:
        digests = [hasher.submit(_digests, item) for item in prepared.inputs]
        workers = prepared.options.jobs or workers_default()
        settled = run(prepared.plan, scratch, workers, progress)
        hashes = [digest.result() for digest in digests]
    return _written(prepared, settled), _report(prepared, settled, hashes, command)


def _digests(item: Input) -> dict[str, str]:
    return item.listing.sha256(*item.listing.used)


def _written(prepared: Prepared, settled: Sequence[Settled]) -> Result:
    found = {
        name: ([item.edit for item in own], labels_of([item.step for item in own]))
        for name, own in by_adapter(settled).items()
    }
    return result_of(prepared, found)


def result_of(
    prepared: Prepared, found: Mapping[str, tuple[Sequence[Edit], Mapping[str, Labels]]]
) -> Result:
    """What is written of the edits and labels of each adapter of the output."""
    results = {
        name: replace(_result(prepared, edits, labels), name=name)
        for name, (edits, labels) in found.items()
    }
    base, options = prepared.base, prepared.options
    modules = modules_of(base, next(iter(results.values())))
    how = WriteOptions(options.ranks, base, modules, options.version)
    return Result(Bundle(results), prepared.target, how, prepared.inputs)


def _result(prepared: Prepared, edits: Sequence[Edit], labels: Mapping[str, Labels]) -> Adapter:
    """The settled edits, lowered for the target, with the promises that still hold."""
    described = described_result(prepared.opened.adapters, prepared.base)
    full = described.with_edits(edits)
    lowered = as_storable(full, prepared.plan.stores)
    before = {
        name for item in prepared.inputs for edit in item.adapter.edits for name in _names(edit)
    }
    gone = before - {name for edit in lowered.edits for name in _names(edit)}
    kept = {cover for cover in lowered.covers if not any(is_suffix(cover, m) for m in gone)}
    tokens = tokens_of(prepared.inputs)
    return replace(lowered, covers=frozenset(kept), labels=dict(labels), tokens=tokens)


def _names(edit: Edit) -> tuple[str, str]:
    """What a promise may call the place of an edit by: its module or its parameter."""
    return edit.site.module, f"{edit.site.module}.{edit.site.param}"


def _report(
    prepared: Prepared,
    settled: Sequence[Settled],
    hashes: Sequence[Mapping[str, str]],
    command: str,
) -> Report:
    plan, options = prepared.plan, prepared.options
    found = totals(settled, plan.inputs)
    lines = site_lines(settled)
    notes = [*prepared.notes, *sanity_notes(found), *companions.notes(prepared.inputs)]
    notes += missed_budget(plan.budget, found, lines)
    return Report(
        command=command,
        method=plan.method.name,
        format=prepared.target.name,
        options=said(prepared),
        inputs=[described_input(i, h) for i, h in zip(prepared.inputs, hashes, strict=True)],
        base=None
        if prepared.base is None
        else {"name": prepared.base.path.name, "fingerprint": prepared.base.fingerprint},
        versions={name: version_of(name) for name in ("adaptmerge", "torch")},
        totals=found,
        sites=lines,
        notes=sorted(set(notes)),
        output={
            "dtype": str(plan.dtype),
            "ranks": options.ranks,
            **said_of_heads(settled, prepared.opened.heads),
        },
    )


def said(prepared: Prepared) -> dict[str, Any]:
    """What a report says of options: what was asked for, and the weights that came of it."""
    options = prepared.options
    return {
        "weights": dict(prepared.opened.weights.base),
        "rules": [asdict(rule) for rule in prepared.opened.weights.rules],
        "budget": asdict(options.budget),
        "dtype": options.dtype,
        "heads": prepared.opened.heads.as_json(),
        "form": options.form,
        "version": options.version,
        "allow": sorted(options.allow),
    }
