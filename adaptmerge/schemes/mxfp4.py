"""How `transformers` stores the experts of gpt-oss in [MXFP4](https://arxiv.org/abs/2310.10537).

| tensor of M.experts | holds |
|---|---|
| gate_up_proj_blocks, down_proj_blocks | u8 (experts, out, in / 32, 16), two e2m1 a byte, the first low |
| gate_up_proj_scales, down_proj_scales | u8 (experts, out, in / 32), e8m0 |

One packed weight is the matrix (out, in) of one expert, named M.experts.gate_up_proj[3], and so are its
tensors, which are slices of the stored ones: M.experts.gate_up_proj_blocks[3]. `transformers` turns the
matrices when it reads them, into a parameter M.experts.gate_up_proj (experts, in, out).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from adaptmerge.bases.base import Base
from adaptmerge.lazy import torch
from adaptmerge.schemes.coded import CodedWeight
from adaptmerge.schemes.grids import BlockGrid
from adaptmerge.schemes.narrow import Fp4, e2m1, from_nibbles, nibbles, raw, scales
from adaptmerge.schemes.scheme import Scheme, checked, config_of
from adaptmerge.tensors.refs import TensorRef

URL = "https://huggingface.co/docs/transformers/quantization/mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32  # entries that share a scale
HELD = GROUP // 2  # bytes that hold them


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """The matrix of one expert; blocks (out, in / 32, 16) and powers (out, in / 32) are slices of what is
    stored, and named so."""

    parameter: str
    expert: int
    shape: tuple[int, int]
    blocks: TensorRef
    powers: TensorRef

    @property
    def module(self) -> str:
        return f"{self.parameter}[{self.expert}]"

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        return {ref.name: ref for ref in (self.blocks, self.powers)}

    def grid(self, rows: tuple[int, int]) -> tuple[torch.Tensor, BlockGrid]:
        bits = nibbles(raw(self.blocks.slice(0, *rows))).flatten(1)
        codes = e2m1().read(bits, self.blocks.name)
        scale = scales(self.powers.slice(0, *rows))
        return codes, Fp4().grid(scale, torch.arange(self.shape[1]) // GROUP)

    def pack(self, codes: torch.Tensor, grid: BlockGrid) -> dict[str, torch.Tensor]:
        before = nibbles(raw(self.blocks)).flatten(1)
        held = from_nibbles(e2m1().stored(codes, before))
        return {self.blocks.name: held.view(self.blocks.shape)}

    def nearest_scales(self, scale: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor | None:
        return None  # powers of two are too far apart


def _detect(base: Base) -> bool:
    return config_of(base).get("quant_method") == "mxfp4"


def _find(base: Base) -> Mapping[str, CodedWeight]:
    """The matrices of all experts whose blocks are stored. Raises InputError naming what is missing or
    misshapen."""
    problems: list[str] = []
    found: dict[str, CodedWeight] = {}
    for name, blocks in base.tensors.items():
        for suffix, other in ((BLOCKS, SCALES), (SCALES, BLOCKS)):
            beside = name.removesuffix(suffix) + other
            if name.endswith(suffix) and beside not in base.tensors:
                problems.append(f"{beside} is missing beside {name}")
        powers = base.tensors.get(name.removesuffix(BLOCKS) + SCALES)
        if name.endswith(BLOCKS) and powers is not None:
            problems += _problems(blocks, powers)
            found.update({} if problems else {one.module: one for one in _experts(blocks, powers)})
    nothing = "its config says that it is quantised to mxfp4, but no expert is"
    return checked(base, found, problems, nothing)


def _problems(blocks: TensorRef, powers: TensorRef) -> Iterator[str]:
    for ref in (blocks, powers):
        if ref.dtype.name != "U8":
            yield f"{ref.name} is {ref.dtype}, expected u8"
    if len(blocks.shape) != 4 or blocks.shape[3] != HELD:
        yield f"{blocks.name} is {list(blocks.shape)}, expected [experts, out, in / {GROUP}, {HELD}]"
    elif powers.shape != blocks.shape[:3]:
        yield f"{powers.name} is {list(powers.shape)}, expected {list(blocks.shape[:3])}"


def _experts(blocks: TensorRef, powers: TensorRef) -> Iterator[Mxfp4]:
    count, rows, groups, _ = blocks.shape
    parameter = blocks.name.removesuffix(BLOCKS)
    for expert in range(count):
        own = blocks.entry(expert), powers.entry(expert)
        yield Mxfp4(parameter, expert, (rows, groups * GROUP), *own)


SCHEME = Scheme("mxfp4", "MXFP4", URL, _detect, _find)
