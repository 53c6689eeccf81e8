"""The whole way: open inputs, align, plan, run, lower, write, commit. `convert` is a merge of one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adaptmerge import __version__
from adaptmerge.adapters.experts import LAYOUTS
from adaptmerge.adapters.graph import Adapter, Bundle, Edit, Kind, Note
from adaptmerge.adapters.module_paths import is_suffix
from adaptmerge.algebra.fit import Budget
from adaptmerge.bases.base import Base
from adaptmerge.errors import CannotStore, UsageError
from adaptmerge.files.scratch import Scratch
from adaptmerge.files.staging import Staging
from adaptmerge.formats.format import Format, Output, WriteOptions
from adaptmerge.formats.inputs import Input, InputSpec, in_natural_order, open_inputs
from adaptmerge.formats.registry import format_named, formats
from adaptmerge.merging.align import align
from adaptmerge.merging.heads.policies import Given, Policies, check_policies, policies
from adaptmerge.merging.plan import Plan, make_plan
from adaptmerge.merging.request import Request
from adaptmerge.merging.settle import Settled, run
from adaptmerge.merging.storable import as_storable
from adaptmerge.merging.weights import SiteRule, Weights, base_weights, is_checkpoint_schedule
from adaptmerge.methods.registry import method_named
from adaptmerge.outputs import companions
from adaptmerge.outputs.adapters import (
    by_adapter,
    check_several,
    label_notes,
    labels_of,
    left_by,
    said_of_heads,
    tokens_of,
    write_bundle,
)
from adaptmerge.outputs.described import described_input, described_result, modules_of, version_of
from adaptmerge.outputs.report import (
    FILE,
    METADATA_KEY,
    Report,
    check_strict,
    missed_budget,
    report_name,
    sanity_notes,
    site_lines,
    totals,
)
from adaptmerge.outputs.target import check_name, check_version, is_file_name
from adaptmerge.parallel import Progress, silent, workers_default
from adaptmerge.schemes.view import open_values
from adaptmerge.tensors import dtypes
from adaptmerge.tensors.refs import forget

ALLOWABLE = ("base", "nonfinite", "approximate", "labels")


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may ask of a merge; see the command line's help for each."""

    method: str = "linear"
    weights: str | None = None
    total: bool = False
    rules: tuple[SiteRule, ...] = ()
    budget: Budget = Budget()
    dtype: str | None = None
    target: str | None = None
    form: str | None = None
    ranks: str = "uniform"
    version: str | None = None
    experts: str | None = None
    heads: Given = None
    base: str | None = None
    allow: frozenset[str] = frozenset()
    strict: bool = False
    force: bool = False
    jobs: int | None = None


@dataclass(frozen=True)
class Prepared:
    """Opened inputs and the plan made of them, before anything is computed or written."""

    inputs: Sequence[Input]
    plan: Plan
    target: Format
    base: Base | None
    weights: Weights
    notes: tuple[Note, ...]
    adapter: Adapter  # names, base, hints of the result; no edits yet
    options: Options
    heads: Policies = Policies()


def prepare(specs: Sequence[InputSpec], output: Path, options: Options) -> Prepared:
    """The plan of a merge. Raises every error that headers can tell."""
    forget()
    _check(specs, options)
    if is_checkpoint_schedule(options.weights):
        specs = in_natural_order(specs)
    base = open_values(options.base) if options.base else None
    inputs = open_inputs(specs, base)
    names = [item.name for item in inputs]
    given = [item.spec.weight for item in inputs]
    weights = Weights(base_weights(names, given, options.weights, options.total), options.rules)
    adapters = {item.name: item.adapter for item in inputs}
    heads = policies(options.heads, names)
    check_policies(heads, adapters)
    groups, notes = align(adapters, base, options.allow, options.experts)
    target = _target(output, options, inputs)
    request = _request(options, weights, target, base)
    plan = make_plan(groups, replace(request, heads=heads, adapters=adapters), names)
    check_several(plan, target, single=is_file_name(output))
    adapter = described_result(adapters, base)
    said = (*_weight_notes(options, given, weights), *notes, *plan.notes)
    said += tuple(label_notes(plan, target))
    said += tuple(Note(Kind.INFO, caution) for caution in [plan.method.caution] if caution)
    said += tuple(replace(n, input=i.name) for i in inputs for n in i.adapter.notes)
    return Prepared(inputs, plan, target, base, weights, said, adapter, options, heads)


def _check(specs: Sequence[InputSpec], options: Options) -> None:
    if not specs:
        raise UsageError("no input was given: name at least one adapter")
    if options.total and (options.weights or any(spec.weight is not None for spec in specs)):
        raise UsageError("--sum means weight 1 for each: leave it out, or the weights")
    unknown = sorted(options.allow - set(ALLOWABLE))
    if unknown:
        raise UsageError(f"--allow {unknown[0]}: expected {' or '.join(ALLOWABLE)}")
    if options.ranks not in ("uniform", "per-site"):
        raise UsageError(f"--ranks {options.ranks}: expected uniform or per-site")
    if options.experts not in (None, *LAYOUTS):
        raise UsageError(f"--experts {options.experts}: expected {' or '.join(LAYOUTS)}")
    if options.dtype is not None and options.dtype not in dtypes.SPELLINGS:
        raise UsageError(f"--dtype {options.dtype}: expected {', '.join(dtypes.SPELLINGS)}")


