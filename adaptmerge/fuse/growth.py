"""Weights of a quantised base that are stored in 16 bits from now on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adaptmerge.errors import CannotMerge
from adaptmerge.files.dtypes import BF16, F16, DType
from adaptmerge.fuse.quantised import View, running_dtype
from adaptmerge.packed import Kept, Packed, schemes
from adaptmerge.runtime.linears import linear_layers

PLAIN_BYTES = 2
QUANTISATION = "quantization_config"


@dataclass(frozen=True)
class Plain:
    """Names of weights that stay in 16 bits, with the bytes that each costs; their dtype, and the entries
    of the config that say so."""

    growth: Mapping[str, int]
    dtype: DType
    config: Mapping[str, object]


def can_mix(view: View) -> bool:
    """Whether loaders of the base's layout leave layers as they are that its config lists."""
    how = None if view.scheme is None else schemes()[view.scheme].kept
    return how is not None and QUANTISATION in view.stored.config


def plain(names: Sequence[str], view: View) -> Plain:
    """The named weights as they are stored plainly instead of packed.

    Raises CannotMerge where no other would be left.
    """
    if len(names) == len(view.packed):
        raise CannotMerge("no layer would be left that is quantised: pass --quant bf16")
    dtype = running_dtype(view) or BF16
    return Plain(
        {name: _growth(view.packed[name]) for name in names},
        dtype if dtype in (BF16, F16) else BF16,
        _config(view, names),
    )


def _growth(packed: Packed) -> int:
    """How many bytes more a packed weight takes in 16 bits."""
    stored = sum(ref.nbytes for ref in packed.tensors.values())
    return PLAIN_BYTES * math.prod(packed.shape) - stored


def _config(view: View, names: Sequence[str]) -> dict[str, object]:
    layers = linear_layers(view.base.path)
    called = {view.base.locate(module): module for module in (*layers.quantised, *layers.kept)}
    modules = [name.removesuffix(".weight") for name in names]
    chosen = tuple(called.get(module, module) for module in modules)
    usual = tuple(m for m in layers.kept if f"{view.base.locate(m)}.weight" not in view.packed)
    how = schemes()[view.scheme or ""].kept
    assert how is not None
    before = view.stored.config[QUANTISATION]
    return {QUANTISATION: dict(how(before, Kept(usual, chosen)))}
