"""Dense and thin linear algebra: tensors in, tensors out, no files and no graph.

A thin matrix is a pair (up: out x r, down: r x in) that stands for up @ down. Work is done in
float32 (float64 for float64 input) with every r x r core in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from adaptmerge.algebra import decompose
from adaptmerge.lazy import torch

PLAIN = 40  # the largest entries of a column between 2^-PLAIN and 2^PLAIN have squares in float32
FARTHEST = 1000  # a power of two that float64 holds
ROWS = 1 << 20  # entries of a weight that are looked at in float64 at once
NOISE = 2.0  # singular values below NOISE * eps * sqrt(max(m, n)) * (sum of the inputs' norms) are rounding


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of rows that together cover a matrix, of about ROWS entries each."""
    rows, columns = shape
    step = max(1, ROWS // max(1, columns))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def in_float64(
    shape: Sequence[int], read: Callable[[int, int], torch.Tensor]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of a matrix, and their values in float64: in one buffer, which the next ones overwrite."""
    buffer = None
    for start, stop in row_blocks(shape):
        values = read(start, stop)
        if buffer is None:  # allocators keep much of what is taken and given back for every block
            buffer = values.new_empty(values.shape, dtype=torch.float64)
        yield slice(start, stop), buffer[: stop - start].copy_(values)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """One BLAS thread per job while the block runs: results do not depend on the core count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def working(value: torch.Tensor) -> torch.Tensor:
    """The tensor in the precision that algebra is done in: float64 stays, all else is float32."""
    return value if value.dtype == torch.float64 else value.to(torch.float32)


def product_norm(up: torch.Tensor, down: torch.Tensor) -> float:
    """|up @ down|_F by two r x r Gram matrices; for pairs that do not cancel."""
    inner = gram(up, down, torch.ones(1, up.shape[1], dtype=torch.float64))
    return float(inner.scales) * math.sqrt(max(float(inner.products), 0.0))


def side_by_side(values: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """The tensors joined along an axis, in working precision; widened once where they agree."""
    if len({value.dtype for value in values}) > 1:
        values = [working(value) for value in values]
    return working(values[0] if len(values) == 1 else torch.cat(list(values), dim=axis))


class Inner(NamedTuple):
    """Inner products of matrices, each divided by its scale first: squares of very small or large values
    would be lost."""

    products: torch.Tensor
    scales: torch.Tensor


def gram(up: torch.Tensor, down: torch.Tensor, owners: torch.Tensor) -> Inner:
    """<delta_i, delta_j> in float64, delta_i being up @ diag(owners[i]) @ down."""
    (up, lefts), (down, rights) = _evened(up, 0), _evened(down, 1)
    core = (up.T @ up).double() * (down @ down.T).double()
    exponents, tops = lefts + rights, torch.zeros(len(owners), dtype=torch.int64)
    if exponents.any():
        tops = exponents.expand(owners.shape).masked_fill(owners == 0, -FARTHEST).amax(1)
        owners = torch.ldexp(owners, (exponents - tops[:, None]).clamp(-FARTHEST, 0))
    ones = torch.ones(len(owners), dtype=torch.float64)
    return Inner(owners @ core @ owners.T, torch.ldexp(ones, tops.clamp(-FARTHEST, FARTHEST)))


def _evened(value: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix with the largest entry of each column (axis 0) or row near 1, and the exponents that were
    taken out; itself where no square can be lost."""
    if not value.numel():
        return value, torch.zeros(value.shape[1 - axis], dtype=torch.int64)
    peak = value.abs().amax(axis).double()
    exponents = torch.frexp(peak).exponent.long().masked_fill(~peak.isfinite() | (peak == 0), 0)
    if int(exponents.abs().max()) <= PLAIN:
        return value, torch.zeros_like(exponents)
    half = exponents // 2  # in two steps: a power of two may itself be out of range
    steps = [step.unsqueeze(axis) for step in (-half, half - exponents)]
    return torch.ldexp(torch.ldexp(value.double(), steps[0]), steps[1]), exponents


@dataclass(frozen=True, slots=True)
class Cores:
    """The triangular factors of QR of both sides of a thin matrix: up = Q left, down.T = Q' right."""

    left: torch.Tensor
    right: torch.Tensor

    def product(self) -> torch.Tensor:
        """The core whose singular values are those of up @ down."""
        return self.left @ self.right.T

    def norms(self, ranks: Sequence[int]) -> list[float]:
        """|up_i @ down_i|_F of the blocks of so many columns that the sides were stacked from."""
        lefts = torch.split(self.left, list(ranks), dim=1)
        rights = torch.split(self.right, list(ranks), dim=1)
        return [float((left @ right.T).norm()) for left, right in zip(lefts, rights, strict=True)]


@dataclass(frozen=True, slots=True)
class ThinSvd:
    """The singular value decomposition of a thin matrix: (left @ u) diag(sigma) (v @ right.T).

    left (out x r) and right (in x r) have orthonormal columns; u and v live in the float64 core.
    """

    left: torch.Tensor
    u: torch.Tensor
    sigma: torch.Tensor
    v: torch.Tensor
    right: torch.Tensor
    cores: Cores

    def balanced(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The best rank-`rank` pair (up, down), each carrying sqrt(sigma), signs fixed."""
        root = self.sigma[:rank].sqrt()
        up = self.left @ (self.u[:, :rank] * root).to(self.left.dtype)
        down = (self.v[:rank] * root[:, None]).to(self.right.dtype) @ self.right.T
        sign = signs(down)
        return up * sign, down * sign[:, None]


def signs(down: torch.Tensor) -> torch.Tensor:
    """+1 or -1 per row, such that the largest entry of a row times its sign is positive."""
    if not down.numel():
        return down.new_ones(down.shape[0])
    peak = down.gather(1, down.abs().argmax(1, keepdim=True))[:, 0]
    sign: torch.Tensor = torch.where(peak < 0, -torch.ones_like(peak), torch.ones_like(peak))
    return sign


def thin_svd(up: torch.Tensor, down: torch.Tensor) -> ThinSvd:
    """The exact SVD of up @ down by QR of both sides and an SVD of the small core.

    QR, not Gram matrices: normal equations would square the condition number.
    """
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(down.T)
    cores = Cores(left_core.double(), right_core.double())
    u, sigma, v = decompose.svd(cores.product(), full_matrices=False)
    return ThinSvd(left, u, sigma, v, right, cores)


def thin_spectrum(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, Cores]:
    """The singular values of up @ down, descending, float64, and the cores they are of."""
    left = torch.linalg.qr(up, mode="r").R.double()
    right = torch.linalg.qr(down.T, mode="r").R.double()
    cores = Cores(left, right)
    return decompose.svdvals(cores.product()), cores


def noise_floor(shape: Sequence[int], dtype: torch.dtype, norms: Sequence[float]) -> float:
    """The size below which a singular value of a sum is rounding noise.

    Judged against the sum of the inputs' norms, never against the largest singular value of the
    result, which is itself noise when inputs cancel.
    """
    return NOISE * torch.finfo(dtype).eps * math.sqrt(max(shape)) * sum(norms)


def rounding_error(
    up: torch.Tensor, down: torch.Tensor, stored_up: torch.Tensor, stored_down: torch.Tensor
) -> float:
    """|stored_up @ stored_down - up @ down|_F through the (small) differences of the two sides."""
    d_up = working(stored_up) - up
    d_down = working(stored_down) - down
    if not (bool(d_up.any()) or bool(d_down.any())):
        return 0.0
    left = torch.cat([d_up, up], dim=1)
    right = torch.cat([working(stored_down), d_down], dim=0)
    return product_norm(left, right)
