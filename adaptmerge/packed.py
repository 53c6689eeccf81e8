"""Quantised weights in checkpoints: which stored tensors make one up, and what they stand for.

A scheme is one module of `adaptmerge.schemes` with a constant SCHEME. It knows a layout and nothing of
rounding: it finds packed weights, reads rows of them as codes on a grid, and stores codes on a grid again.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from adaptmerge.errors import AdaptmergeError, InputError
from adaptmerge.files.dtypes import F32, DType
from adaptmerge.files.refs import TensorRef

if TYPE_CHECKING:
    import torch

    from adaptmerge.base import Base
    from adaptmerge.grids import BlockGrid
    from adaptmerge.spelling import Spelled


class Packed(Protocol):
    """One quantised weight (out, in) of a checkpoint. Data: refs and numbers, no tensors."""

    @property
    def module(self) -> str:
        """The module whose weight it is, as the checkpoint names it; one matrix of a parameter that stacks
        several is named PARAMETER[3]."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        """All stored tensors that make it up, by their names in the checkpoint, the codes first; NAME[3] is
        an entry of the first axis of NAME."""

    def grid(self, rows: tuple[int, int]) -> tuple[torch.Tensor, BlockGrid]:
        """The codes (rows, in), uint8, of some rows and the grid that they lie on, in float32."""

    def pack(self, codes: torch.Tensor, grid: BlockGrid) -> dict[str, torch.Tensor]:
        """What is stored for codes (out, in) on a grid of all rows: those of `tensors` that change with
        them, in their dtypes and shapes. Codes and grid as they were read give the stored bytes."""

    def nearest_scales(self, scale: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor | None:
        """The storable scales nearest to these (rows, blocks); None where scales cannot be chosen freely
        enough to be fitted (powers of two, blocks of several rows, blocks across rows)."""

    def __hash__(self) -> int:
        """Packed weights are data."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The linear layers that are not quantised: those that libraries leave by themselves, and others."""

    usual: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scheme:
    """One layout of quantised weights. find: the packed weights, by module, of a base that it detects;
    raises InputError for what it knows and cannot read. spelled: how parameters are stored, by their names
    in `transformers`, where a scheme has its own. kept: the quantization_config of a base in which further
    linear layers stay as they are; None where no loader would leave them so. typed: every stored tensor
    says itself how it is stored, so that any may be otherwise."""

    name: str
    title: str
    url: str
    detect: Callable[[Base], bool]
    find: Callable[[Base], Mapping[str, Packed]]
    spelled: Callable[[Base], Mapping[str, Spelled]] = lambda _: {}
    refused: bool = False  # known by name only, and never read
    typed: bool = False
    kept: Callable[[Mapping[str, Any], Kept], Mapping[str, Any]] | None = None


def kept_under(key: str) -> Callable[[Mapping[str, Any], Kept], Mapping[str, Any]]:
    """A `kept` of configs that list modules under a key: without a list loaders leave the usual ones, with
    one those that it names."""
    return lambda config, kept: {
        **config,
        key: list(dict.fromkeys([*(config.get(key) or kept.usual), *kept.chosen])),
    }


@dataclass(frozen=True, slots=True)
class Fresh:
    """A way to quantise weights anew, as a scheme's own library does it: one of the FRESH of its module.

    quantise: the packed weight, of computed tensors, of a module's values (out, in), where a model computes
    in a dtype; raises CannotStore for shapes that the layout has no room for. config: the
    quantization_config of a model of that dtype in which some linear layers stay as they are: those that
    the library leaves by itself, and others. conv1d: whether layers that are stored as (in, out) can be
    quantised. mixed: whether loaders leave layers as they are that are chosen. experts: whether they read
    experts that are stored one by one, in full precision, beside quantised layers.
    """

    name: str
    quantise: Callable[[str, TensorRef, DType], Packed]
    config: Callable[[Kept, DType], Mapping[str, Any]]
    conv1d: bool = False
    mixed: bool = True
    experts: bool = True


