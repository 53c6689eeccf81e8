"""Tensors that are not what they were, in every way that a file can hold: for whoever reads them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

CHANGES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "one axis more": lambda value: value[None],
    "one axis": lambda value: value.reshape(-1),
    "no axis": lambda value: value.reshape(-1)[:1].reshape(()),
    "no rows": lambda value: value[:0],
    "no columns": lambda value: value[..., :0],
    "one row more": lambda value: torch.cat([value, value[:1]]) if value.ndim else value[None],
    "half of its rows": lambda value: value[: value.shape[0] // 2] if value.ndim else value[None],
    "turned": lambda value: value.t() if value.ndim == 2 else value[None, :],
    "whole numbers": lambda value: value.to(torch.int64),
    "bytes": lambda value: value.to(torch.uint8),
    "complex": lambda value: value.to(torch.complex64),
    "truths": lambda value: value > 0,
    "in float8": lambda value: value.to(torch.float8_e4m3fn),
}


def damaged(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """All tensors with one of them changed, and how: once for each change and kind of tensor."""
    seen = set()
    for name, value in tensors.items():
        kind = re.sub(r"\d+|[a-z]+_proj", "", name)
        for said, change in CHANGES.items():
            if (kind, said) in seen:
                continue
            seen.add((kind, said))
            try:
                changed = change(value).contiguous().clone()
            except (RuntimeError, IndexError, TypeError):
                continue  # a tensor of this kind cannot be changed so
            yield f"{name}: {said}", {**tensors, name: changed}
