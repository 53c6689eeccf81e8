"""Whole numbers and floats of 8 and 4 bits and scales beside them, as several schemes store them.

| kind | bits of sign, exponent, mantissa | defined in |
|---|---|---|
| e4m3 | 1 4 3, no infinities, two NaN | [FP8 formats for deep learning](https://arxiv.org/abs/2209.05433) |
| e2m1 | 1 2 1, no infinities, no NaN | [microscaling formats](https://arxiv.org/abs/2310.10537) |
| e8m0 | 0 8 0, one NaN | the same |

Codes are places in the ascending table of values. Both zeros have one code, so that rounding never swaps
them; bits that already stand for a code are kept when it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from adaptmerge.errors import InputError
from adaptmerge.lazy import torch
from adaptmerge.schemes.grids import BlockGrid
from adaptmerge.tensors.refs import TensorRef

NO_CODE = 255
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Floats:
    """All floats of a kind: values ascending (count, float32), the code of every bit pattern (uint8;
    NO_CODE where it is no number) and one bit pattern of every code (count, uint8), that of +0 for zero."""

    table: torch.Tensor
    codes: torch.Tensor
    bits: torch.Tensor

    def read(self, bits: torch.Tensor, name: str) -> torch.Tensor:
        """The codes of bit patterns, uint8. Raises InputError for NaN, saying which tensor holds it."""
        found = self._codes(bits)
        if bool((found == NO_CODE).any()):
            raise InputError(f"{name} holds NaN")
        return found

    def stored(self, codes: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """The bit patterns of codes, uint8: those that were there `before` where they mean the same."""
        found = self.bits.index_select(0, codes.reshape(-1).int()).view(codes.shape)
        return torch.where(self._codes(before) == codes, before, found)

    def _codes(self, bits: torch.Tensor) -> torch.Tensor:
        return self.codes.index_select(0, bits.reshape(-1).int()).view(bits.shape)


def _floats(values: torch.Tensor) -> Floats:
    """All floats of a kind from the values of its bit patterns (float32)."""
    values = values + 0.0  # makes -0 the same as 0
    finite = values.isfinite()
    table = torch.unique(values[finite])
    codes = torch.searchsorted(table, values).masked_fill(~finite, NO_CODE)
    listed = codes.tolist()
    bits = torch.tensor([listed.index(code) for code in range(len(table))], dtype=torch.uint8)
    return Floats(table, codes.to(torch.uint8), bits)


@cache
def e4m3() -> Floats:
    """The floats that torch calls float8_e4m3fn."""
    return _floats(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float())


@cache
def e2m1() -> Floats:
    """The 4-bit floats of MXFP4 and NVFP4."""
    return _floats(torch.tensor(E2M1))


def raw(ref: TensorRef) -> torch.Tensor:
    """A stored tensor of 8-bit entries as the bytes that it is, in its shape."""
    return ref.read().reshape(-1).view(torch.uint8).reshape(ref.shape)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Two 4-bit patterns of every byte (..., n), the low one first, (..., 2n)."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def from_nibbles(bits: torch.Tensor) -> torch.Tensor:
    """Bytes (..., n) of pairs of 4-bit patterns (..., 2n), the first one low."""
    return bits[..., 0::2] | (bits[..., 1::2] << 4)


class Levels(Protocol):
    """How the codes of a weight are stored."""

    def read(self, ref: TensorRef, width: int) -> torch.Tensor:
        """The codes (rows, width), uint8, of a part of the stored tensor."""

    def write(self, codes: torch.Tensor, ref: TensorRef) -> torch.Tensor:
        """The tensor that stores codes (out, in)."""

    def grid(self, scale: torch.Tensor, groups: torch.Tensor) -> BlockGrid:
        """The grid with these scales, without zeros."""


@dataclass(frozen=True, slots=True)
class Ints:
    """Whole numbers of some bits, one a byte or packed into i32."""

    bits: int
    packed: bool

    def words(self, count: int) -> int:
        """The i32 words that hold so many."""
        return -(-count * self.bits // 32)

    def read(self, ref: TensorRef, width: int) -> torch.Tensor:
        if self.packed:
            return unpacked(ref.read(), self.bits)[:, :width]
        codes = raw(ref) + (1 << self.bits >> 1)  # bytes wrap around
        if bool((codes >> 1 >= 1 << self.bits >> 1).any()):
            raise InputError(f"{ref.name} holds numbers of more than {self.bits} bits")
        return codes

    def write(self, codes: torch.Tensor, ref: TensorRef) -> torch.Tensor:
        if self.packed:
            return packed(codes, self.bits)
        return (codes.int() - (1 << self.bits >> 1)).to(torch.int8)

    def grid(self, scale: torch.Tensor, groups: torch.Tensor) -> BlockGrid:
        half = 1 << self.bits >> 1
        return BlockGrid(scale, groups, low=-half, high=half - 1)


@dataclass(frozen=True, slots=True)
class Fp8:
    """Floats of 8 bits."""

    def read(self, ref: TensorRef, width: int) -> torch.Tensor:
        return e4m3().read(raw(ref), ref.name)

    def write(self, codes: torch.Tensor, ref: TensorRef) -> torch.Tensor:
        return e4m3().stored(codes, raw(ref)).view(torch.float8_e4m3fn)

    def grid(self, scale: torch.Tensor, groups: torch.Tensor) -> BlockGrid:
        return BlockGrid(scale, groups, e4m3().table)


@dataclass(frozen=True, slots=True)
class Fp4:
    """Floats of 4 bits, two a byte."""

    def read(self, ref: TensorRef, width: int) -> torch.Tensor:
        return e2m1().read(nibbles(raw(ref)), ref.name)

    def write(self, codes: torch.Tensor, ref: TensorRef) -> torch.Tensor:
        return from_nibbles(e2m1().stored(codes, nibbles(raw(ref))))

    def grid(self, scale: torch.Tensor, groups: torch.Tensor) -> BlockGrid:
        return BlockGrid(scale, groups, e2m1().table)


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The 4- or 8-bit fields (rows, n), uint8, of i32 words (rows, n bits / 32), low ones first."""
    # A single column of a transpose is contiguous, but not in a layout that can be viewed
    held = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return nibbles(held) if bits == 4 else held


