"""Fitting a factor into a rank: the only place that approximates, hence the only one that measures.

Without a budget, terms are stacked verbatim and only exact redundancy is removed. With one, the sum is
truncated optimally (Eckart-Young) through its thin SVD, and the error is known exactly: the discarded
singular values, and apart from them the rounding to the output dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from adaptmerge.algebra.factors import Term
from adaptmerge.algebra.linalg import (
    Cores,
    noise_floor,
    rounding_error,
    side_by_side,
    thin_spectrum,
    thin_svd,
    working,
)
from adaptmerge.errors import UsageError
from adaptmerge.lazy import torch
from adaptmerge.tensors.dtypes import DType

PEEK = 16  # entries of a row or column that mostly suffice to see that it is not zero


@dataclass(frozen=True, slots=True)
class Budget:
    """What a result may cost or lose; all parts hold together, `rank` caps last.

    rank: at most this many per site. energy: keep this share of the squared norm. max_error: lose at
    most this share of the norm. The last two are over all sites, which compete with their singular
    values, unless `per_site`.
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    per_site: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.rank is not None and self.rank < 1:
            problems.append(f"--rank {self.rank}: a rank is at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            problems.append(f"--energy {self.energy}: give a share above 0 and up to 1, e.g. 0.99")
        if self.max_error is not None and not 0 <= self.max_error < 1:
            problems.append(f"--max-error {self.max_error}: give a share from 0 to below 1")
        if problems:
            raise UsageError(problems)

    @property
    def unlimited(self) -> bool:
        """Whether nothing is asked."""
        return self.rank is None and self.spectral is False

    @property
    def spectral(self) -> bool:
        """Whether ranks depend on singular values."""
        return self.energy is not None or self.max_error is not None

    @property
    def surveyed(self) -> bool:
        """Whether ranks depend on the singular values of all sites together."""
        return self.spectral and not self.per_site

    @property
    def allowed_loss(self) -> float:
        """The share of the squared norm that may be discarded."""
        by_energy = 1.0 if self.energy is None else 1.0 - self.energy
        by_error = 1.0 if self.max_error is None else self.max_error**2
        return min(by_energy, by_error) if self.spectral else 0.0

    def capped(self, rank: int) -> Budget:
        """This budget with no more than `rank` per site."""
        return replace(self, rank=rank if self.rank is None else min(rank, self.rank))


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fitted pair, in its final dtype, and what it cost (Frobenius norms, absolute)."""

    up: torch.Tensor
    down: torch.Tensor
    truncation: float
    rounding: float

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def error(self) -> float:
        """|delta - stored|_F; truncation and rounding are orthogonal to first order."""
        return math.hypot(self.truncation, self.rounding)


def stack(terms: Sequence[Term], dtype: DType, *, reduce: bool = True) -> Fitted:
    """The sum of the terms side by side: exact up to the scales folded into up in `dtype`."""
    kept = _reduced(list(terms)) if reduce else list(terms)
    if all(_is_verbatim(term, dtype) for term in kept) and kept:
        up, down = torch.cat([t.up for t in kept], dim=1), torch.cat([t.down for t in kept])
    else:
        up, down = _stacked(kept, terms, fold=torch.float64)
    if reduce:
        up, down = _without_zeros(up, down)
    return _stored(up, down, dtype)


def _is_verbatim(term: Term, dtype: DType) -> bool:
    return term.scale == 1.0 and term.up.dtype == term.down.dtype == dtype.torch


def spectrum(terms: Sequence[Term]) -> list[float]:
    """Singular values of the sum above rounding noise, descending."""
    up, down = _stacked(terms, terms)
    sigma, cores = thin_spectrum(up, down)
    values: list[float] = sigma.tolist()
    floor = _floor(terms, up, down, cores)
    return [value for value in values if value > floor]


def truncate(
    terms: Sequence[Term], budget: Budget, dtype: DType, allotted: int | None = None
) -> Fitted:
    """The best approximation of the sum at the `allotted` rank, or else at what `budget` asks here."""
    up, down = _stacked(terms, terms)
    svd = thin_svd(up, down)
    sigma: list[float] = svd.sigma.tolist()
    floor = _floor(terms, up, down, svd.cores)
    usable = sum(value > floor for value in sigma)
    rank = site_rank(sigma[:usable], budget) if allotted is None else min(usable, allotted)
    tail = math.sqrt(sum(value**2 for value in sigma[rank:])) if usable else 0.0
    return rounded(*svd.balanced(rank), dtype, tail)


def site_rank(sigma: Sequence[float], budget: Budget) -> int:
    """The smallest rank of one spectrum that keeps the budget."""
    ranks = allot({"": sigma}, budget)
    return ranks[""]


def allot(
    spectra: Mapping[str, Sequence[float]], budget: Budget, beside: float = 0.0
) -> dict[str, int]:
    """Ranks per site such that the fewest singular values keep the budget over all `spectra`.

    Ties fall to the earlier site, so the answer does not depend on the order of workers. `beside` is the
    squared norm of what is in no spectrum, and lost in any case.
    """
    cap = budget.rank
    if not budget.spectral:
        return {site: len(sigma[:cap]) for site, sigma in spectra.items()}
    entries = [
        (-value, position, index, site)
        for position, (site, sigma) in enumerate(spectra.items())
        for index, value in enumerate(sigma)
    ]
    allowed = budget.allowed_loss * (beside + sum(value**2 for value, *_ in entries))
    ranks = dict.fromkeys(spectra, 0)
    lost = beside
    kept = sorted(entries)
    while kept and lost + kept[-1][0] ** 2 <= allowed:
        lost += kept.pop()[0] ** 2
    for _, _, _, site in kept:
        ranks[site] += 1
    return {site: rank if cap is None else min(rank, cap) for site, rank in ranks.items()}


def _floor(terms: Sequence[Term], up: torch.Tensor, down: torch.Tensor, cores: Cores) -> float:
    norms = cores.norms([term.up.shape[1] for term in terms])
    return noise_floor((up.shape[0], down.shape[1]), up.dtype, norms)


def _stacked(
    terms: Sequence[Term], shapes: Sequence[Term], fold: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides of the sum; `fold` keeps scaled ups in that dtype, so that storing rounds them once."""
    if not terms:
        first = shapes[0]
        return working(first.up[:, :0]), working(first.down[:0])
    folded = [_folded(term, fold) for term in terms]
    return side_by_side(folded, 1), side_by_side([term.down for term in terms], 0)


def _folded(term: Term, dtype: torch.dtype | None) -> torch.Tensor:
    if term.scale == 1.0:
        return term.up
    return (term.up.double() * term.scale).to(dtype or working(term.up).dtype)


def _reduced(terms: list[Term]) -> list[Term]:
    """Terms that share a side become one: c1 B1 A + c2 B2 A = (c1 B1 + c2 B2) A, and likewise B."""
    return _merge_sharing(_merge_sharing(terms, "down", "up"), "up", "down")


def _merge_sharing(terms: list[Term], shared: str, summed: str) -> list[Term]:
    result: list[Term] = []
    for term in terms:
        index = next((i for i, t in enumerate(result) if _same(t, term, shared)), None)
        if index is None:
            result.append(term)
        else:
            result[index] = _added(result[index], term, summed)
    return result


def _same(a: Term, b: Term, side: str) -> bool:
    left, right = getattr(a, side), getattr(b, side)
    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)