@dataclass(frozen=True, slots=True)
class Dequantised:
    """A packed weight as the values that it stands for, in float32: a source of refs."""

    at_once: ClassVar[bool] = False
    packed: Packed

    @property
    def shape(self) -> tuple[int, ...]:
        return self.packed.shape

    @property
    def dtype(self) -> DType:
        return F32

    def read(self) -> torch.Tensor:
        return dequantised(self.packed, (0, self.packed.shape[0]))

    def rows(self, start: int, stop: int) -> DequantisedRows:
        """Some rows of it, as a source that reads no others."""
        return DequantisedRows(self.packed, start, stop)


@dataclass(frozen=True, slots=True)
class DequantisedRows:
    """Rows of a packed weight as the values that they stand for."""

    packed: Packed
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stop - self.start, self.packed.shape[1]

    @property
    def dtype(self) -> DType:
        return F32

    def read(self) -> torch.Tensor:
        return dequantised(self.packed, (self.start, self.stop))


def named(packed: Packed) -> str:
    """The name of the values of a packed weight: of the module's weight, or NAME[3] in a stack of them."""
    return packed.module if packed.module.endswith("]") else f"{packed.module}.weight"


def stacked(name: str) -> tuple[str, int | None]:
    """The tensor that a name is of, and which of the entries of its first axis; None for all of it."""
    whole, bracket, number = name.removesuffix("]").rpartition("[")
    return (whole, int(number)) if bracket else (name, None)


def stands_alone(packed: Packed) -> bool:
    """Whether the tensors of a packed weight hold no other, as those of a stack do."""
    return all(stacked(name)[1] is None for name in packed.tensors)


def dequantised(packed: Packed, rows: tuple[int, int]) -> torch.Tensor:
    """Rows of a packed weight (rows, in) in float32."""
    from adaptmerge.lazy import torch

    codes, grid = packed.grid(rows)
    out = torch.empty(codes.shape, dtype=torch.float32)
    return grid.values(codes, slice(0, packed.shape[1]), out)


@cache
def schemes() -> Mapping[str, Scheme]:
    """All schemes by name."""
    found: dict[str, Scheme] = {}
    for module in _modules():
        for scheme in (getattr(module, "SCHEME", None), *getattr(module, "SCHEMES", ())):
            if scheme is not None and scheme.name in found:
                raise AdaptmergeError(f"two schemes are named {scheme.name!r}")
            if scheme is not None:
                found[scheme.name] = scheme
    return found


@cache
def fresh() -> Mapping[str, Fresh]:
    """All ways to quantise weights anew, by name."""
    return {one.name: one for module in _modules() for one in getattr(module, "FRESH", ())}


def _modules() -> list[Any]:
    root = importlib.import_module("adaptmerge.schemes")
    names = sorted(info.name for info in pkgutil.iter_modules(root.__path__))
    return [importlib.import_module(f"adaptmerge.schemes.{name}") for name in names]


def scheme_of(base: Base) -> Scheme | None:
    """The scheme that a base is quantised with; None for one in full precision.

    Raises InputError for one that is quantised otherwise.
    """
    hits = [scheme for scheme in schemes().values() if scheme.detect(base)]
    if len(hits) > 1:
        names = " and ".join(hit.name for hit in hits)
        raise InputError(f"could be quantised as {names}", where=str(base.path))
    if hits:
        return hits[0]
    said = base.config.get("quantization_config")
    if isinstance(said, Mapping):
        how = said.get("quant_method") or "unknown"
        known = ", ".join(name for name, scheme in schemes().items() if not scheme.refused)
        raise InputError(
            f"is quantised ({how}), which cannot be fused into (known: {known}): give the "
            "original base, with --trained-on for an adapter that was trained on a quantised one",
            where=str(base.path),
        )
    return None
