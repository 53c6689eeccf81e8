"""Tables for the docs and for a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence

RIGHT = (1, 3, 5)  # columns of the table of ratios


def markdown(cells: Sequence[Sequence[str]], right: Collection[int] = RIGHT) -> str:
    """The table for the docs, with these columns to the right."""
    head, *body = cells
    rule = ["---:" if i in right else "---" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


def plain(cells: Sequence[Sequence[str]]) -> str:
    """The table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
