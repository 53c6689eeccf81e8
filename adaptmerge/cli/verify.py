"""adaptmerge verify: does an output compute what was promised?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adaptmerge.cli.options import base_option, device_option, json_option, named_paths
from adaptmerge.cli.terminal import filled, print_json, report_error, steps, table
from adaptmerge.errors import AdaptmergeError, OutputError

if TYPE_CHECKING:
    from adaptmerge.commands.verify import Questions, Verdict

EPILOG = """\b
Examples:
  adaptmerge verify merged
  adaptmerge verify merged --base ./llama --junit verify.xml
  adaptmerge verify merged --input sql=/elsewhere/sql
  adaptmerge verify merged --base ./llama --layerwise
  adaptmerge verify fused --base ./llama
  adaptmerge verify ./merged-by-peft --base ./llama --adapter ./adapter
"""


@click.command(epilog=EPILOG, short_help="Check that an output computes what was promised.")
@click.argument("output", type=click.Path(path_type=Path))
@base_option
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=PATH",
    help="Where an input lies now; repeatable.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ADAPTER[:WEIGHT]",
    help="What should be fused into OUTPUT, a model without a report; repeatable.",
)
@click.option("--trained-on", metavar="WHAT", help="With --adapter: what the base was in training.")
@click.option("--original", metavar="DIR", help="What a smoothed base was quantised from.")
@device_option
@click.option("--layerwise", is_flag=True, help="Stream the base; for models that do not fit.")
@click.option("--junit", type=click.Path(path_type=Path), help="Also write a JUnit XML file.")
@json_option
def verify(
    output: Path,
    base: str | None,
    inputs: tuple[str, ...],
    adapters: tuple[str, ...],
    trained_on: str | None,
    original: str | None,
    device: str,
    layerwise: bool,
    junit: Path | None,
    as_json: bool,
) -> None:
    """Check OUTPUT against its inputs, its report and, with --base, the real model's outputs.

    Exit code 3 unless every check that was made passed.
    """
    from adaptmerge.commands import verify as library
    from adaptmerge.commands.fuse import FuseOptions
    from adaptmerge.formats.inputs import parse_input

    specs = tuple(map(parse_input, adapters))
    alone = len(specs) > 1 and all(spec.weight is None for spec in specs)
    questions = library.Questions(
        base,
        named_paths(inputs, "--input"),
        device,
        layerwise,
        specs,
        FuseOptions(trained_on=trained_on, original=original, total=alone),
    )
    if junit:
        _check_junit(junit)
    verdict = _judged(output, questions, junit)
    if as_json:
        print_json(verdict.as_json())
    else:
        _show(verdict)
    written = junit is None or _written(junit, verdict)
    click.get_current_context().exit(3 if verdict.status != library.PASS else int(not written))


def _judged(output: Path, questions: Questions, junit: Path | None) -> Verdict:
    """The verdict; of an output that cannot be examined one failure is in the JUnit file."""
    from adaptmerge.commands import verify as library

    try:
        with steps() as tell:
            return library.verify(output, questions, tell)
    except AdaptmergeError as problem:
        failed = library.Check("verify", library.FAIL, "; ".join(problem.problems))
        if junit:
            _written(junit, library.Verdict(output.name, [failed]))
        raise


def _check_junit(path: Path) -> None:
    """Raises OutputError, before any work, where the JUnit file cannot be written."""
    if path.is_dir():
        raise OutputError("is a folder: name a file as --junit", where=str(path))
    if not path.absolute().parent.is_dir():
        raise OutputError("its folder does not exist: choose another --junit", where=str(path))
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise OutputError("may not be written: choose another --junit", where=str(path))


def _written(path: Path, verdict: Verdict) -> bool:
    """Whether the JUnit file could be written; where not that is said, and the verdict stands."""
    try:
        path.write_text(verdict.as_junit(), encoding="utf-8")
    except OSError as problem:
        lost = OutputError(f"cannot be written: {problem.strerror}", where=str(path))
        report_error(lost, as_json=False)
        return False
    return True


def _show(verdict: Verdict) -> None:
    table(("check", "status", "finding"), [(c.name, c.status, c.detail) for c in verdict.checks])
    for check in verdict.checks:
        if "relative_error" in check.numbers:
            n = check.numbers
            click.echo(
                f"{check.name}: effect {n['effect']:.1e} of the outputs, max error "
                f"{n['max_error']:.1e},\n  KL {n['kl']:.1e}, top-1 {100 * n['top1_agreement']:.1f} %"
            )
    if verdict.trusted:
        click.echo(filled(f"trusted without proof: {verdict.trusted}"))
    click.echo(f"{verdict.subject}: {verdict.status}")
