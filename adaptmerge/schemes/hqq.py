"""How [HQQ](https://github.com/mobiusml/hqq) stores weights that it quantised along their inputs (axis 1).

| tensor | holds |
|---|---|
| M.W_q | u8 (rows, group size): lanes of codes; i32 for 3 bits; any float dtype on top (view_as_float) |
| M.scale, M.zero | f16, bf16 or f32 (groups, 1); w = scale (code - zero), and zeros are no whole numbers |
| M.shape, M.group_size, M.axis, M.nbits | numbers |
| M.packing, M.view_as_float, ... | settings of a layer; text as one byte a letter |

Groups run over the flattened weight. The first groups are in the highest bits of W_q, the next ones below
them, and so on: at 4 bits row r of W_q holds groups r and rows + r. 3 bits are ten to a word, and the last
ones of a word may be none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from adaptmerge.bases.base import Base
from adaptmerge.lazy import torch
from adaptmerge.schemes import affine
from adaptmerge.schemes.coded import CodedWeight
from adaptmerge.schemes.grids import BlockGrid
from adaptmerge.schemes.scheme import Scheme
from adaptmerge.tensors.refs import TensorRef

URL = "https://github.com/mobiusml/hqq"
PARTS = ("W_q", "scale", "zero")
NUMBERS = ("shape", "group_size", "axis", "nbits", "packing")
FLAGS = ("quant_scale", "quant_zero")
SETTINGS = (
    *NUMBERS,
    *FLAGS,
    *("unpack_view_dtype", "view_as_float", "compute_dtype", "offload_meta", "encoded_state_dict"),
    *("stores_quant_config", "channel_wise", "optimize", "round_zero"),
)
DTYPES = {
    **dict.fromkeys(PARTS[1:], ("F16", "BF16", "F32")),
    **dict.fromkeys(("shape", "group_size", "axis"), ("I32", "I64")),
    "nbits": ("I32", "I64", "F32"),
    "packing": ("U8",),
}
MOST = 64  # numbers of a setting
PLAIN = ("BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64")


class Lanes(NamedTuple):
    """How many codes an entry of W_q holds, and of how many bits."""

    per: int
    bits: int
    dtype: str

    def shift(self, lane: int) -> int:
        """Where the codes of a lane begin."""
        return self.bits * (self.per - 1 - lane)


PACKINGS = {
    "8bit_u8": Lanes(1, 8, "uint8"),
    "4bit_u8": Lanes(2, 4, "uint8"),
    "3bit_32": Lanes(10, 3, "int32"),
    "2bit_u8": Lanes(4, 2, "uint8"),
    "1bit_u8": Lanes(8, 1, "uint8"),
}


@dataclass(frozen=True, slots=True)
class Hqq:
    """A weight in groups of `size` along its flattened entries; `high` is its largest code."""

    module: str
    shape: tuple[int, int]
    size: int
    high: int
    lanes: Lanes
    parts: affine.Tensors

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        return dict(self.parts)

    def _stored(self, suffix: str) -> TensorRef:
        return dict(self.parts)[f"{self.module}.{suffix}"]

    @property
    def _straddles(self) -> bool:
        """Whether groups do not end with rows."""
        return self.shape[1] % self.size != 0

    def grid(self, rows: tuple[int, int]) -> tuple[torch.Tensor, BlockGrid]:
        width = self.shape[1]
        first, last = rows[0] * width, rows[1] * width
        start, stop = first // self.size, -(-last // self.size)
        skipped = first - start * self.size
        codes = self._groups(start, stop).flatten()[skipped : skipped + last - first]
        scale, zero = (
            self._stored(part).slice(0, start, stop).read().float().flatten() for part in PARTS[1:]
        )
        if self._straddles:
            entries = torch.arange(first, last) // self.size - start
            scale, zero = scale[entries], zero[entries]
        wide = width if self._straddles else width // self.size
        groups = torch.arange(width) // (width // wide)
        shaped = (scale.view(-1, wide), zero.view(-1, wide))
        return codes.view(-1, width), BlockGrid(shaped[0], groups, high=self.high, zero=shaped[1])

    def _groups(self, start: int, stop: int) -> torch.Tensor:
        """The codes of some groups (groups, size), uint8."""
        held = self._stored("W_q")
        height, found = held.shape[0], []
        for lane in range(self.lanes.per):
            low, high = max(start, lane * height), min(stop, (lane + 1) * height)
            if low < high:
                part = held.slice(0, low - lane * height, high - lane * height).read()
                entries = part.view(-1).view(getattr(torch, self.lanes.dtype)).view(-1, self.size)
                entries = entries >> self.lanes.shift(lane)
                found.append((entries & (1 << self.lanes.bits) - 1).to(torch.uint8))
        return torch.cat(found) if found else torch.empty(0, self.size, dtype=torch.uint8)

    def pack(self, codes: torch.Tensor, grid: BlockGrid) -> dict[str, torch.Tensor]:
        held, scale = self._stored("W_q"), self._stored("scale")
        groups = codes.reshape(-1, self.size)
        blank = held.shape[0] * self.lanes.per - len(groups)
        lanes = torch.nn.functional.pad(groups, (0, 0, 0, blank)).view(
            self.lanes.per, held.shape[0], self.size
        )
        raw = torch.zeros(lanes.shape[1:], dtype=getattr(torch, self.lanes.dtype))
        for lane, part in enumerate(lanes):
            raw |= part.to(raw.dtype) << self.lanes.shift(lane)
        found = {f"{self.module}.W_q": affine.as_stored(raw, held)}
        if not self._straddles:
            found[f"{self.module}.scale"] = grid.scale.to(scale.dtype.torch).reshape(scale.shape)
        return found

    def nearest_scales(self, scale: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor | None:
        return None if self._straddles else affine.rounded(scale, self._stored("scale"))


def _detect(base: Base) -> bool:
    return affine.said(base, "hqq") is not None


def _find(base: Base) -> Mapping[str, CodedWeight]:
    """The weights beside which scales lie. Raises InputError naming what is missing or misshapen."""
    return affine.find(base, "HQQ", "W_q", partial(_one, base))


def _one(base: Base, module: str, problems: list[str]) -> Hqq | None:
    tensors = affine.named(base, module, *PARTS, *SETTINGS)
    wrong = affine.missing(base, module, *PARTS, *NUMBERS) + affine.mistyped(tensors, DTYPES)
    wrong += [
        f"{name} is {ref.dtype} {list(ref.shape)}, expected up to {MOST} numbers"
        for name, ref in tensors
        if name.rpartition(".")[2] in (*NUMBERS, *FLAGS)
        and not (ref.dtype.name in PLAIN and ref.count <= MOST)
    ]
    by_part = {name.rpartition(".")[2]: ref for name, ref in tensors}
    wrong = wrong or _refused(module, by_part)
    if wrong:
        problems += wrong
        return None
    lanes = PACKINGS[_text(by_part["packing"])]
    (rows, width), (size,) = _numbers(by_part["shape"]), _numbers(by_part["group_size"])
    outputs, inputs, size = int(rows), int(width), int(size)
    groups = outputs * inputs // size if min(outputs, inputs, size) > 0 else 0
    if groups < 1 or groups * size != outputs * inputs:
        problems.append(f"{module} has groups of {size}, which {[outputs, inputs]} is not made of")
        return None
    high = round(2 ** _numbers(by_part["nbits"])[0] - 1)
    wrong = affine.misfits(tensors, dict.fromkeys(PARTS[1:], (groups, 1)))
    wrong += _lanes_wrong(module, by_part["W_q"], lanes, (groups, size))
    problems += wrong
    parts = tuple(tensors)
    return None if wrong else Hqq(module, (outputs, inputs), size, high, lanes, parts)


def _lanes_wrong(module: str, held: TensorRef, lanes: Lanes, groups: tuple[int, int]) -> list[str]:
    height, nbytes = -(-groups[0] // lanes.per), getattr(torch, lanes.dtype).itemsize
    whole = lanes.bits == 3 or groups[0] % lanes.per == 0
    rows = held.shape[0] if len(held.shape) == 2 else 0
    if whole and rows == height and held.nbytes == height * groups[1] * nbytes:
        return []
    return [
        f"{module}.W_q has the shape {list(held.shape)} of {held.dtype}, expected {lanes.per} codes each "
        f"of {groups[0]} groups of {groups[1]}"
    ]


def _refused(module: str, by_part: Mapping[str, TensorRef]) -> list[str]:
    """Problems of a layer's settings."""
    counts = {"shape": 2, "group_size": 1, "axis": 1, "nbits": 1}
    odd = [part for part, count in counts.items() if by_part[part].count != count]
    if odd:
        return [f"{module}.{part} holds {by_part[part].count} numbers" for part in odd]
    found = []
    if _numbers(by_part["axis"]) != [1]:
        found.append(f"{module} is quantised along its outputs (axis 0), only axis 1 is known")
    if any(any(_numbers(by_part[flag])) for flag in FLAGS if flag in by_part):
        found.append(
            f"{module} has scales or zeros that are quantised themselves, which is not known"
        )
    packing = _text(by_part["packing"])
    if packing not in PACKINGS:
        found.append(f"{module} is packed as {packing!r}, expected one of: {', '.join(PACKINGS)}")
    elif not 1 <= _numbers(by_part["nbits"])[0] <= PACKINGS[packing].bits:
        found.append(f"{module} has {_numbers(by_part['nbits'])[0]} bits, packed as {packing!r}")
    return found


def _numbers(ref: TensorRef) -> list[float]:
    found: list[float] = ref.read().flatten().tolist()
    return found


def _text(ref: TensorRef) -> str:
    return "".join(chr(int(letter)) for letter in _numbers(ref)[:64])


SCHEME = Scheme("hqq", "HQQ, axis 1", URL, _detect, _find)
