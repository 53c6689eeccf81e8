"""Weights quantised anew as bitsandbytes and `transformers` store them: the same names, shapes and bytes.

One thing differs where absmax are quantised again: their mean is known only with the whole weight, so the
JSON that says it is filled up with spaces to the length that any mean has room in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptmerge.lazy import torch
from adaptmerge.schemes.bitsandbytes import codes
from adaptmerge.schemes.bitsandbytes.layout import STATE, EightBit, FourBit, State
from adaptmerge.schemes.coded import CodedWeight
from adaptmerge.schemes.computed import Encoder, OfAll, OfRows, renamed
from adaptmerge.schemes.scheme import Kept, Quantiser
from adaptmerge.tensors.dtypes import F32, I8, U8, DType
from adaptmerge.tensors.refs import TensorRef, computed, listed

LONGEST = 24  # characters of a number


@dataclass(frozen=True, slots=True)
class Blocks:
    """Codes, two a byte, and absmax of values."""

    table: codes.Table

    def quantise(self, values: torch.Tensor) -> Mapping[str, torch.Tensor]:
        found, absmax = codes.quantise_4bit(values, self.table)
        pairs = torch.nn.functional.pad(found, (0, len(found) % 2)).view(-1, 2)
        return {"codes": (pairs[:, 0] << 4 | pairs[:, 1])[:, None], "absmax": absmax}


@dataclass(frozen=True, slots=True)
class Nested:
    """Codes, absmax and state of absmax that are quantised again."""

    state: str  # all but the mean

    def quantise(self, values: torch.Tensor) -> Mapping[str, torch.Tensor]:
        found, largest, mean = codes.double_quantise(values)
        said = json.dumps({**json.loads(self.state), "nested_offset": mean.item()})
        raw = said.ljust(self.length).encode()
        state = torch.tensor(list(raw), dtype=torch.uint8)
        return {"codes": found, "absmax": largest, "state": state}

    @property
    def length(self) -> int:
        """Bytes of the state."""
        return len(json.dumps({**json.loads(self.state), "nested_offset": 0})) + LONGEST


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """Codes and absmax of rows, through float16 as the library has them."""

    def quantise(self, values: torch.Tensor) -> Mapping[str, torch.Tensor]:
        found, absmax = codes.quantise_int8(values.half())
        return {"codes": found, "absmax": absmax}


def _four_bit(kind: str, module: str, values: TensorRef, dtype: DType) -> CodedWeight:
    table, double = codes.ROUND_TRIPS[kind]
    shape = (values.shape[0], values.shape[1])
    weight, name = f"{module}.weight", kind.partition(",")[0]
    state = {"quant_type": name, "blocksize": codes.BLOCK, "dtype": dtype.torch_name}
    state |= {"shape": list(shape)}
    known = State(codes.BLOCK, shape, codes.NESTED_BLOCK)
    held, absmax = _blocks(weight, values, table)
    maps = _listed(f"{weight}.quant_map", torch.tensor(table))
    if not double:
        raw = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        said = _listed(f"{weight}{STATE}{name}", raw)
        return FourBit(module, shape, known, held, absmax, maps, None, (said,))
    state |= {"nested_blocksize": codes.NESTED_BLOCK, "nested_dtype": "float32"}
    how, count = Nested(json.dumps(state)), absmax.count
    spans = (-(-count // codes.NESTED_BLOCK),)
    again = _part(f"{weight}.absmax", absmax, how, "codes", (count,), U8)
    largest = _part(f"{weight}.nested_absmax", absmax, how, "absmax", spans, F32)
    said = _part(f"{weight}{STATE}{name}", absmax, how, "state", (how.length,), U8)
    outer = _listed(f"{weight}.nested_quant_map", codes.dynamic_map())
    return FourBit(module, shape, known, held, again, maps, (largest, outer), (said,))


def _blocks(weight: str, values: TensorRef, table: codes.Table) -> tuple[TensorRef, TensorRef]:
    """Codes and absmax of a weight; where blocks do not end with rows all at once."""
    how, count = Blocks(table), math.prod(values.shape)
    sizes = (-(-count // 2), 1), (-(-count // codes.BLOCK),)
    if values.shape[1] % codes.BLOCK:
        held = _part(weight, values, how, "codes", sizes[0], U8)
        return held, _part(f"{weight}.absmax", values, how, "absmax", sizes[1], F32)
    of_rows = OfRows(values, how, "codes", sizes[0], U8, values.shape[1] // 2)
    per_row = values.shape[1] // codes.BLOCK
    largest = OfRows(values, how, "absmax", sizes[1], F32, per_row)
    return computed(of_rows, weight), computed(largest, f"{weight}.absmax")


def _part(
    name: str,
    values: TensorRef,
    how: Encoder,
    part: str,
    shape: tuple[int, ...],
    dtype: DType,
) -> TensorRef:
    return computed(OfAll(values, how, part, shape, dtype), name)


def _listed(name: str, value: torch.Tensor) -> TensorRef:
    dtype = U8 if value.dtype == torch.uint8 else F32
    return renamed(listed(tuple(value.tolist()), tuple(value.shape), dtype), name)


def _eight_bit(module: str, values: TensorRef, _: DType) -> CodedWeight:
    shape, how = (values.shape[0], values.shape[1]), Int8Rows()
    held = OfRows(values, how, "codes", shape, I8)
    largest = OfRows(values, how, "absmax", shape[:1], F32)
    order = renamed(listed((0,), (), U8), f"{module}.weight_format")
    weight, scale = f"{module}.weight", f"{module}.SCB"
    return EightBit(module, shape, computed(held, weight), computed(largest, scale), (order,))


def _config(kind: str, kept: Kept, dtype: DType) -> dict[str, Any]:
    """What `BitsAndBytesConfig.to_dict` gives; a list of modules replaces the library's own choice."""
    eight = kind == "int8"
    name, _, double = ("fp4" if eight else kind).partition(",")
    return {
        "_load_in_4bit": not eight,
        "_load_in_8bit": eight,
        "bnb_4bit_compute_dtype": "float32" if eight else dtype.torch_name,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": name,
        "bnb_4bit_use_double_quant": bool(double),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": [*kept.usual, *kept.chosen] if kept.chosen else None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": not eight,
        "load_in_8bit": eight,
        "quant_method": "bitsandbytes",
    }


def _quantiser(kind: str) -> Quantiser:
    def quantise(module: str, values: TensorRef, dtype: DType) -> CodedWeight:
        if kind == "int8":
            return _eight_bit(module, values, dtype)
        return _four_bit(kind, module, values, dtype)

    return Quantiser(kind, quantise, lambda kept, dtype: _config(kind, kept, dtype), conv1d=True)


QUANTISERS = tuple(_quantiser(kind) for kind in (*codes.ROUND_TRIPS, "int8"))
