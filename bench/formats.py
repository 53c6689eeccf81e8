"""Quantised weights in memory: what a format makes of values, and what else it could store for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adaptmerge.schemes.bitsandbytes.codes import (
    FP4,
    NF4,
    Table,
    double_dequantise,
    double_quantise,
)
from adaptmerge.schemes.grids import BlockGrid
from adaptmerge.tensors.dtypes import F32, DType
from adaptmerge.tensors.refs import TensorRef

Stored = Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]
BNB_BLOCK, Q4_BLOCK = 64, 32


@dataclass(frozen=True, eq=False)
class InMemory:
    """A tensor (out, in) as a source of refs."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> DType:
        return F32

    def read(self) -> torch.Tensor:
        return self.tensor.clone()

    def rows(self, start: int, stop: int) -> InMemory:
        return InMemory(self.tensor[start:stop])


@dataclass(frozen=True, eq=False)
class Quantised:
    """A weight as a format holds it. stored: the scales that it can hold nearest to some; None where they
    are shared between rows."""

    codes: torch.Tensor
    whole: BlockGrid
    stored: Stored | None
    module: str = "layer"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        return {}

    def values(self) -> torch.Tensor:
        out = torch.empty(self.codes.shape)
        return self.whole.values(self.codes, slice(0, self.shape[1]), out)

    def grid(self, rows: tuple[int, int]) -> tuple[torch.Tensor, BlockGrid]:
        part, zero = slice(*rows), self.whole.zero
        grid = BlockGrid(
            self.whole.scale[part],
            self.whole.groups,
            self.whole.table,
            self.whole.low,
            self.whole.high,
            None if zero is None else zero[part],
            across=self.whole.across if self._are_whole(rows) else 0,
        )
        return self.codes[part], grid

    def _are_whole(self, rows: tuple[int, int]) -> bool:
        """Whether no block is cut that runs across rows."""
        block = max(1, self.whole.across)
        ends = [row * self.shape[1] % block == 0 for row in rows]
        return ends[0] and (ends[1] or rows[1] == self.shape[0])

    def pack(self, codes: torch.Tensor, grid: BlockGrid) -> dict[str, torch.Tensor]:
        raise NotImplementedError("is in memory only")

    def nearest_scales(self, scale: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor | None:
        return None if self.stored is None else self.stored(scale, rows)


def _wide(scale: torch.Tensor, _: tuple[int, int]) -> torch.Tensor:
    return scale.float().to(scale.dtype)


def _half(scale: torch.Tensor, _: tuple[int, int]) -> torch.Tensor:
    return scale.half().to(scale.dtype)


def _groups(width: int, size: int) -> torch.Tensor:
    return torch.arange(width) // size


def _four_bits(weight: torch.Tensor, kind: str, table: Table) -> Quantised:
    """As bitsandbytes itself quantises."""
    import bitsandbytes.functional as functional

    packed, state = functional.quantize_4bit(weight.contiguous(), quant_type=kind)
    pairs = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1)
    levels, order = torch.tensor(table).sort(stable=True)
    codes = order.argsort()[pairs[: weight.numel()].int()].to(torch.uint8).view(weight.shape)
    width = weight.shape[1]
    if width % BNB_BLOCK:
        entries = torch.arange(weight.numel()) // BNB_BLOCK
        scale = state.absmax[entries].view(weight.shape)
        grid = BlockGrid(scale, torch.arange(width), levels, across=BNB_BLOCK)
        return Quantised(codes, grid, None)
    scale = state.absmax.view(len(weight), -1)
    return Quantised(codes, BlockGrid(scale, _groups(width, BNB_BLOCK), levels), _wide)


def nf4(weight: torch.Tensor) -> Quantised:
    return _four_bits(weight, "nf4", NF4)


def fp4(weight: torch.Tensor) -> Quantised:
    return _four_bits(weight, "fp4", FP4)


def nf4_double(weight: torch.Tensor) -> Quantised:
    """NF4 whose scales are quantised; only for widths of whole blocks."""
    found = nf4(weight)
    shape = found.whole.scale.shape
    codes, nested, offset = double_quantise(found.whole.scale.flatten())
    table = double_dequantise(torch.arange(256).to(torch.uint8), torch.ones(1), torch.zeros(()))
    spread = nested.repeat_interleave(256)[: len(codes)].view(shape)
    middles = (table[1:] + table[:-1]) / 2

    def stored(scale: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor:
        part = spread[slice(*rows)]
        places = torch.bucketize(((scale - offset) / part).float(), middles)
        return (table[places] * part + offset).to(scale.dtype)

    scale = double_dequantise(codes, nested, offset).view(shape)
    return Quantised(found.codes, found.whole.rescaled(scale), stored)


def int8(weight: torch.Tensor) -> Quantised:
    import bitsandbytes.functional as functional

    size = weight.abs().amax(1, keepdim=True)
    codes = (weight * (127.0 / size)).round().clamp(-127, 127).int()
    values = functional.int8_vectorwise_dequant(codes.to(torch.int8), size[:, 0])
    assert torch.allclose(values, codes * size / 127)
    grid = BlockGrid(size / 127, _groups(weight.shape[1], weight.shape[1]), low=-128, high=127)
    return Quantised((codes + 128).to(torch.uint8), grid, _wide)


def q4_0(weight: torch.Tensor) -> Quantised:
    """As gguf-py quantises."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q4_0
    raw = torch.from_numpy(gguf.quants.quantize(weight.numpy(), kind).copy())
    blocks = raw.view(len(weight), -1, 18)
    scale = blocks[..., :2].contiguous().view(torch.float16).float()[..., 0]
    low, high = blocks[..., 2:] & 15, blocks[..., 2:] >> 4
    codes = torch.cat([low, high], -1).reshape(weight.shape)
    grid = BlockGrid(scale, _groups(weight.shape[1], Q4_BLOCK), low=-8, high=7)
    return Quantised(codes, grid, _half)


def gptq(weight: torch.Tensor, size: int) -> Quantised:
    """The grid of GPTQ and AWQ (their packing differs): four bits, a scale in float16 and a whole zero."""
    blocks = weight.view(len(weight), -1, size)
    low, high = blocks.amin(2).clamp(max=0), blocks.amax(2).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(0, 15)
    grid = BlockGrid(scale, _groups(weight.shape[1], size), high=15, zero=zero)
    return Quantised(grid.codes(weight, slice(0, weight.shape[1])), grid, _half)


FORMATS: Mapping[str, Callable[[Any], Quantised]] = {
    "NF4": nf4,
    "NF4, double": nf4_double,
    "FP4": fp4,
    "int8": int8,
    "Q4_0": q4_0,
    "GPTQ, AWQ g32": lambda weight: gptq(weight, 32),
    "GPTQ, AWQ g128": lambda weight: gptq(weight, 128),
}
