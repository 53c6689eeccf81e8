"""How `transformers` stores int8 weights of [torchao](https://github.com/pytorch/ao) in safetensors.

| tensor | holds |
|---|---|
| M._weight_qdata | i8 (out, in) |
| M._weight_scale | f32 (out, groups), one group per row unless the config says otherwise |
| M._weight_zero_point | i8 (out, groups), 0 unless asymmetric; w = scale (code - zero) |

Other kinds of its weights, and those with scales for inputs, are told by the config or their tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from adaptmerge.bases.base import Base
from adaptmerge.lazy import torch
from adaptmerge.schemes import affine
from adaptmerge.schemes.coded import CodedWeight
from adaptmerge.schemes.grids import BlockGrid
from adaptmerge.schemes.scheme import Scheme
from adaptmerge.tensors.refs import TensorRef

URL = "https://github.com/pytorch/ao"
LOW, HIGH = -128, 127
KIND = "Int8WeightOnlyConfig"
PARTS = ("_weight_qdata", "_weight_scale", "_weight_zero_point")
FOREIGN = ("_weight_act_pre_scale", "_weight_act_quant_scale", "_weight_scale_and_zero")
DTYPES = {
    PARTS[0]: ("I8",),
    PARTS[1]: ("F16", "BF16", "F32"),
    PARTS[2]: ("I8", "I16", "I32", "I64"),
}


@dataclass(frozen=True, slots=True)
class Int8:
    """A weight of one code a byte, with a scale per row and group of inputs."""

    module: str
    shape: tuple[int, int]
    qdata: TensorRef
    scale: TensorRef
    zero: TensorRef | None = None

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        refs = (self.qdata, self.scale, *(() if self.zero is None else (self.zero,)))
        return {f"{self.module}.{part}": ref for part, ref in zip(PARTS, refs, strict=False)}

    def grid(self, rows: tuple[int, int]) -> tuple[torch.Tensor, BlockGrid]:
        # adding 128 to a byte is turning its highest bit over
        codes = self.qdata.slice(0, *rows).read().view(torch.uint8) ^ -LOW
        scale = self.scale.slice(0, *rows).read().float()
        zero = None if self.zero is None else self.zero.slice(0, *rows).read().float()
        groups = torch.arange(self.shape[1]) // (self.shape[1] // self.scale.shape[1])
        return codes, BlockGrid(scale, groups, low=LOW, high=HIGH, zero=zero)

    def pack(self, codes: torch.Tensor, grid: BlockGrid) -> dict[str, torch.Tensor]:
        return {
            f"{self.module}.{PARTS[0]}": (codes ^ -LOW).view(torch.int8),
            f"{self.module}.{PARTS[1]}": grid.scale.to(self.scale.dtype.torch).contiguous(),
        }

    def nearest_scales(self, scale: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor | None:
        return affine.rounded(scale, self.scale)


def _detect(base: Base) -> bool:
    return affine.said(base, "torchao") is not None


def _find(base: Base) -> Mapping[str, CodedWeight]:
    """The weights beside which scales lie. Raises InputError naming what is missing or misshapen."""
    kind = _kind(affine.said(base, "torchao") or {})
    unknown = f"is quantised with torchao's {kind}, only {KIND} is known"
    refused = [] if kind == KIND else [unknown]
    return affine.find(base, "torchao", PARTS[0], partial(_one, base), refused)


def _kind(config: Mapping[str, Any]) -> str:
    """The name of torchao's config, as `transformers` writes it down."""
    said = config.get("quant_type")
    default = said.get("default") if isinstance(said, Mapping) else said
    kind = default.get("_type") if isinstance(default, Mapping) else default
    return str(kind)


def _one(base: Base, module: str, problems: list[str]) -> Int8 | None:
    tensors = affine.named(base, module, *PARTS)
    wrong = affine.missing(base, module, *PARTS[:2]) + affine.mistyped(tensors, DTYPES)
    wrong += affine.flat(tensors)
    wrong += [
        f"{name} belongs to a kind of weight that is not known"
        for name, _ in affine.named(base, module, *FOREIGN)
    ]
    if wrong:
        problems += wrong
        return None
    qdata, scale = tensors[0][1], tensors[1][1]
    (outputs, inputs), groups = qdata.shape, scale.shape[1]
    wrong = affine.misfits(tensors, dict.fromkeys(PARTS[1:], (outputs, groups)))
    if inputs % groups:
        wrong.append(
            f"{module}.{PARTS[1]} has {groups} groups, which {inputs} inputs do not divide into"
        )
    problems += wrong
    zero = tensors[2][1] if len(tensors) == 3 else None
    return None if wrong else Int8(module, (outputs, inputs), qdata, scale, zero)


SCHEME = Scheme("torchao", "torchao int8, weights only", URL, _detect, _find)
