"""Rotations: what is stored, turned into blocks and back; logarithms and exponentials."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adaptmerge.adapters.families import rotation
from adaptmerge.adapters.families.boft import Boft, butterfly
from adaptmerge.adapters.families.hra import Hra
from adaptmerge.adapters.families.oft import Oft
from adaptmerge.adapters.graph import Site
from adaptmerge.tensors.dtypes import F64
from adaptmerge.tensors.refs import TensorRef, listed

LIKE = torch.zeros(1, dtype=torch.float64)
SITE = Site("m")


def ref(value: Tensor) -> TensorRef:
    return listed(tuple(value.flatten().tolist()), tuple(value.shape), F64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def skew(blocks: int, size: int, length: float, seed: int = 0) -> Tensor:
    """Random skew blocks whose largest angle is `length`."""
    found = rotation.skew_of(randn(blocks, size * (size - 1) // 2, seed=seed))
    longest: Tensor = torch.linalg.matrix_norm(found, 2)
    return found * (length / longest)[:, None, None]


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("size", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("length", [0.0, 1e-9, 0.3, 2.0, 3.1, 3.14159])
def test_exp_undoes_log(size: int, length: float) -> None:
    turned = rotation.exp(skew(4, size, length) if size > 1 else torch.zeros(4, 1, 1).double())
    assert off(rotation.exp(rotation.log(turned)), turned) < 1e-12


@pytest.mark.parametrize("length", [1e-6, 0.3, 2.0, 3.1])
def test_log_undoes_exp_below_half_a_circle(length: float) -> None:
    given = skew(3, 6, length)
    assert off(rotation.log(rotation.exp(given)), given) < 1e-12


def test_log_where_eigenvalues_meet() -> None:
    """Twice the same angle, at rest elsewhere, in a turned frame."""
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    frame = rotation.exp(skew(1, 7, 2.0))[0]
    angles = frame @ torch.block_diag(quarter * 1.3, quarter * 1.3, torch.zeros(3, 3)) @ frame.T
    turned = rotation.exp(angles[None])
    assert off(rotation.log(turned), angles[None]) < 1e-12


@pytest.mark.parametrize("call", [rotation.log, rotation.inverse_cayley])
@pytest.mark.parametrize("mirrored", [1, 2])
def test_half_turns_and_mirrors_are_refused(call: Any, mirrored: int) -> None:
    signs = torch.ones(5, dtype=torch.float64)
    signs[:mirrored] = -1
    frame = rotation.exp(skew(1, 5, 2.0))[0]
    with pytest.raises(ValueError, match="eigenvalue -1"):
        call((frame @ torch.diag(signs) @ frame.T)[None])


def test_the_log_of_what_is_no_rotation_is_refused() -> None:
    with pytest.raises(ValueError, match="not orthogonal"):
        rotation.log(1.1 * rotation.exp(skew(2, 4, 1.0)))
    cut = rotation.cayley_series(skew(2, 4, 0.3), 5)
    nearest = rotation.nearest(cut)
    assert off(nearest.mT @ nearest, torch.eye(4).double()) < 1e-14
    assert off(nearest, cut) < 0.01


def test_cayley_and_back() -> None:
    given = skew(3, 8, 0.9)
    turned = rotation.cayley(given)
    assert off(turned.mT @ turned, torch.eye(8).double()) < 1e-13
    assert off(rotation.inverse_cayley(turned), given) < 1e-12


def test_skew_blocks_from_their_upper_triangles() -> None:
    vectors = randn(3, 10)
    found = rotation.skew_of(vectors)
    assert found.shape == (3, 5, 5)
    assert torch.equal(found, -found.mT)
    assert torch.equal(found[:, 0, 1:], vectors[:, :4])
    assert torch.equal(rotation.vectors_of(found), vectors)
    with pytest.raises(ValueError, match="b \\* \\(b - 1\\) / 2"):
        rotation.block_size(5)


@pytest.mark.parametrize(
    ("terms", "last", "factors"),
    [
        (1, 1.0, [1]),
        (2, 1.0, [1, 2]),
        (3, 1.0, [1, 2, 2, 1]),
        (4, 1.0, [1, 2, 2, 1]),
        (5, 1.0, [1, 2, 2, 2, 1]),
        (3, 2.0, [1, 2, 2]),
        (5, 2.0, [1, 2, 2, 2, 2]),
    ],
)
def test_the_series_of_peft_and_its_old_one(terms: int, last: float, factors: list[int]) -> None:
    given = skew(2, 3, 0.5)
    expected = sum(f * torch.linalg.matrix_power(given, n) for n, f in enumerate(factors))
    assert isinstance(expected, Tensor)
    assert off(rotation.cayley_series(given, terms, last), expected) < 1e-14


def test_a_long_series_is_the_opposite_rotation() -> None:
    given = skew(2, 4, 0.3)
    assert off(rotation.cayley_series(given, 60), rotation.cayley(-given)) < 1e-14


@pytest.mark.parametrize("repeated", [False, True])
def test_oft_stored_turned_stored(repeated: bool) -> None:
    vectors = 0.3 * randn(1 if repeated else 4, 10)
    edit = Oft(SITE, ref(vectors), repeated=repeated, blocks=4)
    blocks = edit.rotation(LIKE)
    assert off(edit.stored(blocks), vectors) < 1e-12
    weight = randn(7, 20)
    whole = torch.block_diag(*blocks.expand(4, -1, -1))
    assert off(edit.apply(weight), weight @ whole.T) < 1e-13


def test_boft_stored_turned_stored() -> None:
    given = 0.3 * randn(3, 8, 4, 4)
    edit = Boft(SITE, ref(given), ref(torch.ones(5, 1)))
    stored = edit.stored(edit.rotation(LIKE))
    assert stored.shape == given.shape
    assert off(stored, (given - given.mT) / 2) < 1e-12
    again = Boft(SITE, ref(stored), ref(torch.ones(5, 1)))
    assert off(again.rotation(LIKE), edit.rotation(LIKE)) < 1e-12
    kept = edit.apply(randn(5, 32))
    assert kept.norm() == pytest.approx(randn(5, 32).norm())


def test_butterflies_shuffle_half_blocks() -> None:
    assert butterfly(4, 4, 0).tolist() == list(range(16))
    assert butterfly(4, 4, 1).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    half = [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]
    assert butterfly(4, 4, 2).tolist() == half


@pytest.mark.parametrize("orthogonalise", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3, 6])
def test_hra_stored_turned_stored(rank: int, orthogonalise: bool) -> None:
    edit = Hra(SITE, ref(randn(9, rank)), orthogonalise)
    block = edit.rotation(LIKE)
    assert off(block.mT @ block, torch.eye(9).double()) < 1e-13
    again = Hra(SITE, ref(edit.stored(block)), orthogonalise=False)
    assert again.directions.shape == (9, rank)
    assert off(again.rotation(LIKE), block) < 1e-12


def test_hra_is_a_product_of_reflections() -> None:
    directions = randn(6, 3)
    expected = torch.eye(6).double()
    for column in (directions / directions.norm(dim=0)).T:
        expected = expected @ (torch.eye(6).double() - 2 * torch.outer(column, column))
    assert off(Hra(SITE, ref(directions), False).rotation(LIKE)[0], expected) < 1e-13


def test_rotations_as_reflections() -> None:
    """Fewer than there is room for are padded by pairs; too many, or one more, are refused."""
    turned = rotation.exp(skew(1, 4, 1.0))[0]
    assert rotation.reflections(turned, 6).shape == (4, 6)
    assert rotation.reflections(torch.eye(4).double(), 2).shape == (4, 2)
    for count in (3, 5):
        with pytest.raises(ValueError, match="reflections"):
            rotation.reflections(turned, count)
