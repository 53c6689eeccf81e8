"""What the files of tuners/ share: additive edits checked as they are made, ranks, refusals, kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from adaptmerge.adapters.graph import Edit, Layer, Site
from adaptmerge.adapters.weight_edits import Add
from adaptmerge.algebra.factors import Factor
from adaptmerge.formats.peft.tuner import Malformed, Reading


def added(
    reading: Reading, module: str, factor: Factor, kernel: tuple[int, ...] = ()
) -> list[Edit]:
    """The one edit that adds the factor. Raises ValueError where its parts do not fit each other.

    kernel: what the tensors say of a convolution, where there is no base that says it.
    """
    assert len(factor.shape) == 2
    layer = reading.layer(module)
    if kernel and not layer.kernel:
        layer = Layer("conv", kernel)
    return [Add(Site(module, "weight", layer), factor)]


def expect(reading: Reading, name: str, module: str, found: int) -> None:
    """Raises Malformed when the config says another number than the tensors of a module."""
    said = reading.setting(name, module)
    if said != found:
        raise Malformed(
            f"{name} is {found} by the stored shapes, but {said} by the config: is this config of "
            "another adapter?"
        )


def fits(reading: Reading, module: str, shape: tuple[int, int]) -> None:
    """Raises Malformed when the base has a weight of another shape there; nothing without a base."""
    weight = reading.weight(module)
    if weight is not None and weight.shape != shape:
        raise Malformed(
            f"is for a weight of {list(shape)}, but the base has {list(weight.shape)}: is this adapter "
            "for another model?"
        )


def number(reading: Reading, name: str, module: str | None = None) -> float:
    """A field that must be a finite number. Raises Malformed for anything else."""
    value = reading.setting(name, module)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Malformed(f"{name} is {value!r}: expected a number")
    return value


def integer(reading: Reading, name: str, module: str | None = None) -> int:
    """A field that must be a whole number of at least 1. Raises Malformed for anything else."""
    value = number(reading, name, module)
    if not isinstance(value, int) or value < 1:
        raise Malformed(f"{name} is {value!r}: expected a whole number of at least 1")
    return value


def refuse(reading: Reading, name: str, why: str) -> None:
    """Notes once, however many modules there are, that a field of the config cannot be honoured."""
    problem = f"config field {name} is {reading.setting(name)!r}: {why}"
    if problem not in reading.keys.problems:
        reading.keys.problems.append(problem)


def kernel_of(shape: Sequence[int]) -> tuple[int, ...]:
    """The kernel of a (r, r, *kernel) core: one-dimensional ones are stored as (k, 1)."""
    kernel = tuple(shape[2:])
    return kernel[:1] if len(kernel) == 2 and kernel[1] == 1 else kernel
