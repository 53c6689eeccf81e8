"""Settling a plan: site jobs compute, one thread each; results go to a scratch file in plan order.

Work is parallel over sites and never inside one, and only the caller's thread writes, in order: bytes do
not depend on the number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from adaptmerge.adapters.graph import Edit
from adaptmerge.adapters.weight_edits import delta_on, factor_of, normed_axis, refitted
from adaptmerge.algebra.factors import Factor, Leaf, Product, Term, Values, rank_bound
from adaptmerge.algebra.fit import Budget, Fitted, allot, spectrum, stack, truncate
from adaptmerge.algebra.linalg import Inner, gram, one_thread_each, side_by_side
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.algebra.moved import distance_on
from adaptmerge.errors import InputError
from adaptmerge.files.scratch import Keeps
from adaptmerge.lazy import torch
from adaptmerge.merging.plan import Plan, Step
from adaptmerge.merging.resolve import WHOLE
from adaptmerge.parallel import Progress, ordered, short_turns
from adaptmerge.tensors.caches import read_once
from adaptmerge.tensors.dtypes import BF16, F16, DType, default_dtype
from adaptmerge.tensors.held import Held
from adaptmerge.tensors.refs import TensorRef, Unsettled, computed
from adaptmerge.tensors.walk import mapped, refs_of

CANCELS = 1e-2  # below this share of what it could be, a squared norm is computed in float64


@dataclass(frozen=True, slots=True)
class SiteStats:
    """What one site was made of and what it lost (Frobenius norms, absolute).

    gram[i][j] is the inner product of the deltas of inputs i and j, unweighted, in the order of `names`,
    each divided by its one of `scales` (1 but for values whose squares would be lost).
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    ranks: tuple[int, ...]
    rank: int | None
    norm: float
    truncation: float
    rounding: float
    gram: tuple[tuple[float, ...], ...] = ()
    scales: tuple[float, ...] = ()

    @property
    def error(self) -> float:
        """|promised - stored|_F."""
        return math.hypot(self.truncation, self.rounding)


@dataclass(frozen=True, slots=True)
class Settled:
    """One settled site: its step, the edit with its final refs, and its statistics."""

    step: Step
    edit: Edit
    stats: SiteStats


@dataclass(frozen=True, slots=True)
class Computed:
    """What a job hands back: the edit with tensors in memory, not yet in any file."""

    edit: Edit
    stats: SiteStats


def run(plan: Plan, scratch: Keeps, workers: int, progress: Progress) -> list[Settled]:
    """Every step settled, in plan order. Raises InputError naming all tensors that are not finite."""
    problems: list[str] = []
    settled: list[Settled] = []
    with one_thread_each(), short_turns(), ThreadPoolExecutor(max_workers=workers) as pool:
        allotted = _allotted(plan, pool, workers)
        jobs = list(zip(plan.steps, allotted, strict=True))
        results = ordered(pool, workers, lambda job: _compute(plan, *job), jobs)
        for step, (computed, found) in zip(plan.steps, results, strict=True):
            problems += found
            if not problems:
                settled.append(Settled(step, _store(computed.edit, scratch), computed.stats))
            progress(len(settled), len(plan.steps))
    if problems:
        advice = "pass --allow nonfinite to merge it all the same"
        raise InputError([*problems[:-1], f"{problems[-1]}; {advice}"])
    return settled


def _allotted(plan: Plan, pool: ThreadPoolExecutor, workers: int) -> list[int | None]:
    """The rank of each step where sites compete, after a survey of all spectra; else None."""
    if not plan.budget.surveyed:
        return [None] * len(plan.steps)
    surveyed = {
        str(i): found for i, found in enumerate(ordered(pool, workers, _survey, plan.steps))
    }
    ranks = allot(surveyed, plan.budget)
    return [
        _capped(ranks[str(i)], step.budget) if _is_matrix(step) else None
        for i, step in enumerate(plan.steps)
    ]


def _capped(rank: int, budget: Budget) -> int:
    return rank if budget.rank is None else min(rank, budget.rank)


def _is_matrix(step: Step) -> bool:
    return step.action == "fit" and step.factor is not None and not step.is_vector


def _survey(step: Step) -> list[float]:
    if not _is_matrix(step) or step.factor is None:
        return []
    with _at(step):
        return spectrum(step.factor.thin())


@contextmanager
def _at(step: Step) -> Iterator[None]:
    """Errors of values name the site."""
    try:
        yield
    except InputError as problem:
        raise problem.located(str(step.site)) from None