def packed(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """The i32 words (rows, ceil(n bits / 32)) of 4- or 8-bit fields (rows, n), uint8, filled up with 0."""
    rest = -fields.shape[1] % (32 // bits)
    padded = torch.nn.functional.pad(fields, (0, rest))
    held = from_nibbles(padded) if bits == 4 else padded
    return held.contiguous().view(torch.int32)


def is_power_of_two(ref: TensorRef) -> bool:
    """Whether stored scales are e8m0, by name or as bytes."""
    return ref.dtype.name in ("F8_E8M0", "U8")


def scales(ref: TensorRef) -> torch.Tensor:
    """Stored scales of any kind as float32, exactly. Raises InputError for NaN and infinity."""
    found = _powers_of_two(raw(ref)) if is_power_of_two(ref) else ref.read().float()
    if not bool(found.isfinite().all()):
        raise InputError(f"{ref.name} holds scales that are not finite")
    return found


def _powers_of_two(held: torch.Tensor) -> torch.Tensor:
    """2^(byte - 127) as float32; infinity for the byte that means NaN."""
    # Exponent bits of a float32; the smallest is half of its least normal number
    held = held.int()
    return torch.where(held == 0, 1 << 22, held << 23).to(torch.int32).view(torch.float32)


def block_of(shape: Shape, grid: Shape, said: Iterable[Shape] = ()) -> Shape | None:
    """The sides of the blocks that a weight (out, in) with a grid of scales is cut into.

    The first of those that a config says that fits, whose last blocks may be partial; else equal blocks;
    None where there are none.
    """
    if math.prod(grid) == 1:
        return shape
    if len(grid) != 2:
        return None
    for block in said:
        if all(side > 0 for side in block) and grid == tuple(map(_ceil, shape, block)):
            return block
    if not all(grid) or shape[0] % grid[0] or shape[1] % grid[1]:
        return None
    return shape[0] // grid[0], shape[1] // grid[1]


def _ceil(size: int, block: int) -> int:
    return -(-size // block)
