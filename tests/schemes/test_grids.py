"""Cells of a grid: the codes that a search gives, and a sentence for what is in none of them."""

from __future__ import annotations

import pytest
import torch

from adaptmerge.errors import InputError
from adaptmerge.schemes.grids import cells_of

POINTS = torch.tensor([-0.75, -0.25, 0.25, 0.8])


def test_codes_of_cells_are_those_of_a_search() -> None:
    cells = cells_of(POINTS)
    assert cells is not None
    values = torch.cat([torch.linspace(-2, 2, 999), POINTS, torch.tensor([torch.inf, -torch.inf])])
    assert torch.equal(cells.nearest(values), torch.bucketize(values, POINTS).to(torch.uint8))


def test_what_overflowed_is_in_no_cell() -> None:
    cells = cells_of(POINTS)
    assert cells is not None
    with pytest.raises(InputError, match="so large that rounding them overflows"):
        cells.nearest(torch.tensor([0.5, torch.nan]))
