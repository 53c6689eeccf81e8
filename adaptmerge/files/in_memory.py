"""Tensors and documents in memory, asked like the files of a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptmerge.errors import InputError
from adaptmerge.files.disk import tensor_bytes
from adaptmerge.files.listing import Listing
from adaptmerge.files.pickles import Pickled
from adaptmerge.files.strict_json import capped, quoted
from adaptmerge.files.tensor_file import TensorFile
from adaptmerge.lazy import torch
from adaptmerge.tensors import dtypes
from adaptmerge.tensors.dtypes import DType
from adaptmerge.tensors.refs import Shape, Stored, TensorRef, computed


@dataclass(frozen=True, eq=False, slots=True)
class Snapshot:
    """A tensor on the CPU that nobody else changes, as the source of a ref."""

    value: torch.Tensor

    @property
    def shape(self) -> Shape:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> DType:
        return dtypes.of_torch(self.value.dtype)

    def read(self) -> torch.Tensor:
        return self.value.clone()

    def rows(self, start: int, stop: int) -> Snapshot:
        """Some entries of the first axis."""
        return Snapshot(self.value[start:stop])


AS_STORED = (Stored, Pickled, Snapshot)  # values as an input has them, and nothing computed


class SnapshotScratch:
    """Keeps results in memory, where a scratch file would keep them on the disk."""

    def put(self, tensor: torch.Tensor, name: str = "") -> TensorRef:
        """A ref to the tensor."""
        return computed(Snapshot(tensor), name)


def snapshots(tensors: Mapping[str, Any], metadata: Mapping[str, str], where: str) -> TensorFile:
    """Copies of tensors, as those of a file. Raises InputError for what no file could hold."""
    problems = [
        f"{quoted(str(name))} is {_described(value)}: expected a tensor with values, dense and in a "
        "standard dtype"
        for name, value in tensors.items()
        if not isinstance(name, str) or not _is_plain(value)
    ]
    if problems:
        raise InputError(capped(problems), where=where)
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # as in a file
    refs = {name: computed(Snapshot(_copy(tensors[name])), name) for name in order}
    return TensorFile(where, refs, dict(metadata))


def _copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def _is_plain(value: object) -> bool:
    return isinstance(value, torch.Tensor) and dtypes.is_plain(value)


def _described(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return f"of type {type(value).__name__}"
    return f"{value.layout} {value.dtype} on {value.device}"


class InMemory(Listing):
    """Documents and tensors by the names that their files would have."""

    @classmethod
    def holding(
        cls, origin: str, documents: Mapping[str, Any], tensors: Mapping[str, TensorFile]
    ) -> InMemory:
        """A listing of these; of one file where there is only one."""
        names = tuple(sorted([*documents, *tensors]))
        kept: dict[tuple[str, str], Any] = {("json", n): value for n, value in documents.items()}
        kept |= {("tensors", name): file for name, file in tensors.items()}
        return cls(origin, Path(origin), names[0] if len(names) == 1 else None, names, (), kept)

    @property
    def on_disk(self) -> bool:
        return False

    def has(self, name: str) -> bool:
        return name in self.names

    def head(self, name: str, n: int = 64) -> bytes:
        return b""

    def sha256(self, *names: str) -> dict[str, str]:
        """Digests of what would be in the files: documents as JSON, tensors with names and dtypes."""
        return {name: self._digest(name) for name in names or self.names}

    def _digest(self, name: str) -> str:
        if ("json", name) in self._kept:
            return hashlib.sha256(json.dumps(self.json(name), sort_keys=True).encode()).hexdigest()
        digest = hashlib.sha256()
        for key, ref in sorted(self.tensors(name).refs.items()):
            digest.update(f"{key} {ref.dtype} {list(ref.shape)}\n".encode())
            digest.update(tensor_bytes(ref.read()))
        return digest.hexdigest()
