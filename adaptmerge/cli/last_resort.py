"""The last resort: an error that nothing foresaw becomes one sentence that asks for a report."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import click

from adaptmerge.errors import AdaptmergeError

DEBUG = "ADAPTMERGE_DEBUG"
REPORT = f"please report it with this input ({DEBUG}=1 shows where it happened)"


def foreseen(problem: Exception) -> bool:
    """Whether click knows what to do about it, or Python is to show it as it is."""
    by_click = isinstance(problem, (click.ClickException, click.Abort, click.exceptions.Exit))
    closed = isinstance(problem, OSError) and problem.errno == errno.EPIPE  # by who reads stdout
    return by_click or closed or os.environ.get(DEBUG, "0") not in ("", "0")


def unforeseen(problem: Exception, inputs: Sequence[str]) -> AdaptmergeError:
    """The error that names what the command was to read, and what happened."""
    return AdaptmergeError(f"{_happened(problem)}: {REPORT}", where=", ".join(inputs) or None)


def _happened(problem: Exception) -> str:
    if isinstance(problem, MemoryError):
        return "needs more memory than there is"
    if isinstance(problem, RecursionError):
        return "is nested more deeply than can be read"
    said = " ".join(str(problem).split())[:200]
    kind = type(problem).__name__
    return (
        f"adaptmerge failed in a way that it does not know ({f'{kind}: {said}' if said else kind})"
    )


def arguments_of(group: click.Group, context: click.Context, args: Sequence[str]) -> list[str]:
    """The arguments of a command line, which are what its command reads; its options are not."""
    name, command, rest = group.resolve_command(context, list(args))
    if command is None:
        return []
    with command.make_context(name, rest, parent=context, resilient_parsing=True) as inner:
        found = [inner.params.get(p.name) for p in command.params if isinstance(p, click.Argument)]
    listed = (one if isinstance(one, (list, tuple)) else (one,) for one in found if one is not None)
    return [str(part) for parts in listed for part in parts]
