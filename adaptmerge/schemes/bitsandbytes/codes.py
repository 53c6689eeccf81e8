"""The grids of [bitsandbytes](https://github.com/bitsandbytes-foundation/bitsandbytes), on the CPU.

| scheme | a weight becomes |
|---|---|
| nf4, fp4 | per block of 64 along the flattened weight: codes of a table of 16, times the block's absmax |
| double | that absmax less its mean, again in blocks of 256 with an 8-bit code |
| int8 | per row: round(127 w / absmax) |

Codes, scales and values are those of bitsandbytes 0.50 on x86, bit for bit. Two quirks come with it:

- Full blocks are multiplied by 1 / absmax, a last short block is divided by absmax.
- The 8-bit code is the nearest one only up to the 65536 positions that scaled values are rounded to.

The nearest of 16 codes is found without a search: scaled values fall into equal cells, narrow enough that
each holds at most one midpoint of the table, and one comparison with it decides.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

from adaptmerge.errors import UsageError
from adaptmerge.lazy import torch

Table = tuple[float, ...]

# Quantiles of N(0, 1), from QLoRA (arXiv 2305.14314)
NF4: Table = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Floats of 1 sign, 2 exponent and 1 mantissa bit over the largest of them, rounded to float32
_MAGNITUDES = (
    0.0,
    0.0052083334885537624,
    0.6666666865348816,
    1.0,
    0.3333333432674408,
    0.5,
    0.1666666716337204,
    0.25,
)
FP4: Table = (*_MAGNITUDES, 0.0, *(-value for value in _MAGNITUDES[1:]))

BLOCK, NESTED_BLOCK = 64, 256
SMALLEST_SCALE = 1e-38  # below it 1 / absmax would overflow
POSITIONS = 65535  # of the 8-bit code, over [-1, 1]
INT8_STEP = 7.874015718698502e-3  # as it is written there, for 1 / 127
CHUNK = 1 << 17  # entries that are worked on at once, so that they stay in the cache
ROUND_TRIPS = {
    "nf4": (NF4, False),
    "nf4,double": (NF4, True),
    "fp4": (FP4, False),
    "fp4,double": (FP4, True),
}


class Cells(NamedTuple):
    """How values in [-1, 1] find their code: cell = half - half * value, downwards from 1."""

    half: int  # a power of two, so that the only rounding in a cell's number is monotone
    midpoints: torch.Tensor  # of each cell, float32; NaN where it has none
    codes: torch.Tensor  # int32: above the midpoint, and 16 times the one up to it


@cache
def cells(table: Table) -> Cells:
    """The cells of a table of 16 values in [-1, 1], in any order; of equal ones the first is the lower."""
    values = torch.tensor(table, dtype=torch.float32)
    values, order = values.sort(stable=True)
    middles = (values[:-1] + values[1:]) / 2
    half = 2 ** math.ceil(math.log2(2 / float(middles.diff().min())))
    owners = torch.rsub(middles, half, alpha=half).int()
    count = torch.arange(2 * half + 1)
    above = (owners >= count[:, None]).sum(1)  # midpoints below all values, or all but the cell's
    midpoints = torch.full((len(count),), math.nan).index_put_((owners.long(),), middles)
    codes = order[above] + 16 * order[(above - 1).clamp(min=0)]
    return Cells(half, midpoints, codes.int())


def _nearest(scaled: torch.Tensor, lookup: Cells) -> torch.Tensor:
    """The codes, int32, of values of any shape in [-1, 1]; a tie goes to the lower value."""
    flat = scaled.reshape(-1)
    # Rounded down by the cast, and NaN to a number below 0, which is the cell that bitsandbytes means
    cell = torch.rsub(flat, lookup.half, alpha=lookup.half).int().clamp_(min=0)
    middle = lookup.midpoints.index_select(0, cell)
    # Comparing into a float tensor is vectorised, into a boolean one it is not
    shift = torch.le(flat, middle, out=middle).mul_(4).int()
    return lookup.codes.index_select(0, cell).bitwise_right_shift_(shift).bitwise_and_(15)


def quantise_4bit(
    weight: torch.Tensor, table: Table, blocksize: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes (n, uint8, not packed) and absmax (blocks, float32) of a float32, bfloat16 or float16
    weight of any shape, in row-major order, as `bitsandbytes.functional.quantize_4bit` has them."""
    flat, lookup = weight.detach().reshape(-1), cells(table)
    codes = torch.empty(flat.shape, dtype=torch.uint8)
    absmax = torch.empty(-(-len(flat) // blocksize))
    full = len(flat) - len(flat) % blocksize
    for part, blocks in _chunks(full, blocksize):
        values = flat[part].float().view(-1, blocksize)
        largest = torch.amax(values.abs(), 1, out=absmax[blocks])
        values = values * largest.clamp(min=SMALLEST_SCALE).reciprocal_()[:, None]
        codes[part] = _nearest(values, lookup)
    if full < len(flat):
        rest = flat[full:].float()
        absmax[-1] = rest.abs().max().clamp(min=SMALLEST_SCALE)
        codes[full:] = _nearest(rest / absmax[-1], lookup)
    return codes, absmax


def dequantise_4bit(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    table: Table,
    shape: tuple[int, ...],
    blocksize: int = BLOCK,
) -> torch.Tensor:
    """The weight (shape, float32) of codes (n, uint8) and absmax (blocks, float32), by the definition of
    bitsandbytes' 4-bit formats: table[code] * absmax[entry // blocksize]."""
    values, out = torch.tensor(table, dtype=torch.float32), torch.empty(codes.shape)
    full = len(codes) - len(codes) % blocksize
    for part, blocks in _chunks(full, blocksize):
        scaled = out[part].view(-1, blocksize)
        picked = values.index_select(0, codes[part].int()).view(-1, blocksize)
        torch.mul(picked, absmax[blocks, None], out=scaled)
    if full < len(codes):
        out[full:] = values[codes[full:].int()] * absmax[-1]
    return out.view(shape)


def _chunks(size: int, blocksize: int) -> list[tuple[slice, slice]]:
    """Entries 0..size, a multiple of the block's size, as parts of whole blocks: (entries, blocks)."""
    step = max(1, CHUNK // blocksize)
    blocks = [slice(s, min(s + step, size // blocksize)) for s in range(0, size // blocksize, step)]
    return [(slice(b.start * blocksize, b.stop * blocksize), b) for b in blocks]


@cache
def dynamic_map() -> torch.Tensor:
    """The 256 values (float32, ascending) of bitsandbytes' signed 8-bit dynamic code (arXiv 1511.04561):
    of each of 7 decades below 1 the midpoints of 2^i parts, with both signs, and 0 and 1."""
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        decades.append(10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2))
    positive = torch.cat(decades)
    return torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort().values


def double_quantise(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The codes (blocks, uint8), nested absmax (ceil(blocks / 256), float32) and offset (scalar, float32)
    of absmax (blocks, float32), as bitsandbytes' `quantize_4bit(compress_statistics=True)` has them."""
    offset = absmax.mean()
    count = -(-len(absmax) // NESTED_BLOCK)
    centred = absmax.new_zeros(count * NESTED_BLOCK)
    torch.sub(absmax, offset, out=centred[: len(absmax)])
    nested = centred.view(count, NESTED_BLOCK).abs().amax(1)
    scaled = (centred.view(count, NESTED_BLOCK) * nested.reciprocal()[:, None]).clamp_(-1, 1)
    position = ((scaled + 1) * (POSITIONS / 2) + 0.5).int()
    position[nested == 0] = 0
    codes = dynamic_map()
    middles = (codes[:-1] + codes[1:]) / 2
    found = torch.bucketize(2.0 * position.float() / POSITIONS - 1, middles)
    return found.to(torch.uint8).view(-1)[: len(absmax)], nested, offset


def double_dequantise(
    codes: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """The absmax (blocks, float32) of what `double_quantise` gives, by the definition of bitsandbytes'
    nested state: map[code] * nested[block // 256] + offset."""
    scales = nested.repeat_interleave(NESTED_BLOCK)[: len(codes)]
    return dynamic_map()[codes.int()] * scales + offset


def quantise_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes (out, in, int8) and absmax (out, float32) of a weight (out, in), as
    `bitsandbytes.functional.int8_vectorwise_quant` has them; rows too small for 127 / absmax become 0."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    absmax = torch.empty(weight.shape[0])
    step = max(1, CHUNK // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        values = weight[rows].detach().float()
        largest = torch.amax(values.abs(), 1, out=absmax[rows])
        scale = 127.0 / largest
        scale[scale.isinf()] = 0
        codes[rows] = (values * scale[:, None]).round_().int()
    return codes, absmax


def dequantise_int8(codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """The weight (out, in, float32) of codes (out, in, int8) and absmax (out, float32), as
    `bitsandbytes.functional.int8_vectorwise_dequant` has it."""
    return codes.float().mul_(absmax[:, None]).mul_(INT8_STEP)


def round_trip(weight: torch.Tensor, trained_on: str) -> torch.Tensor:
    """What a weight becomes (float32, same shape) when bitsandbytes quantises it on loading as "nf4",
    "nf4,double", "fp4", "fp4,double" or "int8", given in the dtype that it is loaded in; int8 goes
    through float16, as `bitsandbytes.nn.Int8Params` does."""
    if trained_on == "int8":
        return dequantise_int8(*quantise_int8(weight.half()))
    if trained_on not in ROUND_TRIPS:
        known = ", ".join([*ROUND_TRIPS, "int8"])
        raise UsageError(f"trained on {trained_on!r} is not known; expected one of: {known}")
    table, double = ROUND_TRIPS[trained_on]
    codes, absmax = quantise_4bit(weight, table)
    if double:
        absmax = double_dequantise(*double_quantise(absmax))
    return dequantise_4bit(codes, absmax, table, tuple(weight.shape))
