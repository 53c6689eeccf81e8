"""How [GPTQModel](https://github.com/ModelCloud/GPTQModel) and AutoGPTQ store weights.

| tensor | holds |
|---|---|
| M.qweight | i32 (in bits / 32, out): codes of 2, 3, 4 or 8 bits along the inputs, the first one lowest |
| M.qzeros | i32 (groups, out bits / 32): zeros along the outputs |
| M.scales | f16 or bf16 (groups, out); w = scale (code - zero) |
| M.g_idx | i32 (in), the group of each input; in order if it is missing |

Two quirks: the format "gptq" stores zeros less 1, "gptq_v2" as they are; and where a zero is 0, less 1
borrows from the next one in its word, because whole words are subtracted (not those of 3 bits).
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

URL = "https://github.com/ModelCloud/GPTQModel"
BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # 1 in every code of a word
PARTS = ("qweight", "qzeros", "scales", "g_idx")
DTYPES = {
    "qweight": affine.WORDS,
    "qzeros": affine.WORDS,
    "scales": ("F16", "BF16", "F32"),
    "g_idx": ("I32", "I64"),
}


@dataclass(frozen=True, slots=True)
class Gptq:
    """A weight whose codes lie along its inputs; `size` is the length of groups in order."""

    module: str
    shape: tuple[int, int]
    bits: int
    size: int
    less_one: bool
    parts: affine.Tensors

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        return dict(self.parts)

    def _part(self, suffix: str) -> TensorRef | None:
        return dict(self.parts).get(f"{self.module}.{suffix}")

    def _stored(self, suffix: str) -> TensorRef:
        return dict(self.parts)[f"{self.module}.{suffix}"]

    def grid(self, rows: tuple[int, int]) -> tuple[torch.Tensor, BlockGrid]:
        words = self._stored("qweight").T.slice(0, *rows).read()
        codes = affine.unpacked(affine.as_bytes(words), self.bits)
        scale = self._stored("scales").T.slice(0, *rows).read().float()
        zero = self._zeros()[:, slice(*rows)].float().T.contiguous()
        high = (1 << self.bits) - 1
        return codes, BlockGrid(scale, self._groups(), high=high, zero=zero)

    def _groups(self) -> torch.Tensor:
        """The group of each input (in,)."""
        order = self._part("g_idx")
        return torch.arange(self.shape[1]) // self.size if order is None else order.read().long()

    def _zeros(self) -> torch.Tensor:
        """The zeros (groups, out) as they are subtracted, uint8."""
        words = self._stored("qzeros").read().view(torch.int32)
        ones = ONES.get(self.bits) if self.less_one else None
        found = affine.unpacked(affine.as_bytes(words if ones is None else words + ones), self.bits)
        found = found[:, : self.shape[0]]
        spared = self.less_one and ones is None
        return found + 1 & (1 << self.bits) - 1 if spared else found

    def pack(self, codes: torch.Tensor, grid: BlockGrid) -> dict[str, torch.Tensor]:
        qweight, scales = self._stored("qweight"), self._stored("scales")
        raw = affine.packed(codes, self.bits).view(-1)
        words = raw.view(qweight.dtype.torch).view(self.shape[0], -1)
        return {
            f"{self.module}.qweight": words.T.contiguous(),
            f"{self.module}.scales": grid.scale.T.to(scales.dtype.torch).contiguous(),
        }

    def nearest_scales(self, scale: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor | None:
        return affine.rounded(scale, self._stored("scales"))


def _detect(base: Base) -> bool:
    return affine.said(base, "gptq") is not None


def _find(base: Base) -> Mapping[str, CodedWeight]:
    """The weights beside which scales lie. Raises InputError naming what is missing or misshapen."""
    config = affine.said(base, "gptq") or {}
    return affine.find(base, "GPTQ", "qweight", partial(_one, base, config), _refused(config))


def _format(config: Mapping[str, Any]) -> str:
    return str(config.get("checkpoint_format") or config.get("format") or FORMATS[0]).lower()


def _refused(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if _format(config) not in FORMATS:
        known = " and ".join(FORMATS)
        problems.append(
            f"is stored in GPTQ's format {_format(config)!r}, which is not known (only {known} are)"
        )
    if config.get("is_marlin_format"):
        problems.append("is stored in GPTQ's format 'marlin', which is laid out for one kernel")
    meta = config.get("meta")
    turned = config.get("rotation") or (isinstance(meta, Mapping) and meta.get("rotation"))
    if turned:
        problems.append(
            f"was rotated ({turned}) before it was quantised: adapters for the original do not fit it"
        )
    if not config.get("dynamic") and config.get("bits") not in BITS:
        problems.append(f"says {config.get('bits')!r} bits, expected one of: 2, 3, 4, 8")
    return problems


def _one(base: Base, config: Mapping[str, Any], module: str, problems: list[str]) -> Gptq | None:
    tensors = affine.named(base, module, *PARTS)
    wrong = affine.missing(base, module, *PARTS[:3]) + affine.mistyped(tensors, DTYPES)
    wrong += affine.flat(affine.named(base, module, *PARTS[:3]))
    if wrong:
        problems += wrong
        return None
    by_part = {name.rpartition(".")[2]: ref for name, ref in tensors}
    groups, outputs = by_part["scales"].shape
    bits = _bits(by_part["qzeros"].shape[1], outputs, config)
    inputs = by_part["qweight"].shape[0] * 32 // bits
    size, order = _size(config, inputs, groups), by_part.get("g_idx")
    expected = {
        "qweight": (inputs * bits // 32, outputs),
        "qzeros": (groups, -(-outputs * bits // 32)),
        "scales": (groups if order or not size else -(-inputs // size), outputs),
        "g_idx": (inputs,),
    }
    wrong = affine.misfits(tensors, expected)
    wrong += [] if wrong or order is None else _strays(order, groups, module)
    problems += wrong
    less_one = _format(config) == "gptq"
    return None if wrong else Gptq(module, (outputs, inputs), bits, size, less_one, tensors)


def _bits(words: int, outputs: int, config: Mapping[str, Any]) -> int:
    """The bits of a module's codes: those of the config, or in checkpoints that mix them (`dynamic`) those
    that its zeros have room for."""
    usual = config.get("bits")
    choices = [bits for bits in (usual, *BITS) if bits in BITS]
    fits = [bits for bits in choices if -(-outputs * bits // 32) == words]
    return int(fits[0] if fits and config.get("dynamic") else choices[0])


def _size(config: Mapping[str, Any], inputs: int, groups: int) -> int:
    """The length of groups in order; 0 where there is none."""
    usual = config.get("group_size")
    size = usual if isinstance(usual, int) and usual > 0 else inputs
    if config.get("dynamic") and groups and inputs % groups == 0:
        return inputs // groups
    return size


def _strays(order: TensorRef, groups: int, module: str) -> list[str]:
    """The problem of inputs that are of no group."""
    held = order.read()
    if not held.numel() or (int(held.min()) >= 0 and int(held.max()) < groups):
        return []
    return [
        f"{module}.g_idx names the groups {int(held.min())} to {int(held.max())}, expected 0 to "
        f"{groups - 1}"
    ]


SCHEME = Scheme("gptq", "GPTQ, versions 1 and 2", URL, _detect, _find)
