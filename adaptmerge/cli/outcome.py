"""Showing what a merge plans and what it made: shared by combine, run and convert."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adaptmerge.cli.terminal import filled, print_json, progress, show_notes, table

if TYPE_CHECKING:
    from adaptmerge.commands.combine import Options
    from adaptmerge.formats.inputs import InputSpec
    from adaptmerge.outputs.report import Report

# What stands in the tables of merged adapters and of fused models, in words.
ACTIONS = {
    "pass": "kept as it was stored",
    "fit": "computed as one low-rank pair",
    "whole": "computed as one full matrix",
    "value": "stored values, summed",
    "concat": "the rows of the inputs, one below the other",
}
CAP = "largest rank allowed there"
ARRIVES = "how much of the adapter's change is in the weights"
ERROR = "size of the rounding error, relative to that change, in the inputs that the adapter reads"
FLOOR = "the same from running the model in 16 bits, whatever is stored"
KEEPS = "how much of the change rounding to the nearest value leaves"


def legend(**words: str) -> str:
    """What the words of a table mean, in one line or more."""
    named = (f"{word.replace('_', ' ')}: {meaning}" for word, meaning in words.items())
    return filled("; ".join(named))


def execute(
    specs: Sequence[InputSpec],
    output: Path,
    options: Options,
    *,
    command: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Plans, or merges and shows the outcome."""
    from adaptmerge.commands import combine

    if dry_run:
        _show_plan(combine.prepare(specs, output, options), as_json)
        return
    with progress("merging sites") as advance:
        report = combine.combine(specs, output, options, advance, command)
    if as_json:
        print_json({"path": str(output), **report.as_json()})
        return
    show_notes(report.notes)
    _show_inputs(report)
    click.echo(headline(output, report))
    show_worst(report)


def _show_plan(prepared: object, as_json: bool) -> None:
    from adaptmerge.commands.combine import Prepared
    from adaptmerge.merging.plan import plan_rows

    assert isinstance(prepared, Prepared)
    rows = plan_rows(prepared.plan)
    if as_json:
        notes = [str(note) for note in prepared.notes]
        print_json({"plan": rows, "notes": notes, "format": prepared.target.name})
        return
    show_notes(prepared.notes)
    table(
        ("site", "action", "weights", "ranks", "cap"),
        [
            (r["site"], r["action"], _pairs(r["weights"]), _pairs(r["ranks"]), r["rank_cap"])
            for r in rows
        ],
        right=(4,),
    )
    used = {row["action"] for row in rows}
    click.echo(legend(**{word: ACTIONS[word] for word in ACTIONS if word in used}, cap=CAP))
    count, method = len(rows), prepared.plan.method.name
    click.echo(f"{count} sites by {method} as {prepared.target.name}; nothing was written")


def _pairs(values: object) -> str:
    assert isinstance(values, dict)
    return " ".join(f"{value:.4g}" for value in values.values())


def _show_inputs(report: Report) -> None:
    weights = report.options["weights"]
    norms = report.totals.input_norms
    table(
        ("input", "format", "weight", "norm"),
        [
            (i["name"], i["format"], weights[i["name"]], norms[i["name"]] or None)
            for i in report.inputs
        ],
        right=(2, 3),
    )
    if sum(map(bool, norms.values())) > 1 and len(norms) <= 4:
        used = [i["name"] for i in report.inputs if norms[i["name"]]]
        cosines = report.totals.cosines
        pairs = [f"{a}/{b} {cosines[f'{a} {b}']:+.2f}" for a, b in combinations(used, 2)]
        click.echo(filled(f"cosines {', '.join(pairs)}"))


def show_worst(report: Report) -> None:
    """The sites that lose most, where any loses something."""
    from adaptmerge.outputs.report import worst_sites

    worst = [f"{line.site} {line.error:.2e}" for line in worst_sites(report, 3)]
    if worst:
        click.echo(filled(f"worst sites: {', '.join(worst)}"))


def headline(output: Path, report: Report) -> str:
    """What was written, in one sentence."""
    ranks = [line.rank for line in report.sites if line.rank is not None]
    low, high = min(ranks, default=0), max(ranks, default=0)
    shown = f"rank {low}" if low == high else f"rank {low}-{high}"
    size = f"{len(report.sites)} sites" + (f", {shown}" if ranks else "")
    totals = report.totals
    if totals.error == 0:
        loss = "exact"
    else:
        parts = f"truncation {totals.truncation:.1e}, rounding {totals.rounding:.1e}"
        loss = f"error {totals.error:.2e} ({parts})"
    made = f"{size}, {report.output['dtype']}, {loss}"
    return filled(f"wrote {output}: {made}")
