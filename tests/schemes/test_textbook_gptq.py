"""Error feedback on the grids of every layout, held to dense GPTQ as its paper has it, in float64.

The Hessian of the one is H = I + strength V V^T; the other never forms it. With one column a step both are
the same algorithm, so every value must be the same one, unless it lies on the middle between two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from fuse.made_models import KINDS, quantised_base
from schemes.checkpoints import QUANTISED, packed_of

from adaptmerge import rounding
from adaptmerge.grids import BlockGrid
from adaptmerge.packed import Packed

TINY = Path(__file__).resolve().parents[2] / "fixtures" / "tinyllama" / "base"
LAYOUTS = sorted(path.name for path in QUANTISED.iterdir())
STRENGTHS = (1e2, 1e4)
RANK, RATIO, ROWS = 4, 0.3, 32  # a delta that the coarsest grids can follow
TIE = 1e-5  # of the gap between two neighbouring values


class Book(NamedTuple):
    """Values (rows, in), and per entry how far the two nearest were from equally near, over their gap."""

    values: torch.Tensor
    margin: torch.Tensor


def every_value(grid: BlockGrid) -> torch.Tensor:
    """What each code stands for in each block (rows, blocks, codes), as the formats define it."""
    level = torch.arange(grid.low, grid.high + 1) if grid.table is None else grid.table
    zero = torch.zeros(()) if grid.zero is None else grid.zero.double()[:, :, None]
    offset = torch.zeros(()) if grid.offset is None else grid.offset.double()[:, :, None]
    return grid.scale.double()[:, :, None] * (level.double() - zero) + offset


def nearest(wanted: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of values (rows, codes) the one nearest to each wanted (rows,), and the margin of the choice."""
    inside = wanted.clamp(
        values.amin(1), values.amax(1)
    )  # far outside, distances would all be alike
    distance = (values - inside[:, None]).abs()
    chosen = values.gather(1, distance.argmin(1, keepdim=True))
    others = torch.where(values == chosen, torch.inf, distance)
    second = values.gather(1, others.argmin(1, keepdim=True))
    margin = (others.amin(1) - distance.amin(1)) / (second - chosen).abs()[:, 0].clamp(min=1e-300)
    return chosen[:, 0], margin


def gptq(target: torch.Tensor, values: torch.Tensor, groups: torch.Tensor, H: torch.Tensor) -> Book:
    """Algorithm 1 of Frantar et al. 2023 (arXiv:2210.17323), without its lazy batches."""
    factor = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    left, book = target.clone(), Book(torch.empty_like(target), torch.empty_like(target))
    for j, group in enumerate(groups.tolist()):
        book.values[:, j], book.margin[:, j] = nearest(left[:, j], values[:, group])
        error = (left[:, j] - book.values[:, j]) / factor[j, j]
        left[:, j:] -= error[:, None] * factor[j, j:]
    return book


def some_rows(packed: Packed) -> tuple[torch.Tensor, BlockGrid]:
    """The values of the first rows of a packed weight, and their grid, in float64."""
    codes, grid = packed.grid((0, min(ROWS, packed.shape[0])))
    parts = {name: getattr(grid, name) for name in ("table", "scale", "zero", "offset")}
    wide = replace(
        grid, **{name: part.double() for name, part in parts.items() if part is not None}
    )
    return value_of(codes, wide), wide


def value_of(codes: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """What codes (rows, in) stand for."""
    rows = torch.arange(len(codes))[:, None]
    return every_value(grid)[rows, grid.groups, codes.long()]


def assert_textbook(packed: Packed, strength: float, seed: int) -> None:
    weight, grid = some_rows(packed)
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(RANK, weight.shape[1], generator=generator).double()
    delta = torch.randn(len(weight), RANK, generator=generator).double() @ down
    target = weight + delta * (RATIO * weight.norm() / delta.norm())
    basis = rounding.row_space([down])
    H = torch.eye(weight.shape[1]).double() + strength * basis @ basis.T
    book = gptq(target, every_value(grid), grid.groups, H)
    codes = rounding.round_adaptive(
        target, grid, rounding.feedback(basis, torch.float64, strength)
    ).codes
    assert not torch.equal(book.values, nearest_values(target, grid))  # feedback has a say
    assert_same_but_for_ties(value_of(codes, grid), book)


def nearest_values(target: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    values = every_value(grid)[:, grid.groups].flatten(0, 1)
    return nearest(target.flatten(), values)[0].view(target.shape)


def assert_same_but_for_ties(found: torch.Tensor, book: Book) -> None:
    """A row may differ from where a value was in the middle of two, and rows that do are rare."""
    differs = found != book.values
    rows = differs.any(1)
    first = differs.int().argmax(1)
    margins = book.margin.gather(1, first[:, None])[rows, 0]
    assert bool((margins < TIE).all()), margins
    assert int(rows.sum()) <= len(found) // 16


@pytest.fixture(autouse=True)
def one_column_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "BLOCKS", ((1, 0),))


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_recorded_layouts(layout: str, strength: float) -> None:
    found = packed_of(QUANTISED / layout)
    assert found
    for seed, packed in enumerate(found.values()):
        assert_textbook(packed, strength, seed)


@pytest.fixture(scope="module", params=KINDS)
def bitsandbytes_layers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Packed]:
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("base")
    return packed_of(quantised_base(TINY, folder, request.param))


@pytest.mark.parametrize("strength", STRENGTHS)
def test_bitsandbytes(bitsandbytes_layers: Mapping[str, Packed], strength: float) -> None:
    layers = [packed for name, packed in bitsandbytes_layers.items() if ".layers.0." in name]
    assert len(layers) == 7
    for seed, packed in enumerate(layers):
        assert_textbook(packed, strength, seed)
