"""The files of a fused checkpoint: which tensors they hold, in which order, and what each is made of."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from adaptmerge.bases.base import Base
from adaptmerge.bases.gguf_model import GgufModel
from adaptmerge.bases.stored_as import halved, interleaved
from adaptmerge.files import header
from adaptmerge.files.gguf import NUMBERS, GgufFile, Info, rewritten
from adaptmerge.files.pickles import Pickled
from adaptmerge.files.safetensors import raw_header, read_header
from adaptmerge.lazy import torch
from adaptmerge.rounding.codes import CodedMatrix
from adaptmerge.rounding.matrix import Matrix
from adaptmerge.schemes.coded import Dequantised
from adaptmerge.tensors.dtypes import DType
from adaptmerge.tensors.refs import Joined, Stored, TensorRef, constant

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
INDEXES = (INDEX, "pytorch_model.bin.index.json")


@dataclass(frozen=True, slots=True)
class Copy:
    """A run of stored values that go into the output as they are, or cast to its dtype."""

    ref: TensorRef


@dataclass(frozen=True, slots=True)
class Fused:
    """A matrix that is computed; `transposed`: it is stored as (in, out); `heads`: with the rows of each of
    so many heads in pairs, not in halves."""

    matrix: Matrix
    transposed: bool = False
    heads: int = 0

    @property
    def in_order(self) -> bool:
        """Whether its rows are stored one after the other."""
        return not (self.transposed or self.heads)

    def stored(self, value: torch.Tensor) -> torch.Tensor:
        """All of the matrix (out, in) as it is stored."""
        value = interleaved(value, self.heads) if self.heads else value
        return value.T if self.transposed else value

    def seen(self, stored: TensorRef) -> TensorRef:
        """The matrix (out, in) in what is stored: the inverse."""
        ref = stored.T if self.transposed else stored.reshape(*self.matrix.shape)
        return halved(ref, self.heads) if self.heads else ref


@dataclass(frozen=True, slots=True)
class Recoded:
    """One of the tensors that a coded weight is stored as, under the name that the weight has for it. Of
    these the one that `leads` stands for the weight where it must be counted once; `stored` is what the
    base has."""

    coded: CodedMatrix
    name: str
    stored: TensorRef
    leads: bool = False


TensorPart = Copy | Fused | Recoded


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the output: its parts follow each other in row-major order; then `gap` zero bytes."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    parts: tuple[TensorPart, ...]
    gap: int = 0

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(math.prod(self.shape))

    @property
    def made(self) -> list[Fused | CodedMatrix]:
        """What is computed, each counted with one tensor."""
        return [
            part.coded if isinstance(part, Recoded) else part
            for part in self.parts
            if isinstance(part, Fused) or (isinstance(part, Recoded) and part.leads)
        ]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the output: its name, its first bytes, its tensors in the order of their data."""

    name: str
    header: bytes
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes + tensor.gap for tensor in self.tensors)

    @property
    def made(self) -> list[Fused | CodedMatrix]:
        """What is computed, in order."""
        return [one for tensor in self.tensors for one in tensor.made]

    @property
    def names(self) -> list[str]:
        """The tensor that each of what is computed is counted with."""
        return [tensor.name for tensor in self.tensors for _ in tensor.made]

    @property
    def coded_matrices(self) -> list[CodedMatrix]:
        """The coded weights of which it holds any tensor."""
        parts = (part for tensor in self.tensors for part in tensor.parts)
        return list(dict.fromkeys(p.coded for p in parts if isinstance(p, Recoded)))


def files_of(base: Base) -> dict[str, list[str]]:
    """The names of the tensors in each file of a checkpoint, files by path, in the order of their data."""
    found: dict[str, list[str]] = {}
    for name, ref in base.tensors.items():
        found.setdefault(path_of(ref), []).append(name)
    for names in found.values():
        names.sort(key=lambda name: getattr(base.tensors[name].source, "offset", 0))
    return dict(sorted(found.items()))


def path_of(ref: TensorRef) -> str:
    """The file that a tensor of a checkpoint lies in; of a coded weight that of its codes."""
    source = ref.source
    if isinstance(source, Dequantised):
        return path_of(next(iter(source.weight.tensors.values())))
    if isinstance(source, Joined):
        return path_of(source.parts[0])
    assert isinstance(source, Stored | Pickled)
    return source.path


