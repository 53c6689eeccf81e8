"""`python -m bench.narrow`: a table of docs/quantised-merging.md, as markdown.

Rows with few columns per direction, by feedback and scales alone, and with codes exchanged in between.
Times are ratios in one run.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter
from unittest.mock import patch

import torch

from adaptmerge.rounding.codes import SOLVE, CodedMatrix, requantise
from adaptmerge.rounding.error_feedback import ADAPTIVE
from adaptmerge.rounding.scales import CodedRows
from bench.formats import FORMATS, Quantised
from bench.layers import drawn
from bench.quantised import Loss, loss, matrix_of, scaled
from bench.table import markdown

ROWS, ROUNDS, RATIO = 512, 5, 1e-2
SMALL = 1e-3  # of what is added to int8
LAYERS = (
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


def main() -> None:
    """Measures and prints."""
    torch.set_num_threads(1)
    heads = ["format", "columns", "rank", "ratio", "alone", "with an exchange", "time"]
    print(markdown([heads, *map(_measured, LAYERS)], range(1, len(heads))))


def _measured(layer: tuple[str, int, int]) -> list[str]:
    name, columns, rank = layer
    ratio = SMALL if name == "int8" else RATIO
    random = torch.Generator().manual_seed(0)
    held = FORMATS[name](drawn("Gaussian", (ROWS, columns), random))
    down, up = (drawn("Gaussian", shape, random) for shape in ((rank, columns), (ROWS, rank)))
    sides = scaled(held.values(), [(up, down)], ratio)
    packing = CodedMatrix(held, matrix_of(held, sides))  # type: ignore[arg-type]
    requantise(packing, ADAPTIVE, SOLVE, 0)  # what is remembered of the adapter

    def timed() -> tuple[float, Loss]:
        start = perf_counter()
        done = requantise(packing, ADAPTIVE, SOLVE, 0)
        took = perf_counter() - start
        after = Quantised(done.codes, done.grid, None).values()
        return took, loss(held.values(), sides, after)

    times: tuple[list[float], list[float]] = [], []
    for _ in range(ROUNDS):
        with patch.object(CodedRows, "exchanges", lambda *_: False):
            took, alone = timed()
        times[0].append(took)
        took, exchanged = timed()
        times[1].append(took)
    cells = (f"{one.gain:.3f} / {one.sub:.1e} / {one.noise:.4f}" for one in (alone, exchanged))
    slower = median(times[1]) / median(times[0])
    return [name, str(columns), str(rank), f"{ratio:.0e}", *cells, f"{slower:.1f}x"]


if __name__ == "__main__":
    main()
