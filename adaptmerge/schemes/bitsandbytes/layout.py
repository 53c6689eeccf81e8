"""How `transformers` stores weights that bitsandbytes quantised.

| tensor | 4 bit |
|---|---|
| M.weight | two codes a byte, the first in the high half, row-major, in any dtype (quant_storage) |
| M.weight.absmax | f32 per 64 entries; u8 where it is quantised again |
| M.weight.nested_absmax, .nested_quant_map | f32 per 256 of these, the 256 values of a code |
| M.weight.quant_map | f32, the 16 values |
| M.weight.quant_state.bitsandbytes__nf4 (fp4) | JSON as bytes: block size, shape, dtype, offset |

| tensor | 8 bit |
|---|---|
| M.weight | i8 (out, in); w = code SCB / 127 |
| M.SCB | f32 (out), the largest of each row |
| M.weight_format | u8, how rows are ordered: as they are |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from adaptmerge.bases.base import Base
from adaptmerge.errors import InputError
from adaptmerge.files.strict_json import object_in
from adaptmerge.files.typed import Number, built
from adaptmerge.lazy import torch
from adaptmerge.schemes import affine
from adaptmerge.schemes.bitsandbytes.codes import INT8_STEP
from adaptmerge.schemes.coded import CodedWeight
from adaptmerge.schemes.grids import BlockGrid
from adaptmerge.schemes.scheme import Scheme, checked, config_of, kept_under
from adaptmerge.tensors.dtypes import F32
from adaptmerge.tensors.refs import TensorRef

URL = "https://github.com/bitsandbytes-foundation/bitsandbytes"
STATE = ".quant_state.bitsandbytes__"
LOW, HIGH = -128, 127
FLOATS = ("F16", "BF16", "F32", "F64")
NOTHING = "its config says that bitsandbytes quantised it, but no weight is"


class State(NamedTuple):
    """What the JSON beside 4-bit codes says."""

    block: int
    shape: tuple[int, int]
    nested_block: int


@dataclass(frozen=True)
class Said:
    """The JSON beside 4-bit codes."""

    OPEN: ClassVar[bool] = True
    blocksize: int
    shape: tuple[int, int]
    nested_blocksize: int = 256
    nested_offset: Number = 0.0


@dataclass(frozen=True, slots=True)
class FourBit:
    """A weight of two codes a byte; `nested` are the absmax and map that its absmax is quantised with."""

    module: str
    shape: tuple[int, int]
    state: State
    weight: TensorRef
    absmax: TensorRef
    table: TensorRef
    nested: tuple[TensorRef, TensorRef] | None = None
    beside: tuple[TensorRef, ...] = ()

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        refs = (self.weight, self.absmax, self.table, *(self.nested or ()), *self.beside)
        return {ref.name: ref for ref in refs}

    def _name(self, suffix: str) -> str:
        return f"{self.module}.weight{suffix}"

    @property
    def _straddles(self) -> bool:
        """Whether blocks do not end with rows."""
        return self.shape[1] % self.state.block != 0

    def grid(self, rows: tuple[int, int]) -> tuple[torch.Tensor, BlockGrid]:
        width, block = self.shape[1], self.state.block
        first, last = rows[0] * width, rows[1] * width
        size = self.weight.dtype.bits // 8
        start, stop = first // 2 // size, -(-last // 2 // size)
        raw = _bytes(self.weight.slice(0, start, stop))
        nibbles = torch.stack((raw >> 4, raw & 15), 1).view(-1)
        skipped = first - 2 * size * start
        nibbles = nibbles[skipped : skipped + last - first]
        order, table = self._order()
        places = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))
        codes = places.to(torch.uint8)[nibbles.int()].view(-1, width)
        scale = self._scales()
        if self._straddles:
            entries = torch.arange(first, last) // block
            part, groups = scale[entries].view(-1, width), torch.arange(width)
            grid = BlockGrid(part, groups, table, across=block if self._are_whole(rows) else 0)
        else:
            part = scale.view(-1, width // block)[slice(*rows)]
            grid = BlockGrid(part, torch.arange(width) // block, table)
        return codes, grid

    @property
    def _moves_across(self) -> bool:
        """Whether scales of blocks across rows can be any number."""
        return self._straddles and self.nested is None and self.absmax.dtype == F32

    def _are_whole(self, rows: tuple[int, int]) -> bool:
        """Whether rows are those of whole blocks, whose scales can be any number."""
        ends = [row * self.shape[1] % self.state.block == 0 for row in rows]
        return self._moves_across and ends[0] and (ends[1] or rows[1] == self.shape[0])

    def _order(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes by ascending value, and these values."""
        table = self.table.read().float().flatten()
        order = torch.argsort(table, stable=True)
        return order, table[order]

    def _scales(self) -> torch.Tensor:
        """The absmax of all blocks, float32."""
        stored = self.absmax.read()
        if self.nested is None:
            return stored.float().flatten()
        return self._map()[stored.flatten().int()] * self._spread() + self._offset()

    def _offset(self) -> float:
        """What is added to every absmax that is quantised again."""
        said = _said(self.beside[0])
        return 0.0 if said is None else said.nested_offset

    def _map(self) -> torch.Tensor:
        assert self.nested is not None
        return self.nested[1].read().float().flatten()

    def _spread(self) -> torch.Tensor:
        """The scale of every absmax code."""
        assert self.nested is not None
        return (
            self.nested[0]
            .read()
            .float()
            .repeat_interleave(self.state.nested_block)[: self.absmax.count]
        )

    def pack(self, codes: torch.Tensor, grid: BlockGrid) -> dict[str, torch.Tensor]:
        order, _ = self._order()
        nibbles = order.to(torch.uint8)[codes.flatten().int()]
        nibbles = torch.nn.functional.pad(nibbles, (0, len(nibbles) % 2)).view(-1, 2)
        raw = (nibbles[:, 0] << 4) | nibbles[:, 1]
        stored = raw.view(self.weight.dtype.torch).view(self.weight.shape)
        found = {self._name(""): stored}
        if not self._straddles or self._moves_across:
            absmax = grid.scale.flatten()[:: self.state.block if self._straddles else 1]
            kept = (
                absmax.to(self.absmax.dtype.torch) if self.nested is None else self._coded(absmax)
            )
            found[self._name(".absmax")] = kept.view(self.absmax.shape)
        return found

    def _coded(self, absmax: torch.Tensor) -> torch.Tensor:
        """The 8-bit codes nearest to values of absmax; those that are stored where they stand for them."""
        stored = self.absmax.read().flatten()
        values = (absmax - self._offset()) / self._spread()
        table = self._map()
        found = torch.bucketize(values, (table[:-1] + table[1:]) / 2).to(torch.uint8)
        return torch.where(self._scales() == absmax, stored, found)

    def nearest_scales(self, scale: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor | None:
        if self._straddles:
            return None
        if self.nested is None:
            return scale.to(self.absmax.dtype.torch).to(scale.dtype)
        count = self.shape[1] // self.state.block
        spread = self._spread().view(-1, count)[slice(*rows)]
        table = self._map()
        values = (scale - self._offset()) / spread
        codes = torch.bucketize(values, (table[:-1] + table[1:]) / 2)
        return table[codes] * spread + self._offset()


@dataclass(frozen=True, slots=True)
class EightBit:
    """A weight of one code a byte, with a scale per row."""

    module: str
    shape: tuple[int, int]
    weight: TensorRef
    scale: TensorRef
    beside: tuple[TensorRef, ...] = ()

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        return {ref.name: ref for ref in (self.weight, self.scale, *self.beside)}

    def grid(self, rows: tuple[int, int]) -> tuple[torch.Tensor, BlockGrid]:
        codes = (self.weight.slice(0, *rows).read().int() - LOW).to(torch.uint8)
        scale = self.scale.reshape(self.shape[0]).slice(0, *rows).read().float()[:, None]
        groups = torch.zeros(self.shape[1], dtype=torch.long)
        return codes, BlockGrid(scale * INT8_STEP, groups, low=LOW, high=HIGH)

    def pack(self, codes: torch.Tensor, grid: BlockGrid) -> dict[str, torch.Tensor]:
        stored = (codes.int() + LOW).to(torch.int8)
        before = self.scale.read()
        scale = grid.scale.view(before.shape)
        # dividing what was multiplied is not always exact
        kept = torch.where(before * INT8_STEP == scale, before, scale / INT8_STEP)
        return {f"{self.module}.weight": stored, f"{self.module}.SCB": kept.to(before.dtype)}

    def nearest_scales(self, scale: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor | None:
        return scale


def _bytes(ref: TensorRef) -> torch.Tensor:
    """A stored tensor as the bytes that it is."""
    return ref.read().reshape(-1).view(torch.uint8)


def _config(base: Base) -> Mapping[str, object]:
    found = config_of(base)
    return found if found.get("quant_method") in ("bitsandbytes", None) else {}


def _is_4bit(base: Base) -> bool:
    return bool(_config(base).get("load_in_4bit") or _config(base).get("_load_in_4bit"))


def _is_8bit(base: Base) -> bool:
    return bool(_config(base).get("load_in_8bit") or _config(base).get("_load_in_8bit"))


def _find_4bit(base: Base) -> Mapping[str, CodedWeight]:
    """The weights beside which a state lies. Raises InputError naming what is missing or misshapen."""
    problems: list[str] = []
    found: dict[str, CodedWeight] = {}
    for name in base.tensors:
        weight, mark, _ = name.partition(STATE)
        if mark:
            module = weight.removesuffix(".weight")
            one = _four_bit(base, module, name, problems)
            found.update({} if one is None else {module: one})
    return checked(base, found, problems, NOTHING)


def _four_bit(base: Base, module: str, state_name: str, problems: list[str]) -> FourBit | None:
    tensors, name = base.tensors, f"{module}.weight"
    state, nested = (
        _state(tensors[state_name]),
        (f"{name}.nested_absmax", f"{name}.nested_quant_map"),
    )
    wanted = [name, f"{name}.absmax", f"{name}.quant_map"]
    wanted += list(nested) if any(part in tensors for part in nested) else []
    lost = [part for part in wanted if part not in tensors]
    problems += [f"{part} is missing" for part in lost]
    if state is None:
        problems.append(f"{state_name} does not say a block size and a shape of two sides")
    if lost or state is None:
        return None
    weight, absmax = tensors[name], tensors[f"{name}.absmax"]
    count, table = state.shape[0] * state.shape[1], tensors[wanted[2]]
    pair = (tensors[nested[0]], tensors[nested[1]]) if len(wanted) == 5 else None
    wrong = [*_held_wrong(state, absmax, table, pair)]
    if wrong:
        problems += wrong
        return None
    if weight.nbytes != (count + 1) // 2 or absmax.count != -(-count // state.block):
        problems.append(
            f"{name} has {weight.nbytes} bytes and {absmax.count} scales, expected {(count + 1) // 2} and "
            f"{-(-count // state.block)} for {list(state.shape)}"
        )
        return None
    if weight.shape[:1] != (weight.count,):
        problems.append(f"{name} has shape {list(weight.shape)}, expected {[weight.count, 1]}")
        return None
    beside = (tensors[state_name],)
    return FourBit(module, state.shape, state, weight, absmax, table, pair, beside)


def _held_wrong(
    state: State, absmax: TensorRef, table: TensorRef, pair: tuple[TensorRef, TensorRef] | None
) -> Iterator[str]:
    """Scales and tables of another kind or size than they must be."""
    yield from affine.held_wrong(table, FLOATS, 16)
    yield from affine.held_wrong(absmax, FLOATS if pair is None else ("U8",), absmax.count)
    if pair is not None:
        yield from affine.held_wrong(pair[0], FLOATS, -(-absmax.count // state.nested_block))
        yield from affine.held_wrong(pair[1], FLOATS, 256)


def _state(ref: TensorRef) -> State | None:
    said = _said(ref)
    if said is None or min(said.blocksize, said.nested_blocksize, *said.shape) < 1:
        return None
    return State(said.blocksize, said.shape, said.nested_blocksize)


def _said(ref: TensorRef) -> Said | None:
    try:
        return built(Said, object_in(_bytes(ref).numpy().tobytes(), ref.name), ref.name)
    except InputError:
        return None


def _find_8bit(base: Base) -> Mapping[str, CodedWeight]:
    """The weights beside which row scales lie. Raises InputError naming what is misshapen."""
    problems: list[str] = []
    found = {one.module: one for one in _eight_bits(base, problems)}
    return checked(base, found, problems, NOTHING)


def _eight_bits(base: Base, problems: list[str]) -> Iterator[EightBit]:
    for name, scale in base.tensors.items():
        module, mark, rest = name.rpartition(".SCB")
        weight = base.tensors.get(f"{module}.weight")
        if not mark or rest:
            continue
        if weight is None or len(weight.shape) != 2 or scale.count != weight.shape[0]:
            problems.append(f"{name} has no weight of as many rows beside it")
            continue
        wrong = affine.held_wrong(weight, ("I8",), weight.count)
        wrong += affine.held_wrong(scale, FLOATS, scale.count)
        if wrong or not weight.count:
            problems += wrong or [f"{weight.name} has shape {list(weight.shape)} and no values"]
            continue
        shape = (weight.shape[0], weight.shape[1])
        mark_ref = base.tensors.get(f"{module}.weight_format")
        beside = () if mark_ref is None else (mark_ref,)
        yield EightBit(module, shape, weight, scale, beside)


KEPT = kept_under("llm_int8_skip_modules")
SCHEMES = (
    Scheme("bitsandbytes-4bit", "bitsandbytes NF4 and FP4", URL, _is_4bit, _find_4bit, kept=KEPT),
    Scheme("bitsandbytes-8bit", "bitsandbytes int8", URL, _is_8bit, _find_8bit, kept=KEPT),
)
