"""Codes with feedback are those of GPTQ, on the grid of every layout: dense, by the book, in float64.

The textbook (Frantar et al. 2023): H = I + strength V V^T, the upper Cholesky factor of its inverse, one
column after another, each error fed to the columns that follow; with moments of what flows in,
H = D + U U^T + strength V V^T. The nearest code is found by looking at all values of the grid. Where two
of them are as near, up to rounding, either is right: such ties are counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from schemes.checkpoints import QUANTISED, folder_of, packed_of, whole
from tiers import first_of, slow
from torch import Tensor

from adaptmerge.rounding import error_feedback
from adaptmerge.rounding.error_feedback import feedback, round_adaptive, row_space
from adaptmerge.rounding.metric import Metric
from adaptmerge.schemes.gguf.blocks import Codec
from adaptmerge.schemes.gguf.codecs import CODECS
from adaptmerge.schemes.grids import BlockGrid

F64 = torch.float64
TIE = 1e-5  # of the distance between two values: a middle between them is no nearer to one
SAME = 1e-12  # of the distance to them: values nearer to each other are one in float64
MODULE = "model.layers.0.mlp.up_proj"
ROWS, RANK = 32, 4  # of a layer, and of what is added to it
STRENGTHS = WEAK, STRONG = 64.0, 1e4
BLOCKS = load_file(QUANTISED.parent / "gguf" / "blocks.safetensors")
FOLDERS = sorted(path.parent for path in QUANTISED.glob("**/expected.safetensors"))


@dataclass(frozen=True)
class Compared:
    """Entries of a matrix: how many there are, differ, and lie between two values."""

    entries: int
    wrong: int
    ties: int


def levels(grid: BlockGrid) -> Tensor:
    """What the codes stand for, without scales (codes,)."""
    whole_numbers = torch.arange(grid.low, grid.high + 1)
    return (whole_numbers if grid.table is None else grid.table).to(F64)


def possible(grid: BlockGrid, column: int) -> Tensor:
    """All values (rows, codes) that the entries of a column can have: scale (level - zero) + offset."""
    block = int(grid.groups[column])
    scale, zero, offset = (
        torch.zeros(1, 1, dtype=F64) if stored is None else stored[:, block, None].to(F64)
        for stored in (grid.scale, grid.zero, grid.offset)
    )
    return scale * (levels(grid) - zero) + offset


def compared(target: Tensor, grid: BlockGrid, hessian: Tensor, codes: Tensor) -> Compared:
    """Codes against those of GPTQ for a target (rows, in), which goes on from the values of the codes where
    they are as near as the nearest."""
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, wrong, ties = target.clone(), 0, 0
    for column in range(target.shape[1]):
        values = possible(grid, column)
        distances = (left[:, column, None] - values).abs()
        nearest = distances.argmin(1, keepdim=True)
        taken = codes[:, column, None].long()
        best, ours = values.gather(1, nearest), values.gather(1, taken)
        farther = distances.gather(1, taken) - distances.gather(1, nearest)
        differs = (best - ours).abs() > SAME * distances.gather(1, nearest)
        near = differs & (farther <= 2 * TIE * (best - ours).abs())
        wrong, ties = wrong + int((differs & ~near).sum()), ties + int(near.sum())
        value = torch.where(near, ours, best)
        miss = (left[:, column, None] - value) / upper[column, column]
        left[:, column:] -= miss @ upper[column : column + 1, column:]
    return Compared(codes.numel(), wrong, ties)


def in_float64(grid: BlockGrid) -> BlockGrid:
    def wide(stored: Tensor | None) -> Tensor | None:
        return None if stored is None else stored.to(F64)

    scale = grid.scale.to(F64)
    return replace(grid, scale=scale, zero=wide(grid.zero), offset=wide(grid.offset))


def rows_of(grid: BlockGrid) -> BlockGrid:
    """The first rows of a grid."""

    def first(stored: Tensor | None) -> Tensor | None:
        return None if stored is None else stored[:ROWS]

    return replace(grid, scale=grid.scale[:ROWS], zero=first(grid.zero), offset=first(grid.offset))


def metric_for(columns: int) -> Metric:
    """Inputs that count from once to four times, and six directions that count ten times more."""
    random = torch.Generator().manual_seed(columns + 1)
    diagonal = 1 + 3 * torch.rand(columns, generator=random, dtype=F64)
    return Metric(diagonal, 3 * torch.randn(columns, 6, generator=random, dtype=F64))


def agreement(
    codes: Tensor, grid: BlockGrid, strength: float, metric: Metric | None = None
) -> Compared:
    """The codes of a weight and a delta that moves it by a thirtieth."""
    grid, columns = in_float64(rows_of(grid)), slice(0, codes.shape[1])
    weight = grid.values(codes[:ROWS], columns, torch.empty(codes[:ROWS].shape, dtype=F64))
    random = torch.Generator().manual_seed(codes.shape[1])
    down = torch.randn(RANK, codes.shape[1], generator=random, dtype=F64)
    delta = torch.randn(len(weight), RANK, generator=random, dtype=F64) @ down
    target = weight + delta * (weight.norm() / delta.norm() / 30)
    basis = row_space([down])
    found = round_adaptive(target, grid, feedback(basis, F64, strength, metric=metric)).codes
    assert not torch.equal(found, grid.codes(target, columns)), "feedback changes nothing: no proof"
    hessian = torch.eye(codes.shape[1], dtype=F64) + strength * basis @ basis.T
    if metric is not None:
        plain = round_adaptive(target, grid, feedback(basis, F64, strength)).codes
        assert not torch.equal(found, plain), "the metric changes nothing: no proof"
        hessian += metric.diagonal.diag() + metric.sketch @ metric.sketch.T
        hessian -= torch.eye(codes.shape[1], dtype=F64)
    return compared(target, grid, hessian, found)


def assert_all_agree(folder: Path, strength: float) -> None:
    for module, packed in packed_of(folder).items():
        found = agreement(*whole(packed), strength)
        assert found.wrong == 0, (module, found)
        assert found.ties <= found.entries // 1000, (module, found)


def by_bitsandbytes(folder: Path, kind: str) -> Path:
    """A layer that bitsandbytes quantises, as `transformers` stores it."""
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(5)) * 0.02
    config = {"quant_method": "bitsandbytes", f"load_in_{8 if kind == 'int8' else 4}bit": True}
    if kind == "int8":
        codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
        return folder_of(folder, {f"{MODULE}.weight": codes, f"{MODULE}.SCB": largest}, config)
    table, _, double = kind.partition(",")
    codes, state = functional.quantize_4bit(
        weight, quant_type=table, compress_statistics=bool(double), blocksize=64
    )
    beside = {f"{MODULE}.weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    return folder_of(folder, {f"{MODULE}.weight": codes, **beside}, config)


@pytest.fixture(autouse=True)
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns rounded singly, as GPTQ does it: together, they see the errors of earlier blocks only."""
    monkeypatch.setattr(error_feedback, "BLOCKS", ((1, 0),))


