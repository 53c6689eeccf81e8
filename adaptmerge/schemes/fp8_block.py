"""How `transformers` stores weights in [fine-grained FP8](https://arxiv.org/abs/2412.19437), as DeepSeek
and Qwen release them.

| tensor | holds |
|---|---|
| M.weight | float8_e4m3fn (out, in) |
| M.weight_scale_inv | f32, bf16, f16 or e8m0 (also as u8) per block of 128 x 128; w = weight times it |
| M.activation_scale | f32, of inputs, not read |

Two quirks: despite its name the scale is multiplied by, and the last blocks of rows and columns may be
partial, where `transformers` itself takes (out / rows of scales) as the height of a block if that is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptmerge.bases.base import Base
from adaptmerge.lazy import torch
from adaptmerge.schemes.coded import CodedWeight
from adaptmerge.schemes.grids import BlockGrid
from adaptmerge.schemes.narrow import Fp8, block_of, scales
from adaptmerge.schemes.scheme import Scheme, checked, config_of, kept_under
from adaptmerge.tensors.refs import TensorRef

URL = "https://huggingface.co/docs/transformers/quantization/finegrained_fp8"
SCALE = ".weight_scale_inv"
BESIDE = ("activation_scale", "input_scale")
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
BLOCK = (128, 128)


@dataclass(frozen=True, slots=True)
class Fp8Block:
    """A weight of 8-bit floats with a scale per block of several rows and columns."""

    module: str
    shape: tuple[int, int]
    block: tuple[int, int]
    weight: TensorRef
    scale: TensorRef
    beside: tuple[TensorRef, ...] = ()

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        return {ref.name: ref for ref in (self.weight, self.scale, *self.beside)}

    def grid(self, rows: tuple[int, int]) -> tuple[torch.Tensor, BlockGrid]:
        codes = Fp8().read(self.weight.slice(0, *rows), self.shape[1])
        height, width = self.block
        stored = scales(self.scale).reshape(-1, -(-self.shape[1] // width))
        scale = stored[torch.arange(*rows) // height]
        groups = torch.arange(self.shape[1]) // width
        return codes, Fp8().grid(scale, groups)

    def pack(self, codes: torch.Tensor, grid: BlockGrid) -> dict[str, torch.Tensor]:
        return {self.weight.name: Fp8().write(codes, self.weight)}

    def nearest_scales(self, scale: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor | None:
        return None  # blocks have several rows


def _detect(base: Base) -> bool:
    return config_of(base).get("quant_method") == "fp8"


def _find(base: Base) -> Mapping[str, CodedWeight]:
    """The weights beside which scales lie. Raises InputError naming what is missing or misshapen."""
    problems: list[str] = []
    found = {one.module: one for one in _weights(base, problems)}
    problems += _lost(base)
    nothing = "its config says that it is quantised to fp8, but no weight is"
    return checked(base, found, problems, nothing)


def _lost(base: Base) -> Iterator[str]:
    """Weights and scales that lack one another."""
    for name, ref in base.tensors.items():
        if ref.dtype.name == "F8_E4M3" and f"{name}_scale_inv" not in base.tensors:
            yield f"{name} is {ref.dtype}, but {name}_scale_inv is missing"
        weight = name.removesuffix("_scale_inv")
        if weight != name and weight not in base.tensors:
            yield f"{name} has no {weight} beside it"


def _weights(base: Base, problems: list[str]) -> Iterator[Fp8Block]:
    said = _said(config_of(base))
    for name, scale in base.tensors.items():
        weight = base.tensors.get(name.removesuffix("_scale_inv"))
        if weight is None or not name.endswith("_scale_inv"):
            continue
        problem = _problem(name, weight, scale, said)
        if problem:
            problems.append(problem)
            continue
        module = name.removesuffix(SCALE)
        shape = (weight.shape[0], weight.shape[1])
        height, width = block_of(shape, scale.shape, said) or shape
        names = [f"{module}.{part}" for part in BESIDE]
        beside = tuple(base.tensors[part] for part in names if part in base.tensors)
        yield Fp8Block(module, shape, (height, width), weight, scale, beside)


def _said(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The blocks that the config says, or those that are usual."""
    sides = config.get("weight_block_size")
    if isinstance(sides, Sequence) and [type(side) for side in sides] == [int, int]:
        return [(sides[0], sides[1])]
    return [BLOCK]


def _problem(name: str, weight: TensorRef, scale: TensorRef, said: list[tuple[int, int]]) -> str:
    if not name.endswith(SCALE) or len(weight.shape) != 2:
        return f"{weight.name} {list(weight.shape)} is quantised, but only matrices of modules can be read"
    if weight.dtype.name != "F8_E4M3":
        return f"{weight.name} is {weight.dtype}, expected f8_e4m3 for one with {name}"
    if scale.dtype.name not in SCALE_DTYPES:
        return f"{name} is {scale.dtype}, expected one of {', '.join(SCALE_DTYPES).lower()}"
    if block_of(weight.shape, scale.shape, said) is None:
        blocks = " x ".join(map(str, said[0]))
        return f"{name} is {list(scale.shape)}, expected a scale per {blocks} block of {list(weight.shape)}"
    return ""


KEPT = kept_under("modules_to_not_convert")
SCHEME = Scheme("fp8-block", "FP8 with a scale per block", URL, _detect, _find, kept=KEPT)
