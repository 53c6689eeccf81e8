"""adaptmerge diff: do two adapters compute the same?"""

from __future__ import annotations

import math

import click

from adaptmerge.cli.options import SITE, base_option, json_option
from adaptmerge.cli.terminal import print_json, table


@click.command(epilog=SITE, short_help="Compare what two adapters compute.")
@click.argument("a")
@click.argument("b")
@click.option("--tolerance", default=1e-5, show_default=True, help="Largest relative difference.")
@click.option("--all", "show_all", is_flag=True, help="List every site, not the ten worst.")
@base_option
@json_option
def diff(a: str, b: str, tolerance: float, show_all: bool, base: str | None, as_json: bool) -> None:
    """Compare the deltas of two adapters in any formats; exit code 3 when they differ."""
    from adaptmerge.commands.verify.difference import difference
    from adaptmerge.formats.inputs import open_input, parse_input
    from adaptmerge.schemes.view import open_values

    if not 0 <= tolerance < math.inf:
        raise click.UsageError(f"--tolerance {tolerance}: expected a number of at least 0")
    model = open_values(base) if base else None
    specs = [parse_input(text) for text in (a, b)]
    weighted = [spec.source for spec in specs if spec.weight is not None]
    if weighted:
        raise click.UsageError(f"{weighted[0]} has a weight: diff compares adapters as they are")
    left, right = (open_input(spec, model).adapter for spec in specs)
    found = difference(left, right, model)
    same = found.relative <= tolerance and all(s.relative <= tolerance for s in found.sites)
    if as_json:
        print_json({"same": same, "tolerance": tolerance, **found.as_json()})
    else:
        worst = sorted(found.sites, key=lambda s: -s.relative)
        rows = [(s.site, s.left, s.right, s.relative) for s in worst[: None if show_all else 10]]
        table(("site", "|a|", "|b|", "relative"), rows, right=(1, 2, 3))
        answer = "compute the same" if same else "differ"
        largest = f", {worst[0].relative:.2e} at the worst" if worst and not same else ""
        click.echo(f"{a}\n{b}\n{answer}: {found.relative:.2e} over {len(worst)} sites{largest}")
    click.get_current_context().exit(0 if same else 3)
