"""adaptmerge extract: a LoRA adapter out of two full checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptmerge.cli.options import SITE, budget_of, budget_options, extract_options
from adaptmerge.cli.terminal import print_json, progress, show_notes, table

if TYPE_CHECKING:
    from adaptmerge.commands.extract import Prepared

EPILOG = f"""\b
BASE and TUNED are model folders or hub ids, of one architecture.

{SITE}

\b
Examples:
  adaptmerge extract ./llama ./llama-chat --rank 32 -o chat-lora
  adaptmerge extract ./llama ./llama-chat --energy 0.95 -o chat-lora
  adaptmerge extract ./llama ./llama-chat --max-error 0.1 --per-site
  adaptmerge verify chat-lora --base ./llama --input tuned=./llama-chat
"""


@click.command(epilog=EPILOG, short_help="Take an adapter out of two models.")
@click.argument("base")
@click.argument("tuned")
@click.option("-o", "--output", default="extracted", show_default=True, help="Folder, or one file.")
@budget_options
@extract_options
def extract(base: str, tuned: str, output: str, dry_run: bool, as_json: bool, **given: Any) -> None:
    """Extract what TUNED adds to BASE as a LoRA, with the error of every site."""
    from adaptmerge.cli.outcome import headline, show_worst
    from adaptmerge.commands import extract as library

    options = library.Extraction(budget=budget_of(given), **given)
    if dry_run:
        _show_plan(library.prepare(base, tuned, Path(output), options), as_json)
        return
    with progress("factoring deltas") as advance:
        report = library.extract(base, tuned, Path(output), options, advance)
    if as_json:
        print_json({"path": output, **report.as_json()})
        return
    show_notes(report.notes)
    click.echo(headline(Path(output), report))
    show_worst(report)


def _show_plan(prepared: Prepared, as_json: bool) -> None:
    rows = [
        {
            "site": str(step.site),
            "action": "lora" if step.action == "fit" else "full",
            "shape": list(_shape(step.edit)),
        }
        for step in prepared.steps
    ]
    if as_json:
        notes = [str(note) for note in prepared.notes]
        print_json({"plan": rows, "notes": notes, "format": prepared.target.name})
        return
    show_notes(prepared.notes)
    shown = [(r["site"], r["action"], "x".join(map(str, r["shape"]))) for r in rows]
    table(("site", "as", "shape"), shown, right=(2,))
    click.echo(f"{len(rows)} sites differ, as {prepared.target.name}; nothing was written")


def _shape(edit: Any) -> tuple[int, ...]:
    from adaptmerge.adapters.weight_edits import factor_of

    factor = factor_of(edit)
    found: tuple[int, ...] = edit.value.shape if factor is None else factor.shape
    return found
