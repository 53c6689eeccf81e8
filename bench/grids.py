"""`python -m bench.grids`: what rounding leaves of an adapter in wide layers of quantised bases, as markdown.

A layer is quantised as its scheme's library does it, and lies on its grid from then on. A LoRA is added and
the sum stored by nearest codes on the scales that are there, by scales and nearest codes of its own, and as
fuse() stores it. The figures depend on no speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from adaptmerge.factors import low_rank
from adaptmerge.files.dtypes import BF16, F32, U8, DType
from adaptmerge.files.refs import TensorRef, computed
from adaptmerge.fuse.fresh import Merged
from adaptmerge.fuse.matrix import Matrix, Measured, Part
from adaptmerge.fuse.repack import Packing, requantise
from adaptmerge.fuse.scales import KEEP, SOLVE
from adaptmerge.graph import Site
from adaptmerge.packed import Dequantised, Packed, dequantised, fresh
from adaptmerge.rounding import ADAPTIVE, NEAREST
from adaptmerge.schemes.gguf.layout import Ggml
from adaptmerge.spelling import Spelled
from bench.table import markdown

ROWS, WIDTH, RANK, SEED = 512, 4096, 16, 0
RATIOS = (1e-3, 5e-3, 1e-2, 5e-2)
ADAPTERS = ("a", "b", "c")
SCHEMES = ("nf4", "nf4,double", "fp4", "int8", "gptq-int4-g128")
BLOCKS = ("Q4_0", "Q8_0")
HEADS = ("grid", "values", "adapters", "ratio", "nearest", "requantised", "fuse", r"error / \|W\|")


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor in memory as a source of refs."""

    value: torch.Tensor = field(repr=False)
    dtype: DType

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def read(self) -> torch.Tensor:
        return self.value

    def rows(self, start: int, stop: int) -> Held:
        """Some rows of it."""
        return Held(self.value[start:stop], self.dtype)


def held(value: torch.Tensor) -> TensorRef:
    return computed(Held(value, U8 if value.dtype == torch.uint8 else F32), "layer.weight")


def gaussian(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=generator) * 0.02


def heavy(generator: torch.Generator) -> torch.Tensor:
    """Student's t with 4 degrees of freedom."""
    square = torch.randn(4, ROWS, WIDTH, generator=generator).square().mean(0)
    return gaussian(generator) / square.sqrt()


VALUES: dict[str, Callable[[torch.Generator], torch.Tensor]] = {
    "Gaussian": gaussian,
    "Student t4": heavy,
}


def packed(kind: str, values: TensorRef) -> Packed:
    """A weight in a layout, as the layout's library quantises it."""
    if kind not in BLOCKS:
        return fresh()[kind].quantise("layer", values, BF16)
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    raw = torch.from_numpy(gguf.quants.quantize(values.read().numpy(), number))
    return Ggml("layer", (ROWS, WIDTH), int(number), Spelled("layer.weight"), held(raw))


def parts(count: int, ratio: float, size: float) -> tuple[Part, ...]:
    """LoRAs of random factors, each |dW| / |W| of a ratio."""
    found = []
    for name in ADAPTERS[:count]:
        generator = torch.Generator().manual_seed(ord(name))
        down = torch.randn(RANK, WIDTH, generator=generator)
        up = torch.randn(ROWS, RANK, generator=generator)
        up *= ratio * size / float((up @ down).norm())
        found.append(Part(name, 1.0, low_rank(held(up), held(down), 1.0)))
    return tuple(found)


def ways(kind: str, base: Packed, count: int, ratio: float) -> Iterator[Measured]:
    """What each way of storing the sum does to the adapters."""
    size = float(dequantised(base, (0, ROWS)).norm())
    weight = computed(Dequantised(base), "layer.weight")
    matrix = Matrix(Site("layer"), weight, F32, parts(count, ratio, size))
    yield requantise(Packing(base, matrix), NEAREST, KEEP, SEED).measured
    again = packed(kind, computed(Merged(matrix), "layer.weight"))
    yield requantise(Packing(again, matrix, fresh=True), NEAREST, KEEP, SEED).measured
    yield requantise(Packing(base, matrix), ADAPTIVE, SOLVE, SEED).measured


def said(found: Measured) -> str:
    """The worst of all adapters: gain / sub."""
    gains = [gain for gain in found.gains if gain is not None]
    worst = max(gains, key=lambda gain: abs(gain - 1))
    return f"{worst:.3f} / {max(sub or 0 for sub in found.subs):.1e}"


def line(kind: str, values: str, count: int, ratio: float) -> Sequence[str]:
    layer = VALUES[values](torch.Generator().manual_seed(SEED))
    found = list(ways(kind, packed(kind, held(layer)), count, ratio))
    cells = [said(one) for one in found]
    return (kind, values, str(count), f"{ratio:.0e}", *cells, f"{found[-1].noise:.3f}")


def main() -> None:
    """Measures and prints."""
    lines: list[Sequence[str]] = [HEADS]
    for kind in (*SCHEMES, *BLOCKS):
        lines += [line(kind, values, 1, ratio) for values in VALUES for ratio in RATIOS]
        lines += [line(kind, "Gaussian", count, 1e-2) for count in (2, 3)]
    print(markdown(lines, range(2, len(HEADS))))


if __name__ == "__main__":
    main()
