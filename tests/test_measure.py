"""Forms of factors and the norms measured with them, against the plain definition in numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Matrix, factors_of, random_ref, ref_of, seeds

from adaptmerge.adapters.graph import Site
from adaptmerge.adapters.weight_edits import Dora, Effect
from adaptmerge.algebra import linalg
from adaptmerge.algebra.factors import (
    Diag,
    Factor,
    Hadamard,
    Kronecker,
    Leaf,
    Place,
    Product,
    Sum,
)
from adaptmerge.algebra.forms import Form, WeightedSum, form_of
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.commands.verify import measure
from adaptmerge.commands.verify.measure import in_coordinates, measured
from adaptmerge.commands.verify.normed import on_weight
from adaptmerge.tensors.refs import TensorRef

SHAPE = (64, 48)


def thin(seed: int, rank: int = 3, scale: float = 1.0) -> Product:
    rows, columns = SHAPE
    return low_rank(random_ref(seed, rows, rank), random_ref(seed + 1, rank, columns), scale)


def dense(factor: Factor) -> Matrix:
    found: Matrix = factor.dense().numpy()
    return found


def close(found: Any, wanted: Any, atol: float) -> None:
    np.testing.assert_allclose(found, wanted, atol=atol)


def value_of(form: Form, weight: Matrix | None = None) -> Matrix:
    value: Matrix = (form.up @ form.down).numpy()
    if form.rows is not None:
        assert weight is not None
        value = value + form.rows.numpy()[:, None] * weight
    return value


THIN: dict[str, Factor] = {
    "product": thin(1),
    "scaled": thin(2, scale=-0.25),
    "between diagonals": Product(
        (Diag(random_ref(3, 64)), thin(4), Diag(random_ref(5, 48))), scale=2.0
    ),
    "vera": Product(
        (
            Diag(random_ref(6, 64)),
            Leaf(random_ref(7, 64, 4)),
            Diag(random_ref(8, 4)),
            Leaf(random_ref(9, 4, 48)),
        )
    ),
    "sum": Sum((thin(10), thin(11, 2), Product((thin(12),), 0.5))),
    "hadamard": Hadamard(thin(13, 2), thin(14, 2)),
    "placed": Place(
        low_rank(random_ref(15, 32, 3), random_ref(16, 3, 40)), SHAPE, row=16, column=4
    ),
    "weighted": WeightedSum(((0.5, thin(17)), (-2.0, thin(18))), SHAPE),
}


@pytest.mark.parametrize("name", THIN)
def test_a_form_is_its_factor(name: str) -> None:
    form = form_of(THIN[name])
    assert form is not None
    close(value_of(form), dense(THIN[name]), atol=1e-12)


@given(factors_of((12, 9)))
def test_a_form_is_its_factor_or_none(factor: Factor) -> None:
    form = form_of(factor)
    if form is not None:
        close(value_of(form), dense(factor), atol=1e-9)


def test_what_is_not_thin_has_no_form() -> None:
    assert form_of(Leaf(random_ref(1, *SHAPE))) is None
    assert form_of(thin(1, rank=30)) is None
    assert form_of(Kronecker(Leaf(random_ref(1, 8, 8)), Leaf(random_ref(2, 8, 6)))) is None


def truth(terms: Sequence[tuple[float, Factor]], stored: Factor) -> tuple[float, float, float]:
    whole = sum(by * dense(factor) for by, factor in terms)
    sides = whole - dense(stored), whole, dense(stored)
    apart, left, right = (float(np.linalg.norm(side)) for side in sides)
    return apart, left, right


@given(seeds, st.sampled_from([1.0, -0.7, 1e-3]), st.sampled_from([0.0, 1e-7, 1e-3, 1.0]))
def test_norms_of_thin_sides_are_those_of_the_matrices(seed: int, by: float, off: float) -> None:
    terms = ((1.0, thin(seed)), (by, thin(seed + 7)))
    stored = Sum((thin(seed), Product((thin(seed + 7),), by), Product((thin(seed + 14),), off)))
    found = measured(WeightedSum(terms, SHAPE), stored)
    apart, left, right = truth(terms, stored)
    assert found.apart.left == pytest.approx(left, rel=1e-9)
    assert found.apart.right == pytest.approx(right, rel=1e-9)
    assert found.apart.apart == pytest.approx(apart, rel=1e-6, abs=1e-7 * left)
    assert found.sizes == pytest.approx(
        [abs(by) * np.linalg.norm(dense(factor)) for by, factor in terms]
    )


def test_inputs_that_cancel_are_measured_by_triangles() -> None:
    almost = ref_of(thin(1).parts[0].dense().numpy() * (1 + 1e-9))
    terms = ((1.0, thin(1)), (-1.0, Product((Leaf(almost), thin(1).parts[1]))))
    found = measured(WeightedSum(terms, SHAPE), thin(3))
    size = float(np.linalg.norm(dense(thin(1))))
    assert found.apart.left == pytest.approx(1e-9 * size, rel=1e-4)


def test_nan_is_never_close() -> None:
    value = np.ones((64, 3))
    value[5, 1] = math.nan
    broken = low_rank(ref_of(value), random_ref(2, 3, 48))
    for terms, stored in (((1.0, thin(1)), broken), ((1.0, broken), thin(1))):
        found = measured(WeightedSum((terms,), SHAPE), stored)
        assert math.isnan(found.apart.apart)


def test_a_form_that_is_not_its_factor_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    terms, stored = ((1.0, thin(1)),), thin(3)
    true = measured(WeightedSum(terms, SHAPE), stored)

    def wrong(factor: Factor, weight: TensorRef | None = None) -> Form | None:
        form = form_of(factor, weight)
        return None if form is None else form.times(1.01)

    monkeypatch.setattr(measure, "form_of", wrong)
    found = measured(WeightedSum(terms, SHAPE), stored).apart
    assert found.relative == pytest.approx(true.apart.relative, rel=1e-9)


def dora(seed: int, weight: TensorRef, size: float = 0.3) -> Dora:
    magnitude = np.abs(np.random.default_rng(seed).standard_normal(64)) + 0.5
    return Dora(Site("m"), thin(seed + 1, scale=size), ref_of(magnitude))


def by_definition(edit: Dora, weight: Matrix) -> Matrix:
    """m / |W + delta| (W + delta) - W, row by row."""
    moved = weight + dense(edit.factor)
    magnitude = edit.magnitude.read().double().numpy()[:, None]
    found: Matrix = magnitude * moved / np.linalg.norm(moved, axis=1, keepdims=True) - weight
    return found


@given(seeds, st.sampled_from([1e-4, 0.3, 20.0]))
def test_doras_are_rows_of_the_weight_and_a_thin_rest(seed: int, size: float) -> None:
    weight = random_ref(seed, *SHAPE)
    plain = weight.read().numpy()
    edits = [dora(seed + 3, weight, size), dora(seed + 5, weight, size)]
    factors: list[Factor] = [Effect((edit,), weight) for edit in edits]
    made = on_weight([*factors, thin(seed)], weight)
    for edit, factor in zip(edits, made, strict=False):
        form = form_of(factor, weight)
        assert form is not None
        close(value_of(form, plain), by_definition(edit, plain), atol=1e-9)
    found = measured(WeightedSum(((0.5, made[0]), (2.0, made[2])), SHAPE), made[1], weight)
    whole = 0.5 * by_definition(edits[0], plain) + 2.0 * dense(thin(seed))
    other = by_definition(edits[1], plain)
    assert found.apart.left == pytest.approx(np.linalg.norm(whole), rel=1e-7)
    assert found.apart.right == pytest.approx(np.linalg.norm(other), rel=1e-7)
    assert found.apart.apart == pytest.approx(np.linalg.norm(whole - other), rel=1e-7)
    assert found.base == pytest.approx(np.linalg.norm(plain))


def test_a_delta_that_takes_away_a_row_is_measured_by_definition() -> None:
    weight = random_ref(1, *SHAPE)
    row = weight.read().numpy()[:1]
    up = np.zeros((64, 1))
    up[0] = -(1 - 1e-7)
    edit = Dora(Site("m"), low_rank(ref_of(up), ref_of(row)), ref_of(np.ones(64)))
    (made,) = on_weight([Effect((edit,), weight)], weight)
    assert isinstance(made, Effect)


@given(seeds)
def test_small_coordinates_keep_norms_and_singular_values(seed: int) -> None:
    whole = form_of(thin(seed, rank=5))
    assert whole is not None
    up, down = torch.randn(64, 2).double(), torch.randn(2, 48).double()
    small, left, right = in_coordinates(whole, up, down)
    rest = small.dense() - left @ right
    full = whole.up @ whole.down - up @ down
    want = torch.linalg.svdvals(full)[:7]
    close(torch.linalg.svdvals(rest)[:7], want, atol=1e-9)


def test_a_weight_is_looked_at_in_one_buffer_of_a_bounded_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A block that is taken and given back for every few rows stays with the allocator: gigabytes for the
    weights of large layers."""
    monkeypatch.setattr(linalg, "ROWS", 5 * SHAPE[1])
    weight = random_ref(3, *SHAPE).read()
    read: list[int] = []

    def rows_of(start: int, stop: int) -> torch.Tensor:
        read.append(stop - start)
        return weight[start:stop]

    found = torch.zeros(SHAPE, dtype=torch.float64)
    places = set()
    for rows, block in linalg.in_float64(SHAPE, rows_of):
        found[rows] = block
        places.add(block.data_ptr())
    assert torch.equal(found, weight.double())
    assert max(read) == 5 and sum(read) == SHAPE[0]
    assert len(places) == 1
