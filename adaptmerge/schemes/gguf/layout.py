"""How llama.cpp stores the weights of a model: per row, blocks of codes with their scales.

| tensor | holds |
|---|---|
| of a block type (Q4_0, Q4_K, ...) | bytes (..., out, blocks of a row), see `CODECS` |
| of a float type | values (..., out, in) |

Rows of q and k lie in llama.cpp's order in some architectures, experts are stacked in one tensor, and norms
may have 1 added. One packed weight is a matrix as its module has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adaptmerge.bases.base import Base
from adaptmerge.bases.gguf_model import GgufModel
from adaptmerge.bases.stored_as import StoredAs, halved, interleaved
from adaptmerge.errors import CannotMerge
from adaptmerge.files.gguf import TYPES, type_name
from adaptmerge.lazy import torch
from adaptmerge.schemes.coded import CodedWeight, stacked
from adaptmerge.schemes.gguf.blocks import Codec
from adaptmerge.schemes.gguf.codecs import CODECS
from adaptmerge.schemes.grids import BlockGrid
from adaptmerge.schemes.scheme import Scheme
from adaptmerge.tensors.refs import TensorRef

URL = "https://github.com/ggml-org/llama.cpp/blob/master/docs/development/HOWTO-add-model.md"
WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Ggml:
    """A matrix in blocks of one type; `raw` is its bytes (out, bytes of a row) in the file's order of
    rows."""

    module: str
    shape: tuple[int, int]
    type: int
    stored_as: StoredAs
    raw: TensorRef

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        return {self.stored_as.name: self.raw}

    @property
    def _codec(self) -> Codec:
        """Raises CannotMerge for a type whose blocks cannot be made anew."""
        found = CODECS.get(self.type)
        if found is None:
            known = ", ".join(codec.name for codec in CODECS.values())
            raise CannotMerge(
                f"is stored as {type_name(self.type)}, which cannot be fused into (known: {known}): give a "
                "model that is quantised otherwise",
                where=self.module,
            )
        return found

    @property
    def _ordered(self) -> TensorRef:
        """The bytes with rows as the module has them."""
        heads = self.stored_as.heads
        return halved(self.raw, heads) if heads else self.raw

    def grid(self, rows: tuple[int, int]) -> tuple[torch.Tensor, BlockGrid]:
        return self._codec.grid(self._ordered.slice(0, *rows).read())

    def pack(self, codes: torch.Tensor, grid: BlockGrid) -> dict[str, torch.Tensor]:
        made = self._codec.pack(self._ordered.read(), codes, grid)
        heads = self.stored_as.heads
        return {self.stored_as.name: interleaved(made, heads).contiguous() if heads else made}

    def nearest_scales(self, scale: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor | None:
        return self._codec.nearest_scales(self._ordered.slice(0, *rows).read(), scale)


def _detect(base: Base) -> bool:
    return isinstance(base, GgufModel)


def _stored_as(base: Base) -> dict[str, StoredAs]:
    from adaptmerge.schemes.gguf.names import stored_as

    assert isinstance(base, GgufModel)
    return stored_as(base)


def _find(base: Base) -> dict[str, CodedWeight]:
    """The matrices that are stored in blocks."""
    assert isinstance(base, GgufModel)
    found: dict[str, CodedWeight] = {}
    for name, stored_as in _stored_as(base).items():
        whole, entry = stacked(stored_as.name)
        info = base.infos.get(whole)
        if info is not None and TYPES[info.type].width > 1 and name.endswith(WEIGHT):
            stored = base.tensors[whole]
            raw = stored if entry is None else stored.entry(entry)
            rows, columns = info.shape[-2:]
            module = name.removesuffix(WEIGHT)
            found[module] = Ggml(module, (rows, columns), info.type, stored_as, raw)
    return found


SCHEME = Scheme("gguf", "GGUF", URL, _detect, _find, _stored_as, typed=True)
