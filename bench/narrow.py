"""`python -m bench.narrow`: two tables of docs/quantised-merging.md, as markdown.

Rows with few columns per direction, by feedback and scales alone, and with codes exchanged in between; and
small weights, with feedback in rows alone, and from row to row. Times are ratios in one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch

from adaptmerge.fuse import repack
from adaptmerge.fuse.repack import SOLVE, Packing, requantise
from adaptmerge.fuse.scales import Rows
from adaptmerge.rounding import ADAPTIVE
from bench.formats import FORMATS, Quantised
from bench.layers import drawn
from bench.quantised import Sides, loss, matrix_of, scaled
from bench.table import markdown

HEIGHT, ROUNDS, RATIO = 512, 5, 1e-2
SLIGHT = 1e-3  # of what is added to int8
NARROW = (
    ("NF4", 128, 8),
    ("NF4", 352, 8),
    ("NF4", 896, 16),
    ("NF4", 1024, 64),
    ("NF4", 2048, 32),
    ("NF4", 4096, 64),
    ("Q4_0", 128, 8),
    ("GPTQ, AWQ g128", 4096, 64),
    ("int8", 128, 8),
    ("int8", 2048, 64),
)
SMALL = (
    ("NF4", 128, 128, 8),
    ("NF4", 128, 128, 16),
    ("NF4", 128, 352, 8),
    ("NF4", 352, 128, 8),
    ("NF4", 512, 512, 16),
    ("FP4", 128, 128, 8),
    ("Q4_0", 128, 128, 8),
    ("GPTQ, AWQ g32", 128, 128, 8),
    ("int8", 128, 128, 8),
)
Away = Callable[[], Any]
Shown = Callable[[Quantised, Sides, torch.Tensor], str]


def main() -> None:
    """Measures and prints."""
    torch.set_num_threads(1)
    heads = ["format", "columns", "rank", "ratio", "alone", "with an exchange", "time"]
    print(markdown([heads, *_narrow()], range(1, len(heads))))
    heads = ["format", "rows", "columns", "rank", "ratio", "in rows", "and from row to row", "time"]
    print("\n" + markdown([heads, *_small()], range(1, len(heads))))


def _rows_alone() -> Any:
    return patch.object(repack, "written_of", lambda _: None)


def _narrow() -> Iterator[list[str]]:
    def no_exchange() -> Any:
        return patch.object(Rows, "exchanges", lambda *_: False)

    for name, columns, rank in NARROW:
        with _rows_alone():
            cells = _compared(name, (HEIGHT, columns), rank, no_exchange, _gain_sub_error)
        yield [name, str(columns), str(rank), *cells]


def _small() -> Iterator[list[str]]:
    for name, rows, columns, rank in SMALL:
        cells = _compared(name, (rows, columns), rank, _rows_alone, _sub_outputs_error)
        yield [name, str(rows), str(columns), str(rank), *cells]


def _compared(name: str, shape: tuple[int, int], rank: int, away: Away, shown: Shown) -> list[str]:
    """The ratio, what a layer becomes without something and with it, and how much longer that takes."""
    ratio = SLIGHT if name == "int8" else RATIO
    random = torch.Generator().manual_seed(0)
    held = FORMATS[name](drawn("Gaussian", shape, random))
    down, up = (drawn("Gaussian", side, random) for side in ((rank, shape[1]), (shape[0], rank)))
    sides = scaled(held.values(), [(up, down)], ratio)
    packing = Packing(held, matrix_of(held, sides))  # type: ignore[arg-type]
    requantise(packing, ADAPTIVE, SOLVE, 0)  # what is remembered of the adapter
    times: tuple[list[float], list[float]] = [], []
    after: list[torch.Tensor] = []
    for _ in range(ROUNDS):
        after.clear()
        for way, taken in zip((away, nullcontext), times, strict=True):
            with way():
                start = perf_counter()
                done = requantise(packing, ADAPTIVE, SOLVE, 0)
                taken.append(perf_counter() - start)
            after.append(Quantised(done.codes, done.grid, None).values())
    cells = [shown(held, sides[0], values) for values in after]
    return [f"{ratio:.0e}", *cells, f"{median(times[1]) / median(times[0]):.1f}x"]


def _gain_sub_error(held: Quantised, sides: Sides, after: torch.Tensor) -> str:
    found = loss(held.values(), [sides], after)
    return f"{found.gain:.3f} / {found.sub:.1e} / {found.noise:.4f}"


def _sub_outputs_error(held: Quantised, sides: Sides, after: torch.Tensor) -> str:
    """With the error in what the adapter writes to, relative to the delta like `sub`."""
    found = loss(held.values(), [sides], after)
    up, down = (side.double() for side in sides)
    written, delta = torch.linalg.qr(up).Q, up @ down
    outputs = (written.T @ (after.double() - held.values().double() - delta)).norm() / delta.norm()
    return f"{found.sub:.1e} / {float(outputs):.2f} / {found.noise:.4f}"


if __name__ == "__main__":
    main()
