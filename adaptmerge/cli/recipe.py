"""adaptmerge run: a merge described in a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from adaptmerge.cli.options import SITE, json_option


@click.command(epilog=SITE, short_help="Run a recipe: a merge written down in YAML.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--output", help="Folder or file; default: the recipe's own, else merged.")
@click.option("--locked", is_flag=True, help="Require and check a sha256 for every input.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@json_option
def run(
    recipe: Path, output: str | None, locked: bool, force: bool, dry_run: bool, as_json: bool
) -> None:
    """Run a recipe (YAML): inputs, weights per site, method, budget and output in one file."""
    from adaptmerge.cli.outcome import execute
    from adaptmerge.commands.recipe import check_locked, load_recipe
    from adaptmerge.formats.inputs import open_inputs

    loaded = load_recipe(recipe)
    if locked:
        check_locked(loaded, open_inputs(loaded.specs()))
    options = loaded.options()
    options = replace(options, force=force or options.force)
    target = Path(output) if output else loaded.output() or Path("merged")
    execute(loaded.specs(), target, options, command="run", dry_run=dry_run, as_json=as_json)
