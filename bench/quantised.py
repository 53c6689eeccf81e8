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

from adaptmerge.adapters.graph import Site
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.rounding.codes import KEEP, SOLVE, CodedMatrix, requantise
from adaptmerge.rounding.error_feedback import ADAPTIVE, NEAREST
from adaptmerge.rounding.matrix import Matrix, Part
from adaptmerge.tensors.dtypes import F32
from adaptmerge.tensors.refs import TensorRef
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
ORDERS = 8  # of the inputs of every layer, in which a model is quantised
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
    heads = ["format", "adapters", "ratio", "base", "unmerged", FRESH, ADAPTIVE, "kept"]
    heads += [f"kept, mean of {ORDERS} orders", "Python"]
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
    packing = CodedMatrix(held, matrix_of(held, sides))  # type: ignore[arg-type]
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
    return Matrix(Site("layer"), _ref("weight", held.values()), F32, tuple(parts), coded=True)


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


class Layer(NamedTuple):
    """A weight of which a format holds these columns (in,) in place of its own order."""

    held: Quantised
    columns: torch.Tensor

    def back(self, values: torch.Tensor) -> torch.Tensor:
        """Values (out, in) of the columns in their own order."""
        return values[:, self.columns.argsort()]


Layers = Mapping[str, Layer]


def layers_in_orders(tiny: Tiny, name: str) -> list[Layers]:
    """The model in a format, as often as orders are tried: first as it is, then with the inputs of every
    layer in a random order, which changes nothing but what is rounded with what."""
    found = []
    for number in range(ORDERS):
        random = torch.Generator().manual_seed(number)
        layers = {}
        for module, weight in tiny.weights.items():
            mixed = torch.randperm(weight.shape[1], generator=random)
            columns = mixed if number else mixed.sort().values
            layers[module] = Layer(FORMATS[name](weight[:, columns].contiguous()), columns)
        found.append(layers)
    return found


def _trained(tiny: Tiny, formats: Sequence[str], ratios: Sequence[float]) -> Iterator[list[str]]:
    for name in formats:
        orders = layers_in_orders(tiny, name)
        for text, adapter in TRAINED.items():
            for ratio in ratios:
                yield from _rows(tiny, name, orders, {text: adapter}, ratio)


def _together(tiny: Tiny, formats: Sequence[str]) -> Iterator[list[str]]:
    for name in formats:
        orders = layers_in_orders(tiny, name)
        for count in (2, 3):
            yield from _rows(tiny, name, orders, dict(list(TRAINED.items())[:count]), 0.03)


Scores = Mapping[str, Mapping[str, Scored]]


def _rows(
    tiny: Tiny,
    name: str,
    orders: Sequence[Layers],
    adapters: Mapping[str, str],
    ratio: float,
) -> Iterator[list[str]]:
    scores: list[Scores] = []
    for layers in orders:
        found = fused(name, layers, [str(tiny.folder / one) for one in adapters.values()], ratio)
        scores.append(
            {
                way: tiny.scored({module: v[way] for module, v in found.items()}, texts)
                for way, texts in _asked(list(adapters), first=not scores).items()
            }
        )
    other = [one[ADAPTIVE]["Python"].mean - one["unmerged"]["Python"].mean for one in scores]
    for text in adapters:
        first = [f"{scores[0][way][text].mean:.3f}" for way in COMPARED]
        where = text if len(adapters) == 1 else f"{text} of {len(adapters)}"
        all_kept = [kept_of(one, text) for one in scores]
        python = f"{sum(other) / len(other):+.4f}"
        yield [name, where, f"{ratio:g}", *first, said(all_kept[:1]), said(all_kept), python]


def _asked(texts: list[str], *, first: bool) -> Mapping[str, list[str]]:
    """Which texts are read after which way; fresh scales only in the order that is shown by itself."""
    other = [*texts, "Python"]
    return {"base": texts, "unmerged": other, ADAPTIVE: other} | ({FRESH: texts} if first else {})


def fused(
    name: str, layers: Layers, adapters: Sequence[str], ratio: float
) -> Mapping[str, Mapping[str, torch.Tensor]]:
    """Per module the values before, with the adapters beside them, and after each way. The adapters keep
    their own proportions between modules."""
    sides: dict[str, list[Sides]] = {module: [] for module in layers}
    size = math.sqrt(
        sum(float(one.held.values().double().square().sum()) for one in layers.values())
    )
    for adapter in adapters:
        own = {module: (up, down) for module, up, down in factors(adapter, 1.0)}
        norm = math.sqrt(sum(float((up @ down).square().sum()) for up, down in own.values()))
        for module, (up, down) in own.items():
            mixed = down[:, layers[module].columns].contiguous()
            sides[module].append(((up * (ratio * size / norm)).float(), mixed.float()))
    found = {}
    for module, one in layers.items():
        base = one.held.values()
        beside = base + torch.stack([up @ down for up, down in sides[module]]).sum(0)
        after = {"base": base, "unmerged": beside, **ways(name, one.held, sides[module])}
        found[module] = {way: one.back(values) for way, values in after.items()}
    return found


class Kept(NamedTuple):
    """How much is left of what an adapter gains on a text, and how much is lost in each window of it."""

    part: float
    lost: torch.Tensor


def kept_of(scores: Scores, text: str) -> Kept:
    base, beside, after = (scores[way][text] for way in ("base", "unmerged", ADAPTIVE))
    won = base.mean - beside.mean
    return Kept((base.mean - after.mean) / won, (after.windows - beside.windows) / won)


def said(found: Sequence[Kept]) -> str:
    """The mean, with twice its standard error: that of sampling windows, and, of more than one, that of
    how they were rounded."""
    parts = torch.tensor([one.part for one in found], dtype=torch.float64)
    lost = torch.stack([one.lost for one in found]).mean(0)
    square = float(lost.var()) / len(lost)
    if len(found) > 1:
        square += float(parts.var()) / len(found)
    return f"{float(parts.mean()):.1%} ± {2 * math.sqrt(square):.1%}"


if __name__ == "__main__":
    main()