def _request(options: Options, weights: Weights, target: Format, base: Base | None) -> Request:
    assert target.stores is not None
    method = method_named(options.method)
    if options.form is not None and options.form not in method.forms:
        known = " or ".join(method.forms) or "nothing with this method"
        raise UsageError(f"--as {options.form}: expected {known}")
    stores = target.stores(WriteOptions(ranks=options.ranks))
    if stores.base and base is None:
        raise UsageError(f"{target.name} needs the base model to name its tensors: pass --base DIR")
    return Request(
        method=method,
        weights=weights,
        target=target,
        stores=stores,
        budget=options.budget,
        dtype=dtypes.SPELLINGS[options.dtype] if options.dtype else None,
        base=base,
        form=options.form,
        allowed=options.allow,
    )


def _target(output: Path, options: Options, inputs: Sequence[Input]) -> Format:
    """The format asked for, or the one the output's name or the inputs' own format suggests."""
    if options.target:
        target = format_named(options.target)
    else:
        fitting = [f for f in formats().values() if f.write and output.suffix in f.suffixes]
        own = inputs[0].format
        target = fitting[0] if fitting and own not in fitting else own
        if target.write is None:
            target = _without_base()
    if target.write is None:
        raise CannotStore(f"{target.name} is read only so far: use --to with one of {_writable()}")
    check_name(output, target)
    check_version(options.version, target)
    return target


def _without_base() -> Format:
    """A format that can be written whatever is known of the base, for inputs of one that cannot."""
    found = (f for f in formats().values() if f.stores and not f.stores(WriteOptions()).base)
    return next(found)


def _writable() -> str:
    return ", ".join(f.name for f in formats().values() if f.write)


def _weight_notes(options: Options, given: Sequence[float | None], weights: Weights) -> list[Note]:
    said = options.weights or options.total or any(w is not None for w in given)
    if said or len(given) < 2:
        return []
    return [
        Note(Kind.INFO, f"no weights were given: each of {len(given)} inputs counts 1/{len(given)}")
    ]


def combine(
    specs: Sequence[InputSpec],
    output: Path,
    options: Options = Options(),
    progress: Progress = silent,
    command: str = "combine",
) -> Report:
    """Merges the inputs into `output` (a folder, or one file by its suffix) and returns the report.

    Raises AdaptmergeError; then nothing was written. Notes are fatal under `options.strict`.
    """
    prepared = prepare(specs, output, options)
    check_strict(prepared.notes, options.strict)
    single = is_file_name(output)
    paths = [item.path for item in prepared.inputs]
    paths += [prepared.base.path] if prepared.base else []
    obsolete = {name for f in formats().values() for name in f.files}
    obsolete |= left_by(output, obsolete)
    with Staging(output, force=options.force, inputs=paths, single=single) as staging:
        with ThreadPoolExecutor(max_workers=1) as hasher:
            digests = [hasher.submit(_digests, item) for item in prepared.inputs]
            scratch = Scratch(staging.scratch("settled"), _header_room(prepared))
            with scratch:
                workers = options.jobs or workers_default()
                settled = run(prepared.plan, scratch, workers, progress)
                hashes = [digest.result() for digest in digests]
                report = _report(prepared, settled, hashes, command)
                check_strict(report.notes, options.strict)
                output_to = Output(
                    staging.path, output.name if single else None, _short(report), scratch
                )
                main = _write(prepared, settled, report, output_to)
        staging.commit(main, obsolete=obsolete)
    return report


def _digests(item: Input) -> dict[str, str]:
    return item.listing.sha256(*item.listing.used)


def _header_room(prepared: Prepared) -> int:
    """Bytes that a header of the result surely fits in: two entries per site and the metadata."""
    entries = sum(2 * (len(str(step.site)) + 200) for step in prepared.plan.steps)
    return -(-(entries + 4096 + 512 * len(prepared.inputs)) // 4096) * 4096


def _short(report: Report) -> dict[str, str]:
    """The report's short form, for the header of the main file."""
    inputs = [{k: i[k] for k in ("name", "sha256")} for i in report.inputs]
    short = {"version": __version__, "method": report.method, "inputs": inputs}
    return {METADATA_KEY: json.dumps(short, sort_keys=True)}


def _write(prepared: Prepared, settled: Sequence[Settled], report: Report, output: Output) -> str:
    results = {
        name: replace(_result(prepared, own), name=name)
        for name, own in by_adapter(settled).items()
    }
    modules = modules_of(prepared.base, next(iter(results.values())))
    options = WriteOptions(prepared.options.ranks, prepared.base, modules, prepared.options.version)
    main = write_bundle(Bundle(results), prepared.target, output, options)
    if output.single is None:
        companions.write(prepared.inputs, report, output)
    name = report_name(output.single) if output.single else FILE
    output.path(name).write_text(report.as_text(), encoding="utf-8")
    return main


def _result(prepared: Prepared, settled: Sequence[Settled]) -> Adapter:
    """The settled edits, lowered for the target, with the promises that still hold."""
    full = prepared.adapter.with_edits(item.edit for item in settled)
    lowered = as_storable(full, prepared.plan.stores)
    before = {
        name for item in prepared.inputs for edit in item.adapter.edits for name in _names(edit)
    }
    gone = before - {name for edit in lowered.edits for name in _names(edit)}
    kept = {cover for cover in lowered.covers if not any(is_suffix(cover, m) for m in gone)}
    labels, tokens = labels_of(settled), tokens_of(prepared.inputs)
    return replace(lowered, covers=frozenset(kept), labels=labels, tokens=tokens)


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
        options=_said(prepared),
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
            **said_of_heads(settled, prepared.heads),
        },
    )


def _said(prepared: Prepared) -> dict[str, Any]:
    options = prepared.options
    return {
        "weights": dict(prepared.weights.base),
        "rules": [asdict(rule) for rule in prepared.weights.rules],
        "budget": asdict(options.budget),
        "dtype": options.dtype,
        "heads": prepared.heads.as_json(),
        "form": options.form,
        "allow": sorted(options.allow),
    }
