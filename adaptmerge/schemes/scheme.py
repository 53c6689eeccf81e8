"""What a layout of quantised weights is, and which one a base is in.

A scheme is one module of `adaptmerge.schemes` with a constant SCHEME. It knows a layout and nothing of
rounding: it finds quantised weights, reads rows of them as codes on a grid, and stores such codes again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from adaptmerge.bases.base import Base
from adaptmerge.bases.config import check_quantisation
from adaptmerge.bases.stored_as import StoredAs
from adaptmerge.discovery import modules_in
from adaptmerge.errors import AdaptmergeError, InputError
from adaptmerge.schemes.coded import CodedWeight
from adaptmerge.tensors.dtypes import DType
from adaptmerge.tensors.refs import TensorRef

PACKAGE = "adaptmerge.schemes"
QUANT_CONFIG = "quantization_config"  # the entry of config.json that says how a base is quantised


@dataclass(frozen=True, slots=True)
class Kept:
    """The linear layers that are not quantised: those that libraries leave by themselves, and others."""

    usual: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scheme:
    """One layout of quantised weights. find: the coded weights, by module, of a base that it detects;
    raises InputError for what it knows and cannot read. stored_as: how parameters are stored, by their
    names in `transformers`, where a scheme has its own. kept: the quantization_config of a base in which
    further linear layers stay as they are; None where no loader would leave them so. typed: every stored
    tensor says itself how it is stored, so that any may be otherwise."""

    name: str
    title: str
    url: str
    detect: Callable[[Base], bool]
    find: Callable[[Base], Mapping[str, CodedWeight]]
    stored_as: Callable[[Base], Mapping[str, StoredAs]] = lambda _: {}
    refused: bool = False  # known by name only, and never read
    typed: bool = False
    kept: Callable[[Mapping[str, Any], Kept], Mapping[str, Any]] | None = None


def config_of(base: Base) -> Mapping[str, Any]:
    """The quantization_config of a base; empty where there is none."""
    found = base.config.get(QUANT_CONFIG)
    return found if isinstance(found, Mapping) else {}


def checked(
    base: Base, found: Mapping[str, CodedWeight], problems: list[str], nothing: str
) -> Mapping[str, CodedWeight]:
    """What was found. Raises InputError with all problems, or saying `nothing` where nothing was found."""
    if not found and not problems:
        problems.append(nothing)
    if problems:
        raise InputError(problems, where=str(base.path))
    return found


def kept_under(key: str) -> Callable[[Mapping[str, Any], Kept], Mapping[str, Any]]:
    """A `kept` of configs that list modules under a key: without a list loaders leave the usual ones, with
    one those that it names."""
    return lambda config, kept: {
        **config,
        key: list(dict.fromkeys([*(config.get(key) or kept.usual), *kept.chosen])),
    }


@dataclass(frozen=True, slots=True)
class Quantiser:
    """A way to quantise weights anew, as a scheme's own library does it: one of QUANTISERS of its module.

    quantise: the coded weight, of computed tensors, of a module's values (out, in), where a model computes
    in a dtype; raises CannotStore for shapes that the layout has no room for. config: the
    quantization_config of a model of that dtype in which some linear layers stay as they are: those that
    the library leaves by itself, and others. conv1d: whether layers that are stored as (in, out) can be
    quantised. mixed: whether loaders leave layers as they are that are chosen. experts: whether they read
    experts that are stored one by one, in full precision, beside quantised layers.
    """

    name: str
    quantise: Callable[[str, TensorRef, DType], CodedWeight]
    config: Callable[[Kept, DType], Mapping[str, Any]]
    conv1d: bool = False
    mixed: bool = True
    experts: bool = True


@cache
def schemes() -> Mapping[str, Scheme]:
    """All schemes by name."""
    found: dict[str, Scheme] = {}
    for module in modules_in(PACKAGE):
        for scheme in (getattr(module, "SCHEME", None), *getattr(module, "SCHEMES", ())):
            if scheme is not None and scheme.name in found:
                raise AdaptmergeError(f"two schemes are named {scheme.name!r}")
            if scheme is not None:
                found[scheme.name] = scheme
    return found


@cache
def quantisers() -> Mapping[str, Quantiser]:
    """All ways to quantise weights anew, by name."""
    return {
        one.name: one for module in modules_in(PACKAGE) for one in getattr(module, "QUANTISERS", ())
    }


def scheme_of(base: Base) -> Scheme | None:
    """The scheme that a base is quantised with; None for one in full precision.

    Raises InputError for one that is quantised otherwise.
    """
    hits = [scheme for scheme in schemes().values() if scheme.detect(base)]
    if len(hits) > 1:
        names = " and ".join(hit.name for hit in hits)
        raise InputError(f"could be quantised as {names}", where=str(base.path))
    if hits:
        if not hits[0].refused:
            check_quantisation(config_of(base), QUANT_CONFIG, str(base.path))
        return hits[0]
    said = base.config.get(QUANT_CONFIG)
    if isinstance(said, Mapping):
        how = said.get("quant_method") or "unknown"
        known = ", ".join(name for name, scheme in schemes().items() if not scheme.refused)
        raise InputError(
            f"is quantised ({how}), which cannot be fused into (known: {known}): give the "
            "original base, with --trained-on for an adapter that was trained on a quantised one",
            where=str(base.path),
        )
    return None
