"""A quantised base seen as one in full precision, and where its packed weights go in the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from adaptmerge.base import Base
from adaptmerge.errors import InputError
from adaptmerge.files.dtypes import BF16, F16, DType
from adaptmerge.files.refs import TensorRef, computed
from adaptmerge.graph import Site
from adaptmerge.packed import Dequantised, Packed, scheme_of

QUANTISATION = ("quantization_config", "quantization", "compression_config")


@dataclass(frozen=True)
class View:
    """A base with the values of its packed weights in place of the tensors that store them.

    base: the view; stored: the base as it is. packed: the packed weights by the name of their values.
    """

    base: Base
    stored: Base
    scheme: str | None = None
    packed: Mapping[str, Packed] = field(default_factory=dict)


def view_of(stored: Base) -> View:
    """The view of a base; itself where nothing is quantised. Raises InputError for unknown layouts."""
    scheme = scheme_of(stored)
    if scheme is None:
        return View(stored, stored)
    found = scheme.find(stored)
    if any(module.endswith("]") for module in found):
        raise InputError(
            f"stacks experts as {scheme.name} does, which cannot be fused into yet: dequantise it first",
            where=str(stored.path),
        )
    inside = {name for packed in found.values() for name in packed.tensors}
    tensors = {name: ref for name, ref in stored.tensors.items() if name not in inside}
    packed = {f"{module}.weight": one for module, one in found.items()}
    tensors |= {
        name: _laid_out(computed(Dequantised(one), name), stored) for name, one in packed.items()
    }
    config = {key: value for key, value in stored.config.items() if key not in QUANTISATION}
    return View(replace(stored, tensors=tensors, config=config), stored, scheme.name, packed)


def _laid_out(values: TensorRef, base: Base) -> TensorRef:
    """Values (out, in) as a checkpoint in full precision holds them."""
    turned = base.is_transposed(Site(values.name.removesuffix(".weight")))
    return values.T if turned else values


def running_dtype(config: Mapping[str, Any]) -> DType | None:
    """What a quantised model computes with its weights in, as its config says; None for float32."""
    said = config.get("quantization_config") or {}
    named = said.get("bnb_4bit_compute_dtype") or config.get("torch_dtype") or config.get("dtype")
    return {"float16": F16, "float32": None}.get(str(named).removeprefix("torch."), BF16)
