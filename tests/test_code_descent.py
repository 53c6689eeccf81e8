"""Codes exchanged for their neighbours: the end of a descent, by costs computed densely for every pair."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from fuse.layers import Fused, gaussian, heavy_tailed, layer, with_lora
from schemes.test_against_gptq import possible
from torch import Tensor

from adaptmerge.bases.open import open_base
from adaptmerge.rounding import code_descent
from adaptmerge.rounding.code_descent import Cost, cost_of, exchanged
from adaptmerge.rounding.error_feedback import feedback, round_adaptive
from adaptmerge.rounding.metric import Metric
from adaptmerge.rounding.scales import KEEP, ONLY, SOLVE, CodedRows
from adaptmerge.schemes.bitsandbytes.codes import FP4, NF4
from adaptmerge.schemes.grids import BlockGrid
from adaptmerge.schemes.view import view_of

F64 = torch.float64
ROWS, COLUMNS, DIRECTIONS, STRENGTH = 12, 20, 3, 30.0
EVERY = slice(0, COLUMNS)
TABLES = {"NF4": NF4, "FP4": FP4}
RANGES = {"whole numbers": (-8, 7), "zeros": (0, 15), "offsets": (0, 3)}
KINDS = [*TABLES, *RANGES]


def grid_of(kind: str) -> BlockGrid:
    """Two blocks a row, whose scales differ; one of them is negative."""
    scale = 0.3 + gaussian(ROWS, 2, seed=1).double().abs()
    scale[0, 0] *= -1
    groups = torch.arange(COLUMNS) // (COLUMNS // 2)
    if kind in TABLES:
        return BlockGrid(scale, groups, torch.tensor(sorted(TABLES[kind]), dtype=F64))
    zero = torch.full((ROWS, 2), 7.0, dtype=F64) if kind == "zeros" else None
    offset = -scale if kind == "offsets" else None
    return BlockGrid(scale, groups, None, *RANGES[kind], zero, offset)


@dataclass(frozen=True)
class Problem:
    """A target on a grid, codes of feedback for it, and what errors cost: also densely, (rows, in, in)."""

    grid: BlockGrid
    target: Tensor
    codes: Tensor
    cost: Cost
    dense: Tensor

    def values(self, codes: Tensor) -> Tensor:
        return self.grid.values(codes, EVERY, torch.empty(ROWS, COLUMNS, dtype=F64))

    def paid(self, error: Tensor) -> Tensor:
        return torch.einsum("ni,nij,nj->n", error, self.dense, error)

    def steps(self, values: Tensor) -> list[tuple[int, Tensor]]:
        """From values to the next ones below and above, column by column; 0 at an end."""
        found = []
        for column in range(COLUMNS):
            now = values[:, column, None]
            others = possible(self.grid, column) - now
            for way in (-1, 1):
                away = torch.where(others * way > 0, others * way, torch.inf).amin(1)
                found.append((column, torch.where(torch.isfinite(away), way * away, 0.0)))
        return found


def problem(kind: str, *, measured: bool) -> Problem:
    grid = grid_of(kind)
    drawn = gaussian(ROWS, COLUMNS, seed=2).double()
    weight = grid.values(grid.codes(drawn, EVERY), EVERY, torch.empty_like(drawn))
    added = 0.2 * gaussian(ROWS, COLUMNS, seed=3).double()
    basis = torch.linalg.qr(gaussian(COLUMNS, DIRECTIONS, seed=4).double()).Q
    dense, metric = torch.eye(COLUMNS, dtype=F64), None
    if measured:
        diagonal = 1 + gaussian(COLUMNS, seed=5).double().abs()
        metric = Metric(diagonal, gaussian(COLUMNS, 2, seed=6).double())
        dense = metric.diagonal.diag() + metric.sketch @ metric.sketch.T
    feed = feedback(basis, F64, STRENGTH, metric=metric)
    codes = round_adaptive(weight + added, grid, feed).codes
    unit = added / added.norm(dim=1, keepdim=True)
    own = code_descent.ALONG * STRENGTH * unit[:, :, None] * unit[:, None, :]
    dense = dense + STRENGTH * basis @ basis.T + own
    return Problem(grid, weight + added, codes, cost_of(basis, added, STRENGTH, metric), dense)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_pair_of_moves_costs_less(
    kind: str, measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By trying all of them, where all are looked at and until nothing moves."""
    monkeypatch.setattr(code_descent, "POOL", 2 * COLUMNS)
    monkeypatch.setattr(code_descent, "ROUNDS", 50)
    asked = problem(kind, measured=measured)
    after = exchanged(asked.codes, asked.grid, asked.target, asked.cost)
    values = asked.values(after)
    error = values - asked.target
    paid = asked.paid(error)
    assert float(paid.sum()) < 0.9 * float(
        asked.paid(asked.values(asked.codes) - asked.target).sum()
    )
    least = -1.001 * code_descent.LEAST * error.square().sum(1)
    nothing = (0, torch.zeros(ROWS, dtype=F64))
    for (i, first), (j, second) in combinations([nothing, *asked.steps(values)], 2):
        moved = error.clone()
        moved[:, i] += first
        if i != j or not bool(first.any()):
            moved[:, j] += second
        assert bool((asked.paid(moved) - paid >= least).all()), (i, j)


