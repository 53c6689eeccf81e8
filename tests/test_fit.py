"""The one place that approximates: its result is the best there is, and its error the true one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import dense_of, random_term, scales, seeds, term_lists

from adaptmerge.algebra.factors import Term
from adaptmerge.algebra.fit import Budget, Fitted, allot, site_rank, spectrum, stack, truncate
from adaptmerge.errors import UsageError
from adaptmerge.tensors.dtypes import BF16, F16, F32, F64, DType

DTYPES = [F64, F32, BF16, F16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def stored(fitted: Fitted) -> torch.Tensor:
    return fitted.up.double() @ fitted.down.double()


def dense_error(terms: list[Term], fitted: Fitted) -> float:
    return float((dense_of(terms) - stored(fitted)).norm())


def size_of(terms: list[Term]) -> float:
    """The scale of rounding: what the terms are before they cancel."""
    return sum(float(dense_of([term]).norm()) for term in terms)


def tail(delta: torch.Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(delta)[rank:].square().sum().sqrt())


def regauged(term: Term, seed: int) -> Term:
    """The same matrix from other sides: up G, G^-1 down with a well-conditioned G."""
    rank = term.up.shape[1]
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(random).Q
    stretch = torch.linspace(0.5, 2.0, rank, dtype=torch.float64)
    gauge = rotation * stretch
    up = term.up.double() @ gauge
    down = torch.linalg.solve(gauge, term.down.double())
    return Term(up.to(term.up.dtype), down.to(term.down.dtype), term.scale)


@given(terms=term_lists(), rank=st.integers(1, 8))
def test_truncation_is_the_best_there_is(terms: list[Term], rank: int) -> None:
    fitted = truncate(terms, Budget(rank=rank), F32)
    best = tail(dense_of(terms), rank)
    assert fitted.rank <= rank
    assert fitted.truncation == pytest.approx(best, abs=1e-6 * size_of(terms))
    assert dense_error(terms, fitted) == pytest.approx(best, abs=1e-5 * size_of(terms))


@given(terms=term_lists(dtype=torch.float64), rank=st.integers(1, 8))
def test_truncation_in_float64(terms: list[Term], rank: int) -> None:
    fitted = truncate(terms, Budget(rank=rank), F64)
    assert dense_error(terms, fitted) == pytest.approx(
        tail(dense_of(terms), rank), abs=1e-12 * size_of(terms)
    )


@every_dtype
@given(terms=term_lists(), rank=st.integers(1, 8))
def test_reported_error_is_the_true_one(dtype: DType, terms: list[Term], rank: int) -> None:
    fitted = truncate(terms, Budget(rank=rank), dtype)
    assert fitted.up.dtype == fitted.down.dtype == dtype.torch
    assert fitted.error == pytest.approx(dense_error(terms, fitted), abs=1e-5 * size_of(terms))
    assert fitted.error == math.hypot(fitted.truncation, fitted.rounding)


@every_dtype
@pytest.mark.parametrize("source", DTYPES, ids=str)
@given(data=st.data())
@settings(max_examples=20)
def test_stacking_loses_only_what_it_reports(
    dtype: DType, source: DType, data: st.DataObject
) -> None:
    terms = data.draw(term_lists(dtype=source.torch))
    fitted = stack(terms, dtype)
    assert fitted.truncation == 0.0
    assert fitted.rank <= sum(term.up.shape[1] for term in terms)
    assert fitted.error == pytest.approx(dense_error(terms, fitted), abs=1e-5 * size_of(terms))


@every_dtype
@given(seed=seeds, rank=st.integers(1, 4))
def test_stacking_is_verbatim(dtype: DType, seed: int, rank: int) -> None:
    """Values keep every bit where scales fold exactly."""
    one, two = (random_term(seed + i, (9, 7), rank, 1.0, dtype.torch) for i in range(2))
    fitted = stack([one, two._replace(scale=-0.5)], dtype)
    assert torch.equal(fitted.up, torch.cat([one.up, two.up * -0.5], dim=1))
    assert torch.equal(fitted.down, torch.cat([one.down, two.down]))
    assert fitted.rounding == 0.0


@every_dtype
@given(terms=term_lists(count=4))
@settings(max_examples=20)
def test_cat_keeps_every_term(dtype: DType, terms: list[Term]) -> None:
    fitted = stack([*terms, *terms], dtype, reduce=False)
    assert fitted.rank == 2 * sum(term.up.shape[1] for term in terms)


# Exact redundancy


@every_dtype
@given(seed=seeds, scale=scales)
def test_a_minus_a_is_exactly_empty(dtype: DType, seed: int, scale: float) -> None:
    term = random_term(seed, (6, 8), 3, scale, dtype.torch)
    for fitted in (
        stack([term, term._replace(scale=-scale)], dtype),
        stack([term, Term(-term.up, term.down, scale)], dtype),
        stack([term, Term(term.up, -term.down, scale)], dtype),
        truncate([term, term._replace(scale=-scale)], Budget(rank=3), dtype),
    ):
        assert (fitted.rank, fitted.error) == (0, 0.0)
        assert (fitted.up.shape, fitted.down.shape) == ((6, 0), (0, 8))


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize(
    "budget",
    [Budget(rank=8), Budget(energy=0.999, per_site=True), Budget(max_error=0.0, per_site=True)],
    ids=["rank", "energy", "exact"],
)
@given(seed=seeds)
@settings(max_examples=40)
def test_a_minus_another_factorisation_of_a_is_empty(
    dtype: DType, budget: Budget, seed: int
) -> None:
    """What is left is rounding; a floor taken from it, instead of the inputs, would keep it."""
    term = random_term(seed, (24, 17), 4, 1.0, dtype.torch)
    other = regauged(term, seed + 1)._replace(scale=-1.0)
    fitted = truncate([term, other], budget, dtype)
    assert (fitted.rank, fitted.up.numel()) == (0, 0)
    assert spectrum([term, other]) == []


@given(seed=seeds, first=scales, second=scales)
def test_a_shared_side_is_stored_once(seed: int, first: float, second: float) -> None:
    one, two = (random_term(seed + i, (7, 9), 3) for i in range(2))
    same_down = [one._replace(scale=first), Term(two.up, one.down, second)]
    same_up = [one._replace(scale=first), Term(one.up, two.down, second)]
    for terms in (same_down, same_up):
        fitted = stack(terms, F32)
        assert fitted.rank == 3
        assert dense_error(terms, fitted) <= 1e-6 * size_of(terms)


@every_dtype
@pytest.mark.parametrize("count", [2, 3, 4])
@given(seed=seeds)
@settings(max_examples=10)
def test_copies_that_share_a_weight_of_one_are_one(dtype: DType, count: int, seed: int) -> None:
    term = random_term(seed, (7, 9), 3, 1.0, dtype.torch)
    fitted = stack([term._replace(scale=1 / count)] * count, dtype)
    assert torch.equal(fitted.up, term.up)
    assert torch.equal(fitted.down, term.down)
    assert fitted.error == 0.0


def test_zero_rows_and_columns_are_left_out() -> None:
    term = random_term(1, (6, 5), 4)
    term.up[:, 1] = 0
    term.down[3] = 0
    fitted = stack([term], F32)
    assert torch.equal(fitted.up, term.up[:, [0, 2]])
    assert torch.equal(fitted.down, term.down[[0, 2]])
    assert stack([term], F32, reduce=False).rank == 4


def test_numerical_rank_is_not_judged_by_a_cancelled_sum() -> None:
    """A small true remainder of two large inputs survives; rounding of its size would not."""
    large, small = random_term(1, (30, 20), 2), random_term(2, (30, 20), 1, 1e-2)
    terms = [large, large._replace(scale=-1.0), small]
    fitted = truncate(terms, Budget(rank=5), F32)
    assert fitted.rank == 1
    assert dense_error(terms, fitted) < 1e-5 * size_of(terms)


# Gauge and determinism


@given(seed=seeds, rank=st.integers(1, 4))
def test_results_do_not_depend_on_the_factorisation(seed: int, rank: int) -> None:
    terms = [random_term(seed + i, (12, 9), 3, 0.5 + i) for i in range(2)]
    other = [regauged(term, seed + 5 + i) for i, term in enumerate(terms)]
    one, two = (truncate(found, Budget(rank=rank), F32) for found in (terms, other))
    assert one.truncation == pytest.approx(two.truncation, abs=1e-5 * size_of(terms))
    assert dense_error(other, one) == pytest.approx(one.error, abs=1e-5 * size_of(terms))


@given(seed=seeds)
def test_signs_are_fixed(seed: int) -> None:
    term = random_term(seed, (12, 9), 3)
    one = truncate([term], Budget(rank=3), F32)
    flipped = truncate([Term(-term.up, -term.down, 1.0)], Budget(rank=3), F32)
    peaks = one.down.gather(1, one.down.abs().argmax(1, keepdim=True))
    assert bool((peaks > 0).all())
    assert torch.allclose(one.up, flipped.up, rtol=1e-3, atol=1e-3)
    assert torch.allclose(one.down, flipped.down, rtol=1e-3, atol=1e-3)


@given(terms=term_lists())
@settings(max_examples=20)
def test_the_same_terms_give_the_same_bits(terms: list[Term]) -> None:
    one, two = (truncate(terms, Budget(rank=2), F32) for _ in range(2))
    assert torch.equal(one.up, two.up)
    assert torch.equal(one.down, two.down)


@given(terms=term_lists())
@settings(max_examples=20)
def test_both_sides_carry_the_root_of_the_singular_values(terms: list[Term]) -> None:
    fitted = truncate(terms, Budget(rank=3), F32)
    sigma = torch.linalg.svdvals(dense_of(terms))[: fitted.rank].float()
    for side in (fitted.up.norm(dim=0), fitted.down.norm(dim=1)):
        assert torch.allclose(side.square(), sigma, rtol=1e-2, atol=1e-4)


# Budgets

spectra = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    st.lists(st.floats(0.01, 100), max_size=3).map(lambda s: sorted(s, reverse=True)),
    min_size=1,
)
budgets = st.builds(
    Budget,
    rank=st.none() | st.integers(1, 4),
    energy=st.none() | st.floats(0.05, 1),
    max_error=st.none() | st.floats(0, 0.95),
)


def lost(found: dict[str, list[float]], ranks: dict[str, int]) -> float:
    return sum(v**2 for site, sigma in found.items() for v in sigma[ranks[site] :])


@given(found=spectra, budget=budgets)
def test_budgets_are_kept_with_the_fewest_ranks(
    found: dict[str, list[float]], budget: Budget
) -> None:
    total = sum(v**2 for sigma in found.values() for v in sigma)
    uncapped = Budget(energy=budget.energy, max_error=budget.max_error)
    ranks = allot(found, uncapped)
    if not budget.spectral:
        assert ranks == {site: len(sigma) for site, sigma in found.items()}
    else:
        allowed = total * min(
            1.0 if budget.energy is None else 1.0 - budget.energy,
            1.0 if budget.max_error is None else budget.max_error**2,
        )
        assert lost(found, ranks) <= allowed * (1 + 1e-9)
        every = itertools.product(*(range(len(sigma) + 1) for sigma in found.values()))
        choices = [dict(zip(found, choice, strict=True)) for choice in every]
        fits = [c for c in choices if lost(found, c) <= allowed * (1 - 1e-9)]
        fewest = min((sum(c.values()) for c in fits), default=sum(map(len, found.values())))
        assert sum(ranks.values()) <= fewest
    capped = allot(found, budget)
    assert capped == {
        s: r if budget.rank is None else min(r, budget.rank) for s, r in ranks.items()
    }


@given(terms=term_lists(), share=st.floats(0.01, 0.9))
def test_max_error_holds_for_what_is_stored(terms: list[Term], share: float) -> None:
    fitted = truncate(terms, Budget(max_error=share, per_site=True), F32)
    norm = float(dense_of(terms).norm())
    noise = 1e-5 * size_of(terms)
    assert dense_error(terms, fitted) <= share * norm + noise
    if fitted.rank:
        assert tail(dense_of(terms), fitted.rank - 1) > share * norm - noise


@given(terms=term_lists(), share=st.floats(0.1, 0.999))
def test_energy_holds_for_what_is_stored(terms: list[Term], share: float) -> None:
    fitted = truncate(terms, Budget(energy=share, per_site=True), F32)
    norm = float(dense_of(terms).norm())
    assert float(stored(fitted).norm()) ** 2 >= share * norm**2 - 1e-5 * size_of(terms) ** 2


def test_large_sites_take_ranks_from_small_ones() -> None:
    ranks = allot({"small": [1.0, 0.9], "large": [10.0, 8.0, 6.0]}, Budget(max_error=0.2))
    assert ranks == {"small": 0, "large": 3}
    assert site_rank([1.0, 0.9], Budget(max_error=0.2)) == 2


def test_ties_fall_to_the_earlier_site() -> None:
    tied = {"a": [2.0, 1.0], "b": [2.0, 1.0]}
    assert allot(tied, Budget(energy=0.85)) == {"a": 2, "b": 1}
    assert allot({"b": tied["b"], "a": tied["a"]}, Budget(energy=0.85)) == {"b": 2, "a": 1}


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_nothing_to_keep_is_no_error(energy: float) -> None:
    assert allot({"a": [], "b": []}, Budget(energy=energy)) == {"a": 0, "b": 0}


def test_the_noise_floor_is_not_energy() -> None:
    term = random_term(3, (20, 20), 2)
    assert len(spectrum([term, regauged(term, 4)])) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "--rank 0: a rank is at least 1"),
        ({"rank": -3}, "--rank -3: a rank is at least 1"),
        ({"energy": 0.0}, "--energy 0.0: give a share above 0 and up to 1"),
        ({"energy": 1.01}, "--energy 1.01"),
        ({"energy": math.nan}, "--energy nan"),
        ({"max_error": -0.1}, "--max-error -0.1: give a share from 0 to below 1"),
        ({"max_error": 1.0}, "--max-error 1.0"),
        ({"max_error": math.inf}, "--max-error inf"),
    ],
)
def test_budgets_that_cannot_be_meant(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Budget(**options)  # type: ignore[arg-type]


def test_all_problems_of_a_budget_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        Budget(rank=0, energy=2.0, max_error=1.5)
    assert len(caught.value.problems) == 3


def test_a_rank_larger_than_the_matrix_is_only_a_cap() -> None:
    term = random_term(5, (4, 3), 2)
    fitted = truncate([term], Budget(rank=1000), F32)
    assert fitted.rank == 2


def test_folding_a_weight_is_measured_and_rounds_once() -> None:
    """0.7 * B in float32 is not exact, and a bf16 result is the float64 product rounded once."""
    term = random_term(7, (40, 30), 4)._replace(scale=0.7)
    wide = stack([term], F32)
    whole = 0.7 * term.up.double() @ term.down.double()
    apart = float((wide.up.double() @ wide.down.double() - whole).norm())
    assert 0 < apart == pytest.approx(wide.rounding, rel=1e-3)
    narrow = stack([term], BF16)
    assert torch.equal(narrow.up, (term.up.double() * 0.7).to(torch.bfloat16))
