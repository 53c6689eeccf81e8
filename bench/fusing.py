"""`python -m bench.fusing`: the measured tables of docs/fusing.md, as markdown.

What rounding leaves of an adapter that is fused into weights of 16 bits, by fuse() and by PEFT. All is read
back from the files that were written; the figures depend on no speed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from bench import machine
from bench.fused import ADAPTIVE, NEAREST, PEFT, WAYS, Loss, fuse, relative, total
from bench.layers import RANK, SITES, WIDTH, make_layers, make_layers_adapter
from bench.outputs import Reference, cast_base, evaluation_tokens
from bench.table import markdown

RATIOS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
DTYPES = ("bf16", "fp16")
TINY = Path("fixtures/tinyllama")
COMPARED = (NEAREST, ADAPTIVE, PEFT)
SHAKESPEARE = "lora-r8-shakespeare"
ADAPTERS = {"bf16": (SHAKESPEARE, "lora-r8-perl", "lora-r8-cheaders"), "fp16": (SHAKESPEARE,)}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m bench.fusing", description=__doc__)
    parser.add_argument("--width", type=int, default=WIDTH, help="of the synthetic layers")
    parser.add_argument("--only", choices=("layers", "trained"), help="one of the two tables")
    asked = parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        described = machine.describe(Path(folder))
        print(f"- software: {described['software']}, {asked.width}x{asked.width}, rank {RANK}")
        if asked.only != "trained":
            heads = ["dtype", "values", "ratio", *WAYS]
            _print([heads, *_layers(Path(folder), asked.width)], "gain / sub")
        if asked.only != "layers":
            heads = ["dtype", "adapter", "ratio", "base", *COMPARED]
            _print([heads, *_trained(Path(folder))], "KL(reference, base); gain / sub / KL")


def _print(cells: Sequence[Sequence[str]], what: str) -> None:
    print(f"\n{what}\n\n{markdown(cells, range(2, len(cells[0])))}", flush=True)


def _layers(folder: Path, width: int) -> Iterator[list[str]]:
    for dtype in DTYPES:
        base = str(make_layers(folder / f"layers-{dtype}", width=width, dtype=dtype))
        adapter = str(make_layers_adapter(folder / f"adapter-{dtype}", width=width))
        found = {
            ratio: [fuse(way, base, adapter, ratio / max(RATIOS), folder / "out") for way in WAYS]
            for ratio in RATIOS
        }
        for values, site in SITES.items():
            for ratio in RATIOS:
                yield [dtype, values, f"{ratio:.0e}", *(_said(o[site]) for o in found[ratio])]


def _trained(folder: Path) -> Iterator[list[str]]:
    for dtype in DTYPES:
        base = cast_base(TINY / "base", folder / f"base-{dtype}", dtype)
        for name in ADAPTERS[dtype]:
            adapter = str(TINY / name)
            reference = Reference(base, adapter, evaluation_tokens(TINY / "base", adapter))
            full = relative(base, adapter)
            for ratio in RATIOS:
                cells = _cells(reference, ratio / full, folder / "out")
                yield [dtype, name.rpartition("-")[2], f"{ratio:.0e}", *cells]


def _cells(reference: Reference, weight: float, output: Path) -> Sequence[str]:
    wanted = reference.log_probabilities(weight)
    compare = partial(reference.divergence, wanted)
    cells = [f"{compare(reference.base):.1e}"]
    for way in COMPARED:
        found = total(fuse(way, reference.base, reference.adapter, weight, output))
        cells.append(f"{_said(found)} / {compare(str(output)):.1e}")
    return cells


def _said(loss: Loss) -> str:
    return f"{loss.gain:.3f} / {loss.sub:.2g}"


if __name__ == "__main__":
    main()