def _compute(plan: Plan, step: Step, allotted: int | None) -> tuple[Computed, list[str]]:
    """The tensors of one step, and the names of input tensors that are not finite."""
    with read_once(), _at(step):
        stats = _input_stats(step)
        problems = [] if "nonfinite" in plan.allowed else _nonfinite(step, stats)
        if problems or step.action == "pass":
            return Computed(step.edit, stats), problems
        done, stats = _settled(plan, step, stats, allotted)
        judged = "nonfinite" not in plan.allowed and not math.isfinite(stats.rounding)
        problems = _overflown(step, done) if judged else []
        stats = stats if problems else _measured(step, done, stats)
        return Computed(done, stats), problems


def _settled(
    plan: Plan, step: Step, stats: SiteStats, allotted: int | None
) -> tuple[Edit, SiteStats]:
    """The edit with everything computed: first its factor, then the tensors beside it."""
    edit, factor = step.edit, step.factor
    if factor is not None:
        settle = _matrix if _is_matrix(step) else _column
        settled, stats = settle(plan, step, factor, stats, allotted)
        edit = refitted(edit, settled)
    pending = [(ref, ref.source) for ref in refs_of(edit) if isinstance(ref.source, Unsettled)]
    for ref, source in pending:
        exact = source.read()
        stored = exact.to(_stored_dtype(plan, step, ref, source.store).torch)
        edit = mapped(edit, partial(_put, ref, _held(stored)))
        if factor is None:
            lost = float((stored.double() - exact).norm())
            moved = exact - (source.neutral if isinstance(source, Values) else 0.0)
            size = math.hypot(stats.norm, float(moved.norm()))
            stats = replace(stats, norm=size, rounding=math.hypot(stats.rounding, lost))
    return edit, stats


def _put(old: TensorRef, new: TensorRef, ref: TensorRef) -> TensorRef:
    return new if ref == old else ref


def _stored_dtype(plan: Plan, step: Step, ref: TensorRef, own: DType | None) -> DType:
    """What a computed tensor is stored as: as asked, else wide enough for all members; what is stored
    whole keeps its own."""
    if step.edit.kind in WHOLE and own is not None:
        return own
    if plan.asked is not None:
        return plan.asked
    beside = [
        r.dtype
        for member in step.members
        for r in refs_of(member.edit)
        if own is not None and r.shape[1:] == ref.shape[1:]
    ]
    return default_dtype(beside) if beside else plan.dtype


def _held(value: torch.Tensor) -> TensorRef:
    return computed(Held(value.contiguous()))


def _measured(step: Step, done: Edit, stats: SiteStats) -> SiteStats:
    """For edits that depend on the base: what they add to it against what was meant."""
    if step.promise is None:
        return stats
    delta = factor_of(done) if step.weight is None else delta_on([done], step.weight)
    assert delta is not None
    off = distance_on(step.weight, normed_axis(done), delta, step.promise)
    if stats.truncation > 0 or step.weight is None:
        return replace(stats, norm=off.right, truncation=off.apart, rounding=0.0)
    return replace(stats, norm=off.right, rounding=off.apart)


def _nonfinite(step: Step, stats: SiteStats) -> list[str]:
    """NaN and infinity in a factor reach the Gram matrix; only then is it worth looking for them."""
    clean = bool(stats.gram) and all(math.isfinite(v) for row in stats.gram for v in row)
    return [
        f"{member.adapter}: tensor {ref.name!r} of {step.site} holds NaN or infinity"
        for member in step.members
        for ref in _unseen(member.edit, clean)
        if ref.dtype.is_float and ref.dtype.bits >= 8 and not _finite(ref.read())
    ]


def _overflown(step: Step, done: Edit) -> list[str]:
    """What rounding to a narrow dtype made infinite, or too large to measure: inputs are finite, as was
    asked before."""
    stored = (ref for ref in refs_of(done) if isinstance(ref.source, Held))
    found = {ref.dtype for ref in stored if ref.dtype.is_float and not _finite(ref.read())}
    return [
        f"{step.site}: values beyond the range of {dtype} would be infinite: use {_wider(dtype)}"
        for dtype in sorted(found, key=str)
    ] or [f"{step.site}: values so large that what rounding them loses cannot be told"]


def _wider(dtype: DType) -> str:
    """What stores values beyond the range of a dtype."""
    ways = {F16: "--dtype bf16 or fp32", BF16: "--dtype fp32"}
    return ways.get(dtype, "smaller weights")


def _unseen(edit: Edit, clean: bool) -> list[TensorRef]:
    """The tensors that may not be finite: where factors are clean those beside them (magnitudes)."""
    seen = set(refs_of(factor_of(edit))) if clean else set()
    return [ref for ref in refs_of(edit) if ref not in seen]


def _finite(value: torch.Tensor) -> bool:
    return bool(torch.isfinite(value.float() if value.itemsize < 2 else value).all())


