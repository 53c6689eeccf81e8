"""How a parameter lies in a checkpoint that stores it otherwise than its module has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef

RefOrTensor = TypeVar("RefOrTensor", TensorRef, "torch.Tensor")


@dataclass(frozen=True, slots=True)
class StoredAs:
    """The name in the checkpoint, NAME[3] for an entry of the first axis of NAME, and what differs there.

    heads: rows of each of so many heads lie in pairs, not in halves (llama.cpp's rotary embedding); added:
    to every value (norms that multiply by 1 + w); turned: the matrix is transposed.
    """

    name: str
    heads: int = 0
    added: float = 0.0
    turned: bool = False

    def seen(self, ref: TensorRef) -> TensorRef:
        """The parameter as its module has it."""
        shape, rows = ref.shape, ref.shape[0]
        if self.heads:
            ref = halved(ref.reshape(rows, ref.count // rows), self.heads).reshape(*shape)
        ref = ref.shifted(-self.added)
        return ref.T if self.turned else ref

    def kept(self, ref: TensorRef) -> TensorRef:
        """What is stored of a parameter as its module has it: the inverse of `seen`."""
        ref = (ref.T if self.turned else ref).shifted(self.added)
        shape, rows = ref.shape, ref.shape[0]
        if self.heads:
            ref = interleaved(ref.reshape(rows, ref.count // rows), self.heads).reshape(*shape)
        return ref


def interleaved(ref: RefOrTensor, heads: int) -> RefOrTensor:
    """Rows of each head from two halves (transformers) to alternating pairs (llama.cpp)."""
    rows, columns = ref.shape
    halves = ref.reshape(heads, 2, rows // heads // 2, columns)
    return halves.permute(0, 2, 1, 3).reshape(rows, columns)


def halved(ref: RefOrTensor, heads: int) -> RefOrTensor:
    """The inverse of `interleaved`."""
    rows, columns = ref.shape
    pairs = ref.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.permute(0, 2, 1, 3).reshape(rows, columns)
