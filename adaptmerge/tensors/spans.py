"""Runs of bytes in files, read as tensors."""

from __future__ import annotations

from adaptmerge.errors import InputError
from adaptmerge.lazy import torch
from adaptmerge.tensors.dtypes import DType


def read_span(path: str, offset: int, nbytes: int) -> torch.Tensor:
    """`nbytes` bytes of a file as a uint8 tensor. Raises InputError when the file is shorter."""
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    if not nbytes:
        return buffer
    view = memoryview(buffer.numpy().data)
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - called for every tensor
            file.seek(offset)
            done = 0
            while done < nbytes:
                step = file.readinto(view[done:])
                if not step:
                    break
                done += step
    except OSError as problem:
        raise InputError(f"cannot be read: {problem.strerror}", where=path) from None
    if done < nbytes:
        raise InputError(
            f"ends {nbytes - done} bytes early: it was shortened while in use", where=path
        )
    return buffer


def as_tensor(raw: torch.Tensor, dtype: DType, shape: tuple[int, ...]) -> torch.Tensor:
    """Bytes as values of a dtype and shape; as they are where torch has no such dtype."""
    if dtype.torch_name is None or not hasattr(torch, dtype.torch_name):
        return raw
    return raw.view(dtype.torch).reshape(shape)
