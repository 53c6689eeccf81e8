"""What the terminal shows: text or JSON on stdout, notes, progress and errors on stderr."""

from __future__ import annotations

import io
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import click

from adaptmerge.adapters.graph import Note
from adaptmerge.errors import AdaptmergeError
from adaptmerge.files.strict_json import dump

WIDTH = 80
GAP = "  "
NARROWEST = 16  # columns that a cell which may wrap keeps in any case
PATIENCE = 1.0  # seconds before a progress bar appears


def escape_what_has_no_character() -> None:
    """Streams escape from now on what their encoding lacks, as half a pair of UTF-16 that a name holds."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    text = dump(value)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = dump(value, ascii_only=True)
    click.echo(text)


def print_problems(problems: Sequence[str], where: str | None = None) -> None:
    """What went wrong, as a document on stdout."""
    print_json({"error": {"where": where, "problems": list(problems)}})


def report_error(problem: AdaptmergeError, *, as_json: bool) -> None:
    """The error on stderr; with --json also as a document on stdout."""
    click.echo(f"error: {problem}", err=True)
    if as_json:
        print_problems(problem.problems, problem.where)


def show_notes(notes: Iterable[Note]) -> None:
    """Notes on stderr, one line each."""
    for note in notes:
        click.echo(str(note), err=True)


def table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[int] = ()
) -> None:
    """A table within 80 columns; `right` are the columns of numbers, the others may wrap."""
    cells = [list(headers), *([cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    room = WIDTH - len(GAP) * (len(widths) - 1)
    for index in sorted(range(len(widths)), key=lambda i: -widths[i]):
        if index not in right:
            others = sum(widths) - widths[index]
            widths[index] = min(widths[index], max(room - others, len(headers[index]), NARROWEST))
    head, *body = [_lines(row, widths, right) for row in cells]
    rule = "-" * (sum(widths) + len(GAP) * (len(widths) - 1))
    click.echo("\n".join([*head, rule, *(line for row in body for line in row)]))


def _lines(row: Sequence[str], widths: Sequence[int], right: Sequence[int]) -> list[str]:
    columns = [_wrapped(text, width) for text, width in zip(row, widths, strict=True)]
    return [
        GAP.join(
            text.rjust(width) if index in right else text.ljust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in zip_longest(*columns, fillvalue="")
    ]


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width`, broken at spaces, else after dots and slashes, else after dashes."""
    lines = []
    while len(text) > width:
        spaces = text.rfind(" ", 1, width + 1)
        breaks = (max(text.rfind(m, 1, width) for m in marks) + 1 for marks in ("./\\", "-_"))
        end = spaces if spaces > 0 else next(filter(None, breaks), width)
        lines.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return [*lines, text]


def filled(text: str) -> str:
    """The text in lines of 80 columns, with paths kept whole."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


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
    with steps() as tell:
        yield lambda done, total: tell(what, done, total)


@contextmanager
def steps() -> Iterator[Callable[[str, int, int], None]]:
    """The same for work of several kinds: (what is worked on now, done, total), 0 for an unknown total."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    started = time.monotonic()
    task = bar.add_task("", total=None)

    def tell(what: str, done: int, total: int) -> None:
        if not bar.live.is_started and time.monotonic() - started > PATIENCE:
            bar.start()
        bar.update(task, description=_short(what), completed=done, total=total or None)

    try:
        yield tell
    finally:
        bar.stop()


def _short(what: str) -> str:
    """At most half of a line, with the end of a long name."""
    most = WIDTH // 2
    return what if len(what) <= most else f"…{what[1 - most :]}"
