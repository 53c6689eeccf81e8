"""The scales of rows and columns that a quantised linear has beside the one that it was made of.

Smoothing (SmoothQuant, Xiao et al. 2023; AWQ, Lin et al. 2024) stores W diag(s) and divides what comes in
by s in the layer before: in a norm, or in the rows of another linear. So a stored weight is
q(diag(t) W diag(s)) for some t and s, which least squares finds from it and W, whatever the model is.
Errors of q average out over a row or column of n entries: an estimate is right to |error| / |W| / sqrt(n).
Entries at the ends of a grid, which were clipped, are left out: they would make all factors seem smaller.
Where a norm of the layer has the factors that the columns show, these are taken, being exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from adaptmerge.algebra.linalg import one_thread_each
from adaptmerge.lazy import torch
from adaptmerge.schemes.coded import Dequantised
from adaptmerge.tensors.caches import remembered
from adaptmerge.tensors.dtypes import F64, DType
from adaptmerge.tensors.refs import TensorRef, computed
from adaptmerge.tensors.row_source import RowSource

TURNS = 3  # of alternating least squares, each of which leaves about 1 / sqrt(n) of the error
FEW = 2.0  # deviations of noise within which factors are the same
CODES = 8  # of fewer those at the ends are too many to be left out
KEPT = 4096  # scalings that are remembered: those of all linears of a model


Norm = tuple[TensorRef, TensorRef]  # the weight of a norm as it is stored, and as it was


@dataclass(frozen=True, slots=True)
class ScaledPair:
    """A linear (out, in) as it is stored and as it was before it was quantised, and the norms of its layer
    that its inputs may come through."""

    stored: TensorRef
    original: TensorRef
    norms: tuple[Norm, ...] = ()


class Scaling(NamedTuple):
    """stored = diag(outputs) original diag(inputs) but for rounding, float64; None for factors of 1.

    apart: |what is left| / |stored|. error: of the factors that are estimated, 0 where all are exact.
    """

    outputs: torch.Tensor | None
    inputs: torch.Tensor | None
    apart: float
    error: float = 0.0

    @property
    def is_one(self) -> bool:
        """Whether nothing is scaled."""
        return self.outputs is None and self.inputs is None


class _Squares:
    """The sums over a pair of matrices that least squares needs."""

    def __init__(self, stored: torch.Tensor, original: torch.Tensor) -> None:
        self.stored, self.original = stored, original
        self.product, self.square = stored * original, original.square()
        energy = stored.square()
        self.rows, self.columns = energy.sum(1).double(), energy.sum(0).double()

    def inputs(self, outputs: torch.Tensor) -> torch.Tensor:
        """The best factors of columns beside those of rows."""
        own = outputs.float()
        return _quotient(own @ self.product, own.square() @ self.square)

    def outputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """The best factors of rows beside those of columns."""
        own = inputs.float()
        return _quotient(self.product @ own, self.square @ own.square())

    def noise(self, outputs: torch.Tensor, inputs: torch.Tensor) -> Noise:
        """What is left beside these factors, and the errors that it makes in them."""
        meant = outputs.float()[:, None] * self.original * inputs.float()
        left = self.stored - meant
        apart = float(left.norm()) / max(float(self.stored.norm()), 1e-30)
        terms, energy = left.mul_(meant).square_(), meant.square_()
        sides = [(terms.sum(axis), energy.sum(axis)) for axis in (1, 0)]
        return Noise(apart, *(_deviation(*side) for side in sides))


class Noise(NamedTuple):
    """|what is left| / |stored|, and the deviation of estimated factors of rows and columns, relative and
    weighted by energy. Each entry counts with its own error: weights are not equally noisy."""

    apart: float
    outputs: float
    inputs: float


def _deviation(terms: torch.Tensor, energy: torch.Tensor) -> float:
    variance = terms.double() / energy.double().square().clamp(min=1e-60)
    return math.sqrt(float((variance * energy).sum() / energy.double().sum().clamp(min=1e-30)))


def _quotient(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    return torch.where(below > 0, above.double() / below.double(), 1.0)


def _scaling_of(pair: ScaledPair) -> Scaling:
    with one_thread_each():
        found = _Squares(*_unclipped(pair))
        outputs = torch.ones(pair.stored.shape[0], dtype=torch.float64)
        for _ in range(TURNS):
            inputs = found.inputs(outputs)
            outputs = found.outputs(inputs)
        noise = found.noise(outputs, inputs)
        rows_alike = spread(outputs, found.rows)[0] <= _room(noise.outputs, noise)
        outputs = torch.ones_like(outputs) if rows_alike else outputs
        inputs = found.inputs(outputs)
        exact = _exact(inputs, pair, found, noise, free=not rows_alike)
        if exact is not None and not rows_alike:
            outputs = found.outputs(exact)
    settled = inputs if exact is None else exact
    return Scaling(
        None if rows_alike else outputs,
        None if bool((settled == 1).all()) else settled,
        noise.apart,
        math.hypot(
            0.0 if rows_alike else noise.outputs, 0.0 if exact is not None else noise.inputs
        ),
    )


scaling_of = remembered(_scaling_of, KEPT)


def _unclipped(pair: ScaledPair) -> tuple[torch.Tensor, torch.Tensor]:
    """Both matrices, float32, with 0 in both for entries at the ends of a grid of some codes."""
    stored, original = pair.stored.read().float(), pair.original.read().float()
    source = pair.stored.source
    if not isinstance(source, Dequantised) or pair.stored.steps:
        return stored, original
    codes, grid = source.weight.grid((0, source.shape[0]))
    if grid.count < CODES:
        return stored, original
    ends = (codes == 0) | (codes == grid.count - 1)
    return stored.masked_fill(ends, 0.0), original.masked_fill(ends, 0.0)


def _room(deviation: float, noise: Noise, more: float = 0.0) -> float:
    """By how much factors may seem to differ: noise, and a grid's bias."""
    return FEW * deviation + noise.apart**2 + more + 1e-5


