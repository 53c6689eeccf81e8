"""Rounding a weight to the grid that it is stored on, so that what was added to it survives.

A stored weight lies exactly on its grid, and a delta below half a step rounds back to nothing. Adaptive
rounding is error feedback (sigma-delta modulation): with an orthonormal basis V (in, R) of the deltas'
row space and the loss |e|^2 + strength |V^T e|^2 per row, the columns are rounded in order, each together
with what the errors so far call for:

    t_j = w_j - x . g_j,   q_j = round(t_j),   x += (q_j - w_j) v_j,   g_j = M_j^-1 v_j,
    M_j = I / strength + sum over i >= j of v_i v_i^T

which gives the codes of GPTQ with H = I + strength V V^T (Frantar et al. 2023) in O(out in R), without
any (in, in) matrix. Columns are rounded in blocks, M frozen at the start of each. What the last columns do
is never made up for, so those that V reads least come last.

Where it is known what flows into a layer, errors count as it makes them felt: with a metric D + U U^T, D
diagonal, the same recursion runs on the rows of [U, V] with g_j = M_j^-1 u_j / d_j and u_i u_i^T / d_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from adaptmerge.algebra import decompose
from adaptmerge.lazy import torch
from adaptmerge.rounding.metric import Metric, slack

NEAREST, STOCHASTIC, ADAPTIVE = "nearest", "stochastic", "adaptive"
ROUNDINGS = (NEAREST, STOCHASTIC, ADAPTIVE)
STRENGTH = 1e4  # of the error in the deltas' directions; above 1e6 noise elsewhere grows
OWN_STRENGTH = 1e2  # of that along a row's own delta, where more would cost the common directions
LAST = 32  # columns that wait for the end; more of them gain nothing
FEW = (
    64  # of so many columns one waits: errors gather there, where inputs may be large all the same
)
BLOCKS = ((64, 256), (8, 32), (1, 0))  # columns rounded together, until so many are left
FLAT = 1e-6  # singular values below this share of the largest span no direction


class Grid(Protocol):
    """The values that a stored tensor can have."""

    def codes(self, values: torch.Tensor, columns: slice) -> torch.Tensor:
        """What is stored for the nearest values on the grid, for some columns of a matrix."""

    def values(self, codes: torch.Tensor, columns: slice, out: torch.Tensor) -> torch.Tensor:
        """The values of what is stored, in working precision, written into `out`."""

    def in_order(self, order: torch.Tensor) -> Grid:
        """The grid of a matrix whose columns are these (in,) of this one."""


@dataclass(frozen=True, slots=True)
class FloatGrid:
    """The values of a floating-point type; codes are the values in that type. Finite values beyond its
    range become its largest."""

    dtype: torch.dtype
    work: torch.dtype

    def codes(self, values: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        if self.dtype.itemsize == 1:
            most = torch.finfo(self.dtype).max
            values = values.clamp(-most, most)
        return values.to(self.dtype)

    def values(self, codes: torch.Tensor, columns: slice, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(codes)

    def in_order(self, order: torch.Tensor) -> FloatGrid:
        return self

    def near(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest values of the type, in working precision."""
        return self.codes(values).to(self.work)


class FeedbackStep(NamedTuple):
    """Columns start..stop that are rounded together, and their gains (R, stop - start)."""

    start: int
    stop: int
    gains: torch.Tensor


@dataclass(frozen=True, slots=True)
class Order:
    """In which order columns are rounded: their numbers (in,), and the places where these are not their
    own."""

    columns: torch.Tensor
    moved: torch.Tensor

    def take(self, value: torch.Tensor) -> None:
        """A matrix (rows, in) gets its columns in this order; in place, for few are moved."""
        _copy_columns(value, self.columns[self.moved], self.moved)

    def put_back(self, value: torch.Tensor) -> torch.Tensor:
        """The matrix as it was before, in place."""
        return _copy_columns(value, self.moved, self.columns[self.moved])


