"""How [MLX](https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html) stores
weights that it quantised in its mode "affine".

| tensor | holds |
|---|---|
| M.weight | u32 (out, in bits / 32): codes along the inputs, the first one lowest |
| M.scales, M.biases | f16, bf16 or f32 (out, groups); w = scale code + bias |

config.json holds `quantization`: group_size, bits, and by a module's path what is different for it.
Two quirks: 3, 5 and 6 bits run on across words; scales may be negative.
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

URL = "https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html"
BITS = (1, 2, 3, 4, 5, 6, 8)
MODE = "affine"
PARTS = ("weight", "scales", "biases")
DTYPES = {"weight": ("U32",), "scales": ("F16", "BF16", "F32"), "biases": ("F16", "BF16", "F32")}


@dataclass(frozen=True, slots=True)
class Mlx:
    """A weight whose codes lie along its inputs, with a scale and a bias per group of `size`."""

    module: str
    shape: tuple[int, int]
    bits: int
    size: int
    weight: TensorRef
    scales: TensorRef
    biases: TensorRef

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        refs = (self.weight, self.scales, self.biases)
        return {f"{self.module}.{part}": ref for part, ref in zip(PARTS, refs, strict=True)}

    def grid(self, rows: tuple[int, int]) -> tuple[torch.Tensor, BlockGrid]:
        raw = affine.as_bytes(self.weight.slice(0, *rows).read())
        scale, offset = (ref.slice(0, *rows).read().float() for ref in (self.scales, self.biases))
        groups = torch.arange(self.shape[1]) // self.size
        high = (1 << self.bits) - 1
        return affine.unpacked(raw, self.bits), BlockGrid(scale, groups, high=high, offset=offset)

    def pack(self, codes: torch.Tensor, grid: BlockGrid) -> dict[str, torch.Tensor]:
        raw = affine.packed(codes, self.bits)
        return {
            f"{self.module}.weight": affine.as_stored(raw, self.weight),
            f"{self.module}.scales": grid.scale.to(self.scales.dtype.torch).contiguous(),
        }

    def nearest_scales(self, scale: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor | None:
        return affine.rounded(scale, self.scales)


def _said(base: Base) -> Mapping[str, Any] | None:
    found = base.config.get("quantization")
    if not isinstance(found, Mapping) or "bits" not in found or "quant_method" in found:
        return None
    return found


def _detect(base: Base) -> bool:
    return _said(base) is not None


def _find(base: Base) -> Mapping[str, CodedWeight]:
    """The weights beside which scales lie. Raises InputError naming what is missing or misshapen."""
    config = _said(base) or {}
    mode = config.get("mode") or MODE
    unknown = f"is quantised in MLX's mode {mode!r}, only {MODE!r} is known"
    refused = [] if mode == MODE else [unknown]
    return affine.find(base, "MLX", "scales", partial(_one, base, config), refused)


def _one(base: Base, config: Mapping[str, Any], module: str, problems: list[str]) -> Mlx | None:
    tensors = affine.named(base, module, *PARTS)
    own = config.get(module)
    said = {**config, **own} if isinstance(own, Mapping) else config
    wrong = affine.missing(base, module, *PARTS) + affine.mistyped(tensors, DTYPES)
    wrong += [
        f"{name} has the shape {list(ref.shape)}, expected two sides (stacks of experts are not known)"
        for name, ref in tensors
        if len(ref.shape) != 2 or not ref.count
    ]
    wrong += _refused(module, said)
    if wrong:
        problems += wrong
        return None
    weight, scales, biases = (ref for _, ref in tensors)
    bits, size = int(said["bits"]), int(said["group_size"])
    outputs, inputs = weight.shape[0], weight.shape[1] * 32 // bits
    wrong = affine.misfits(tensors, dict.fromkeys(PARTS[1:], (outputs, inputs // size)))
    if inputs % size or inputs * bits != weight.shape[1] * 32:
        wrong.append(
            f"{module}.weight has {weight.shape[1]} words a row, which are no whole groups"
        )
    problems += wrong
    return None if wrong else Mlx(module, (outputs, inputs), bits, size, weight, scales, biases)


def _refused(module: str, said: Mapping[str, Any]) -> list[str]:
    """The problem of a layer's settings."""
    mode, bits, size = said.get("mode") or MODE, said.get("bits"), said.get("group_size")
    if mode != MODE:
        return [f"{module} is quantised in MLX's mode {mode!r}, only {MODE!r} is known"]
    known = isinstance(bits, int) and bits in BITS and isinstance(size, int) and size > 0
    said_so = f"{module} has {bits!r} bits in groups of {size!r}, which MLX does not know"
    return [] if known else [said_so]


SCHEME = Scheme("mlx", "MLX, mode affine", URL, _detect, _find)