def _matrix(
    plan: Plan, step: Step, factor: Factor, stats: SiteStats, allotted: int | None
) -> tuple[Factor, SiteStats]:
    terms = factor.thin()
    fitted = _fitted(plan, step, terms, allotted)
    found = replace(stats, rank=fitted.rank, truncation=fitted.truncation, rounding=fitted.rounding)
    if plan.method.promise is not None:  # not the weighted sum, whose norm `stats` has
        found = replace(found, norm=_norm(_gram([factor]), (1.0,)))
    return low_rank(_held(fitted.up), _held(fitted.down)), found


def _fitted(plan: Plan, step: Step, terms: list[Term], allotted: int | None) -> Fitted:
    """Verbatim when that is within the rank cap; only then is a truncation needed."""
    budget = step.budget
    if allotted is None and not budget.spectral:
        exact = stack(terms, plan.dtype, reduce=plan.method.reduce)
        if budget.rank is None or exact.rank <= budget.rank:
            return exact
    return truncate(terms, budget, plan.dtype, allotted)


def _column(
    plan: Plan, step: Step, factor: Factor, stats: SiteStats, allotted: int | None
) -> tuple[Factor, SiteStats]:
    """A vector, or a delta kept whole: summed in float64 and rounded once."""
    value = factor.dense()
    stored = value.to(plan.dtype.torch)
    lost = float((stored.double() - value).norm())
    kept = Leaf(_held(stored))
    settled: Factor = kept if step.action == "whole" else Product((kept,))
    return settled, replace(stats, norm=float(value.norm()), rounding=lost)


def _input_stats(step: Step) -> SiteStats:
    """Ranks, inner products and the norm of the weighted sum, from the inputs alone."""
    factors = [f for m in step.members if (f := factor_of(m.edit)) is not None]
    bounds = tuple(rank_bound(factor) for factor in factors)
    factors = factors if step.promise is None else []
    weights = tuple(member.weight for member in step.members)
    inner = _gram(factors)
    if _cancels(inner, weights):
        inner = _gram(factors, torch.float64)
    return SiteStats(
        names=tuple(member.adapter for member in step.members),
        weights=weights,
        ranks=bounds,
        rank=bounds[0] if step.action == "pass" and bounds else None,
        norm=_norm(inner, weights),
        truncation=0.0,
        rounding=0.0,
        gram=tuple(tuple(row) for row in inner.products.tolist()),
        scales=tuple(inner.scales.tolist()),
    )


def _norm(inner: Inner, weights: Sequence[float]) -> float:
    """The norm of the weighted sum."""
    top, counted = _counted(inner, weights)
    return top * math.sqrt(max(float(counted @ inner.products @ counted), 0.0))


def _cancels(inner: Inner, weights: Sequence[float]) -> bool:
    """Whether so little is left of the sum that its norm is mostly error."""
    _, counted = _counted(inner, weights)
    most = float((counted.abs() @ inner.products.diagonal().clamp(min=0).sqrt()) ** 2)
    return float(counted @ inner.products @ counted) < CANCELS * most


def _counted(inner: Inner, weights: Sequence[float]) -> tuple[float, torch.Tensor]:
    """The largest scale, and what each matrix counts for beside it."""
    top = float(inner.scales.max()) if len(inner.scales) else 1.0
    counted = torch.tensor(weights[: len(inner.scales)], dtype=torch.float64)
    return top, counted * (inner.scales / top)


def _gram(factors: Sequence[Factor], dtype: torch.dtype | None = None) -> Inner:
    """Inner products of whole deltas, each the sum over its terms; in `dtype` where they cancel."""
    terms = [(i, term) for i, factor in enumerate(factors) for term in factor.thin()]
    if not terms:
        return Inner(torch.zeros(0, 0, dtype=torch.float64), torch.ones(0, dtype=torch.float64))
    up = side_by_side([term.up for _, term in terms], 1)
    down = side_by_side([term.down for _, term in terms], 0)
    up, down = (up, down) if dtype is None else (up.to(dtype), down.to(dtype))
    owners = torch.zeros(len(factors), up.shape[1], dtype=torch.float64)
    start = 0
    for i, term in terms:
        owners[i, start : (start := start + term.up.shape[1])] = term.scale
    return gram(up, down, owners)


def _store(edit: Edit, scratch: Keeps) -> Edit:
    """The edit with refs to the scratch where its tensors are in memory."""

    def put(ref: TensorRef) -> TensorRef:
        if not isinstance(ref.source, Held):
            return ref
        return scratch.put(ref.source.value).reshape(*ref.shape)

    stored: Edit = mapped(edit, put)
    return stored
