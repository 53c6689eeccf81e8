"""Tensors that PEFT stores once for all modules of an adapter, or draws from a seed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from adaptmerge.errors import CannotStore
from adaptmerge.formats.peft.tuner import Malformed, Reading
from adaptmerge.tensors.compare import same_values
from adaptmerge.tensors.refs import TensorRef


def uncut(refs: Iterable[TensorRef], what: str) -> TensorRef:
    """The one tensor that all refs are cut from, uncut. Raises CannotStore when there are several.

    Adapters of different files may well share it: what a seed gave one, it gave the other.
    """
    sources = dict.fromkeys(ref.source for ref in refs)
    first, *others = [TensorRef(s, s.shape, s.dtype) for s in sources]
    for other in others:
        if not same_values(first, other):
            raise CannotStore(
                f"{what} is stored once for all modules, here are several: --to native keeps each "
                "module's own, and a budget (--rank) makes them one LoRA"
            )
    return replace(first, shared=False)


def seed(reading: Reading, name: str) -> int:
    """A field that seeds a generator. Raises Malformed for anything that is no whole number from 0 on."""
    value = reading.setting(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise Malformed(f"{name} is {value!r}: expected a whole number from 0 on, to draw from")
    return value
