"""`python -m bench.quantised`: the tables of docs/quantised-evidence.md, as markdown.

What is left of adapters that are fused into quantised weights: nearest codes on the scales that are there,
fresh scales and nearest codes (which is what merging and quantising again does), and adaptive rounding.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from adaptmerge.factors import low_rank
from adaptmerge.files.dtypes import F32
from adaptmerge.files.refs import TensorRef
from adaptmerge.fuse.matrix import Matrix, Part
from adaptmerge.fuse.repack import KEEP, SOLVE, Packing, requantise
from adaptmerge.graph import Site
from adaptmerge.rounding import ADAPTIVE, NEAREST
from bench.bytes import Scored, Texts, Tiny
from bench.formats import FORMATS, InMemory, Quantised
from bench.fused import factors
from bench.layers import drawn
from bench.table import markdown

FRESH = "fresh scales"
WAYS = (NEAREST, FRESH, ADAPTIVE)
COMPARED = ("base", "unmerged", FRESH, ADAPTIVE)
RATIOS = (1e-3, 1e-2, 5e-2)
ROWS, WIDTH, RANK = 512, 4096, 16
OF_LAYERS = tuple(name for name in FORMATS if "g32" not in name)
TRAINED = {"plays": "lora-r8-shakespeare", "C": "lora-r8-cheaders", "Perl": "lora-r8-perl"}
TRAINED_RATIOS = (0.1, 0.03, 0.01)
OF_TRAINED = tuple(name for name in FORMATS if "double" not in name and "g128" not in name)
Sides = tuple[torch.Tensor, torch.Tensor]


class Loss(NamedTuple):
    """gain and sub of a delta, and |error| / |W|."""

    gain: float
    sub: float
    noise: float


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m bench.quantised", description=__doc__)
    parser.add_argument("--texts", type=Path, help="plays.txt, C.txt, Perl.txt, Python.txt")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, help="of trained adapters")
    parser.add_argument("--ratios", nargs="+", type=float, default=TRAINED_RATIOS)
    parser.add_argument("--only", choices=("layers", "trained", "together"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.only in (None, "layers"):
        heads = ["format", "values", "ratio", NEAREST, FRESH, ADAPTIVE]
        _print([heads, *_layers()], "gain / sub / error")
    if asked.only == "layers":
        return
    if asked.texts is None:
        raise SystemExit("trained adapters need --texts FOLDER")
    tiny, formats = Tiny(Texts(asked.texts)), asked.formats or OF_TRAINED
    heads = ["format", "adapters", "ratio", "base", "unmerged", FRESH, ADAPTIVE, "kept", "Python"]
    if asked.only != "together":
        _print([heads, *_trained(tiny, formats, asked.ratios)], "bits per byte")
    if asked.only != "trained":
        _print([heads, *_together(tiny, formats)], "bits per byte, several adapters")


def _print(cells: Sequence[Sequence[str]], what: str) -> None:
    print(f"\n{what}\n\n{markdown(cells, range(2, len(cells[0])))}", flush=True)


def _layers() -> Iterator[list[str]]:
    for name in OF_LAYERS:
        for values in ("Gaussian", "Student t4"):
            random = torch.Generator().manual_seed(0)
            held = FORMATS[name](drawn(values, (ROWS, WIDTH), random))
            down, up = drawn(values, (RANK, WIDTH), random), drawn(values, (ROWS, RANK), random)
            for ratio in RATIOS:
                sides = scaled(held.values(), [(up, down)], ratio)
                found = [loss(held.values(), sides, ways(name, held, sides)[way]) for way in WAYS]
                cells = (f"{o.gain:.3f} / {o.sub:.1e} / {o.noise:.3f}" for o in found)
                yield [name, values, f"{ratio:.0e}", *cells]


def ways(name: str, held: Quantised, sides: Sequence[Sides]) -> Mapping[str, torch.Tensor]:
    """The values (out, in) that the weight has after each way of fusing."""
    packing = Packing(held, matrix_of(held, sides))  # type: ignore[arg-type]
    target = held.values() + sum(up @ down for up, down in sides)
    found = {FRESH: FORMATS[name](target.float()).values()}
    for rounding, scales in ((NEAREST, KEEP), (ADAPTIVE, SOLVE)):
        done = requantise(packing, rounding, scales, 0)
        found[rounding] = Quantised(done.codes, done.grid, None).values()
    return found


def matrix_of(held: Quantised, sides: Sequence[Sides]) -> Matrix:
    """A quantised weight with one adapter per pair of sides."""
    parts = [
        Part(str(number), 1.0, low_rank(_ref("up", up), _ref("down", down)))
        for number, (up, down) in enumerate(sides)
    ]
    return Matrix(Site("layer"), _ref("weight", held.values()), F32, tuple(parts), packed=True)


def _ref(name: str, tensor: torch.Tensor) -> TensorRef:
    return TensorRef(InMemory(tensor.float()), tuple(tensor.shape), F32, name=name)


def scaled(weight: torch.Tensor, sides: Sequence[Sides], ratio: float) -> list[Sides]:
    """The sides with |delta| / |W| of each at that ratio."""
    return [
        (up * (ratio * float(weight.norm()) / float((up @ down).norm())), down)
        for up, down in sides
    ]


def loss(before: torch.Tensor, sides: Sequence[Sides], after: torch.Tensor) -> Loss:
    """By the plain definitions, in float64."""
    weight = before.double()
    delta = torch.stack([up.double() @ down.double() for up, down in sides]).sum(0)
    error = after.double() - weight - delta
    basis = torch.linalg.qr(torch.cat([down for _, down in sides]).double().T).Q
    return Loss(
        1 + float((error * delta).sum() / delta.square().sum()),
        float((error @ basis).norm() / delta.norm()),
        float(error.norm() / weight.norm()),
    )


def _trained(tiny: Tiny, formats: Sequence[str], ratios: Sequence[float]) -> Iterator[list[str]]:
    for name in formats:
        held = {module: FORMATS[name](weight) for module, weight in tiny.weights.items()}
        for text, adapter in TRAINED.items():
            for ratio in ratios:
                yield from _rows(tiny, name, held, {text: adapter}, ratio)


def _together(tiny: Tiny, formats: Sequence[str]) -> Iterator[list[str]]:
    for name in formats:
        held = {module: FORMATS[name](weight) for module, weight in tiny.weights.items()}
        for count in (2, 3):
            yield from _rows(tiny, name, held, dict(list(TRAINED.items())[:count]), 0.03)


def _rows(
    tiny: Tiny,
    name: str,
    held: Mapping[str, Quantised],
    adapters: Mapping[str, str],
    ratio: float,
) -> Iterator[list[str]]:
    found = fused(name, held, [str(tiny.folder / one) for one in adapters.values()], ratio)
    texts = [*adapters, "Python"]
    scores = {way: tiny.scored({m: v[way] for m, v in found.items()}, texts) for way in COMPARED}
    other = _difference(scores[ADAPTIVE]["Python"], scores["unmerged"]["Python"])
    for text in adapters:
        of = {way: scores[way][text] for way in COMPARED}
        cells = [f"{of[way].mean:.3f}" for way in COMPARED]
        where = text if len(adapters) == 1 else f"{text} of {len(adapters)}"
        yield [name, where, f"{ratio:g}", *cells, _kept(of), other]


def fused(
    name: str, held: Mapping[str, Quantised], adapters: Sequence[str], ratio: float
) -> Mapping[str, Mapping[str, torch.Tensor]]:
    """Per module the values before, with the adapters beside them, and after each way. The adapters keep
    their own proportions between modules."""
    sides: dict[str, list[Sides]] = {module: [] for module in held}
    size = math.sqrt(sum(float(one.values().double().square().sum()) for one in held.values()))
    for adapter in adapters:
        own = {module: (up, down) for module, up, down in factors(adapter, 1.0)}
        norm = math.sqrt(sum(float((up @ down).square().sum()) for up, down in own.values()))
        for module, (up, down) in own.items():
            sides[module].append(((up * (ratio * size / norm)).float(), down.float()))
    found = {}
    for module, one in held.items():
        base = one.values()
        beside = base + torch.stack([up @ down for up, down in sides[module]]).sum(0)
        found[module] = {"base": base, "unmerged": beside, **ways(name, one, sides[module])}
    return found


def _kept(of: Mapping[str, Scored]) -> str:
    """How much of what the adapter gains is left, with twice its standard error."""
    won = of["base"].mean - of["unmerged"].mean
    kept = (of["base"].mean - of[ADAPTIVE].mean) / won
    lost = (of[ADAPTIVE].windows - of["unmerged"].windows) / won
    return f"{kept:.1%} ± {2 * float(lost.std()) / math.sqrt(len(lost)):.1%}"


def _difference(found: Scored, wanted: Scored) -> str:
    return f"{found.mean - wanted.mean:+.4f}"


if __name__ == "__main__":
    main()
