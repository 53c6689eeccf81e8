"""adaptmerge convert: one adapter into another format, dtype or rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from adaptmerge.cli.options import SITE, allowed, budget_of, budget_options, writing_options

EPILOG = f"""{SITE}

\b
Examples:
  adaptmerge convert ./adapter --to gguf --base ./llama -o adapter.gguf
  adaptmerge convert ./adapter -o adapter.safetensors
  adaptmerge convert ./adapter --max-error 0.01 --ranks per-site -o smaller
"""


@click.command(epilog=EPILOG, short_help="Convert an adapter to another format, dtype or rank.")
@click.argument("input_", metavar="INPUT")
@click.option("-o", "--output", default="converted", show_default=True, help="Folder, or one file.")
@budget_options
@writing_options
def convert(
    input_: str, output: str, allow: str, dry_run: bool, as_json: bool, **given: Any
) -> None:
    """Convert an adapter: a merge of one, exact unless a budget or dtype is given."""
    from adaptmerge.cli.outcome import execute
    from adaptmerge.commands.combine import Options
    from adaptmerge.formats.inputs import parse_input

    options = Options(budget=budget_of(given), allow=allowed(allow), **given)
    spec = parse_input(input_)
    execute([spec], Path(output), options, command="convert", dry_run=dry_run, as_json=as_json)
