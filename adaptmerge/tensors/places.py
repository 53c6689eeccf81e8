"""Tensors of whole numbers that say where other values are put, or taken from."""

from __future__ import annotations

from adaptmerge.errors import InputError
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef


def places_in(ref: TensorRef, *sizes: int) -> torch.Tensor:
    """The places that a tensor holds, int64, below a size; with several sizes each of its rows below its
    own. Raises InputError naming the tensor where one is not."""
    found = ref.read().long()
    rows = found.unbind(0) if len(sizes) > 1 else (found,)
    if all(map(_within, rows, sizes)):
        return found
    raise InputError(
        f"tensor {ref.name!r} has places outside of {' x '.join(map(str, sizes))} values: is it for "
        "another model?"
    )


def _within(places: torch.Tensor, size: int) -> bool:
    return not places.numel() or 0 <= int(places.min()) <= int(places.max()) < size