def tool(folder: Path) -> str:
    """Who quantised a checkpoint: the first of each tool stands for its others."""
    return folder.name.partition("-")[0]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_codes_of_recorded_checkpoints_are_those_of_gptq(folder: Path) -> None:
    assert_all_agree(folder, STRONG)


@pytest.mark.parametrize("folder", first_of(FOLDERS, tool), ids=lambda folder: folder.name)
def test_codes_of_recorded_checkpoints_with_less_feedback(folder: Path) -> None:
    assert_all_agree(folder, WEAK)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("kind", ["nf4", "nf4,double", "fp4", "fp4,double", "int8"])
def test_codes_on_the_grids_of_bitsandbytes_are_those_of_gptq(
    kind: str, strength: float, tmp_path: Path
) -> None:
    assert_all_agree(by_bitsandbytes(tmp_path / "base", kind), strength)


@pytest.mark.parametrize("strength", [STRONG, *slow(WEAK)])
@pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)
def test_codes_in_blocks_of_ggml_are_those_of_gptq(codec: Codec, strength: float) -> None:
    found = agreement(*codec.grid(BLOCKS[f"{codec.name}.bytes"]), strength)
    assert found.wrong == 0, found
    assert found.ties <= 1 + found.entries // 1000, found


@pytest.mark.parametrize("folder", first_of(FOLDERS, tool), ids=lambda folder: folder.name)
def test_codes_with_moments_are_those_of_gptq(folder: Path) -> None:
    for module, packed in packed_of(folder).items():
        codes, grid = whole(packed)
        found = agreement(codes, grid, 1e4, metric_for(codes.shape[1]))
        assert found.wrong == 0, (module, found)
        assert found.ties <= found.entries // 1000, (module, found)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_codes_with_moments_on_the_grids_of_bitsandbytes_are_those_of_gptq(
    kind: str, tmp_path: Path
) -> None:
    for packed in packed_of(by_bitsandbytes(tmp_path / "base", kind)).values():
        codes, grid = whole(packed)
        found = agreement(codes, grid, 1e4, metric_for(codes.shape[1]))
        assert found.wrong == 0, found
        assert found.ties <= found.entries // 1000, found


def test_the_textbook_tells_wrong_codes() -> None:
    """One code moved by one is found, and so are nearest codes."""
    packed = next(iter(packed_of(QUANTISED / "ct-int4").values()))
    codes, grid = whole(packed)
    grid, columns = in_float64(rows_of(grid)), slice(0, codes.shape[1])
    weight = grid.values(codes[:ROWS], columns, torch.empty(codes[:ROWS].shape, dtype=F64))
    basis = row_space(
        [torch.randn(RANK, codes.shape[1], generator=torch.Generator().manual_seed(1))]
    )
    target = weight + weight.std() * torch.ones(len(weight), RANK, dtype=F64) @ basis.T
    hessian = torch.eye(codes.shape[1], dtype=F64) + 64 * basis @ basis.T
    right = round_adaptive(target, grid, feedback(basis, F64, 64)).codes
    assert compared(target, grid, hessian, right).wrong == 0
    other = right.clone()
    other[3, 7] = (other[3, 7] + 1) % grid.count
    assert compared(target, grid, hessian, other).wrong >= 1
    assert compared(target, grid, hessian, grid.codes(target, columns)).wrong > ROWS
