"""A quantised base seen as one in full precision, and where its coded weights go in the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adaptmerge.adapters.graph import Site
from adaptmerge.bases.base import Base
from adaptmerge.bases.gguf_model import GgufModel
from adaptmerge.bases.open import open_base
from adaptmerge.bases.stored_as import StoredAs
from adaptmerge.runtime.linears import parameters_of
from adaptmerge.schemes.coded import CodedWeight, Dequantised, named, stacked
from adaptmerge.schemes.scheme import scheme_of
from adaptmerge.tensors.dtypes import BF16, F16, DType
from adaptmerge.tensors.refs import TensorRef, computed, join

QUANT_ENTRIES = ("quantization_config", "quantization", "compression_config")


@dataclass(frozen=True)
class View:
    """A base with the values of its coded weights in place of the tensors that store them.

    on_disk: the base as it is. coded: the coded weights by the name of their values, one
    of a stack as NAME[3]. stored_as: how parameters are stored that have another name in the checkpoint.
    """

    values: Base
    on_disk: Base
    scheme: str | None = None
    coded: Mapping[str, CodedWeight] = field(default_factory=dict)
    stored_as: Mapping[str, StoredAs] = field(default_factory=dict)


def view_of(stored: Base) -> View:
    """The view of a base; itself where nothing is quantised. Raises InputError for unknown layouts."""
    if isinstance(stored, GgufModel):
        stored = replace(stored, parameters=parameters_of(stored.path))
    scheme = scheme_of(stored)
    if scheme is None:
        return View(stored, stored)
    coded = {named(one): one for one in scheme.find(stored).values()}
    stored_as = scheme.stored_as(stored)
    inside = {stacked(name)[0] for one in coded.values() for name in one.tensors}
    inside |= {stacked(one.name)[0] for one in stored_as.values()}
    tensors = {name: ref for name, ref in stored.tensors.items() if name not in inside}
    tensors |= _as_modules_have_them(stored_as, stored) | _values(coded, stored)
    config = {key: value for key, value in stored.config.items() if key not in QUANT_ENTRIES}
    return View(
        replace(stored, tensors=tensors, config=config, on_disk=stored),
        stored,
        scheme.name,
        coded,
        stored_as,
    )


def _as_modules_have_them(stored_as: Mapping[str, StoredAs], stored: Base) -> dict[str, TensorRef]:
    """Parameters as their modules have them."""
    found: dict[str, TensorRef] = {}
    for name, one in stored_as.items():
        whole, entry = stacked(one.name)
        ref = stored.tensors.get(whole)
        if ref is not None:
            found[name] = one.seen(ref if entry is None else ref.entry(entry))
    return found


def _values(coded: Mapping[str, CodedWeight], stored: Base) -> dict[str, TensorRef]:
    """What coded weights stand for, as a checkpoint in full precision stores it."""
    found: dict[str, TensorRef] = {}
    stacks: dict[str, list[TensorRef]] = {}
    for name, one in coded.items():
        whole, expert = stacked(name)
        module, _, param = whole.rpartition(".")
        value = computed(Dequantised(one), name)
        turned = stored.is_transposed(Site(module, param, expert=expert))
        value = value.T if turned else value
        if expert is None:
            found[name] = value
        else:
            stacks.setdefault(whole, []).append(value.reshape(1, *value.shape))
    return found | {name: replace(join(parts, 0), name=name) for name, parts in stacks.items()}


def open_values(source: str | Path) -> Base:
    """The base model at a source with quantised weights as what they stand for. Raises InputError."""
    return view_of(open_base(source)).values


def running_dtype(config: Mapping[str, Any]) -> DType | None:
    """What a quantised model computes with its weights in, as its config says; None for float32."""
    said = config.get("quantization_config") or {}
    named = said.get("bnb_4bit_compute_dtype") or config.get("torch_dtype") or config.get("dtype")
    return {"float16": F16, "float32": None}.get(str(named).removeprefix("torch."), BF16)
