"""Settling an extraction: each delta is read, factored and measured by itself; results go to the scratch in
order, so bytes do not depend on the number of workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from adaptmerge.adapters.graph import Edit
from adaptmerge.adapters.weight_edits import Add, factor_of
from adaptmerge.algebra.fit import Budget, Fitted, allot, rounded
from adaptmerge.algebra.linalg import one_thread_each
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.algebra.sketch import (
    Leading,
    Spectrum,
    enough,
    leading,
    residual,
    seed_of,
    spectrum,
    squared_norm,
)
from adaptmerge.commands.extract.tuned import Difference
from adaptmerge.errors import InputError
from adaptmerge.files.scratch import Scratch
from adaptmerge.lazy import torch
from adaptmerge.merging.plan import Step
from adaptmerge.merging.settle import Settled, SiteStats
from adaptmerge.parallel import Progress, ordered, short_turns
from adaptmerge.tensors.dtypes import DType
from adaptmerge.tensors.refs import TensorRef

UNIFORM = 12.0  # the variance of a uniform error is its width squared over this


@dataclass(frozen=True, slots=True)
class Found:
    """What a job hands back: the pair, or nothing for what is kept whole; noise: the squared norm of what
    can be rounding of the tuned checkpoint."""

    pair: Fitted | None
    stats: SiteStats
    noise: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The settled sites, and the share of their deltas that can be rounding of the checkpoint."""

    settled: Sequence[Settled]
    noise: float


def settle(
    steps: Sequence[Step],
    budget: Budget,
    dtype: DType,
    scratch: Scratch,
    workers: int,
    progress: Progress,
) -> Outcome:
    """Every step settled, in order. Raises InputError for a tensor that is not finite."""
    settled: list[Settled] = []
    noise = 0.0
    with one_thread_each(), short_turns(), ThreadPoolExecutor(max_workers=workers) as pool:
        jobs = list(zip(steps, _allotted(steps, budget, pool, workers), strict=True))
        results = ordered(pool, workers, lambda job: _compute(*job, budget, dtype), jobs)
        for step, found in zip(steps, results, strict=True):
            settled.append(Settled(step, _stored(step, found, scratch), found.stats))
            noise += found.noise
            progress(len(settled), len(steps))
    size = math.hypot(*(item.stats.norm for item in settled if item.step.action == "fit"))
    return Outcome(settled, math.sqrt(noise) / size if size else 0.0)


def _stored(step: Step, found: Found, scratch: Scratch) -> Edit:
    if found.pair is None:
        return step.edit
    up, down = scratch.put(found.pair.up), scratch.put(found.pair.down)
    return Add(step.site, low_rank(up, down))


def _difference(step: Step) -> Difference:
    factor = factor_of(step.edit)
    assert isinstance(factor, Difference)
    return factor


def _allotted(
    steps: Sequence[Step], budget: Budget, pool: ThreadPoolExecutor, workers: int
) -> list[int | None]:
    """The rank of each step where sites compete; else None.

    Only the leading values of a site are looked for. Where all of them are kept there may be more, so
    those sites are looked at in full and all compete again.
    """
    places = [number for number, step in enumerate(steps) if step.action == "fit"]
    if not budget.surveyed or not places:
        return [None] * len(steps)
    shares = dict.fromkeys(places, budget.allowed_loss)
    found: dict[int, Spectrum] = {}
    while shares:
        jobs = [(steps[number], share) for number, share in shares.items()]
        surveyed = ordered(pool, workers, lambda job: _survey(*job), jobs)
        found |= dict(zip(shares, surveyed, strict=True))
        ranks = _competing(found, replace(budget, rank=None))
        short = [n for n, s in found.items() if not s.whole and ranks[n] == len(s.sigma)]
        shares = dict.fromkeys(short, 0.0)
    capped = {
        n: rank if budget.rank is None else min(rank, budget.rank) for n, rank in ranks.items()
    }
    return [capped.get(number) for number in range(len(steps))]


def _competing(found: dict[int, Spectrum], budget: Budget) -> dict[int, int]:
    spectra = {str(number): item.sigma for number, item in sorted(found.items())}
    ranks = allot(spectra, budget, sum(item.rest for item in found.values()))
    return {number: ranks[str(number)] for number in found}


def _survey(step: Step, share: float) -> Spectrum:
    return spectrum(_matrix(step), share, seed_of(str(step.site)))


def _matrix(step: Step) -> torch.Tensor:
    """The delta. Raises InputError when it is not finite."""
    matrix = _difference(step).matrix()
    if not math.isfinite(float(matrix.sum(dtype=torch.float64))):
        _refuse(step)
    return matrix


def _refuse(step: Step) -> None:
    factor = _difference(step)
    bad = [ref for ref in (factor.base, factor.tuned) if not bool(torch.isfinite(ref.read()).all())]
    if bad:
        names = " and ".join("the base" if ref is factor.base else "the tuned model" for ref in bad)
        sentence = f"holds NaN or infinity in {names}: is the checkpoint damaged?"
        raise InputError(sentence, where=str(step.site))


def _compute(step: Step, allotted: int | None, budget: Budget, dtype: DType) -> Found:
    if step.action == "pass":
        return Found(None, _stats(step, 0.0, None))
    matrix = _matrix(step)
    found, rank = _leading(step, matrix, allotted, budget)
    rank = min(rank, found.usable)
    up, down = found.balanced(rank)
    left = residual(matrix, up, down)
    cut = rank < found.usable or not found.whole and found.squared_tail(rank) > found.floor**2
    pair = rounded(up, down, dtype, left if cut else 0.0)
    if not cut:
        pair = replace(pair, rounding=math.hypot(pair.rounding, left))
    noise = rounding_of(_difference(step).tuned)
    return Found(pair, _stats(step, math.sqrt(squared_norm(matrix)), pair), noise)


def _leading(
    step: Step, matrix: torch.Tensor, allotted: int | None, budget: Budget
) -> tuple[Leading, int]:
    """Directions, and how many of them are kept."""
    seed, most = seed_of(str(step.site)), min(matrix.shape)
    if allotted is None and budget.spectral:
        found = enough(matrix, budget.allowed_loss, seed)
        rank = found.within(budget.allowed_loss * squared_norm(matrix))
        return found, rank if budget.rank is None else min(rank, budget.rank)
    rank = min(most, allotted if allotted is not None else budget.rank or most)
    return leading(matrix, rank, seed), rank


def _stats(step: Step, norm: float, pair: Fitted | None) -> SiteStats:
    (member,) = step.members
    factor = factor_of(step.edit)
    return SiteStats(
        names=(member.adapter,),
        weights=(member.weight,),
        ranks=() if factor is None else (min(factor.shape),),
        rank=None if pair is None else pair.rank,
        norm=norm,
        truncation=0.0 if pair is None else pair.truncation,
        rounding=0.0 if pair is None else pair.rounding,
        gram=() if pair is None else ((1.0,),),
        scales=() if pair is None else (norm,),
    )


def rounding_of(ref: TensorRef) -> float:
    """The squared norm to expect of the rounding of a narrow checkpoint: uniform within half a step."""
    if ref.dtype.bits >= 32:
        return 0.0
    value = ref.read().float()
    _, exponent = torch.frexp(value)
    steps = torch.ldexp((value != 0).float(), exponent - 1)
    return float(steps.square().sum(dtype=torch.float64)) * ref.dtype.eps**2 / UNIFORM
