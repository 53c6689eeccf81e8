"""The whole way: open inputs, align, plan, run, lower, write, commit. `convert` is a merge of one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from adaptmerge import __version__, carry, outputs
from adaptmerge.align import align
from adaptmerge.base import Base
from adaptmerge.errors import AdaptmergeError, CannotStore, UsageError
from adaptmerge.experts import LAYOUTS
from adaptmerge.files import dtypes
from adaptmerge.files.refs import forget
from adaptmerge.files.scratch import Scratch
from adaptmerge.files.staging import Staging
from adaptmerge.fit import Budget
from adaptmerge.graph import Adapter, BaseReference, Bundle, Edit, Kind, Note
from adaptmerge.heads import Given, Policies, check_policies, policies
from adaptmerge.inputs import SUFFIXES, Input, InputSpec, in_natural_order, open_inputs
from adaptmerge.lower import lower
from adaptmerge.names import is_suffix
from adaptmerge.plan import Plan, make_plan
from adaptmerge.quantised import open_values
from adaptmerge.registry import Format, Output, WriteOptions, format_named, formats, method_named
from adaptmerge.report import (
    FILE,
    METADATA_KEY,
    Report,
    SiteLine,
    Totals,
    report_name,
    sanity_notes,
    site_lines,
    totals,
)
from adaptmerge.request import Request
from adaptmerge.run import Progress, Settled, run, workers_default
from adaptmerge.weights import SiteRule, Weights, base_weights, is_checkpoint_schedule

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


def silent(done: int, total: int) -> None:
    """A progress callback that says nothing."""


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
    outputs.check_several(plan, target, single=is_file_name(output))
    adapter = _described(adapters, base)
    said = (*_weight_notes(options, given, weights), *notes, *plan.notes)
    said += tuple(outputs.label_notes(plan, target))
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


def check_version(version: str | None, target: Format) -> None:
    """Raises UsageError for a version of a library that the target cannot be written for."""
    if version is None:
        return
    if not target.versions:
        raise UsageError(f"--peft-version {version}: is not for {target.name}: leave it out")
    if not any(version == known or version.startswith(f"{known}.") for known in target.versions):
        oldest, newest = target.versions[0], target.versions[-1]
        raise UsageError(f"--peft-version {version}: expected a release from {oldest} to {newest}")


def check_name(output: Path, target: Format) -> None:
    """Raises UsageError for a file name that promises another kind of file than will be written."""
    suffixes = target.suffixes or (".safetensors",)
    if (is_file_name(output) or output.suffix in SUFFIXES) and output.suffix not in suffixes:
        wanted = " or ".join(suffixes)
        raise UsageError(
            f"-o {output}: {target.name} is written as a folder or a {wanted} file, not as "
            f"{output.suffix}: choose another -o or --to"
        )


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


def _described(adapters: Mapping[str, Adapter], base: Base | None) -> Adapter:
    """The result's base, hints and promises: what the inputs agree on."""
    all_of = list(adapters.values())
    names = {a.base.name for a in all_of if a.base.name}
    revisions = {a.base.revision for a in all_of if a.base.revision}
    reference = BaseReference(
        name=all_of[0].base.name or next(iter(sorted(names)), None),
        revision=next(iter(revisions)) if len(revisions) == 1 else None,
        architecture=base.architecture if base else None,
        fingerprint=base.fingerprint if base else None,
        replication=all_of[0].base.replication,
    )
    covers = frozenset().union(*(a.covers for a in all_of))
    return Adapter(
        "default", (), reference, hints=_agreed([a.hints for a in all_of]), covers=covers
    )


