"""Hypothesis strategies: matrices behind refs, factors of every built-in class, thin terms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from adaptmerge.algebra.factors import (
    Diag,
    Factor,
    Hadamard,
    Kronecker,
    Leaf,
    Place,
    Product,
    Sum,
    Term,
)
from adaptmerge.tensors.dtypes import F64, DType
from adaptmerge.tensors.refs import TensorRef, listed

Shape = tuple[int, int]
Matrix = NDArray[np.float64]
seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([1.0, -1.0, 0.5, 2.25, -0.375, 0.1])


def ref_of(values: Matrix, dtype: DType = F64, name: str = "") -> TensorRef:
    """A ref that carries its values itself."""
    found = listed(tuple(float(v) for v in values.ravel()), values.shape, dtype)
    return TensorRef(found.source, found.shape, found.dtype, name=name)


def random_ref(seed: int, *shape: int) -> TensorRef:
    return ref_of(np.random.default_rng(seed).standard_normal(shape))


@st.composite
def leaves(draw: st.DrawFn, shape: Shape) -> Factor:
    return Leaf(random_ref(draw(seeds), *shape))


@st.composite
def products(draw: st.DrawFn, shape: Shape) -> Factor:
    """One to four parts around inner ranks, with diagonals between them."""
    count = draw(st.integers(1, 3))
    inner = [draw(st.integers(1, 4)) for _ in range(count - 1)]
    sizes = [shape[0], *inner, shape[1]]
    parts: list[Factor] = []
    for rows, columns in zip(sizes, sizes[1:], strict=False):
        if draw(st.booleans()):
            parts.append(Diag(random_ref(draw(seeds), rows)))
        parts.append(draw(leaves((rows, columns))))
    return Product(tuple(parts), draw(scales))


@st.composite
def sums(draw: st.DrawFn, shape: Shape, depth: int) -> Factor:
    parts = draw(st.lists(factors_of(shape, depth - 1), min_size=1, max_size=3))
    return Sum(tuple(parts))


@st.composite
def hadamards(draw: st.DrawFn, shape: Shape, depth: int) -> Factor:
    return Hadamard(draw(factors_of(shape, depth - 1)), draw(factors_of(shape, depth - 1)))


@st.composite
def kroneckers(draw: st.DrawFn, shape: Shape, depth: int) -> Factor:
    rows = draw(st.sampled_from([d for d in range(1, shape[0] + 1) if shape[0] % d == 0]))
    columns = draw(st.sampled_from([d for d in range(1, shape[1] + 1) if shape[1] % d == 0]))
    right = (shape[0] // rows, shape[1] // columns)
    return Kronecker(
        draw(factors_of((rows, columns), depth - 1)), draw(factors_of(right, depth - 1))
    )


@st.composite
def places(draw: st.DrawFn, shape: Shape, depth: int) -> Factor:
    rows, columns = (draw(st.integers(1, size)) for size in shape)
    row = draw(st.integers(0, shape[0] - rows))
    column = draw(st.integers(0, shape[1] - columns))
    return Place(draw(factors_of((rows, columns), depth - 1)), shape, row, column)


NESTING: dict[type[Factor], Callable[[Shape, int], st.SearchStrategy[Factor]]] = {
    Sum: sums,
    Hadamard: hadamards,
    Kronecker: kroneckers,
    Place: places,
}
CLASSES: tuple[type[Factor], ...] = (Leaf, Diag, Product, *NESTING)


def of_class(kind: type[Factor], shape: Shape, depth: int = 2) -> st.SearchStrategy[Factor]:
    """Factors of one class; a diagonal is as large as the first side of `shape`."""
    if kind is Leaf:
        return leaves(shape)
    if kind is Diag:
        return st.builds(lambda seed: Diag(random_ref(seed, shape[0])), seeds)
    if kind is Product:
        return products(shape)
    return NESTING[kind](shape, depth)


def factors_of(shape: Shape, depth: int = 2) -> st.SearchStrategy[Factor]:
    """Factors of a shape, nested to a depth."""
    flat = [leaves(shape), products(shape)]
    nested = [build(shape, depth) for build in NESTING.values()] if depth > 0 else []
    return st.one_of(*flat, *nested)


shapes = st.tuples(st.integers(1, 7), st.integers(1, 7))


def random_term(
    seed: int, shape: Shape, rank: int, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> Term:
    """A dense random pair of sides."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    down = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
    return Term(up.to(dtype), down.to(dtype), scale)


@st.composite
def term_lists(draw: st.DrawFn, dtype: torch.dtype = torch.float32, count: int = 3) -> list[Term]:
    """One to `count` terms of one shape, of any ranks and scales."""
    shape = draw(st.tuples(st.integers(2, 14), st.integers(2, 14)))
    ranks = draw(st.lists(st.integers(1, 5), min_size=1, max_size=count))
    return [random_term(draw(seeds), shape, rank, draw(scales), dtype) for rank in ranks]


def dense_of(terms: list[Term]) -> torch.Tensor:
    """The sum of the terms in float64, by its definition."""
    parts = [term.scale * (term.up.double() @ term.down.double()) for term in terms]
    return torch.stack(parts).sum(0)
