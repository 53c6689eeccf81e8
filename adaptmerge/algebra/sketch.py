"""The leading singular directions of a dense matrix: found at random, measured, and exact where that fails.

The range finder is subspace iteration from a Gaussian start (Halko, Martinsson and Tropp 2011). What it
leaves is always measured: by Pythagoras, and entry by entry where that would cancel.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from adaptmerge.algebra import decompose
from adaptmerge.algebra.linalg import noise_floor, row_blocks, signs
from adaptmerge.lazy import torch

OVERSAMPLING = 16  # directions beyond those that are wanted
FIRST = 16  # directions looked for at first where it is not known how many there are
POWERS = 2  # power iterations at least
TURNS = 12  # and at most, before the exact decomposition
SHARE = 4  # from this share of the shorter side on, the exact decomposition is as cheap
NEAR = 2e-3  # share of a squared error that more turns may still gain: 0.1 % of the error
CANCELS = 1e-2  # share of a squared norm below which a difference of two is measured directly


@dataclass(frozen=True, slots=True)
class Leading:
    """left @ diag(sigma) @ right, the leading part of a matrix; `rest` is the squared norm beside it.

    sigma is descending and float64; values up to `floor` are rounding noise. whole: nothing but noise is
    beside it.
    """

    left: torch.Tensor
    sigma: torch.Tensor
    right: torch.Tensor
    rest: float
    floor: float
    whole: bool = False

    @property
    def usable(self) -> int:
        """The number of values above rounding noise."""
        return int((self.sigma > self.floor).sum())

    def squared_tail(self, rank: int) -> float:
        """The squared norm of what a truncation to `rank` leaves out."""
        return self.rest + float(self.sigma[rank:].square().sum())

    def within(self, allowed: float) -> int:
        """The smallest rank whose squared tail is at most `allowed`."""
        tails = self.sigma.square().flip(0).cumsum(0).flip(0) + self.rest
        return int((tails > allowed).sum())

    def balanced(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The pair (up, down) of that rank, each carrying sqrt(sigma), signs fixed."""
        root = self.sigma[:rank].sqrt().to(self.left.dtype)
        up, down = self.left[:, :rank] * root, self.right[:rank] * root[:, None]
        sign = signs(down)
        return up * sign, down * sign[:, None]


def seed_of(name: str) -> int:
    """A seed that depends on nothing but a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def squared_norm(matrix: torch.Tensor) -> float:
    """|matrix|_F^2, summed in float64."""
    return sum(float(block.double().square().sum()) for block in _blocks(matrix))


def leading(matrix: torch.Tensor, rank: int, seed: int) -> Leading:
    """At least `rank` directions whose truncation is as good as the best one, up to 0.1 %."""
    size = rank + max(OVERSAMPLING, rank // 2)
    if SHARE * size > min(matrix.shape):
        return exact(matrix)
    tails: list[float] = []
    for found in islice(_turns(matrix, size, seed), TURNS):
        tails.append(found.squared_tail(rank))
        if len(tails) > POWERS and _settled(tails, found.floor):
            return found
    return exact(matrix)


def _settled(tails: list[float], floor: float) -> bool:
    """Whether what more turns would gain, as the last ones let expect, no longer matters."""
    before, last = tails[-3] - tails[-2], tails[-2] - tails[-1]
    if last <= 0 or tails[-1] <= floor**2:
        return True
    ratio = max(last / before, 0.5) if before > 0 else 1.0
    return ratio < 1 and last * ratio / (1 - ratio) <= NEAR * tails[-1]


def enough(matrix: torch.Tensor, share: float, seed: int) -> Leading:
    """So many directions that less than `share` of the squared norm is beside them, with room."""
    return _grown(matrix, share, seed) or exact(matrix)


def _grown(matrix: torch.Tensor, share: float, seed: int) -> Leading | None:
    """Twice as many directions until a quarter of the share is left; None where many are needed."""
    allowed = share / 4 * squared_norm(matrix)
    size = FIRST
    while share > 0 and SHARE * size <= min(matrix.shape):
        found = next(islice(_turns(matrix, size, seed), POWERS, None))
        if found.rest <= allowed:
            return found
        size *= 2
    return None


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The leading singular values of a matrix, and the squared norm that is beside them; whole: none is."""

    sigma: tuple[float, ...]
    rest: float
    whole: bool


def spectrum(matrix: torch.Tensor, share: float, seed: int) -> Spectrum:
    """As `enough`, values only; all of them for a share of 0."""
    found = _grown(matrix, share, seed)
    if found is not None:
        return Spectrum(tuple(found.sigma[: found.usable].tolist()), found.rest, whole=False)
    sigma = decompose.svdvals(matrix).double()
    kept = sigma[sigma > _floor(matrix)]
    return Spectrum(tuple(kept.tolist()), 0.0, whole=True)


def exact(matrix: torch.Tensor) -> Leading:
    """All directions."""
    left, sigma, right = decompose.svd(matrix, full_matrices=False)
    return Leading(left, sigma.double(), right, 0.0, _floor(matrix), whole=True)


def _turns(matrix: torch.Tensor, size: int, seed: int) -> Iterator[Leading]:
    """What `size` directions hold after 0, 1, 2, ... power iterations."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], size, generator=generator, dtype=matrix.dtype)
    norm, floor = squared_norm(matrix), _floor(matrix)
    left = torch.linalg.qr(matrix @ start).Q
    while True:
        right, core = torch.linalg.qr(matrix.T @ left)
        u, sigma, v = decompose.svd(core.T.double())
        up, down = left @ u.to(left.dtype), v.to(right.dtype) @ right.T
        rest = norm - float(sigma.square().sum())
        if rest < CANCELS * norm:
            rest = residual(matrix, up * sigma.to(up.dtype), down) ** 2
        yield Leading(up, sigma, down, rest, floor)
        left = torch.linalg.qr(matrix @ right).Q


def residual(matrix: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> float:
    """|matrix - up @ down|_F, entry by entry."""
    sums = []
    start = 0
    for block in _blocks(matrix):
        stop = start + block.shape[0]
        sums.append(float((block - up[start:stop] @ down).double().square().sum()))
        start = stop
    return math.sqrt(sum(sums))


def _blocks(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    for start, stop in row_blocks(matrix.shape):
        yield matrix[start:stop]


def _floor(matrix: torch.Tensor) -> float:
    return noise_floor(matrix.shape, matrix.dtype, [math.sqrt(squared_norm(matrix))])
