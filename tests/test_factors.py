"""Factors against naive numpy: every class must be its formula, by rows, in thin form, in rank."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    CLASSES,
    Matrix,
    Shape,
    dense_of,
    factors_of,
    of_class,
    random_ref,
    ref_of,
    seeds,
    shapes,
)

from adaptmerge.algebra import factors
from adaptmerge.algebra.factors import (
    Diag,
    Factor,
    Hadamard,
    Kronecker,
    Leaf,
    Place,
    Product,
    Sum,
    rank_bound,
)
from adaptmerge.algebra.low_rank import as_low_rank, low_rank
from adaptmerge.methods.peft_linear import SideAverage
from adaptmerge.tensors.dtypes import BF16, F32
from adaptmerge.tensors.refs import Listed, TensorRef
from adaptmerge.tensors.walk import refs_of

every_class = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)


def values(ref: TensorRef) -> Matrix:
    assert isinstance(ref.source, Listed)
    return np.array(ref.source.values).reshape(ref.shape)


def naive(factor: Factor) -> Any:
    """The matrix by the textbook, without a line of the code under test."""
    match factor:
        case Leaf(ref=ref):
            return values(ref)
        case Diag(ref=ref):
            return np.diag(values(ref).ravel())
        case Product(parts=parts, scale=scale):
            total = naive(parts[0])
            for part in parts[1:]:
                total = total @ naive(part)
            return scale * total
        case Sum(parts=parts):
            return np.sum([naive(part) for part in parts], axis=0)
        case Hadamard(left=left, right=right):
            return naive(left) * naive(right)
        case Kronecker(left=left, right=right):
            return np.kron(naive(left), naive(right))
        case Place(block=block, shape=shape, row=row, column=column):
            out, inside = np.zeros(shape), naive(block)
            out[row : row + inside.shape[0], column : column + inside.shape[1]] = inside
            return out
        case _:
            raise AssertionError(f"give {type(factor).__name__} its formula here")


def close(found: torch.Tensor, expected: Matrix) -> bool:
    size = max(1.0, float(np.abs(expected).max(initial=0.0)))
    return found.shape == expected.shape and bool(
        np.abs(found.numpy() - expected).max(initial=0.0) <= 1e-12 * size
    )


def test_every_class_of_the_module_is_tested() -> None:
    found = {
        cls
        for _, cls in inspect.getmembers(factors, inspect.isclass)
        if cls.__module__ == factors.__name__
        and hasattr(cls, "thin")
        and cls not in (Factor, factors.Expanded, factors.Whole)
    }
    assert found == set(CLASSES)


@every_class
@given(data=st.data(), shape=shapes)
@settings(max_examples=25)
def test_dense_is_the_formula(kind: type[Factor], data: st.DataObject, shape: Shape) -> None:
    factor = data.draw(of_class(kind, shape))
    expected = naive(factor)
    assert factor.shape == expected.shape
    assert factor.dense().dtype == torch.float64
    assert close(factor.dense(), expected)


@every_class
@given(data=st.data(), shape=shapes)
@settings(max_examples=25)
def test_thin_terms_sum_to_the_matrix(
    kind: type[Factor], data: st.DataObject, shape: Shape
) -> None:
    factor = data.draw(of_class(kind, shape))
    terms = factor.thin()
    assert terms
    assert all((t.up.shape[0], t.down.shape[1]) == factor.shape for t in terms)
    assert close(dense_of(terms), naive(factor))


@every_class
@given(data=st.data(), shape=shapes)
@settings(max_examples=25)
def test_row_blocks_are_slices(kind: type[Factor], data: st.DataObject, shape: Shape) -> None:
    factor = data.draw(of_class(kind, shape))
    start = data.draw(st.integers(0, factor.shape[0]))
    stop = data.draw(st.integers(start, factor.shape[0]))
    assert close(factor.dense((start, stop)), naive(factor)[start:stop])


@every_class
@given(data=st.data(), shape=shapes)
@settings(max_examples=25)
def test_rank_bound_is_a_bound(kind: type[Factor], data: st.DataObject, shape: Shape) -> None:
    factor = data.draw(of_class(kind, shape))
    assert np.linalg.matrix_rank(naive(factor)) <= rank_bound(factor) <= min(factor.shape)


@given(shape=shapes, rank=st.integers(1, 9), seed=seeds)
def test_low_rank_pairs_are_recognised(shape: Shape, rank: int, seed: int) -> None:
    up, down = random_ref(seed, shape[0], rank), random_ref(seed + 1, rank, shape[1])
    pair = as_low_rank(low_rank(up, down, 0.5))
    assert pair == (up, down, 0.5)
    assert pair is not None
    assert pair.rank == rank
    assert as_low_rank(Sum((low_rank(up, down),))) is None
    assert as_low_rank(Product((Leaf(up),))) is None


@given(factor=factors_of((4, 6)))
@settings(max_examples=25)
def test_refs_are_all_the_stored_numbers(factor: Factor) -> None:
    refs = list(refs_of(factor))
    assert refs
    assert all(values(ref).size == ref.count for ref in refs)


def test_a_low_rank_term_keeps_its_stored_values_and_dtype() -> None:
    up, down = (ref_of(np.full(s, 1 / 3), BF16) for s in ((4, 2), (2, 5)))
    (term,) = low_rank(up, down, 0.1).thin()
    assert term.up.dtype == term.down.dtype == torch.bfloat16
    assert torch.equal(term.up, up.read())
    assert term.scale == 0.1  # not folded: that would round


def test_dense_of_narrow_values_is_exact_in_float64() -> None:
    up, down = (ref_of(np.full(s, 1 / 3), BF16) for s in ((2, 1), (1, 2)))
    third = up.read()[0, 0].double()
    assert torch.equal(low_rank(up, down).dense(), (third * third).expand(2, 2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Leaf(random_ref(0, 2, 3, 4)), "two dimensions"),
        (lambda: Product((Leaf(random_ref(0, 2, 3)), Leaf(random_ref(0, 2, 3)))), "not multiply"),
        (lambda: Sum((Leaf(random_ref(0, 2, 3)), Leaf(random_ref(0, 3, 2)))), "do not add"),
        (lambda: Hadamard(Leaf(random_ref(0, 2, 3)), Leaf(random_ref(0, 3, 2))), "differ"),
        (lambda: Place(Leaf(random_ref(0, 2, 3)), (4, 4), 3, 0), "outside"),
        (lambda: Place(Leaf(random_ref(0, 2, 3)), (4, 4), 0, 2), "outside"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]


def sum_of(weights: tuple[float, ...], refs: tuple[TensorRef, ...]) -> torch.Tensor:
    parts = [w * ref.read().double() for w, ref in zip(weights, refs, strict=True)]
    return torch.stack(parts).sum(0)


@given(seed=seeds, shape=shapes)
@settings(max_examples=25)
def test_side_average_is_a_factor_too(seed: int, shape: Shape) -> None:
    ups = tuple(ref_of(values(random_ref(seed + i, shape[0], 2)), F32) for i in range(3))
    downs = tuple(ref_of(values(random_ref(seed + 9 + i, 2, shape[1])), F32) for i in range(3))
    factor = SideAverage(ups, (0.5, 1.0, 2.0), downs, (0.5, -1.0, 2.0))
    up = sum_of(factor.up_weights, ups)
    down = sum_of(factor.down_weights, downs)
    expected = up @ down
    assert isinstance(factor, Factor)
    assert factor.shape == shape
    assert torch.allclose(factor.dense(), expected, rtol=1e-12)
    assert torch.allclose(dense_of(factor.thin()), expected, rtol=1e-4, atol=1e-5)
    # a product of another shape may round its two terms otherwise, in float64; a wrong row is of size 1
    assert close(factor.dense((0, 1)), factor.dense()[0:1].numpy())