def spread(ratio: torch.Tensor, energy: torch.Tensor) -> tuple[float, float]:
    """How far ratios are from being one number, relative to it, and that number; weighted by the energy of
    the entries that they are of, so that noise is equal in all."""
    share = energy / energy.sum().clamp(min=1e-30)
    mean = float((share * ratio).sum())
    off = math.sqrt(float((share * (ratio - mean).square()).sum()))
    return (off / abs(mean) if mean else math.inf), mean


def _exact(
    inputs: torch.Tensor, pair: ScaledPair, found: _Squares, noise: Noise, *, free: bool
) -> torch.Tensor | None:
    """The factors that a norm has, or 1, where the columns confirm them; free: but for a common factor."""
    best: tuple[float, torch.Tensor] | None = None
    for factors, rounding in [(torch.ones_like(inputs), 0.0), *_of_norms(pair.norms)]:
        room = _room(noise.inputs, noise, rounding)
        off, mean = spread(inputs / factors, found.columns)
        if off <= room and (free or abs(mean - 1) <= room) and (best is None or off < best[0]):
            best = off, factors
    return None if best is None else best[1]


def _of_norms(norms: Sequence[Norm]) -> list[tuple[torch.Tensor, float]]:
    """What each norm divides its outputs by beside the original, multiplying by its weight w or by 1 + w,
    and the rounding of what is stored."""
    found = []
    for stored, original in norms:
        now, then = stored.read().double().flatten(), original.read().double().flatten()
        for more in (0.0, 1.0):
            factors = torch.where(now == then, 1.0, (then + more) / (now + more))
            off = (factors - 1).abs().max()
            usable = bool((factors > 0).all()) and bool(factors.isfinite().all())
            if usable and float(off) > 2 * stored.dtype.eps:
                found.append((factors, stored.dtype.eps))
    return found


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of the rows ("outputs") or columns ("inputs") of a linear: a vector to be computed."""

    pair: ScaledPair
    side: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.pair.stored.shape[0 if self.side == "outputs" else 1],)

    @property
    def dtype(self) -> DType:
        return F64

    def read(self) -> torch.Tensor:
        found: torch.Tensor | None = getattr(scaling_of(self.pair), self.side)
        return torch.ones(self.shape, dtype=torch.float64) if found is None else found


@dataclass(frozen=True, slots=True)
class Unscaled(RowSource):
    """A stored linear as the original has it, but for rounding, in float32: a source of refs."""

    pair: ScaledPair

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pair.stored.shape

    def compute(self, start: int, stop: int) -> torch.Tensor:
        value = self.pair.stored.slice(0, start, stop).read().double()
        outputs, inputs = (Factors(self.pair, side).read() for side in ("outputs", "inputs"))
        return (value / outputs[start:stop, None] / inputs).float()


def unscaled(pair: ScaledPair, name: str) -> TensorRef:
    """A linear (out, in) as the original has it, but for rounding."""
    return computed(Unscaled(pair), name)
