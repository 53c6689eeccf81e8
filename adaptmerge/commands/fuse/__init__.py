"""Fusing adapters into the weights of a base model, shard by shard; what rounding did to each."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adaptmerge import __version__
from adaptmerge.adapters.graph import Kind, Note
from adaptmerge.commands.fuse import folder
from adaptmerge.commands.fuse.calibration import is_text, moments_of_text
from adaptmerge.commands.fuse.options import ALLOWABLE, SAME, FuseOptions
from adaptmerge.commands.fuse.pieces.executors import EXECUTORS, Job
from adaptmerge.commands.fuse.pieces.journal import Journal, Record
from adaptmerge.commands.fuse.pieces.write import Line, lines_of, settings_of, survey
from adaptmerge.commands.fuse.plan import FusePlan, plan_fusion
from adaptmerge.commands.fuse.report import (
    KEPT,
    AdapterLoss,
    FuseReport,
    and_error,
    is_fused,
    load_fuse_report,
    losses,
    noise,
    percent,
    site_of,
)
from adaptmerge.errors import AdaptmergeError, CannotMerge, OutputError, UsageError
from adaptmerge.files.disk import write_text
from adaptmerge.files.staging import Staging, refuse_existing
from adaptmerge.formats.inputs import SUFFIXES, InputSpec, Source, as_specs, paths_of
from adaptmerge.outputs.checksums import checksums
from adaptmerge.outputs.companions import CARD
from adaptmerge.outputs.described import described_input
from adaptmerge.outputs.report import FILE, check_strict
from adaptmerge.parallel import Progress, silent
from adaptmerge.rounding.error_feedback import NEAREST, STOCHASTIC
from adaptmerge.rounding.scales import SOLVE
from adaptmerge.tensors.dtypes import F32, SPELLINGS

__all__ = [
    "ALLOWABLE",
    "FuseOptions",
    "FusePlan",
    "FuseReport",
    "fuse",
    "is_fused",
    "load_fuse_report",
    "plan_fusion",
    "predict",
    "report_of",
]

DEFAULTS = FuseOptions()
SPARE = 64 << 20  # bytes of disk beside the tensors
JOURNAL = "finished"
# options that say nothing of the output, or that the report says otherwise
UNSAID = ("original", "calibration", "jobs", "force", "strict", "executor", "total")


def predict(plan: FusePlan) -> list[Line]:
    """For every matrix how it will be rounded, and what nearest rounding would keep; nothing is written."""
    from adaptmerge.rounding.matrix import Measured

    blank = Measured(0.0, 0.0, 0.0, (), (), ())
    found: list[Line] = []
    for shard in plan.shards:
        choices = survey(shard, settings_of(plan.options))
        found += lines_of(shard, choices, [blank] * len(choices))
    return found


def fuse(
    base: str | Path,
    sources: Source | Sequence[Source],
    output: str | Path,
    options: FuseOptions = DEFAULTS,
    progress: Progress = silent,
) -> FuseReport:
    """Fuses adapters into a base model's weights as a new folder, and returns the report.

    Raises AdaptmergeError; then there is no output. Interrupted work is taken up by the next run with the
    same inputs and options.
    """
    base, output, specs = str(base), Path(output), as_specs(sources)
    if output.suffix in SUFFIXES:
        raise UsageError(
            f"-o {output}: the output is a folder with the model in it, under the names of the base's files"
        )
    if not is_text(options.calibration):
        return _fuse(base, specs, output, options, progress)
    assert options.calibration is not None
    refuse_existing(output, force=options.force)  # before minutes of reading
    unread = plan_fusion(base, specs, replace(options, calibration=None, max_growth=0.0))
    with moments_of_text(
        options.calibration, unread.bases.values, unread.shards, progress
    ) as measured:
        return _fuse(base, specs, output, replace(options, calibration=measured), progress)


def _fuse(
    base: str,
    specs: Sequence[InputSpec],
    output: Path,
    options: FuseOptions,
    progress: Progress,
) -> FuseReport:
    plan = plan_fusion(base, specs, options)
    check_strict(plan.notes, options.strict)
    digests = {item.name: item.listing.sha256(*item.listing.used) for item in plan.inputs}
    key = plan.key(digests)[:16]
    paths = [*paths_of(plan.inputs), plan.bases.values.path]
    staging = Staging(output, force=options.force, inputs=paths, key=key)
    with staging:
        try:
            _check_disk(plan, staging)
            _check_prediction(plan)
            found, files = _write_shards(plan, staging, options, progress)
            report = report_of(plan, found, files, digests)
            _check_loss(report.adapters, options)
            check_strict(report.notes, options.strict)
        except OutputError:
            raise
        except AdaptmergeError:
            staging.discard()
            raise
        folder.write_folder(plan, staging)
        write_text(staging.path(CARD), folder.card(plan, report))
        written = {staging.path(name): digest for name, digest in files.items()}
        report = replace(report, files=checksums(staging, written, FILE))
        write_text(staging.path(FILE), report.as_text())
        staging.commit(folder.main_file(plan), obsolete=_obsolete(output, plan))
    return report


def _write_shards(
    plan: FusePlan, staging: Staging, options: FuseOptions, progress: Progress
) -> tuple[list[Line], dict[str, str]]:
    """Every shard written, or found finished; its lines in order, and the sha256 of each file."""
    journal = Journal(staging.scratch(f"{JOURNAL}/entries").parent)
    records: dict[str, Record] = {}
    jobs = []
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        progress(done := done + count, plan.nbytes)

    for shard in plan.shards:
        path = staging.path(shard.name)
        record = journal.finished(shard.name, path, len(shard.made))
        if record is None:
            beside = staging.scratch(f"{shard.name}.packed")
            jobs.append(Job(shard, path, beside, settings_of(options)))
        else:
            records[shard.name] = record
            advance(shard.nbytes)
    for job, record in EXECUTORS[options.executor](jobs, advance):
        journal.record(job.shard.name, record)
        records[job.shard.name] = record
    lines, files = list[Line](), dict[str, str]()
    for shard in plan.shards:
        record = records[shard.name]
        files[shard.name] = record.sha256
        lines += lines_of(shard, record.choices, record.measured)
    return lines, files


def _check_disk(plan: FusePlan, staging: Staging) -> None:
    """Raises OutputError when the output has no room on its disk."""
    at = staging.path(plan.shards[0].name).parent
    there = sum(path.stat().st_size for path in at.rglob("*") if path.is_file())
    free, needed = shutil.disk_usage(at).free + there, plan.nbytes + SPARE
    if free < needed:
        raise OutputError(
            f"needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB left: free some space or "
            "choose another -o",
            where=str(staging.given),
        )


def _check_prediction(plan: FusePlan) -> None:
    """Raises CannotMerge before anything is written where nearest rounding is asked for and loses much."""
    options = plan.options
    if options.rounding != NEAREST or "loss" in options.allow:
        return
    kept: dict[str, list[float]] = {}
    for line in predict(plan):
        for part, gain in zip(line.matrix.parts, line.choice.predicted, strict=False):
            if gain is not None:
                kept.setdefault(part.adapter, []).append(gain)
    means = {name: sum(gains) / len(gains) for name, gains in kept.items()}
    _check_loss({n: AdapterLoss(0.0, gain, None, 0.0) for n, gain in means.items()}, options)


def _check_loss(adapters: Mapping[str, AdapterLoss], options: FuseOptions) -> None:
    """Raises CannotMerge for adapters that rounding has taken away."""
    problems = [
        f"{name}: {_how_lost(loss, options)}"
        for name, loss in adapters.items()
        if _is_lost(loss, options.max_loss)
    ]
    if problems and "loss" not in options.allow:
        raise CannotMerge(problems)


def _how_lost(loss: AdapterLoss, options: FuseOptions) -> str:
    wider = _wider(options)
    if _drowns(loss, options.max_loss):
        return (
            "is too small for this base: the weights it is run with are rounded to 16 bits, and that alone "
            f"makes an error of {percent(loss.floor)} of what it adds: keep it an adapter, "
            f"{''.join(f'fuse into {way}, ' for way in wider)}or pass --allow loss"
        )
    left = percent(loss.gain, "an unknown part")
    ways = ["--rounding adaptive"] * (options.rounding in (NEAREST, STOCHASTIC))
    ways += ["--scales solve"] * (options.scales != SOLVE and options.quant == SAME)
    use = f"use {', '.join([*ways, *wider])}, or pass" if ways or wider else "pass"
    return (
        f"rounding leaves {left} of what it adds{and_error(loss.sub)}: {use} --allow loss to keep what is "
        "left"
    )


def _wider(options: FuseOptions) -> list[str]:
    """How to ask for more bits than these options do, if there are more."""
    said = options.dtype or options.quant
    if said in SPELLINGS and SPELLINGS[said] == F32:
        return []
    return [f"wider weights ({'--dtype fp32' if options.dtype else '--dtype, --quant'})"]


def _is_lost(loss: AdapterLoss, most: float) -> bool:
    small = loss.gain is not None and loss.gain < KEPT
    return small or (loss.sub is not None and loss.sub > most) or _drowns(loss, most)


def _drowns(loss: AdapterLoss, most: float) -> bool:
    return loss.floor is not None and loss.floor > most


def _obsolete(output: Path, plan: FusePlan) -> list[str]:
    """Files of weights that an output before had: beside the new ones they would be read instead."""
    if not output.is_dir():
        return []
    kept = {shard.name for shard in plan.shards}
    return [
        p.name for p in output.iterdir() if p.name.endswith(folder.WEIGHTS) and p.name not in kept
    ]


def report_of(
    plan: FusePlan,
    lines: Sequence[Line],
    files: Mapping[str, str],
    digests: Mapping[str, Mapping[str, str]],
) -> FuseReport:
    """The report of a fusion. files: the sha256 of what was written; digests: of what each input is of."""
    adapters = losses(lines, plan.running)
    licences, differ = folder.licences(plan)
    notes = [*plan.notes, *differ, *folder.left_out(plan), *_lost_notes(adapters, plan.options)]
    config = folder.changed_config(plan)
    notes += [*_backward(plan, lines), *folder.unnamed_labels(plan, config)]
    return FuseReport(
        options=_said(plan),
        inputs=[described_input(item, digests[item.name]) for item in plan.inputs],
        base=_base_said(plan, licences),
        versions={"adaptmerge": __version__, "torch": version("torch")},
        adapters=adapters,
        noise=noise([line.measured for line in lines]),
        sites=[site_of(line) for line in lines],
        files=dict(files),
        changed=sorted(plan.targets.tensors),
        config=config,
        notes=sorted(set(notes)),
        method=plan.options.method,
    )


def _said(plan: FusePlan) -> dict[str, Any]:
    """The options of a report: all that decide what is written, and the weights that came of them."""
    options = asdict(replace(plan.options, jobs=None, force=False, strict=False))
    options |= {
        "weights": dict(plan.weights.base),
        "rules": [asdict(rule) for rule in plan.weights.rules],
        "heads": plan.opened.heads.as_json(),
        "allow": sorted(plan.options.allow),
        "plain": sorted(plan.plain),
    }
    grown = () if options["max_growth"] else ("max_growth", "plain")
    for unsaid in (*UNSAID, *grown):
        del options[unsaid]
    return options


def _base_said(plan: FusePlan, licences: Mapping[str, str]) -> dict[str, Any]:
    """What a report says of the base."""
    bases, moments = plan.bases, plan.moments
    base: dict[str, Any] = {
        "name": bases.values.path.name,
        "fingerprint": bases.on_disk.fingerprint,
        "licences": licences,
        "trained_on": plan.trained_on,
        "quantised": plan.view.scheme,
        "layers": list(map(list, plan.inputs[0].adapter.base.replication)),
    }
    if bases.original is not None:
        base["original"] = bases.original.fingerprint
    if moments is not None and moments.file is not None:
        base["calibration"] = moments.as_json()
    return base


def _lost_notes(adapters: Mapping[str, AdapterLoss], options: FuseOptions) -> list[Note]:
    found = {n: loss for n, loss in adapters.items() if _is_lost(loss, options.max_loss)}
    said = {name: _how_lost(loss, options) for name, loss in found.items()}
    return [
        Note(Kind.APPROXIMATED, f"{what.rpartition(': ')[0]}, as allowed", input=name)
        for name, what in said.items()
    ]


def _backward(plan: FusePlan, lines: Sequence[Line]) -> list[Note]:
    """What cannot be got back where an adapter is taken out of weights that were rounded with it."""
    out = [name for name, weight in plan.weights.base.items() if weight < 0]
    if not out:
        return []
    lost = sum((site.grid * site.weight_norm) ** 2 for site in map(site_of, lines)) ** 0.5
    size = sum(loss.norm**2 for name, loss in losses(lines).items() if name in out) ** 0.5
    share = f", {100 * lost / size:.3g} % of what is taken out" if size else ""
    what = (
        f"taken out of weights that were rounded when it was fused: what that rounding changed, about "
        f"{lost:.3g} in all{share}, cannot be got back"
    )
    return [Note(Kind.APPROXIMATED, what, input=", ".join(out))]