def shards_of(
    base: Base,
    tensors: Mapping[str, Tensor],
    added: Mapping[str, str],
    asked: DType | None,
    gone: Collection[str] = (),
) -> list[Shard]:
    """The files of the output. tensors: those that change or are new. added: new names, each with that of
    a tensor whose file it goes into. gone: names that are no more.

    Where one would not be aligned to its own elements wide ones come first."""
    shards, files = [], files_of(base)
    last = list(files.values())[-1][-1]
    for path, names in files.items():
        here = list(names)
        for new, beside in added.items():
            anchor = beside if beside in base.tensors else last
            if anchor in names:
                here.insert(here.index(anchor) + 1, new)
        found = tuple(
            tensors.get(name) or _copied(name, base.tensors[name], asked)
            for name in here
            if name not in gone
        )
        if isinstance(base, GgufModel):
            shards.append(_gguf_shard(base.header(path), found))
            continue
        if not _is_aligned(found):
            found = tuple(sorted(found, key=lambda tensor: -tensor.dtype.bits))
        name = output_name(Path(path).name) if len(files) > 1 or _is_indexed(base) else SINGLE
        shards.append(Shard(name, _header(path, found), found))
    return shards


def _gguf_shard(header: GgufFile, tensors: Sequence[Tensor]) -> Shard:
    """A GGUF file: what its header says of tensors that stay, and the types of those that do not."""
    infos = {info.name: info for info in header.infos}
    made = [_info(tensor, infos.get(tensor.name)) for tensor in tensors]
    gaps = [-tensor.nbytes % header.alignment for tensor in tensors]
    padded = tuple(replace(t, gap=gap) for t, gap in zip(tensors, gaps, strict=True))
    return Shard(Path(header.path).name, rewritten(header, made), padded)


def _info(tensor: Tensor, before: Info | None) -> Info:
    """What the header says of a tensor, its offset apart."""
    number = NUMBERS.get(tensor.dtype)
    same = before is not None and before.stored_as == (tensor.shape, tensor.dtype)
    if same or number is None:
        assert before is not None, "bytes are only kept"
        return before
    return Info(tensor.name, tensor.shape, number, 0)


def _is_aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether every tensor begins at a multiple of the size of its elements."""
    offsets = accumulate((tensor.nbytes for tensor in tensors), initial=0)
    return not any(8 * start % one.dtype.bits for one, start in zip(tensors, offsets, strict=False))


def _is_indexed(base: Base) -> bool:
    """Whether an index says what the files are called; without one a lone file has the usual name."""
    return any((base.path / name).is_file() for name in INDEXES)


def output_name(name: str) -> str:
    """The name of the file that a file of the base becomes: pickles become safetensors."""
    if name.endswith(".safetensors"):
        return name
    stem = name.rpartition(".")[0]
    return f"{stem.replace('pytorch_model', 'model')}.safetensors"


def _copied(name: str, ref: TensorRef, asked: DType | None) -> Tensor:
    return Tensor(name, output_dtype(ref, asked), ref.shape, (Copy(ref),))


def output_dtype(ref: TensorRef, asked: DType | None) -> DType:
    """What a stored tensor is written in: as it is; floats of 16 bits and more as asked."""
    wide = ref.dtype.is_float and ref.dtype.bits >= 16
    return asked if asked is not None and wide else ref.dtype


def _header(path: str, tensors: Sequence[Tensor]) -> bytes:
    """The source file's own first bytes where nothing in them changes."""
    blanks = {t.name: constant(0.0, t.shape, t.dtype) for t in tensors}
    if not path.endswith(".safetensors"):
        return header.build(blanks, {"format": "pt"}, path, list(blanks))[0]
    first, stored = raw_header(path), read_header(path).refs
    same = stored.keys() == blanks.keys() and all(
        (ref.shape, ref.dtype) == (blanks[name].shape, blanks[name].dtype)
        for name, ref in stored.items()
    )
    if same:
        return first
    return header.build(blanks, _metadata(first), path, list(blanks))[0]


def _metadata(first: bytes) -> dict[str, str]:
    import json

    found: dict[str, str] = json.loads(first[8:]).get(header.METADATA) or {}
    return found


def index_of(shards: Sequence[Shard], metadata: Mapping[str, object]) -> dict[str, Any]:
    """The content of an index that says which file has which tensor."""
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    names = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    return {
        "metadata": {**metadata, "total_size": total},
        "weight_map": dict(sorted(names.items())),
    }
