"""linear: the true weighted sum of the deltas (task arithmetic, Ilharco et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

from adaptmerge.factors import Factor, Leaf, Product, Sum
from adaptmerge.graph import Site
from adaptmerge.registry import Member, Method


def weighted_sum(site: Site, members: Sequence[Member]) -> Factor:
    """Sum of w * delta over the members, as an expression of their own factors."""
    return Sum(tuple(Product((_factor(member),), member.weight) for member in members))


def weighted_values(site: Site, members: Sequence[Member]) -> Factor:
    """Sum of w * value of parameters stored whole, as a column."""
    columns = [(m.weight, m.edit.value) for m in members]  # type: ignore[attr-defined]
    return Sum(tuple(Product((Leaf(v.reshape(v.count, 1)),), w) for w, v in columns))


def _factor(member: Member) -> Factor:
    factor = member.edit.delta()  # type: ignore[attr-defined]
    assert factor is not None
    found: Factor = factor
    return found


METHOD = Method(
    name="linear",
    summary="the true weighted sum of deltas; exact unless a budget is given",
    url="https://arxiv.org/abs/2212.04089",
    rules={"add": weighted_sum, "replace": weighted_values},
)