def _copy_columns(value: torch.Tensor, source: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    # PyTorch copies no columns of 8-bit floats
    held = value.view(torch.uint8) if value.element_size() == 1 else value
    held.index_copy_(1, to, held.index_select(1, source))
    return value


def least_read_last(basis: torch.Tensor) -> Order:
    """Columns as they are, but those with the smallest rows of a basis (in, R) at the end, descending."""
    count = basis.shape[0]
    front = count - min(LAST, count // FEW)
    last = torch.linalg.vector_norm(basis, dim=1).argsort(descending=True, stable=True)[front:]
    order = torch.arange(count)
    free, rest = last[last < front], order[front:]
    order[free.sort().values] = rest[~torch.isin(rest, last)]
    order[front:] = last
    return Order(order, (order != torch.arange(count)).nonzero().flatten())


@dataclass(frozen=True, slots=True)
class Feedback:
    """The directions whose errors are fed back, and the steps; for columns in `order`, or as they are.

    read: (in, k + R), the sketch of a metric, then an orthonormal basis. diagonal: that of the metric.
    """

    read: torch.Tensor
    steps: Sequence[FeedbackStep]
    order: Order | None = None
    sketched: int = 0
    diagonal: torch.Tensor | None = None

    @property
    def directions(self) -> int:
        """R, the size of the basis."""
        return self.read.shape[1] - self.sketched


def row_space(downs: Sequence[torch.Tensor]) -> torch.Tensor:
    """An orthonormal basis (in, R), float64, of what the rows of matrices (r, in) span together."""
    tall = torch.cat([down.double() for down in downs]).T
    left, core = torch.linalg.qr(tall)
    u, sigma, _ = decompose.svd(core)
    rank = int((sigma > FLAT * sigma[0]).sum()) if sigma.numel() and sigma[0] > 0 else 0
    basis: torch.Tensor = left @ u[:, :rank]
    return basis


def feedback(
    basis: torch.Tensor,
    work: torch.dtype,
    strength: float = STRENGTH,
    order: Order | None = None,
    metric: Metric | None = None,
) -> Feedback:
    """The feedback for an orthonormal basis (in, R), its gains computed in float64."""
    basis = basis.double() if order is None else basis.double()[order.columns]
    metric = metric.in_order(order.columns) if metric is not None and order is not None else metric
    read = basis if metric is None else torch.cat([metric.sketch, basis], dim=1)
    felt = read if metric is None else read / metric.diagonal[:, None]
    sketched = read.shape[1] - basis.shape[1]
    rest = slack(sketched, basis.shape[1], strength).diag()
    steps = []
    for start, stop in reversed(list(column_blocks(basis.shape[0]))):
        rest = rest + felt[start:stop].T @ read[start:stop]
        steps.append(FeedbackStep(start, stop, decompose.solve(rest, felt[start:stop].T).to(work)))
    diagonal = None if metric is None else metric.diagonal.to(work)
    return Feedback(read.to(work), steps[::-1], order, sketched, diagonal)


def column_blocks(columns: int) -> Sequence[tuple[int, int]]:
    """The ranges of columns that are rounded together: wide ones first, single ones at the end."""
    blocks, start = [], 0
    for width, left in BLOCKS:
        while columns - start > left:
            stop = min(start + width, max(columns - left, start + 1))
            blocks.append((start, stop))
            start = stop
    return blocks


class Rounded(NamedTuple):
    """What is stored, and the error: `inside` is error @ basis (rows, R), `squared` its squared norm,
    `error` all of it where it was asked for."""

    codes: torch.Tensor
    inside: torch.Tensor
    squared: float
    error: torch.Tensor | None = None


def round_nearest(
    target: torch.Tensor, grid: Grid, basis: torch.Tensor, *, keep: bool = False
) -> Rounded:
    """Each entry of (rows, in) to the nearest value on the grid."""
    codes = grid.codes(target, slice(0, target.shape[1]))
    return measured_codes(codes, target, grid, basis, keep=keep)


def measured_codes(
    codes: torch.Tensor,
    target: torch.Tensor,
    grid: Grid,
    basis: torch.Tensor,
    *,
    keep: bool,
) -> Rounded:
    """Codes (rows, in) that are given, with their error."""
    columns = slice(0, target.shape[1])
    values = grid.values(codes, columns, torch.empty_like(target))
    return _measured(codes, values, target, basis, keep=keep)


def round_stochastic(
    target: torch.Tensor,
    grid: FloatGrid,
    basis: torch.Tensor,
    seed: int,
    *,
    keep: bool = False,
) -> Rounded:
    """Each entry up or down with the probabilities that make its expectation exact."""
    codes = grid.codes(target)
    near = codes.to(grid.work)
    missing = target - near
    far_codes = _neighbour(codes, missing)
    far = far_codes.to(grid.work)
    share = missing.abs() / (far - near).abs().clamp(min=torch.finfo(grid.work).tiny)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(target.shape, generator=generator, dtype=torch.float32)
    codes = torch.where((drawn < share) & torch.isfinite(far), far_codes, codes)
    return _measured(codes, codes.to(grid.work), target, basis, keep=keep)


def _neighbour(codes: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """The next value of a floating-point type in a direction, by its sign-magnitude bits."""
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[codes.element_size()]
    bits = codes.view(width)
    outward = (direction > 0) == (bits >= 0)
    least = torch.where(direction > 0, 1, torch.iinfo(width).min + 1).to(width)
    magnitude = bits & torch.iinfo(width).max
    moved = torch.where(magnitude == 0, least, bits + torch.where(outward, 1, -1).to(width))
    return torch.where(direction == 0, bits, moved).view(codes.dtype)


def _measured(
    codes: torch.Tensor,
    values: torch.Tensor,
    target: torch.Tensor,
    basis: torch.Tensor,
    *,
    keep: bool,
) -> Rounded:
    error = values.sub_(target) if values.data_ptr() != codes.data_ptr() else values - target
    return Rounded(codes, error @ basis, float(error.norm()) ** 2, error if keep else None)


def round_adaptive(
    target: torch.Tensor,
    grid: Grid,
    feed: Feedback,
    own: torch.Tensor | None = None,
    *,
    keep: bool = False,
) -> Rounded:
    """(rows, in) with the errors of earlier columns made up for by later ones.

    own: one further direction (rows, in) of each row, unit or zero, orthogonal to the basis.
    """
    if feed.order is None:
        return _in_turn(target, grid, feed, own, keep=keep)
    order, given = feed.order, [target] if own is None else [target, own]
    for value in given:
        order.take(value)
    found = _in_turn(target, grid.in_order(order.columns), feed, own, keep=keep)
    for value in given:
        order.put_back(value)
    error = None if found.error is None else order.put_back(found.error)
    return found._replace(codes=order.put_back(found.codes), error=error)


def _in_turn(
    target: torch.Tensor, grid: Grid, feed: Feedback, own: torch.Tensor | None, *, keep: bool
) -> Rounded:
    """The columns rounded from the first to the last."""
    state = target.new_zeros(target.shape[0], feed.read.shape[1])
    strength = OWN_STRENGTH if feed.directions else STRENGTH
    along = None if own is None else _Own(own, strength, feed.diagonal)
    codes, errors, squared = None, torch.empty_like(target) if keep else None, 0.0
    for start, stop, gains in feed.steps:
        columns = slice(start, stop)
        meant = target[:, columns]
        wanted = torch.addmm(meant, state, gains, alpha=-1)
        if along is not None:
            wanted -= along.correction(columns)
        stored = grid.codes(wanted, columns)
        error = grid.values(stored, columns, wanted).sub_(meant)
        state.addmm_(error, feed.read[columns])
        if along is not None:
            along.take(error, columns)
        codes = stored.new_empty(target.shape) if codes is None else codes
        codes[:, columns] = stored
        squared += float(error.norm()) ** 2
        if errors is not None:
            errors[:, columns] = error
    assert codes is not None
    return Rounded(codes, state[:, feed.sketched :], squared, errors)


class _Own:
    """The feedback of one direction per row."""

    def __init__(
        self, direction: torch.Tensor, strength: float, diagonal: torch.Tensor | None
    ) -> None:
        self._direction, self._slack = direction, 1 / strength
        self._felt = direction if diagonal is None else direction / diagonal
        self._left = (direction * self._felt).sum(1, keepdim=True)
        self._state = torch.zeros_like(self._left)

    def correction(self, columns: slice) -> torch.Tensor:
        return self._state / (self._left + self._slack) * self._felt[:, columns]

    def take(self, error: torch.Tensor, columns: slice) -> None:
        part = self._direction[:, columns]
        self._state += (error * part).sum(1, keepdim=True)
        self._left = (self._left - (part * self._felt[:, columns]).sum(1, keepdim=True)).clamp(
            min=0
        )
