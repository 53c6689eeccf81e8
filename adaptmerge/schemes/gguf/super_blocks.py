"""The types of ggml whose 256 entries share one scale d, of which parts of 16 or 32 have a few bits each.

| type | value of a code q | parts of | bits of a part's scale |
|---|---|---|---|
| Q2_K | d s q - e m | 16 | 4, and 4 for m |
| Q3_K | d (s - 32) (q - 4) | 16 | 6 |
| Q4_K, Q5_K | d s q - e m | 32 | 6, and 6 for m |
| Q6_K | d s (q - 32) | 16 | 8 |
| IQ4_XS | d (s - 32) table[q] | 32 | 6 |

d and e are float16. All of this is kept when codes are chosen anew.
"""

from __future__ import annotations

from typing import ClassVar

from adaptmerge.lazy import torch
from adaptmerge.schemes.gguf.blocks import IQ4, Codec, cut, half, joined, split
from adaptmerge.schemes.grids import BlockGrid


class SuperBlock(Codec):
    """Blocks of 256 entries."""

    __slots__ = ()
    scale_at: ClassVar[int | None] = None


def _fields(held: torch.Tensor, bits: int) -> torch.Tensor:
    """The bit fields of bytes (..., n): the lowest of all, then the next (..., 8 / bits, n)."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return held.unsqueeze(-2) >> shifts & (1 << bits) - 1


def _together(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """The bytes of bit fields, as `_fields` has them."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return (fields << shifts).sum(-2, dtype=torch.uint8)


def _scaled(blocks: torch.Tensor, at: int, parts: torch.Tensor) -> torch.Tensor:
    """The float16 of every block times its parts (rows, blocks, parts), as (rows, all parts), float32."""
    return (half(blocks, at)[..., None] * parts.float()).flatten(1)


def _six_bits(held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 8 scales and 8 minima of 6 bits in 12 bytes (Q4_K, Q5_K)."""
    first, second, third = cut(held, 3, 4).unbind(-2)
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), -1)
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), -1)
    return scales, minima


class Q2K(SuperBlock):
    """scales 16 bytes, codes 64, d, e."""

    __slots__ = ()
    shared: ClassVar[int] = 16

    def codes(self, blocks: torch.Tensor) -> torch.Tensor:
        return _fields(cut(blocks[..., 16:80], 2, 32), 2).flatten(-3)

    def put(self, codes: torch.Tensor, blocks: torch.Tensor) -> None:
        blocks[..., 16:80] = _together(cut(codes, 2, 4, 32), 2).flatten(-2)

    def lattice(self, blocks: torch.Tensor, groups: torch.Tensor) -> BlockGrid:
        held = blocks[..., :16]
        offset = -_scaled(blocks, 82, held >> 4)
        return BlockGrid(_scaled(blocks, 80, held & 15), groups, high=3, offset=offset)


class Q3K(SuperBlock):
    """high bits 32 bytes, codes 64, scales 12, d."""

    __slots__ = ()
    shared: ClassVar[int] = 16

    def codes(self, blocks: torch.Tensor) -> torch.Tensor:
        low = _fields(cut(blocks[..., 32:96], 2, 32), 2).flatten(-3)
        return low | _fields(blocks[..., :32], 1).flatten(-2) << 2

    def put(self, codes: torch.Tensor, blocks: torch.Tensor) -> None:
        blocks[..., 32:96] = _together(cut((codes & 3), 2, 4, 32), 2).flatten(-2)
        blocks[..., :32] = _together(cut((codes >> 2), 8, 32), 1)

    def lattice(self, blocks: torch.Tensor, groups: torch.Tensor) -> BlockGrid:
        held = blocks[..., 96:108]
        parts = split(held[..., :8]) | _fields(held[..., 8:], 2).flatten(-2) << 4
        return BlockGrid(_scaled(blocks, 108, parts.int() - 32), groups, low=-4, high=3)


class Q4K(SuperBlock):
    """d, e, scales 12 bytes, codes 128."""

    __slots__ = ()

    def codes(self, blocks: torch.Tensor) -> torch.Tensor:
        return split(cut(blocks[..., -128:], 4, 32)).flatten(-2)

    def put(self, codes: torch.Tensor, blocks: torch.Tensor) -> None:
        blocks[..., -128:] = joined(cut(codes, 4, 64)).flatten(-2)

    def lattice(self, blocks: torch.Tensor, groups: torch.Tensor) -> BlockGrid:
        scales, minima = _six_bits(blocks[..., 4:16])
        offset = -_scaled(blocks, 2, minima)
        return BlockGrid(_scaled(blocks, 0, scales), groups, high=self.most, offset=offset)

    @property
    def most(self) -> int:
        """The largest code."""
        return 15


class Q5K(Q4K):
    """d, e, scales 12 bytes, high bits 32, codes 128."""

    __slots__ = ()

    @property
    def most(self) -> int:
        return 31

    def codes(self, blocks: torch.Tensor) -> torch.Tensor:
        return super().codes(blocks) | _fields(blocks[..., 16:48], 1).flatten(-2) << 4

    def put(self, codes: torch.Tensor, blocks: torch.Tensor) -> None:
        super().put(codes & 15, blocks)
        blocks[..., 16:48] = _together(cut((codes >> 4), 8, 32), 1)


class Q6K(SuperBlock):
    """low bits 128 bytes, high bits 64, scales 16, d."""

    __slots__ = ()
    shared: ClassVar[int] = 16

    def codes(self, blocks: torch.Tensor) -> torch.Tensor:
        low = split(cut(blocks[..., :128], 2, 64))
        high = _fields(cut(blocks[..., 128:192], 2, 32), 2).flatten(-2)
        return (low | high << 4).flatten(-2)

    def put(self, codes: torch.Tensor, blocks: torch.Tensor) -> None:
        halves = cut(codes, 2, 128)
        blocks[..., :128] = joined(halves & 15).flatten(-2)
        high = cut((halves >> 4), 4, 32)
        blocks[..., 128:192] = _together(high, 2).flatten(-2)

    def lattice(self, blocks: torch.Tensor, groups: torch.Tensor) -> BlockGrid:
        parts = blocks[..., 192:208].contiguous().view(torch.int8)
        return BlockGrid(_scaled(blocks, 208, parts), groups, low=-32, high=31)


class Iq4Xs(SuperBlock):
    """d, high bits of scales 2 bytes, low bits 4, codes 128."""

    __slots__ = ()

    def codes(self, blocks: torch.Tensor) -> torch.Tensor:
        return split(cut(blocks[..., 8:], 8, 16)).flatten(-2)

    def put(self, codes: torch.Tensor, blocks: torch.Tensor) -> None:
        blocks[..., 8:] = joined(cut(codes, 8, 32)).flatten(-2)

    def lattice(self, blocks: torch.Tensor, groups: torch.Tensor) -> BlockGrid:
        low = _fields(blocks[..., 4:8], 4).transpose(-1, -2).flatten(-2)
        high = _fields(blocks[..., 2:4], 2).transpose(-1, -2).flatten(-2)
        parts = (low | high << 4).int() - 32
        table = torch.tensor(IQ4, dtype=torch.float32)
        return BlockGrid(_scaled(blocks, 0, parts), groups, table=table)


SUPER_BLOCKS = (Q2K(10), Q3K(11), Q4K(12), Q5K(13), Q6K(14), Iq4Xs(23))
