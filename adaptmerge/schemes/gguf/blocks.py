"""The blocks of [ggml](https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h): codes of
32 or 256 entries of a row, with what scales them, in a run of bytes.

| type | value of a code q | entries that share a scale |
|---|---|---|
| Q8_0, Q4_0, Q5_0 | d q, d (q - 8), d (q - 16) | 32 |
| Q4_1, Q5_1 | d q + m | 32 |
| IQ4_NL | d table[q] | 32 |
| MXFP4 | 2^e e2m1[q] | 32 |
| the K-quants, IQ4_XS | see `super_blocks` | 16 or 32 of 256 |

d and m are float16. What scales the codes of a block by itself, as one float16, can be chosen anew; 6-bit
parts of a common scale and powers of two are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.files.gguf import TYPES
from adaptmerge.lazy import torch
from adaptmerge.schemes.grids import BlockGrid
from adaptmerge.schemes.narrow import Fp4, e2m1

LARGEST = 65504.0  # of float16
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True, slots=True)
class Codec:
    """How blocks of one type hold codes. Blocks are bytes (rows, blocks, bytes of one)."""

    type: int
    shared: ClassVar[int] = 32  # entries that share a scale
    scale_at: ClassVar[int | None] = (
        0  # where a block has its one float16 scale; None: none to choose
    )

    @property
    def name(self) -> str:
        return TYPES[self.type].name

    def codes(self, blocks: torch.Tensor) -> torch.Tensor:
        """The codes (rows, blocks, entries of one), uint8."""
        raise NotImplementedError

    def put(self, codes: torch.Tensor, blocks: torch.Tensor) -> None:
        """Writes codes into the blocks."""
        raise NotImplementedError

    def lattice(self, blocks: torch.Tensor, groups: torch.Tensor) -> BlockGrid:
        """The grid; `groups` has the scale's number for each column."""
        raise NotImplementedError

    def grid(self, raw: torch.Tensor) -> tuple[torch.Tensor, BlockGrid]:
        """The codes (rows, in) and the grid of bytes (rows, bytes of a row)."""
        blocks = self._cut(raw)
        codes = self.codes(blocks).flatten(1)
        return codes, self.lattice(blocks, torch.arange(codes.shape[1]) // self.shared)

    def pack(self, raw: torch.Tensor, codes: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
        """The bytes (rows, bytes of a row) of codes on a grid, with all else as in `raw`."""
        blocks = self._cut(raw).clone()
        self.put(codes.view(*blocks.shape[:2], -1), blocks)
        if self.scale_at is not None:
            put_half(grid.scale, blocks, self.scale_at)
        return blocks.flatten(1)

    def nearest_scales(self, raw: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
        """The scales (rows, blocks) that can be stored nearest to these; None where none can be chosen."""
        if self.scale_at is None:
            return None
        return scale.clamp(-LARGEST, LARGEST).half().to(scale.dtype)

    def _cut(self, raw: torch.Tensor) -> torch.Tensor:
        nbytes = TYPES[self.type].nbytes
        return raw.contiguous().view(raw.shape[0], -1, nbytes)


def half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 of every block, as float32 (rows, blocks)."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()[..., 0]


def cut(values: torch.Tensor, *sizes: int) -> torch.Tensor:
    """Values (..., n) as (..., *sizes)."""
    return values.reshape(*values.shape[:-1], *sizes)


def put_half(values: torch.Tensor, blocks: torch.Tensor, at: int) -> None:
    """Writes a float16 (rows, blocks) into every block, but where it is that already."""
    before = half(blocks, at)
    same = (before == values) | before.isnan()
    made = values.half().unsqueeze(-1).view(torch.uint8)
    blocks[..., at : at + 2] = torch.where(same[..., None], blocks[..., at : at + 2], made)


def split(held: torch.Tensor) -> torch.Tensor:
    """The nibbles of bytes (..., n): all low ones, then all high ones (..., 2n)."""
    return torch.cat((held & 15, held >> 4), -1)


def joined(nibbles: torch.Tensor) -> torch.Tensor:
    """The bytes of nibbles, as `split` has them."""
    low, high = nibbles.chunk(2, -1)
    return low | high << 4


class Bytes(Codec):
    """Q8_0: d, then 32 whole numbers of 8 bits."""

    __slots__ = ()

    def codes(self, blocks: torch.Tensor) -> torch.Tensor:
        return blocks[..., 2:] ^ 128

    def put(self, codes: torch.Tensor, blocks: torch.Tensor) -> None:
        blocks[..., 2:] = codes ^ 128

    def lattice(self, blocks: torch.Tensor, groups: torch.Tensor) -> BlockGrid:
        return BlockGrid(half(blocks, 0), groups, low=-128, high=127)


class Nibbles(Codec):
    """Q4_0: d, then 16 bytes. Q4_1: d and m before them."""

    __slots__ = ()

    def codes(self, blocks: torch.Tensor) -> torch.Tensor:
        return split(blocks[..., -16:])

    def put(self, codes: torch.Tensor, blocks: torch.Tensor) -> None:
        blocks[..., -16:] = joined(codes)

    def lattice(self, blocks: torch.Tensor, groups: torch.Tensor) -> BlockGrid:
        if self.name.endswith("_0"):
            return BlockGrid(half(blocks, 0), groups, low=-self.middle, high=self.middle - 1)
        return BlockGrid(half(blocks, 0), groups, high=2 * self.middle - 1, offset=half(blocks, 2))

    @property
    def middle(self) -> int:
        """Half of the number of codes."""
        return 8


class Fives(Nibbles):
    """Q5_0 and Q5_1: four bytes with the fifth bit of each code before the nibbles."""

    __slots__ = ()

    @property
    def middle(self) -> int:
        return 16

    def codes(self, blocks: torch.Tensor) -> torch.Tensor:
        high = blocks[..., -20:-16, None] >> torch.arange(8, dtype=torch.uint8) & 1
        return split(blocks[..., -16:]) | high.flatten(-2) << 4

    def put(self, codes: torch.Tensor, blocks: torch.Tensor) -> None:
        blocks[..., -16:] = joined(codes & 15)
        bits = cut((codes >> 4), 4, 8) << torch.arange(8, dtype=torch.uint8)
        blocks[..., -20:-16] = bits.sum(-1, dtype=torch.uint8)


class Table(Nibbles):
    """IQ4_NL: nibbles that count in a table."""

    __slots__ = ()

    def lattice(self, blocks: torch.Tensor, groups: torch.Tensor) -> BlockGrid:
        return BlockGrid(half(blocks, 0), groups, table=torch.tensor(IQ4, dtype=torch.float32))


class Mxfp4(Nibbles):
    """MXFP4: an exponent, then nibbles that are floats."""

    __slots__ = ()
    scale_at: ClassVar[int | None] = None

    def codes(self, blocks: torch.Tensor) -> torch.Tensor:
        return e2m1().read(split(blocks[..., -16:]), self.name)

    def put(self, codes: torch.Tensor, blocks: torch.Tensor) -> None:
        blocks[..., -16:] = joined(e2m1().stored(codes, split(blocks[..., -16:])))

    def lattice(self, blocks: torch.Tensor, groups: torch.Tensor) -> BlockGrid:
        scale = torch.exp2(blocks[..., 0].double() - 127).float()
        return Fp4().grid(scale, groups)
