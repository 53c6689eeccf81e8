"""Quantised checkpoints that nothing can be fused into, each with the reason.

Codes of these stand for whole vectors, for steps along a trellis, or for weights in a rotated basis: there
is no grid per weight that a delta could be rounded to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NoReturn

from adaptmerge.bases.base import Base
from adaptmerge.errors import InputError
from adaptmerge.schemes.scheme import Scheme, config_of

# quant_method: title, where it is defined, why not
REASONS = {
    "exl2": (
        "EXL2",
        "https://github.com/turboderp-org/exllamav2",
        "its rows are reordered and have bits of their own, chosen by measured error",
    ),
    "exl3": (
        "EXL3",
        "https://github.com/turboderp-org/exllamav3",
        "its weights are rotated and coded along a trellis, so that no code stands for one weight",
    ),
    "aqlm": (
        "AQLM",
        "https://arxiv.org/abs/2401.06118",
        "its codes stand for sums of vectors of several weights",
    ),
    "quip": (
        "QuIP",
        "https://arxiv.org/abs/2402.04396",
        "its weights are rotated and its codes stand for vectors of several weights",
    ),
    "quarot": (
        "QuaRot",
        "https://arxiv.org/abs/2404.00456",
        "its weights are rotated, and an adapter for the original does not fit them",
    ),
    "spinquant": (
        "SpinQuant",
        "https://arxiv.org/abs/2405.16406",
        "its weights are rotated, and an adapter for the original does not fit them",
    ),
}
SPELLINGS = {"quip#": "quip", "quip-sharp": "quip", "quip_sharp": "quip", "qtip": "quip"}


def _method(base: Base) -> str | None:
    """Which of them a base is; QuIP# and QTIP write `quip_params` and no quant_method."""
    said = config_of(base).get("quant_method")
    if said is None and isinstance(base.config.get("quip_params"), Mapping):
        return "quip"
    name = str(said).lower()
    return SPELLINGS.get(name, name)


def _scheme(method: str, title: str, url: str, reason: str) -> Scheme:
    return Scheme(method, title, url, _detector(method), _refuser(title, reason), refused=True)


def _detector(method: str) -> Callable[[Base], bool]:
    return lambda base: _method(base) == method


def _refuser(title: str, reason: str) -> Callable[[Base], NoReturn]:
    def refuse(base: Base) -> NoReturn:
        raise InputError(
            f"is quantised with {title}, which cannot be fused into: {reason}; give the original base",
            where=str(base.path),
        )

    return refuse


SCHEMES = tuple(_scheme(method, *reason) for method, reason in REASONS.items())
