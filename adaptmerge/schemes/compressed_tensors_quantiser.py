"""Weights quantised anew as compressed-tensors has them: symmetric, with a scale per row or group, from the
largest entry, in the dtype that the model computes in.

| name | format | a preset of the library |
|---|---|---|
| int4-g128 | pack-quantized, groups of 128 | W4A16 |
| int8-channel | pack-quantized, a scale per row | W8A16 |
| fp8-channel | float-quantized, a scale per row; inputs are rounded to fp8 as they come | FP8_DYNAMIC |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptmerge.errors import CannotStore
from adaptmerge.lazy import torch
from adaptmerge.schemes.coded import CodedWeight
from adaptmerge.schemes.compressed_tensors import METHOD, Compressed
from adaptmerge.schemes.computed import OfRows, renamed
from adaptmerge.schemes.narrow import Fp8, Ints, packed
from adaptmerge.schemes.scheme import Kept, Quantiser
from adaptmerge.tensors.dtypes import BY_NAME, I32, I64, DType
from adaptmerge.tensors.refs import TensorRef, computed, listed

F8 = BY_NAME["F8_E4M3"]
FP8_MOST = 448.0


@dataclass(frozen=True, slots=True)
class Symmetric:
    """Whole numbers of some bits, in groups of so many columns, or in rows (0); None bits are fp8."""

    bits: int | None
    group: int
    scale: DType

    def quantise(self, values: torch.Tensor) -> Mapping[str, torch.Tensor]:
        groups = values.float().view(len(values), -1, self.group or values.shape[1])
        most = FP8_MOST if self.bits is None else (2**self.bits - 1) / 2
        scale = (groups.abs().amax(2) / most).to(self.scale.torch)
        scale[scale == 0] = torch.finfo(scale.dtype).eps
        levels = (groups / scale.float()[:, :, None]).view(values.shape)
        return {"codes": self._stored(levels), "scale": scale}

    def _stored(self, levels: torch.Tensor) -> torch.Tensor:
        if self.bits is None:
            return levels.clamp_(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn)
        half = 1 << self.bits >> 1
        return packed(levels.round_().clamp_(-half, half - 1).add_(half).byte(), self.bits)


def _quantise(
    bits: int | None, group: int, module: str, values: TensorRef, dtype: DType
) -> CodedWeight:
    rows, width = shape = (values.shape[0], values.shape[1])
    if group and width % group:
        raise CannotStore(
            f"{module}: {width} inputs are no whole groups of {group}: use int8-channel or nf4"
        )
    how = Symmetric(bits, group, dtype)
    sizes = rows, width // (group or width)
    scale = computed(OfRows(values, how, "scale", sizes, dtype), f"{module}.weight_scale")
    block = (1, group or width)
    if bits is None:
        codes = OfRows(values, how, "codes", shape, F8)
        return Compressed(module, shape, Fp8(), block, computed(codes, f"{module}.weight"), scale)
    levels = Ints(bits, packed=True)
    codes = OfRows(values, how, "codes", (rows, levels.words(width)), I32)
    weight = computed(codes, f"{module}.weight_packed")
    said = renamed(listed(shape, (2,), I64), f"{module}.weight_shape")
    return Compressed(module, shape, levels, block, weight, scale, beside=(said,))


def _config(bits: int | None, group: int, kept: Kept) -> dict[str, Any]:
    """What the library writes for its preset."""
    numbers = {
        "dynamic": False,
        "group_size": group or None,
        "num_bits": bits or 8,
        "strategy": "group" if group else "channel",
        "symmetric": True,
        "type": "float" if bits is None else "int",
    }
    inputs = {**numbers, "dynamic": True, "strategy": "token"} if bits is None else None
    name = "float-quantized" if bits is None else "pack-quantized"
    one = {"format": name, "input_activations": inputs, "output_activations": None}
    return {
        "config_groups": {"group_0": {**one, "targets": ["Linear"], "weights": numbers}},
        "format": name,
        "global_compression_ratio": None,
        "ignore": [*kept.usual, *kept.chosen],
        "kv_cache_scheme": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
    }


def _quantiser(name: str, bits: int | None, group: int) -> Quantiser:
    return Quantiser(
        name,
        lambda module, values, dtype: _quantise(bits, group, module, values, dtype),
        lambda kept, _: _config(bits, group, kept),
        experts=bits
        is None,  # transformers 5.23 looks for packed ones only, whatever `ignore` names
    )


QUANTISERS = (
    _quantiser("int4-g128", 4, 128),
    _quantiser("int8-channel", 8, 0),
    _quantiser("fp8-channel", None, 0),
)
