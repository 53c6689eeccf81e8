"""What the terminal shows: text or JSON on stdout, notes, progress and errors on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from adaptmerge.errors import AdaptmergeError
from adaptmerge.graph import Note

WIDTH = 80
PATIENCE = 1.0  # seconds before a progress bar appears


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, default=str))


def report_error(problem: AdaptmergeError, *, as_json: bool) -> None:
    """The error on stderr; with --json also as a document on stdout."""
    click.echo(f"error: {problem}", err=True)
    if as_json:
        print_json({"error": {"where": problem.where, "problems": list(problem.problems)}})


def show_notes(notes: Iterable[Note]) -> None:
    """Notes on stderr, one line each."""
    for note in notes:
        click.echo(str(note), err=True)


def table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[int] = ()
) -> None:
    """A table within 80 columns; `right` are the columns of numbers."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=SIMPLE, pad_edge=False, show_edge=False)
    for index, header in enumerate(headers):
        number = index in right
        shown.add_column(
            header, justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    for row in rows:
        shown.add_row(*(cell(value) for value in row))
    Console(file=sys.stdout, width=WIDTH, highlight=False, markup=False).print(shown)


def cell(value: object) -> str:
    """A table cell: numbers short, nothing as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) behind a bar on stderr, shown only once a run takes over a second."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    started = time.monotonic()
    task = bar.add_task(what, total=None)

    def advance(done: int, total: int) -> None:
        if not bar.live.is_started and time.monotonic() - started > PATIENCE:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        bar.stop()
