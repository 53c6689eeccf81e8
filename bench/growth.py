"""`python -m bench.growth`: how the time of fusing into one NF4 matrix grows with its inputs and the rank.

Processor time of one thread, from memory, the best of some rounds of which each measures every point once:
on an idle machine what a clock shows, on a busy one less disturbed. Prints the points as markdown and draws
docs/nf4-growth.svg.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from adaptmerge.rounding.codes import SOLVE, requantise
from adaptmerge.rounding.error_feedback import ADAPTIVE
from bench.plot import Panel, drawn
from bench.sites import packing
from bench.table import markdown

PLOT = Path(__file__).parent.parent / "docs" / "nf4-growth.svg"
OUT = 4096
RANK, RANKS = 16, (8, 16, 32, 64, 128)
INPUTS, WIDTHS = 4096, (1024, 2048, 4096, 8192, 16384)
Point = tuple[int, int]  # (inputs, rank)


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=OUT)
    parser.add_argument("--output", type=Path, default=PLOT)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    points = [(width, RANK) for width in WIDTHS]
    points += [(INPUTS, rank) for rank in RANKS if rank != RANK]
    best = measured(asked.rows, points, asked.rounds)
    panels = [
        Panel(
            f"rank {RANK}", "inputs of the matrix", {width: best[width, RANK] for width in WIDTHS}
        ),
        Panel(f"{INPUTS:,} inputs", "rank", {rank: best[INPUTS, rank] for rank in RANKS}),
    ]
    asked.output.write_text(
        drawn(panels, f"Adaptive fusing into an NF4 matrix of {asked.rows} rows")
    )
    for panel in panels:
        cells = [f"{seconds:.2f} s" for seconds in panel.points.values()]
        heads = [panel.label, *(f"{value:,}" for value in panel.points), "exponent"]
        lines = [heads, [panel.title, *cells, f"{panel.power[0]:.2f}"]]
        print(markdown(lines, range(1, len(heads))), end="\n\n")


def measured(rows: int, points: Sequence[Point], rounds: int) -> dict[Point, float]:
    """The least seconds of each point. Rounds are interleaved: what disturbs the machine hits all."""
    found = {point: packing(rows, *point) for point in points}
    best = dict.fromkeys(points, float("inf"))
    for number in range(rounds):
        for point, one in found.items():
            start = time.process_time()
            requantise(one, ADAPTIVE, SOLVE, 0)
            seconds = time.process_time() - start
            best[point] = min(best[point], seconds)
            print(f"round {number + 1}: in, rank {point}: {seconds:.3f} s", file=sys.stderr)
    return best


if __name__ == "__main__":
    main()