def _agreed(hints: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Entries that all inputs spell alike, two levels deep (format, then field)."""
    first, *others = hints
    result: dict[str, Any] = {}
    for key, value in first.items():
        if not all(key in other for other in others):
            continue
        if isinstance(value, Mapping):
            inner = [other[key] for other in others]
            result[key] = {
                k: v for k, v in value.items() if all(k in o and o[k] == v for o in inner)
            }
        elif all(other[key] == value for other in others):
            result[key] = value
    return result


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
    obsolete |= outputs.left_by(output, obsolete)
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


def is_file_name(output: Path) -> bool:
    """Whether an output path names one file: its suffix is one that a format writes."""
    return any(output.suffix in f.suffixes for f in formats().values() if f.write and output.suffix)


def check_strict(notes: Sequence[Note], strict: bool) -> None:
    """Raises AdaptmergeError for Notes that are fatal, where that was asked."""
    fatal = [str(note) for note in notes if note.kind in Kind.FATAL_UNDER_STRICT]
    if strict and fatal:
        raise AdaptmergeError(fatal, where="--strict")


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
        for name, own in outputs.by_adapter(settled).items()
    }
    modules = modules_of(prepared.base, next(iter(results.values())))
    options = WriteOptions(prepared.options.ranks, prepared.base, modules, prepared.options.version)
    main = outputs.write(Bundle(results), prepared.target, output, options)
    if output.single is None:
        carry.write(prepared.inputs, report, output)
    name = report_name(output.single) if output.single else FILE
    output.path(name).write_text(report.as_text(), encoding="utf-8")
    return main


def _result(prepared: Prepared, settled: Sequence[Settled]) -> Adapter:
    """The settled edits, lowered for the target, with the promises that still hold."""
    full = prepared.adapter.with_edits(item.edit for item in settled)
    lowered = lower(full, prepared.plan.stores)
    before = {
        name for item in prepared.inputs for edit in item.adapter.edits for name in _names(edit)
    }
    gone = before - {name for edit in lowered.edits for name in _names(edit)}
    kept = {cover for cover in lowered.covers if not any(is_suffix(cover, m) for m in gone)}
    labels, tokens = outputs.labels_of(settled), outputs.tokens_of(prepared.inputs)
    return replace(lowered, covers=frozenset(kept), labels=labels, tokens=tokens)


def _names(edit: Edit) -> tuple[str, str]:
    """What a promise may call the place of an edit by: its module or its parameter."""
    return edit.site.module, f"{edit.site.module}.{edit.site.param}"


def modules_of(base: Base | None, adapter: Adapter) -> frozenset[str] | None:
    """All modules of the base, spelled as the adapter spells those it has."""
    if base is None or not base.tensors:
        return None
    spelled = {base.locate(edit.site.module): edit.site.module for edit in adapter.edits}
    return frozenset(spelled.get(module, module) for module in base.modules)


def _report(
    prepared: Prepared,
    settled: Sequence[Settled],
    hashes: Sequence[Mapping[str, str]],
    command: str,
) -> Report:
    plan, options = prepared.plan, prepared.options
    found = totals(settled, plan.inputs)
    lines = site_lines(settled)
    notes = [*prepared.notes, *sanity_notes(found), *carry.notes(prepared.inputs)]
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
            **outputs.said(settled, prepared.heads),
        },
    )


def missed_budget(budget: Budget, found: Totals, lines: Sequence[SiteLine]) -> list[Note]:
    """A word where a rank cap leaves a larger error than the other budgets allow."""
    if not budget.spectral or budget.rank is None:
        return []
    lost = found.truncation
    if budget.per_site:
        lost = max((line.truncation / line.norm for line in lines if line.norm), default=0.0)
    allowed = math.sqrt(budget.allowed_loss)
    if lost <= allowed * (1 + 1e-6):
        return []
    what = (
        f"--rank {budget.rank} leaves a truncation error of {lost:.3g}, asked for was {allowed:.3g}"
    )
    return [Note(Kind.APPROXIMATED, what)]


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


def described_input(item: Input, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What a report says of an input."""
    return {
        "name": item.name,
        "source": portable(item.spec.source),
        "format": item.format.name,
        "revision": item.revision,
        "alpha": item.spec.alpha,
        "task": item.spec.task,
        "init": item.spec.init,
        "adapter": item.spec.adapter,
        "base": asdict(item.adapter.base),
        "sha256": dict(hashes),
    }


def portable(source: str) -> str:
    """The source as written, without the folders of an absolute path."""
    return Path(source).name if Path(source).is_absolute() else source


def version_of(package: str) -> str:
    """The installed version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return __version__ if package == "adaptmerge" else "unknown"