def _added(a: Term, b: Term, side: str) -> Term:
    """a + b where the other side is the same; equal sides only add their scales."""
    if _same(a, b, side):
        return a._replace(scale=a.scale + b.scale)
    left, right = getattr(a, side), getattr(b, side)
    total = working(left).double() * a.scale + working(right).double() * b.scale
    return a._replace(scale=1.0, **{side: total.to(working(left).dtype)})


def _without_zeros(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if bool(up[:PEEK].any(dim=0).all()) and bool(down[:, :PEEK].any(dim=1).all()):
        return up, down
    keep = up.any(dim=0) & down.any(dim=1)
    return (up, down) if bool(keep.all()) else (up[:, keep], down[keep])


def rounded(up: torch.Tensor, down: torch.Tensor, dtype: DType, truncation: float) -> Fitted:
    """A pair that a truncation left, in its final dtype."""
    return replace(_stored(up, down, dtype), truncation=truncation)


def _stored(up: torch.Tensor, down: torch.Tensor, dtype: DType) -> Fitted:
    stored_up, stored_down = up.to(dtype.torch).contiguous(), down.to(dtype.torch).contiguous()
    exact = up.dtype == down.dtype == dtype.torch
    lost = 0.0 if exact else rounding_error(up, down, stored_up, stored_down)
    return Fitted(stored_up, stored_down, 0.0, lost)