@pytest.mark.parametrize("kind", KINDS)
def test_costs_fall_in_every_row_that_changes(kind: str) -> None:
    asked = problem(kind, measured=True)
    given = asked.codes.clone()
    after = exchanged(given, asked.grid, asked.target, asked.cost)
    assert torch.equal(given, asked.codes), "codes that are given are not changed"
    change = asked.paid(asked.values(after) - asked.target)
    change -= asked.paid(asked.values(given) - asked.target)
    moved = (after != given).any(1)
    assert int(moved.sum()) > ROWS / 2
    assert bool((change[moved] < 0).all())


@pytest.mark.parametrize("groups", ["blocks", "shuffled"])
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_of_wide_rows_the_last_columns_move(
    kind: str, measured: bool, groups: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the others were not there, whose error is: no move there costs less."""
    monkeypatch.setattr(code_descent, "WINDOW", 0)
    monkeypatch.setattr(code_descent, "NARROW", COLUMNS // 2)
    monkeypatch.setattr(code_descent, "POOL", 2 * COLUMNS)
    monkeypatch.setattr(code_descent, "ROUNDS", 50)
    asked = problem(kind, measured=measured)
    grid = asked.grid
    if groups == "shuffled":
        order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))
        grid = grid.in_order(order)
        asked = replace(asked, grid=grid)
    after = exchanged(asked.codes, grid, asked.target, asked.cost)
    last = slice(COLUMNS // 2, COLUMNS)
    assert torch.equal(after[:, : COLUMNS // 2], asked.codes[:, : COLUMNS // 2])
    assert int((after != asked.codes)[:, last].any(1).sum()) > ROWS / 2
    values = asked.values(after)
    error = values - asked.target
    paid = asked.paid(error)
    assert bool((paid <= asked.paid(asked.values(asked.codes) - asked.target) * (1 + 1e-9)).all())
    least = -1.001 * code_descent.LEAST * error.square().sum(1)
    for column, step in asked.steps(values):
        moved = error.clone()
        moved[:, column] += step
        if column >= COLUMNS // 2:
            assert bool((asked.paid(moved) - paid >= least).all()), column


def test_neighbours_are_other_values() -> None:
    """FP4 stores zero twice, and a step from one to the other is none."""
    grid, levels = grid_of("FP4"), sorted(FP4)
    assert levels.count(0.0) == 2
    codes = torch.arange(16).to(torch.uint8)
    below, above = ([levels[c] for c in grid.neighbours(codes, way).tolist()] for way in (-1, 1))
    assert below == [max((v for v in levels if v < level), default=level) for level in levels]
    assert above == [min((v for v in levels if v > level), default=level) for level in levels]


NARROW, RANK, LAYER_ROWS = 256, 16, 512


def both(
    base: Path, folder: Path, ratio: float, rank: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Fused, Fused]:
    """Fused with an exchange of codes and without."""
    with_it = with_lora(base, folder / "with", ratio, rank)
    monkeypatch.setattr(CodedRows, "exchanges", lambda self, scales: False)
    return with_it, with_lora(base, folder / "without", ratio, rank)


@pytest.mark.parametrize("drawn", [gaussian, heavy_tailed])
@pytest.mark.parametrize("kind", ["nf4", "nf4,double", "fp4", "int8"])
def test_rows_with_few_columns_per_direction_gain_by_both_measures(
    kind: str, drawn: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = layer(tmp_path / "base", kind, LAYER_ROWS, NARROW, drawn)  # type: ignore[arg-type]
    ratio = 0.001 if kind == "int8" else 0.01  # a tenth of a step in each
    found, alone = both(base, tmp_path, ratio, RANK, monkeypatch)
    assert found.sub < alone.sub
    assert found.frob < 0.85 * alone.frob
    assert found.report.adapters["a"].gain == pytest.approx(1, abs=0.01)


def test_blocks_across_rows_gain_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their scales take up nothing afterwards."""
    found, alone = both(layer(tmp_path / "base", "nf4", 300, 352), tmp_path, 0.01, 8, monkeypatch)
    assert found.sub < 0.8 * alone.sub
    assert found.frob < 0.8 * alone.frob


@pytest.mark.parametrize(
    ("columns", "rank", "kind", "expected"),
    [
        (1536, 16, "nf4", {KEEP: False, SOLVE: False, ONLY: False}),
        (1472, 16, "nf4", {KEEP: False, SOLVE: True, ONLY: False}),
        (768, 16, "nf4", {KEEP: True, SOLVE: True, ONLY: False}),
        (768, 16, "int8", {KEEP: True, SOLVE: True, ONLY: False}),
        (784, 16, "int8", {KEEP: False, SOLVE: False, ONLY: False}),
    ],
)
def test_codes_are_exchanged_where_scales_cannot_take_up_all(
    columns: int, rank: int, kind: str, expected: dict[str, bool], tmp_path: Path
) -> None:
    base = layer(tmp_path / "base", kind, 8, columns)
    (packed,) = view_of(open_base(str(base))).coded.values()
    grid = packed.grid((0, 8))[1]
    rows = CodedRows(packed, (0, 8), grid, torch.zeros(8, columns), torch.eye(columns, rank))
    assert {scales: rows.exchanges(scales) for scales in expected} == expected
    nothing = CodedRows(packed, (0, 8), grid, rows.target, rows.basis[:, :0])
    assert not any(nothing.exchanges(scales) for scales in expected)
