"""Weights quantised anew as GPTQ stores them: 4 bits, symmetric, groups of 128 columns in order.

Scales are those of [GPTQModel](https://github.com/ModelCloud/GPTQModel) before it has seen any inputs: the
largest entry of a group over 7.5, in float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptmerge.errors import CannotStore
from adaptmerge.lazy import torch
from adaptmerge.schemes import affine
from adaptmerge.schemes.coded import CodedWeight
from adaptmerge.schemes.computed import OfRows, renamed
from adaptmerge.schemes.gptq import Gptq
from adaptmerge.schemes.scheme import Kept, Quantiser
from adaptmerge.tensors.dtypes import F16, I32, DType
from adaptmerge.tensors.refs import TensorRef, computed, constant

BITS, GROUP, ZERO = 4, 128, 8
STORED_ZEROS = 0x77777777  # eight zeros, each less 1
IN_WORD = 32 // BITS


@dataclass(frozen=True, slots=True)
class Groups:
    """Codes and scales of groups of so many columns."""

    size: int

    def quantise(self, values: torch.Tensor) -> Mapping[str, torch.Tensor]:
        parts = values.float().view(len(values), -1, self.size)
        largest = parts.abs().amax(2)
        scale = (2 * largest / (2**BITS - 1)).half()
        scale[scale == 0] = 1
        codes = (parts / scale.float()[:, :, None]).round_().add_(ZERO).clamp_(0, 2**BITS - 1)
        raw = affine.packed(codes.view(values.shape).byte(), BITS)
        return {"codes": raw.view(torch.int32), "scale": scale}


@dataclass(frozen=True, slots=True)
class InOrder:
    """The group of each input."""

    inputs: int
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.inputs,)

    @property
    def dtype(self) -> DType:
        return I32

    def read(self) -> torch.Tensor:
        return torch.arange(self.inputs, dtype=torch.int32) // self.size


def quantised(module: str, values: TensorRef, size: int) -> Gptq:
    """A weight in groups of `size` columns, which are words and groups in number."""
    outputs, inputs = values.shape
    how = Groups(size)
    codes = OfRows(values, how, "codes", (outputs, inputs // IN_WORD), I32)
    scale = OfRows(values, how, "scale", (outputs, inputs // size), F16)
    zeros = constant(STORED_ZEROS, (inputs // size, outputs // IN_WORD), I32)
    refs = {
        "qweight": computed(codes).T,
        "qzeros": zeros,
        "scales": computed(scale).T,
        "g_idx": computed(InOrder(inputs, size)),
    }
    parts = tuple(
        (f"{module}.{part}", renamed(ref, f"{module}.{part}")) for part, ref in refs.items()
    )
    return Gptq(module, (outputs, inputs), BITS, size, less_one=True, parts=parts)


def _quantise(module: str, values: TensorRef, _: DType) -> CodedWeight:
    outputs, inputs = values.shape
    if inputs % GROUP:
        raise CannotStore(f"{module}: {inputs} inputs are no whole groups of {GROUP}: use nf4")
    if outputs % IN_WORD:
        raise CannotStore(f"{module}: {outputs} outputs fill no words of {IN_WORD}: use nf4")
    return quantised(module, values, GROUP)


def _config(_: Kept, __: DType) -> dict[str, Any]:
    return {
        "bits": BITS,
        "checkpoint_format": "gptq",
        "desc_act": False,
        "format": "gptq",
        "group_size": GROUP,
        "quant_method": "gptq",
        "sym": True,
    }


QUANTISERS = (Quantiser("gptq-int4-g128", _quantise, _config, mixed=False),)
