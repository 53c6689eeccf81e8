"""A scratch file of tensors: results wait there until a writer takes them over."""

from __future__ import annotations

import os
from pathlib import Path

from adaptmerge.files import dtypes, refs
from adaptmerge.files.disk import tensor_bytes, writing
from adaptmerge.files.refs import TensorRef
from adaptmerge.lazy import torch

_ALIGNMENT = 8


class Scratch:
    """An append-only file of tensors, for one thread; refs stay readable after it is closed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Create the file. Raises OutputError when that is impossible."""
        self.path = str(Path(path).absolute())
        self._end = 0
        with writing(self.path):
            # unbuffered, so that a tensor can be read as soon as put() returns
            self._file = Path(self.path).open("wb", buffering=0)  # noqa: SIM115

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

    def _write(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += self._file.write(data[done:])
        self._end += done

    def close(self) -> None:
        """Close the file; it stays where it is."""
        with writing(self.path):
            self._file.close()

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
