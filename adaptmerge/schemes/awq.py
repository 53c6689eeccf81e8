"""How [AutoAWQ](https://github.com/casper-hansen/AutoAWQ) stores weights in its version "gemm".

| tensor | holds |
|---|---|
| M.qweight | i32 (in, out / 8): 4-bit codes along the outputs |
| M.qzeros | i32 (groups, out / 8): zeros likewise |
| M.scales | f16 (groups, out); w = scale (code - zero) |

One quirk: the codes of a word, from the lowest bits up, are those of outputs 0, 2, 4, 6, 1, 3, 5, 7.
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
from adaptmerge.schemes.scheme import Scheme, kept_under
from adaptmerge.tensors.refs import TensorRef

URL = "https://github.com/casper-hansen/AutoAWQ"
BITS, IN_WORD = 4, 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PLACES = tuple(ORDER.index(output) for output in range(IN_WORD))
VERSION = "gemm"
PARTS = ("qweight", "qzeros", "scales")
DTYPES = {
    "qweight": affine.WORDS,
    "qzeros": affine.WORDS,
    "scales": ("F16", "BF16", "F32"),
}


@dataclass(frozen=True, slots=True)
class Awq:
    """A weight whose codes lie along its outputs, in groups of `size` inputs."""

    module: str
    shape: tuple[int, int]
    size: int
    qweight: TensorRef
    qzeros: TensorRef
    scales: TensorRef

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        refs = (self.qweight, self.qzeros, self.scales)
        return {f"{self.module}.{part}": ref for part, ref in zip(PARTS, refs, strict=True)}

    def grid(self, rows: tuple[int, int]) -> tuple[torch.Tensor, BlockGrid]:
        codes, zero = _outputs(self.qweight, rows), _outputs(self.qzeros, rows).float()
        scale = self.scales.slice(1, *rows).read().float().T.contiguous()
        groups = torch.arange(self.shape[1]) // self.size
        return codes, BlockGrid(scale, groups, high=(1 << BITS) - 1, zero=zero)

    def pack(self, codes: torch.Tensor, grid: BlockGrid) -> dict[str, torch.Tensor]:
        words = affine.runs(codes.T, IN_WORD)[..., list(ORDER)].flatten(1)
        return {
            f"{self.module}.qweight": affine.as_stored(affine.packed(words, BITS), self.qweight),
            f"{self.module}.scales": grid.scale.T.to(self.scales.dtype.torch).contiguous(),
        }

    def nearest_scales(self, scale: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor | None:
        return affine.rounded(scale, self.scales)


def _outputs(ref: TensorRef, rows: tuple[int, int]) -> torch.Tensor:
    """Some outputs (rows, n), uint8, of words (n, out / 8)."""
    start, stop = rows[0] // IN_WORD, -(-rows[1] // IN_WORD)
    raw = affine.as_bytes(ref.slice(1, start, stop).read())
    codes = affine.runs(affine.unpacked(raw, BITS), IN_WORD)[..., list(PLACES)].flatten(1)
    skipped = IN_WORD * start
    return codes[:, rows[0] - skipped : rows[1] - skipped].T.contiguous()


def _detect(base: Base) -> bool:
    return affine.said(base, "awq") is not None


def _find(base: Base) -> Mapping[str, CodedWeight]:
    """The weights beside which scales lie. Raises InputError naming what is missing or misshapen."""
    config = affine.said(base, "awq") or {}
    return affine.find(base, "AWQ", "qweight", partial(_one, base, config), _refused(config))


def _refused(config: Mapping[str, Any]) -> list[str]:
    version = str(config.get("version") or config.get("format") or VERSION).lower()
    version = "llm-awq" if str(config.get("backend")).lower() == "llm-awq" else version
    problems = []
    if version != VERSION:
        problems.append(f"is stored in AWQ's version {version!r}, only {VERSION!r} is known")
    if config.get("bits", BITS) != BITS:
        problems.append(f"says {config['bits']!r} bits, expected 4")
    return problems


def _one(base: Base, config: Mapping[str, Any], module: str, problems: list[str]) -> Awq | None:
    tensors = affine.named(base, module, *PARTS)
    wrong = affine.missing(base, module, *PARTS) + affine.mistyped(tensors, DTYPES)
    wrong += affine.flat(tensors)
    if wrong:
        problems += wrong
        return None
    qweight, qzeros, scales = (ref for _, ref in tensors)
    inputs, outputs = qweight.shape[0], qweight.shape[1] * IN_WORD
    usual = config.get("group_size")
    size = usual if isinstance(usual, int) and usual > 0 else inputs
    groups = -(-inputs // size)
    expected = {"qzeros": (groups, outputs // IN_WORD), "scales": (groups, outputs)}
    wrong = affine.misfits(tensors, expected)
    problems += wrong
    return None if wrong else Awq(module, (outputs, inputs), size, qweight, qzeros, scales)


SCHEME = Scheme(
    "awq", "AWQ, version gemm", URL, _detect, _find, kept=kept_under("modules_to_not_convert")
)
