"""adaptmerge combine: many adapters into one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from adaptmerge.cli.options import (
    SITE,
    allowed,
    budget_of,
    budget_options,
    heads_option,
    merging_options,
    writing_options,
)

EPILOG = f"""\b
An input is [NAME=]SOURCE[:WEIGHT][?alpha=32]; SOURCE is a folder, a file (as
.safetensors or .bin), or on the Hub org/name[@revision][//subfolder] or the
address of its page.

{SITE}

\b
Examples:
  adaptmerge combine a.safetensors b.safetensors
  adaptmerge combine sql=./a:0.7 chat=./b:0.3 --rank 16 -o merged
  adaptmerge combine sql=./a chat=./b --site 'layers.[0-7].*:sql=1,chat=0'
  adaptmerge combine run/checkpoint-* --weights ema:0.9
"""


@click.command(epilog=EPILOG, short_help="Merge adapters into one.")
@click.argument("inputs", nargs=-1, required=True)
@click.option("-o", "--output", default="merged", show_default=True, help="Folder, or one file.")
@merging_options
@heads_option
@budget_options
@writing_options
def combine(
    inputs: tuple[str, ...],
    output: str,
    rules: tuple[str, ...],
    allow: str,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Merge adapters: by default the true weighted sum of their deltas."""
    from adaptmerge.cli.outcome import execute
    from adaptmerge.commands.combine import Options
    from adaptmerge.formats.inputs import parse_input
    from adaptmerge.merging.weights import parse_rule

    options = Options(
        rules=tuple(parse_rule(rule) for rule in rules),
        budget=budget_of(given),
        allow=allowed(allow),
        **given,
    )
    specs = [parse_input(text) for text in inputs]
    execute(specs, Path(output), options, command="combine", dry_run=dry_run, as_json=as_json)
