"""adaptmerge inspect: what is in an adapter, from headers and config only."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from adaptmerge.cli.options import base_option, json_option
from adaptmerge.cli.terminal import filled, print_json, show_notes, table

if TYPE_CHECKING:
    from adaptmerge.commands.inspect import Fit, Summary

SPANS = 4  # lines on the numbers of layers and experts
MISFITS = 3  # shown of those that do not fit; the others are mostly like them


@click.command(short_help="Show what is in adapters, and whether they fit a base.")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--values", is_flag=True, help="Read the tensors: norms, NaN, zero deltas.")
@base_option
@json_option
def inspect(inputs: tuple[str, ...], values: bool, base: str | None, as_json: bool) -> None:
    """Show formats, families, ranks, scales, heads and notes of adapters; reads headers only."""
    from adaptmerge.commands.inspect import summarise
    from adaptmerge.formats.inputs import open_inputs, parse_input
    from adaptmerge.schemes.view import open_values

    model = replace(open_values(base), asks_class=values) if base else None
    specs = [parse_input(text) for text in inputs]
    with _all_alive():
        found = [summarise(item, values=values, base=model) for item in open_inputs(specs, model)]
    if as_json:
        print_json([summary.as_json() for summary in found])
        return
    for summary in found:
        _show(summary)


@contextmanager
def _all_alive() -> Iterator[None]:
    """No search for garbage: all that a header of thousands of tensors becomes is in use."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _show(summary: Summary) -> None:
    click.echo(
        f"{summary.name}: {summary.format}, {summary.parameters:,} parameters in {_sites(summary)}"
    )
    base: dict[str, Any] = summary.base
    if base.get("name"):
        click.echo(
            f"base {base['name']}" + (f" @ {base['revision']}" if base.get("revision") else "")
        )
    headers = ["modules", "count", "edit", "shape", "rank", "scale", "dtype"]
    headers += ["norm"] if summary.values else []
    table(headers, summary.rows(), right=(1, 3, 4, 5, 7))
    _show_numbers(summary.counted())
    if summary.heads:
        table(["head", "shapes", "listed", "labels"], summary.head_rows())
    if summary.fit is not None:
        _show_fit(summary.fit)
    show_notes(replace(note, input=summary.name) for note in summary.notes)
    click.echo()


def _sites(summary: Summary) -> str:
    return "1 site" if summary.sites == 1 else f"{summary.sites} sites"


def _show_numbers(lines: Sequence[str]) -> None:
    for line in lines[:SPANS]:
        click.echo(filled(line))
    if len(lines) > SPANS:
        click.echo(f"and {len(lines) - SPANS} more, which --json lists")


def _show_fit(fit: Fit) -> None:
    click.echo(f"{fit.found} of {fit.modules} modules fit the base {fit.base}")
    if fit.likely:
        click.echo(f"  {fit.likely}")
    for problem in fit.problems[:MISFITS]:
        click.echo(f"  {problem}")
    if len(fit.problems) > MISFITS:
        click.echo(f"  and {len(fit.problems) - MISFITS} more")
