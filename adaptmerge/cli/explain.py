"""adaptmerge explain: why a site of an output is what it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from adaptmerge.cli.options import SITE, json_option
from adaptmerge.cli.outcome import ACTIONS, ARRIVES, ERROR, KEEPS, legend
from adaptmerge.cli.terminal import filled, print_json, table

if TYPE_CHECKING:
    from adaptmerge.commands.fuse.report import FusedSite
    from adaptmerge.outputs.report import Report, SiteLine

Line = TypeVar("Line", "SiteLine", "FusedSite")


@click.command(epilog=SITE, short_help="Say why a site of an output is what it is.")
@click.argument("output", type=click.Path(path_type=Path))
@click.argument("site")
@json_option
def explain(output: Path, site: str, as_json: bool) -> None:
    """Explain one SITE of OUTPUT (a module path, its end, or a glob) from the report."""
    from dataclasses import asdict

    from adaptmerge.commands.fuse.report import is_fused, load_fuse_report
    from adaptmerge.outputs.report import load_report

    if is_fused(output):
        fused = _matching(load_fuse_report(output).sites, site)
        if as_json:
            print_json({"sites": [asdict(one) for one in fused]})
        else:
            _show_fused(fused)
        return
    report = load_report(output)
    lines = _matching(report.sites, site)
    if as_json:
        print_json({"method": report.method, "sites": [asdict(line) for line in lines]})
        return
    for line in lines:
        _show(report, line)


def _show_fused(lines: Sequence[FusedSite]) -> None:
    for line in lines:
        _show_matrix(line)
    click.echo(legend(arrives=ARRIVES, error=ERROR, nearest_keeps=KEEPS))


def _show_matrix(line: FusedSite) -> None:
    from adaptmerge.commands.fuse.report import percent

    place = f"{line.tensor}, {'x'.join(map(str, line.shape))} {line.dtype}"
    click.echo(filled(f"{line.site}: fused into {place}, rounded {line.rounding}"))
    losses = (line.gain, line.sub, line.predicted)
    table(
        ("adapter", "weight", "norm", "arrives", "error", "nearest keeps"),
        [
            (name, weight, line.norms[name], *(percent(loss.get(name)) for loss in losses))
            for name, weight in line.weights.items()
        ],
        right=(1, 2, 3, 4, 5),
    )
    share = line.error / line.weight_norm if line.weight_norm else 0.0
    click.echo(
        filled(f"|W| {line.weight_norm:.4g}, |dW| {line.delta_norm:.4g}, |error|/|W| {share:.2e}")
        + "\n"
    )


def _matching(sites: Sequence[Line], site: str) -> list[Line]:
    from adaptmerge.errors import UsageError, did_you_mean

    found = [line for line in sites if any(_is_meant(site, name) for name in _names(line))]
    if not found:
        names = [line.site for line in sites][:2000]
        hint = did_you_mean(site, names)
        example = f"a site is {names[0]}" if names else "the output has no sites"
        raise UsageError(f"no site matches {site!r}: {hint if 'mean' in hint else example}")
    return found


def _names(line: Line) -> tuple[str, str, str]:
    """What a line's site is called: in full, without the kind of edit, and without the place in a layer."""
    bare = line.site.partition(" (")[0]
    return line.site, bare, bare.partition(":")[0]


def _is_meant(site: str, name: str) -> bool:
    from fnmatch import fnmatchcase

    from adaptmerge.adapters.module_paths import is_suffix

    return is_suffix(site, name) or fnmatchcase(name, site) or fnmatchcase(name, f"*.{site}")


def _set_by(report: Report, line: SiteLine, name: str) -> str:
    """The last rule that speaks of this input here, or the input's own weight."""
    from adaptmerge.files.typed import built
    from adaptmerge.merging.weights import SiteRule

    rules = [built(SiteRule, rule, "rules") for rule in report.options["rules"]]
    found = [rule.match for rule in rules if name in rule.weights and rule.selects(*line.key)]
    return f"rule {found[-1]}" if found else "the input's weight"


def _show(report: Report, line: SiteLine) -> None:
    place = f"{line.site} of {line.adapter}" if line.adapter else line.site
    bare = line.action == "concat" or report.command == "extract"
    by = "" if bare else f" by {report.method}"
    click.echo(f"{place}: {ACTIONS[line.action]}{by}")
    table(
        ("input", "weight", "rank", "weight set by"),
        [
            (name, weight, line.ranks_in.get(name), _set_by(report, line, name))
            for name, weight in line.weights.items()
        ],
        right=(1, 2),
    )
    loss = (
        "exact"
        if line.error == 0
        else f"relative error {line.error:.3e} (truncation {line.truncation:.3e}, rounding "
        f"{line.rounding:.3e}, absolute)"
    )
    rank = "" if line.rank is None else f"rank {line.rank}, "
    click.echo(filled(f"{rank}norm {line.norm:.4g}, {loss}") + "\n")
