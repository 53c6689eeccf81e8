"""Errors fed back from row to row: by dense algebra, by textbook GPTQ, and in stored layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from fuse.layers import Fused, gaussian, heavy_tailed, layer, with_lora
from fuse.test_rounding import gptq
from torch import Tensor

from adaptmerge.factors import Diag, Factor, Leaf, Product, low_rank
from adaptmerge.files.dtypes import F32
from adaptmerge.files.refs import TensorRef, constant, listed
from adaptmerge.fuse import repack, written
from adaptmerge.fuse.matrix import Matrix, Part
from adaptmerge.fuse.written import in_turn, written_of
from adaptmerge.graph import Site
from adaptmerge.grids import BlockGrid
from adaptmerge.rounding import feedback, round_adaptive, turns
from adaptmerge.schemes.bitsandbytes.codes import FP4, NF4

F64 = torch.float64
OUT, COLUMNS, RANK = 10, 8, 2
ACROSS, DOWN = 7.0, 5.0  # strengths along rows and from row to row
KINDS = ["NF4", "FP4", "whole numbers", "zeros", "offsets"]


def grid_of(kind: str) -> BlockGrid:
    """One block a row."""
    scale = 0.3 + gaussian(OUT, 1, seed=1).double().abs()
    groups = torch.zeros(COLUMNS, dtype=torch.int64)
    if kind in ("NF4", "FP4"):
        table = torch.tensor(sorted({"NF4": NF4, "FP4": FP4}[kind]), dtype=F64)
        return BlockGrid(3 * scale, groups, table)
    zero = torch.full_like(scale, 7.0) if kind == "zeros" else None
    offset = -scale if kind == "offsets" else None
    return BlockGrid(scale, groups, None, -8, 7, zero, offset)


def as_one_row(grid: BlockGrid) -> BlockGrid:
    """The grid of the same weight with its rows one behind the other."""
    groups = torch.arange(OUT).repeat_interleave(COLUMNS)
    zero, offset = (None if of is None else of.T for of in (grid.zero, grid.offset))
    return BlockGrid(grid.scale.T, groups, grid.table, grid.low, grid.high, zero, offset)


def basis_of(size: int, seed: int) -> Tensor:
    basis: Tensor = torch.linalg.qr(gaussian(size, RANK, seed=seed).double()).Q
    return basis


def singly(count: int) -> list[tuple[int, int]]:
    return [(at, at + 1) for at in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_gptq_for_both_sides(kind: str) -> None:
    """Textbook GPTQ on the whole weight as one row, with a dense Kronecker product as its Hessian."""
    grid, target = grid_of(kind), gaussian(OUT, COLUMNS, seed=2).double()
    rows, columns = basis_of(OUT, 3), basis_of(COLUMNS, 4)
    feed = feedback(columns, F64, ACROSS, ranges=singly(COLUMNS))

    def choose(target: Tensor, numbers: Tensor) -> Tensor:
        return round_adaptive(target, grid.of_rows(numbers), feed).codes

    down = feedback(rows, F64, DOWN, ranges=singly(OUT))
    found = in_turn(target.clone(), grid, down, choose)
    of_rows = torch.eye(OUT, dtype=F64) + DOWN * rows @ rows.T
    of_columns = torch.eye(COLUMNS, dtype=F64) + ACROSS * columns @ columns.T
    flat = target.reshape(1, -1)
    expected = gptq(flat, as_one_row(grid), torch.kron(of_rows, of_columns))
    assert torch.equal(found, expected.view(OUT, COLUMNS))
    assert not torch.equal(found, choose(target.clone(), torch.arange(OUT))), "nothing fed back"


@pytest.mark.parametrize("share", [2, 4, 100])
def test_rows_are_asked_for_what_costs_least(share: int) -> None:
    """What the errors so far call for, by the dense Hessian of the rows."""
    grid, target, basis = grid_of("NF4"), gaussian(OUT, COLUMNS, seed=2).double(), basis_of(OUT, 3)
    hessian = torch.eye(OUT, dtype=F64) + DOWN * basis @ basis.T
    error, asked = torch.zeros(0, COLUMNS, dtype=F64), list[int]()

    def choose(wanted: Tensor, numbers: Tensor) -> Tensor:
        nonlocal error
        done = len(asked)
        asked.extend(numbers.tolist())
        free = torch.linalg.solve(hessian[done:, done:], hessian[done:, :done] @ error)
        torch.testing.assert_close(wanted, (target[done:] - free)[: len(numbers)])
        part = grid.of_rows(numbers)
        codes = part.codes(wanted, slice(0, COLUMNS))
        values = part.values(codes, slice(0, COLUMNS), torch.empty_like(wanted))
        error = torch.cat([error, values - target[numbers]])
        return codes

    in_turn(target, grid, feedback(basis, F64, DOWN, ranges=turns(OUT, share)), choose)
    assert asked == list(range(OUT))
    assert float(error.norm()) > 0.1


def in_outputs(fused: Fused, rank: int) -> float:
    """|error| in what the adapter writes to, relative to what it adds."""
    basis = torch.linalg.svd(fused.delta, full_matrices=False).U[:, :rank]
    return float((basis.T @ fused.error).norm() / fused.delta.norm())


def both(base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, ratio: float) -> list[Fused]:
    """Fused with feedback from row to row and without."""
    found = [with_lora(base, folder / "with", ratio, 8)]
    monkeypatch.setattr(repack, "written_of", lambda _: None)
    return [*found, with_lora(base, folder / "without", ratio, 8)]


@pytest.mark.parametrize("drawn", [gaussian, heavy_tailed])
@pytest.mark.parametrize("kind", ["nf4", "nf4,double", "fp4", "int8"])
def test_small_weights_have_little_error_in_what_adapters_write_to(
    kind: str, drawn: Callable[..., Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = layer(tmp_path / "base", kind, 256, 128, drawn)
    ratio = 0.001 if kind == "int8" else 0.01  # a tenth of a step in each
    found, alone = both(base, tmp_path, monkeypatch, ratio)
    assert in_outputs(found, 8) < 0.5 * in_outputs(alone, 8)
    assert found.sub < 1.2 * alone.sub
    assert found.frob < 1.4 * alone.frob
    assert found.report.adapters["a"].gain == pytest.approx(1, abs=0.02)


def test_also_where_blocks_run_across_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = layer(tmp_path / "base", "nf4", 301, 352)
    found, alone = both(base, tmp_path, monkeypatch, 0.01)
    assert in_outputs(found, 8) < 0.5 * in_outputs(alone, 8)
    assert found.sub < 1.2 * alone.sub


def ref(*shape: int) -> TensorRef:
    return constant(1.0, shape, F32)


def weight_of(out: int, columns: int, *factors: Factor) -> Matrix:
    parts = tuple(Part(str(at), 1.0, factor) for at, factor in enumerate(factors))
    return Matrix(Site("layer"), ref(out, columns), F32, parts, packed=True)


def lora(out: int, columns: int, rank: int) -> Factor:
    up, down = (
        listed(tuple(side.flatten().tolist()), tuple(side.shape), F32)
        for side in (gaussian(out, rank, seed=1), gaussian(rank, columns, seed=2))
    )
    return low_rank(up, down)


def test_only_where_it_matters_and_is_possible() -> None:
    """In small weights, for adapters of few directions with an up."""
    small = partial(weight_of, 64, 96)
    assert written_of(small(lora(64, 96, 4))) is not None
    several = written_of(small(lora(64, 96, 4), lora(64, 96, 4)))
    assert several is not None
    assert several.directions == 4, "the same ups are the same directions"
    assert written_of(small(lora(64, 96, 16))) is None, "four rows per direction"
    assert written_of(small()) is None
    scaling = Product((Diag(ref(64)), Leaf(ref(64, 96))))
    assert written_of(small(scaling)) is None, "what is of full rank writes everywhere"
    wide = written.SMALL // 64
    assert written_of(weight_of(64, wide, lora(64, wide, 4))) is not None
    assert written_of(weight_of(64, wide + 1, lora(64, wide + 1, 4))) is None
