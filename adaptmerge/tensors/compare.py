"""Whether two stored tensors hold the same values, without loading both."""

from __future__ import annotations

from pathlib import Path

from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import Stored, TensorRef

CHUNK = 1 << 20


def same_values(a: TensorRef, b: TensorRef) -> bool:
    """Whether shape, dtype and every bit agree; plain spans of files are compared chunk by chunk."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if isinstance(a.source, Stored) and isinstance(b.source, Stored) and not (a.steps or b.steps):
        return _same_bytes(a.source, b.source)
    left, right = a.read().flatten(), b.read().flatten()
    return bool(torch.equal(left.view(torch.uint8), right.view(torch.uint8)))


def _same_bytes(a: Stored, b: Stored) -> bool:
    with Path(a.path).open("rb") as left, Path(b.path).open("rb") as right:
        left.seek(a.offset)
        right.seek(b.offset)
        remaining = a.nbytes
        while remaining:
            step = min(CHUNK, remaining)
            if left.read(step) != right.read(step):
                return False
            remaining -= step
    return True
