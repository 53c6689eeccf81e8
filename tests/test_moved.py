"""Norms of moved weights and distances on a weight, against extended precision on hard inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import ref_of, seeds

from adaptmerge.algebra.by_rows import distance
from adaptmerge.algebra.factors import Diag, Factor, Leaf, Product, Sum
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.algebra.moved import OF_MOVE, OF_NORM, distance_on, moved_norms
from adaptmerge.algebra.weight_rows import PART, WeightRows
from adaptmerge.tensors.caches import read_once
from adaptmerge.tensors.dtypes import BF16, F16, F32, F64
from adaptmerge.tensors.held import Held
from adaptmerge.tensors.refs import TensorRef, computed

Extended = NDArray[np.longdouble]
LAST = 1e-12  # of the summands: what float64 may lose of a row
DTYPES = [BF16, F16, F32, F64]


class Case(NamedTuple):
    """A weight whose rows are normed, with what moves them."""

    weight: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def rows(self, axis: int = 1) -> WeightRows:
        weight = self.weight if axis else self.weight.T.contiguous()
        return WeightRows(computed(Held(weight)), axis)

    @property
    def exact(self) -> tuple[Extended, Extended]:
        """W and up @ down, of the values as they are stored."""
        up, down = (side.double().numpy().astype(np.longdouble) for side in (self.up, self.down))
        return self.weight.double().numpy().astype(np.longdouble), up @ down


Maker = Callable[[torch.Generator, int, int, int], Case]


def ordinary(random: torch.Generator, rows: int, width: int, rank: int) -> Case:
    weight, up, down = _drawn(random, (rows, width), (rows, rank), (rank, width))
    return Case(weight, up * 0.01, down)


def of_one_sign(random: torch.Generator, rows: int, width: int, rank: int) -> Case:
    """Partial sums that only grow, so that every addition rounds."""
    case = ordinary(random, rows, width, rank)
    return Case(case.weight.abs(), case.up.abs(), case.down.abs())


def nearly_nothing(random: torch.Generator, rows: int, width: int, rank: int) -> Case:
    """Every other row is what its delta takes away, up to the rounding of its dtype."""
    case = ordinary(random, rows, width, rank)
    weight = case.weight.clone()
    weight[::2] = -(case.up @ case.down)[::2]
    return Case(weight, case.up, case.down)


def of_equal_directions(random: torch.Generator, rows: int, width: int, rank: int) -> Case:
    """A delta that nearly cancels in itself."""
    case = ordinary(random, rows, width, rank)
    near = case.down + 1e-6 * _drawn(random, tuple(case.down.shape))[0]
    up = torch.cat([case.up * 100, -case.up * 100], dim=1)
    return Case(case.weight, up, torch.cat([case.down, near]))


def uneven(random: torch.Generator, rows: int, width: int, rank: int) -> Case:
    """Entries from 1e-12 to 1e12, zeros among them, and a row of zeros."""
    case = ordinary(random, rows, width, rank)
    powers = torch.randint(-40, 40, (rows, width), generator=random).float().exp2()
    weight = case.weight * powers * (case.weight > -1)
    weight[0] = 0
    return Case(weight, case.up, case.down)


MAKERS: list[Maker] = [ordinary, of_one_sign, nearly_nothing, of_equal_directions, uneven]


def _drawn(random: torch.Generator, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    random = torch.Generator().manual_seed(draw(seeds))
    width = draw(st.sampled_from([1, 7, 64, PART, 2 * PART + 44]))
    made = draw(st.sampled_from(MAKERS))(random, draw(st.integers(1, 9)), width, 3)
    dtype = draw(st.sampled_from(DTYPES))
    power = draw(st.integers(-9, 9) if dtype == F16 else st.integers(-100, 100))
    sides = draw(st.sampled_from([BF16, F32, F64]))
    skew = draw(st.integers(-20, 20))
    up = made.up * 2.0 ** (power - skew)
    weight = (made.weight * 2.0**power).to(dtype.torch)
    return Case(weight, up.to(sides.torch), (made.down * 2.0**skew).to(sides.torch))


@given(cases(), st.sampled_from([0, 1]))
@np.errstate(invalid="ignore")
def test_norms_are_as_near_as_they_promise(case: Case, axis: int) -> None:
    weight, move = case.exact
    found = moved_norms(case.rows(axis), case.up, case.down).numpy()
    sizes = [np.sqrt((value**2).sum(1)) for value in (weight + move, move, weight)]
    most = case.down.double().norm().item()
    lost = LAST * (sizes[2] + case.up.double().norm(dim=1).numpy() * most)
    allowed = np.minimum(OF_NORM * sizes[0], OF_MOVE * sizes[1]) * 1.001 + lost
    assert np.isfinite(found).all() == case.weight.isfinite().all().item()
    assert (np.abs(found - sizes[0]) <= allowed)[np.isfinite(found)].all()


@given(cases(), st.sampled_from([0, 1]))
@np.errstate(invalid="ignore")
def test_products_are_as_near_as_they_say(case: Case, axis: int) -> None:
    rows, down = case.rows(axis), case.down.double()
    found = rows.products(down).numpy().astype(np.longdouble)
    exact = case.exact[0] @ down.numpy().astype(np.longdouble).T
    for at in range(len(down)):
        allowed = rows.error(torch.ones(rows.count, 1, dtype=torch.float64), down[at : at + 1])
        apart = np.abs(found[:, at] - exact[:, at])
        sure = np.isfinite(found[:, at])
        assert (apart <= allowed.numpy() + LAST * np.abs(exact[:, at]))[sure].all()


def test_only_rows_that_nearly_vanish_are_summed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[list[int]] = []
    own = WeightRows.moved

    def moved(self: WeightRows, rows: torch.Tensor, *sides: torch.Tensor) -> torch.Tensor:
        summed.append(rows.tolist())
        return own(self, rows, *sides)

    monkeypatch.setattr(WeightRows, "moved", moved)
    case = nearly_nothing(torch.Generator().manual_seed(0), 8, 4 * PART, 3)
    case = Case(case.weight.to(torch.bfloat16), case.up.bfloat16(), case.down.bfloat16())
    case.weight[4] = 0.02  # no longer near what its delta takes away
    moved_norms(case.rows(), case.up, case.down)
    assert summed == [[0, 2, 6]]


def test_what_is_not_finite_stays_so() -> None:
    case = ordinary(torch.Generator().manual_seed(0), 4, 2 * PART, 3)
    case.weight[1, 3], case.weight[2, 5] = torch.inf, torch.nan
    found = moved_norms(Case(case.weight.float(), *case[1:]).rows(), case.up, case.down)
    assert found.isfinite().tolist() == [True, False, False, True]


def test_a_weight_beyond_the_products_of_float32_is_summed() -> None:
    case = ordinary(torch.Generator().manual_seed(0), 4, 2 * PART, 3)
    weight = (case.weight * 1e38).clamp(-3e38, 3e38).float()
    found = moved_norms(Case(weight, case.up * 1e38, case.down).rows(), case.up * 1e38, case.down)
    truth = (weight.double() + case.up * 1e38 @ case.down).norm(dim=1)
    assert torch.allclose(found, truth, rtol=OF_NORM)


@given(seeds, st.sampled_from([0, 1]), st.sampled_from([0.0, 1e-9, 1e-3, 1.0]))
def test_distances_are_those_of_dense_deltas(seed: int, axis: int, apart: float) -> None:
    random = np.random.default_rng(seed)
    shape = (40, 48)
    weight = ref_of(random.standard_normal(shape), BF16)
    first, second = _stretched(random, weight, axis, apart)
    found = distance_on(weight, axis, first, second)
    truth = distance(first, second)
    for one in ("apart", "left", "right"):
        near, lost = getattr(truth, one) * 1e-3, truth.left * 1e-14
        assert abs(getattr(found, one) - getattr(truth, one)) <= near + lost, one


def _stretched(
    random: np.random.Generator, weight: TensorRef, axis: int, apart: float
) -> tuple[Factor, Factor]:
    """Two deltas on a weight, the second one off by a share of itself."""
    rows, columns = weight.shape
    scales = random.standard_normal(weight.shape[1 - axis])
    down = ref_of(random.standard_normal((3, columns)))
    up = random.standard_normal((rows, 3))
    pairs = []
    for off in (0.0, apart):
        moved = Diag(ref_of(scales * (1 + off * random.standard_normal(len(scales)))))
        stretched = (moved, Leaf(weight)) if axis else (Leaf(weight), moved)
        added = low_rank(ref_of(up * (1 + off * random.standard_normal(up.shape))), down, 0.5)
        whole = Product((moved, added)) if axis else Product((added, moved))
        pairs.append(Sum((Product((Product(stretched),), 0.3), Product((whole,), -0.7))))
    return pairs[0], pairs[1]


def test_a_distance_without_a_thin_form_is_dense() -> None:
    random = np.random.default_rng(0)
    weight, other = (ref_of(random.standard_normal((8, 6))) for _ in range(2))
    scales = Diag(ref_of(random.standard_normal(6)))
    pairs: list[tuple[Factor, Factor]] = [
        (Leaf(other), Leaf(weight)),
        (Product((Leaf(weight), scales)), Leaf(other)),
    ]
    for first, second in pairs:
        assert distance_on(weight, 1, first, second) == distance(first, second)


def test_one_pass_serves_all_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ordinary(torch.Generator().manual_seed(0), 8, PART, 6)
    parts = (slice(0, 2), slice(2, 4), slice(0, 4), slice(3, 6), slice(2, 6))
    sides = [(case.up[:, part], case.down[part]) for part in parts]
    apart = [moved_norms(case.rows(), *pair) for pair in sides]
    passes: list[int] = []
    own = WeightRows._look

    def look(self: WeightRows, directions: torch.Tensor) -> None:
        passes.append(len(directions))
        own(self, directions)

    monkeypatch.setattr(WeightRows, "_look", look)
    rows = case.rows()
    rows.expect(case.down[:4])
    for pair, norms in zip(sides, apart, strict=True):
        assert torch.allclose(moved_norms(rows, *pair), norms, rtol=1e-6)
    assert passes == [4, 2]


def test_rows_are_kept_for_a_block_of_read_once() -> None:
    from adaptmerge.algebra.weight_rows import rows_of

    weight = ref_of(np.ones((2, 2)))
    assert rows_of(weight) is not rows_of(weight)
    with read_once():
        assert rows_of(weight) is rows_of(weight)
        assert rows_of(weight) is not rows_of(weight, 0)
