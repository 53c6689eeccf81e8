"""Does an output compute what its report promises? Three oracles, cheapest first.

1. weights: each site's stored delta against the inputs' own tensors, dense, in float64.
2. forward: outputs of the real base model with the result, against base plus the promised edits.
3. native: inputs and output loaded by their format's own library, where it is installed.

1 and 2 prove the merge, given our readers; only 3 proves the spelling.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptmerge.adapters.experts import layout_of
from adaptmerge.adapters.families.alora import invoked_by
from adaptmerge.adapters.graph import Adapter, Edit, Kind
from adaptmerge.adapters.stored_edits import owner_of, trained_tokens
from adaptmerge.bases.base import Base
from adaptmerge.bases.open import MODEL_CONFIG
from adaptmerge.commands.fuse import FuseOptions, FuseReport, is_fused, load_fuse_report
from adaptmerge.commands.verify.audit import malformed
from adaptmerge.commands.verify.base_names import with_doubts
from adaptmerge.commands.verify.checks import FAIL, PASS, SKIPPED, UNDECIDABLE, Check, Verdict
from adaptmerge.commands.verify.extracted import is_extraction, tuned_input
from adaptmerge.commands.verify.figures import check_figures
from adaptmerge.commands.verify.files import check_files
from adaptmerge.commands.verify.promise import Promised, promises
from adaptmerge.commands.verify.stated import Stated
from adaptmerge.commands.verify.stored import check_labels
from adaptmerge.commands.verify.weights import UNPROVEN as UNJUDGED
from adaptmerge.commands.verify.weights import check_weights
from adaptmerge.commands.verify.written import check_written
from adaptmerge.errors import CannotMerge, InputError, UsageError, VerificationFailed, did_you_mean
from adaptmerge.formats.in_memory import ORIGIN
from adaptmerge.formats.inputs import Input, InputSpec, Source, as_specs, open_input
from adaptmerge.merging.align import align, in_one_layout
from adaptmerge.outputs.report import Report, load_report, report_path
from adaptmerge.parallel import Tell, untold
from adaptmerge.runtime.inputs import CannotRun
from adaptmerge.runtime.models import device_named
from adaptmerge.schemes.view import open_values
from adaptmerge.tensors.dtypes import BY_NAME

if TYPE_CHECKING:
    from adaptmerge.commands.verify.forward import Bench

__all__ = ["FAIL", "PASS", "SKIPPED", "UNDECIDABLE", "Check", "Questions", "Verdict", "verify"]

TRUSTED = (
    "adaptmerge's own readers (pass --base and install the format's library to prove them too)"
)
UNPROVEN = "adaptmerge's own readers, where no library of the format's own was asked"


@dataclass(frozen=True, slots=True)
class Questions:
    """How to verify: the base to run, where inputs lie if not where the report says, and the device.

    adapters: what should have been fused, for a model that has no report of its own; with the dtype it was
    written in and what the base was trained as (`fuse`, which also says where the base's original lies).
    """

    base: str | Path | None = None
    inputs: Mapping[str, str | Path | InputSpec] = field(default_factory=dict)
    device: str = "auto"
    layerwise: bool = False
    adapters: tuple[Source, ...] = ()
    fuse: FuseOptions = FuseOptions()


def verify(output: str | Path, questions: Questions = Questions(), tell: Tell = untold) -> Verdict:
    """The verdict on an output with a report; `tell` hears what is looked at.

    Raises InputError when it cannot be examined at all.
    """
    output = Path(output)
    if not output.exists():
        raise InputError(
            "does not exist: give the folder or file that was written", where=str(output)
        )
    if questions.adapters or is_fused(output):
        return _of_fused(output, questions, tell)
    if (output / MODEL_CONFIG).is_file() and not report_path(output).is_file():
        raise InputError(
            "is a model without a report: say what should be in it, with --adapter ADAPTER --base DIR",
            where=str(output),
        )
    report = load_report(output)
    problems = malformed(report)
    if problems:
        raise InputError(f"its report is damaged: {problems[0]}", where=str(output))
    _check_questions(report, questions)
    base = open_values(questions.base) if questions.base else None
    find = _tuned if is_extraction(report) else _inputs
    inputs, checks = find(output, report, questions, base)
    checks.append(check_files(output, report.files))
    results = _results(output, report, base)
    for name, result in results.items():
        found = [*_reading(result.adapter), *_base_checks(report, result.adapter, base)]
        checks += _of_adapter(name, found)
    if inputs is None:
        return Verdict(output.name, checks, TRUSTED if base is None else UNPROVEN)
    merge = _Merge(output, report, questions, base, inputs, results, tell)
    more, trusted = _against_promises(merge, fits=not _failed(checks, "base"))
    return Verdict(output.name, [*checks, *more], trusted)


@dataclass(frozen=True)
class _Merge:
    """A merge to verify: what its report says, its inputs and the adapters that came out, by name."""

    output: Path
    report: Report
    questions: Questions
    base: Base | None
    inputs: Sequence[Input]
    results: Mapping[str, Input]
    tell: Tell

    @property
    def edits(self) -> list[Edit]:
        """All that came out."""
        return [edit for result in self.results.values() for edit in result.adapter.edits]


def _against_promises(merge: _Merge, *, fits: bool) -> tuple[list[Check], str]:
    """The checks of weights and outputs, and what has to be trusted. fits: whether the base does."""
    try:
        promised = _promises(merge)
    except VerificationFailed as problem:
        return [Check("promise", FAIL, "; ".join(problem.problems))], TRUSTED
    stated = _stated(merge, promised)
    checks = [check_figures(stated), check_written(stated)]
    references = {}
    for name, result in merge.results.items():
        own = [item for item in promised if item.line.adapter in ("", name)]
        check, expected = check_weights(merge.report, own, result.adapter, merge.tell)
        labels = {owner_of(item.edit): item.labels for item in own if item.labels is not None}
        checks += _of_adapter(name, [check, *check_labels(labels, result.adapter)])
        references[name] = result.adapter.with_edits(expected)
    if merge.base is None:
        skipped = Check("forward", SKIPPED, "no base model was given: pass --base DIR")
        return [*checks, skipped], TRUSTED
    if not fits:
        return checks, UNPROVEN
    more, trusted = _model_checks(merge, merge.base, references)
    blind = sum(check.numbers.get(UNJUDGED, 0) for check in checks)
    return [*checks, *(_with_doubt(check, blind) for check in more)], trusted


def _stated(merge: _Merge, promised: Sequence[Promised]) -> Stated:
    """The report with what it is about."""
    base = merge.questions.base
    source = None if base is None else str(base)
    return Stated(
        merge.report, merge.output, promised, merge.inputs, merge.results, merge.base, source
    )


def _promises(merge: _Merge) -> list[Promised]:
    """What the report promises, with experts laid out as in the output."""
    named = {item.name: item.adapter for item in merge.inputs}
    layouts = {layout_of(edit.site) for edit in merge.edits} - {None}
    layout = layouts.pop() if len(layouts) == 1 else None
    return promises(merge.report, in_one_layout(named, merge.base, layout), merge.base)


def _of_fused(output: Path, questions: Questions, tell: Tell) -> Verdict:
    """The verdict on a model that adapters were fused into."""
    from adaptmerge.commands.verify.fused.model import options_in, verify_fused

    how: Any = {"device": questions.device, "layerwise": questions.layerwise, "tell": tell}
    if questions.adapters:
        options = replace(questions.fuse, allow=questions.fuse.allow | {"loss"})
        specs = as_specs(questions.adapters)
        return verify_fused(output, questions.base, specs, options, None, **how)
    report = load_fuse_report(output)
    _check_questions(report, questions)
    base = open_values(questions.base) if questions.base else None
    inputs, checks = _inputs(output, report, questions, base)
    if inputs is None:
        return Verdict(output.name, checks, TRUSTED if base is None else UNPROVEN)
    weights = report.options["weights"]
    specs = [replace(item.spec, weight=weights[item.name]) for item in inputs]
    options = options_in(report, questions.fuse.original)
    found = verify_fused(output, questions.base, specs, options, report, **how)
    return replace(found, checks=[*checks, *found.checks])


def _with_doubt(check: Check, blind: int) -> Check:
    """A word on sites whose nearest form is its own reference in the forward checks."""
    if not blind or not check.name.startswith("forward"):
        return check
    what = f"{check.detail}; {blind} sites of a nearest form are judged by their weights alone"
    return replace(check, detail=what)


def _results(output: Path, report: Report, base: Base | None) -> dict[str, Input]:
    """The adapters of the output by name; "" for the only one."""
    names = report.output.get("adapters") or ()
    if not names:
        return {"": open_input(InputSpec(str(output), "output"), base)}
    specs = {
        name: InputSpec(str(output / name), name)
        if (output / name).is_dir()
        else InputSpec(str(output), name, adapter=name)
        for name in names
    }
    return {name: open_input(spec, base) for name, spec in specs.items()}


def _of_adapter(name: str, checks: Sequence[Check]) -> list[Check]:
    """The checks, called after the adapter where there are several."""
    return [
        replace(check, name=f"{check.name} of {name}" if name else check.name) for check in checks
    ]


def _check_questions(report: Report | FuseReport, questions: Questions) -> None:
    names = [item["name"] for item in report.inputs]
    unknown = [name for name in questions.inputs if name not in names]
    if unknown:
        raise UsageError(f"--input {unknown[0]}: {did_you_mean(unknown[0], names)}")
    if re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", questions.device) is None:
        raise UsageError(f"--device {questions.device}: expected auto, cpu, cuda, cuda:N or mps")


def _reading(output: Adapter) -> list[Check]:
    """An output says all that it is: what must be assumed to read it is read otherwise elsewhere."""
    said = [str(note) for note in output.notes if note.kind in Kind.FATAL_UNDER_STRICT]
    return [Check("reading", FAIL, "; ".join(said[:3]), {"notes": said})] if said else []


def _failed(checks: Sequence[Check], name: str) -> bool:
    return any(c.name.partition(" ")[0] == name and c.status == FAIL for c in checks)


def _inputs(
    output: Path, report: Report | FuseReport, questions: Questions, base: Base | None
) -> tuple[list[Input] | None, list[Check]]:
    """The report's inputs, found and unchanged; None with a failed check when they are not."""
    opened, problems = [], []
    for described in report.inputs:
        found = _find(output, described, questions)
        if found is None:
            problems.append(_not_found(described))
            continue
        options: Any = {key: described.get(key) for key in ("alpha", "task", "init", "adapter")}
        item = open_input(replace(found, name=described["name"], **options), base)
        opened.append(item)
        problems += _changed(item, described["sha256"])
    if problems:
        return None, [Check("inputs", FAIL, "; ".join(problems), {"problems": problems})]
    said = "the input is the file" if len(opened) == 1 else f"{len(opened)} inputs are the files"
    return opened, [Check("inputs", PASS, f"{said} that went into the merge")]


def _tuned(
    output: Path, report: Report, questions: Questions, base: Base | None
) -> tuple[list[Input] | None, list[Check]]:
    """The tuned model of an extraction; None with a failed check when it is not there."""
    (described,) = report.inputs
    found = _find(output, described, questions)
    if found is None:
        detail = f"the tuned model is not at {described['source']}: say --input tuned=PATH"
        return None, [Check("inputs", FAIL, detail)]
    item, checks = tuned_input(output, report, found.source, base)
    return None if item is None else [item], checks


def _not_found(described: Mapping[str, Any]) -> str:
    name, source = described["name"], str(described["source"])
    if source.startswith(ORIGIN):
        return f"input {name} was in memory when it was merged: give it again, in Questions(inputs=...)"
    return f"input {name} is not at {source}: say --input {name}=PATH"


def _find(output: Path, described: Mapping[str, Any], questions: Questions) -> InputSpec | None:
    """The input: as told, as written relative to here, beside the output or the base, or by its hub id.

    Of an absolute path the report has the name alone; what is found must have the sha256 of the input.
    """
    told = questions.inputs.get(described["name"])
    if told is not None:
        return told if isinstance(told, InputSpec) else InputSpec(str(told))
    if str(described["source"]).startswith(ORIGIN):
        return None
    beside = [] if questions.base is None else [Path(questions.base).resolve().parent]
    found = _written_place(described, [output.resolve().parent, *beside])
    return None if found is None else InputSpec(found)


def _written_place(described: Mapping[str, Any], beside: Sequence[Path]) -> str | None:
    """Where the report says that an input lies, seen from here or from some folders, if it does."""
    source = str(described["source"])
    places = [Path(source), *(folder / name for folder in beside for name in _names_of(source))]
    found = next((str(place) for place in places if place.exists()), None)
    return found or (_pinned(source, described["revision"]) if described["revision"] else None)


def _names_of(source: str) -> tuple[str, str]:
    """What an input may be called in another folder."""
    return source, Path(source).name


def _pinned(source: str, revision: str) -> str:
    """A hub id at the very revision that was merged."""
    repository, slashes, subfolder = source.partition("//")
    return f"{repository.partition('@')[0]}@{revision}{slashes}{subfolder}"


def _changed(item: Input, recorded: Mapping[str, str]) -> list[str]:
    unknown = sorted(set(item.listing.used) - set(recorded))
    if unknown:
        return [f"input {item.name}: the report has no sha256 of {unknown[0]}"]
    missing = [name for name in recorded if not item.listing.has(name)]
    if missing:
        return [f"input {item.name} has no file {missing[0]}"]
    now = item.listing.sha256(*recorded)
    return [
        f"input {item.name}: {name} has changed since the merge (sha256 {now[name][:12]}…, merged was "
        f"{digest[:12]}…)"
        for name, digest in recorded.items()
        if now[name] != digest
    ]


def _base_checks(report: Report, output: Adapter, base: Base | None) -> list[Check]:
    """Whether the base is the one the adapter is for: by fingerprint, modules and shapes."""
    if base is None:
        return []
    recorded = (report.base or {}).get("fingerprint")
    if recorded and recorded != base.fingerprint:
        detail = f"{base.path.name} is not the base this was merged for (its fingerprint differs)"
        return [Check("base", FAIL, detail)]
    try:
        align({"output": output}, base, frozenset())
    except CannotMerge as problem:
        return [Check("base", FAIL, problem.problems[0], {"problems": list(problem.problems)})]
    how = "fingerprint, modules and shapes" if recorded else "modules and shapes"
    fits = Check("base", PASS, f"{base.path.name} fits by {how}")
    return [with_doubts(fits, {"the output": output}, base)]


def _model_checks(
    merge: _Merge, base: Base, expected: Mapping[str, Adapter]
) -> tuple[list[Check], str]:
    """The checks of outputs of the real model, and what has to be trusted."""
    try:
        return _run(merge, _bench(merge, base), expected)
    except CannotRun as problem:
        return [Check("forward", UNDECIDABLE, "; ".join(problem.problems))], UNPROVEN
    except VerificationFailed as problem:
        return [Check("forward", FAIL, "; ".join(problem.problems))], UNPROVEN


def _run(merge: _Merge, bench: Bench, expected: Mapping[str, Adapter]) -> tuple[list[Check], str]:
    from adaptmerge.commands.verify import forward, native

    dtype = BY_NAME[merge.report.output["dtype"].upper()]
    checks: list[Check] = []
    asked = False
    for name, result in merge.results.items():
        ours = forward.check_forward(bench, expected[name], result.adapter, dtype)
        found = [ours.check]
        asked = native.installed(result.format) and not bench.layerwise
        if asked:
            found.append(native.check_native_output(bench, result, ours, dtype))
        checks += _of_adapter(name, found)
    if not asked:
        return checks, UNPROVEN
    readings = native.check_native_inputs(replace(bench, device="cpu"), merge.inputs)
    proved = [c for c in readings if c.status == PASS]
    trusted = "" if len(proved) == len(merge.inputs) else UNPROVEN
    return [*checks, *readings], trusted


def _bench(merge: _Merge, base: Base) -> Bench:
    """The base to run, on inputs that have the tokens that were trained."""
    from adaptmerge.commands.verify import forward

    device = device_named(merge.questions.device)
    invoking = [token for edit in merge.edits[:1] for token in invoked_by(edit)]
    trained = sorted({token for edit in merge.edits for token in trained_tokens(edit)})
    # weights that stand for quantised ones are streamed: live quantised layers would be another code path
    layerwise = merge.questions.layerwise or base.on_disk is not None
    return forward.Bench.of(base, device, layerwise, invoking + trained, merge.tell)
