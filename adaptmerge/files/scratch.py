"""A scratch file of tensors: results wait there until a writer takes them over."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from adaptmerge.files import header
from adaptmerge.files.disk import Flusher, tensor_bytes, writing
from adaptmerge.files.listing import sha256_of
from adaptmerge.lazy import torch
from adaptmerge.tensors import dtypes, refs
from adaptmerge.tensors.refs import Reshape, Stored, TensorRef

_ALIGNMENT = 8


class Keeps(Protocol):
    """Where results of a run wait until they are written."""

    def put(self, tensor: torch.Tensor, name: str = "") -> TensorRef:
        """A ref to the tensor, kept from now on."""


class Scratch:
    """An append-only file of tensors, for one thread; refs stay readable after it is closed."""

    def __init__(self, path: str | os.PathLike[str], reserve: int = 0) -> None:
        """Create the file, `reserve` bytes (a multiple of 8) left free at its start for a header.

        Raises OutputError when that is impossible.
        """
        self.path = str(Path(path).absolute())
        self.reserve = self._end = reserve
        with writing(self.path):
            # unbuffered, so that a tensor can be read as soon as put() returns
            self._file = Path(self.path).open("wb", buffering=0)  # noqa: SIM115
            self._file.seek(reserve)
        # so that a commit has little to wait for
        self._flusher = Flusher(self._file.fileno())

    def put(self, tensor: torch.Tensor, name: str = "") -> TensorRef:
        """Append the tensor's bytes and return a ref to them. Raises OutputError on a full disk."""
        data = tensor_bytes(tensor)
        offset = self._end + -self._end % _ALIGNMENT
        with writing(self.path):
            self._write(memoryview(bytes(offset - self._end)))
            self._write(data)
        return refs.stored(
            self.path, offset, tuple(tensor.shape), dtypes.of_torch(tensor.dtype), name
        )

    def adopt(
        self, path: Path, tensors: Mapping[str, TensorRef], metadata: Mapping[str, str]
    ) -> str | None:
        """Make the scratch the safetensors file at `path` if it holds exactly these tensors, and return
        the sha256 of the file in hexadecimal.

        The header goes into the reserved bytes, padded with spaces, and the file is renamed: nothing
        is copied. None, and nothing done, when anything else is in the file or the header is larger.
        """
        order = self._tiling(tensors)
        if order is None:
            return None
        first, _ = header.build(tensors, metadata, str(path), order)
        if len(first) > self.reserve:
            return None
        text = first[8:].ljust(self.reserve - 8)
        with writing(path):
            self._file.seek(0)
            self._write(memoryview(len(text).to_bytes(8, "little") + text))
            digest = self._closed()
            Path(self.path).replace(path)
        return digest

    def _tiling(self, tensors: Mapping[str, TensorRef]) -> list[str] | None:
        """The names in file order if their spans follow each other from the reserve to the end."""
        spans = []
        for name, ref in tensors.items():
            whole = all(isinstance(step, Reshape) for step in ref.steps)
            if not (isinstance(ref.source, Stored) and ref.source.path == self.path and whole):
                return None
            spans.append((ref.source.offset, ref.nbytes, name))
        position = self.reserve
        for offset, length, _ in sorted(spans):
            if offset != position:
                return None
            position += length
        return [name for *_, name in sorted(spans)] if position == self._end else None

    def _write(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += self._file.write(data[done:])
        self._end += done
        self._flusher.written(done)

    def _closed(self) -> str:
        """Closes the file and returns its sha256, which cannot be had before its header is known: the disk
        is waited for meanwhile."""
        with ThreadPoolExecutor(1) as hasher:
            digest = hasher.submit(sha256_of, self.path)
            self.close()
        return digest.result()

    def close(self) -> None:
        """Close the file; it stays where it is."""
        with writing(self.path):
            self._flusher.finish()
            self._file.close()

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
