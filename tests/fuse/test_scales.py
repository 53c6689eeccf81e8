"""What --scales does, on layers whose values are computed by the definition of their format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import samples
import torch
from fuse.layers import FILE, MODULE, gaussian, heavy_tailed, layer, stored, with_lora
from fuse.made_models import quantised_base
from fuse.test_layouts import FOLDER, LAYOUTS
from safetensors.torch import load_file
from torch import Tensor

from adaptmerge import verify as library
from adaptmerge.base import open_base
from adaptmerge.errors import CannotMerge, UsageError
from adaptmerge.fuse import FuseOptions, fuse, matrix
from adaptmerge.fuse.scales import Rows
from adaptmerge.fuse.solving import _least_change
from adaptmerge.grids import BlockGrid
from adaptmerge.inputs import InputSpec
from adaptmerge.quantised import view_of

ROWS, COLUMNS, RANK, BLOCK = 256, 4096, 16, 64


@pytest.fixture(scope="module")
def nf4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layer(tmp_path_factory.mktemp("base") / "nf4", "nf4", ROWS, COLUMNS)


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layer(tmp_path_factory.mktemp("base") / "int8", "int8", ROWS, COLUMNS)


@pytest.mark.parametrize("ratio", [1e-3, 1e-2])
def test_scales_alone_take_up_an_adapter(ratio: float, nf4: Path, tmp_path: Path) -> None:
    found = with_lora(nf4, tmp_path, ratio, RANK, scales="only")
    before, after = stored(nf4), stored(tmp_path / "out")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"weight.absmax"}
    blocks = COLUMNS / BLOCK
    assert found.sub < 1e-5
    # derived for Gaussian weights: the least that any scales can do
    assert found.frob == pytest.approx((BLOCK * blocks / (blocks - RANK)) ** 0.5, rel=0.02)
    loss = found.report.adapters["a"]
    assert loss.gain == pytest.approx(1, abs=1e-4)
    (site,) = found.report.sites
    assert site.moved == 0
    assert site.error == pytest.approx(float(found.error.norm()), rel=1e-3)


def test_codes_stay_in_a_whole_model(fixtures: Path, tmp_path: Path) -> None:
    """With two blocks a row in a model so small, which take up two directions of sixteen: most is lost."""
    base = quantised_base(fixtures / "tinyllama" / "base", tmp_path / "base", "nf4")
    adapter = fixtures / "tinyllama" / "lora-r16-rslora-qv-perl"
    spec = [InputSpec(str(adapter), "a", 0.1)]
    with pytest.raises(CannotMerge, match="rounding leaves"):
        fuse(str(base), spec, tmp_path / "out", FuseOptions(scales="only"))
    options = FuseOptions(scales="only", allow=frozenset({"loss"}))
    report = fuse(str(base), spec, tmp_path / "out", options)
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[2] for name in moved} == {"absmax"}
    assert len(moved) == len(report.sites) == 8
    questions = library.Questions(str(base), {"a": str(adapter)}, "cpu")
    verdict = library.verify(tmp_path / "out", questions)
    assert {c.name: c.status for c in verdict.checks}["files"] == library.PASS


REFUSED = {"ct-fp8", "ct-fp8-block", "ct-fp8-channel", "ct-int8", "ct-int8-asymmetric", "ct-mixed"}
REFUSED |= {"ct-mxfp4", "ct-mxfp8", "ct-w4a8", "ct-w8a8", "ct-w8a8-asymmetric", "fp8-block"}
REFUSED |= {
    "fp8-block-ue8m0",
    "hqq-1bit-straddling",
    "hqq-8bit-rows",
    "torchao-int8-rows",
    "gptq-v1-8bit",
}


@pytest.mark.parametrize("layout", sorted({*LAYOUTS, "hqq-1bit-straddling"}))
def test_codes_stay_in_every_layout(layout: str, tmp_path: Path) -> None:
    base = FOLDER / layout
    packed = view_of(open_base(str(base))).packed
    sides = {
        one.module: (torch.ones(1, one.shape[1]), 1e-3 * torch.ones(one.shape[0], 1))
        for one in packed.values()
    }
    adapter = samples.write(tmp_path / "adapter", sides)
    options = FuseOptions(scales="only", allow=frozenset({"loss", "base"}))
    work = partial(fuse, str(base), [InputSpec(str(adapter), "a")], tmp_path / "out", options)
    if layout in REFUSED:
        with pytest.raises(CannotMerge, match="scales that cannot take up"):
            work()
        return
    work()
    before, after = tensors_in(base), tensors_in(tmp_path / "out")
    codes = {next(iter(one.tensors)) for one in packed.values()}
    assert all(torch.equal(before[name], after[name]) for name in codes)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All stored tensors, as bytes."""
    files = [path for path in folder.glob("*.safetensors") if path.name != "expected.safetensors"]
    tensors = {name: value for path in files for name, value in load_file(path).items()}
    return {name: value.reshape(-1).view(torch.uint8) for name, value in tensors.items()}


def test_scales_that_are_not_free(int8: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotMerge, match="scales that cannot take up") as caught:
        with_lora(int8, tmp_path, 1e-2, RANK, scales="only")
    assert MODULE in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_scales_alone_round_nothing(nf4: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave out --rounding nearest"):
        with_lora(nf4, tmp_path, 1e-2, RANK, scales="only", rounding="nearest")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("ratio", [1e-2, 1.0])
def test_fitted_scales_make_no_row_worse(
    kind: str, ratio: float, nf4: Path, int8: Path, tmp_path: Path
) -> None:
    base = nf4 if kind == "nf4" else int8
    fitted = with_lora(base, tmp_path / "fit", ratio, RANK, scales="fit")
    kept = with_lora(base, tmp_path / "keep", ratio, RANK, scales="keep")
    basis = torch.linalg.qr(kept.down.T).Q
    for one, other in ((fitted.error, kept.error), (fitted.error @ basis, kept.error @ basis)):
        assert bool((one.norm(dim=1) <= 1.0001 * other.norm(dim=1) + 1e-6).all())
    scale = "SCB" if kind == "int8" else "weight.absmax"
    assert torch.equal(stored(tmp_path / "keep" / "out")[scale], stored(base)[scale])
    assert not torch.equal(stored(tmp_path / "fit" / "out")[scale], stored(base)[scale])
    assert fitted.frob < kept.frob
    if ratio == 1.0:  # what is added reaches beyond the largest value of the old scales
        # 0.947 of it, and 1 where nothing is fitted: bits of sums decide codes, and move that by 1e-3
        assert fitted.frob < 0.97 * kept.frob
        assert fitted.sub < 0.9 * kept.sub


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_scales_grow_where_the_sum_reaches_beyond_them(
    kind: str, nf4: Path, int8: Path, tmp_path: Path
) -> None:
    """A delta as large as half the weight: on the scales that are there its largest entries are cut off."""
    base = nf4 if kind == "nf4" else int8
    kept = with_lora(base, tmp_path / "kept", 0.5, scales="keep")
    solved = with_lora(base, tmp_path / "solved", 0.5)
    assert solved.frob < (0.95 if kind == "nf4" else 0.8) * kept.frob
    assert solved.sub <= kept.sub


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_that_grow_stay_as_wide_as_they_are_stored(dtype: torch.dtype, nf4: Path) -> None:
    """Wider ones would be rounded one by one, each with an R x R system per row: R^3 instead of R."""
    packed = next(iter(view_of(open_base(str(nf4))).packed.values()))
    whole = (0, packed.shape[0])
    codes, grid = packed.grid(whole)
    target = 2 * grid.values(codes, slice(0, packed.shape[1]), torch.empty(packed.shape)).to(dtype)
    rows = Rows(packed, whole, grid, target, torch.eye(packed.shape[1], 4, dtype=dtype))
    grown = rows.stretched(codes).grid.scale
    assert grown.dtype == grid.scale.dtype == torch.float32
    assert torch.allclose(grown, 2 * grid.scale)


NARROW = 256  # columns: four blocks a row, which cannot take up the errors in sixteen directions


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layer(tmp_path_factory.mktemp("base") / "narrow", "nf4", ROWS, NARROW)


@pytest.fixture
def feedback_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No exchange of codes afterwards, so that what scales do shows."""
    monkeypatch.setattr(Rows, "exchanges", lambda self, scales: False)


@pytest.mark.usefixtures("feedback_alone")
def test_scales_of_narrow_rows_follow_the_sum(narrow: Path, tmp_path: Path) -> None:
    """Where blocks shrink, too, their codes are finer: with those that grow alone the error is 0.94 of that
    with kept scales."""
    kept = with_lora(narrow, tmp_path / "kept", 0.3, RANK, scales="keep")
    solved = with_lora(narrow, tmp_path / "solved", 0.3, RANK)
    assert solved.frob < 0.93 * kept.frob
    assert solved.sub < kept.sub
    target = (solved.before + solved.delta).view(-1, BLOCK).abs().amax(1)
    before = stored(narrow)["weight.absmax"]
    after = stored(tmp_path / "solved" / "out")["weight.absmax"]
    shrinks = target < 0.95 * before
    assert 20 < int(shrinks.sum()) < len(before) / 2
    assert float((after < before)[shrinks].double().mean()) > 0.95
    assert float((after / target - 1).abs().median()) < 0.01


def test_a_scale_per_row_is_that_of_the_sum(tmp_path: Path) -> None:
    base = layer(tmp_path / "base", "int8", ROWS, NARROW)
    solved = with_lora(base, tmp_path, 0.1, RANK)
    target = (solved.before + solved.delta).abs().amax(1)
    assert float((target < stored(base)["SCB"]).double().mean()) > 0.4
    # codes reach from -128 to 127, and quantisation takes 127 at most
    after = stored(tmp_path / "out")["SCB"]
    assert float((after / target - 1).abs().max()) < 1.01 / 127


def test_nothing_added_changes_nothing(narrow: Path, tmp_path: Path) -> None:
    with_lora(narrow, tmp_path, 0.0, RANK)
    assert (tmp_path / "out" / FILE).read_bytes() == (narrow / FILE).read_bytes()


@pytest.mark.usefixtures("feedback_alone")
@pytest.mark.parametrize("piece", [1 << 20, 17 * 344])
def test_scales_of_blocks_across_rows(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of the sum, whether all rows are settled at once or some; the last block is short."""
    monkeypatch.setattr(matrix, "PIECE", piece)
    base = layer(tmp_path / "base", "nf4", 131, 344)
    kept = with_lora(base, tmp_path / "kept", 0.3, 8, scales="keep")
    solved = with_lora(base, tmp_path / "solved", 0.3, 8)
    flat = (solved.before + solved.delta).flatten()
    short = -len(flat) % BLOCK
    assert short > 0
    target = torch.nn.functional.pad(flat, (0, short)).view(-1, BLOCK).abs().amax(1)
    after = stored(tmp_path / "solved" / "out")["weight.absmax"].double()
    assert solved.sub < 0.9 * kept.sub
    assert solved.frob < 0.95 * kept.frob
    assert torch.allclose(after, target, rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stretched_grids_hold_the_sum(layout: str) -> None:
    """In every layout whose scales are free: as stored, with the zeros that are there."""
    for packed in view_of(open_base(str(FOLDER / layout))).packed.values():
        every = (0, packed.shape[0])
        codes, grid = packed.grid(every)
        if packed.nearest_scales(grid.scale, every) is None:
            continue
        values = grid.values(codes, slice(0, packed.shape[1]), torch.empty(packed.shape))
        rows = Rows(packed, every, grid, values, torch.eye(packed.shape[1])[:, : grid.blocks])
        assert torch.equal(rows.stretched(codes).grid.scale, grid.scale)
        noise = torch.randn(packed.shape, generator=torch.Generator().manual_seed(0))
        target = values + 0.3 * float(values.std()) * noise
        found = replace(rows, target=target).stretched(codes).grid
        assert found.zero is grid.zero
        assert found.offset is grid.offset
        slack = 2**-4 if "nvfp4" in layout else 2**-8  # what rounding a scale takes
        most = packed.nearest_scales(grid.scale * 1e9, every)
        assert most is not None
        full = (found.scale == most)[:, grid.groups]  # of a few bits, and the largest of them
        assert float(beyond(found, torch.where(full, values, target))) <= slack
        origin = torch.zeros(()) if grid.offset is None else grid.offset[:, grid.groups]
        halved = replace(rows, target=(values + origin) / 2).stretched(codes).grid
        assert torch.allclose(halved.scale, grid.scale / 2, rtol=slack, atol=1e-7)


def beyond(grid: BlockGrid, target: Tensor) -> Tensor:
    """The most that values lie beyond an end of their grid, over its reach, where scales move that end."""
    columns = slice(0, target.shape[1])
    first = torch.zeros(target.shape, dtype=torch.uint8)
    ends = [
        grid.values(codes, columns, torch.empty_like(target))
        for codes in (first, first + grid.count - 1)
    ]
    origin = torch.zeros(()) if grid.offset is None else grid.at(grid.offset, columns)
    reach = torch.stack([(end - origin).abs() for end in ends]).amax(0).clamp(min=1e-12)
    over = [(target - origin) / (end - origin) for end in ends]
    moved = [(end - origin).abs() > 1e-3 * reach for end in ends]
    return torch.stack([torch.where(m, o, 0.0) for m, o in zip(moved, over, strict=True)]).max() - 1


@pytest.mark.parametrize(
    ("blocks", "directions", "sketched"), [(5, 16, 0), (20, 4, 8), (64, 16, 0)]
)
def test_scales_solve_a_least_squares_problem(blocks: int, directions: int, sketched: int) -> None:
    """As torch.linalg.lstsq solves it, the ridge written out as rows; by either side of the system."""
    random = torch.Generator().manual_seed(blocks)
    along = torch.randn(6, blocks, sketched + directions, generator=random, dtype=torch.float64)
    state = torch.randn(6, sketched + directions, generator=random, dtype=torch.float64)
    ridge = torch.cat([torch.ones(sketched), torch.full((directions,), 1e-4)]).double()
    found = _least_change(along, ridge, state)
    for row in range(6):
        weighted = along[row].T / ridge.sqrt()[:, None]
        system = torch.cat([torch.eye(blocks, dtype=torch.float64), weighted])
        wanted = torch.cat([torch.zeros(blocks), state[row] / ridge.sqrt()])
        best = torch.linalg.lstsq(system, wanted[:, None]).solution[:, 0]
        assert torch.allclose(found[row], best, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("drawn", [gaussian, heavy_tailed])
def test_scales_of_eight_bits_lose_little_of_an_adapter(
    drawn: Callable[..., Tensor], tmp_path: Path
) -> None:
    """The coarsest are rounded first, and finer ones make up for them: in the order of columns the error
    was 5e-3, and 2e-2 of heavy-tailed values, whose largest block makes the grid of 256 coarse."""
    base = layer(tmp_path / "base", "nf4,double", ROWS, COLUMNS, drawn)
    found = with_lora(base, tmp_path, 1e-2, RANK)
    assert float(found.delta.norm()) > 0
    assert found.sub < (3e-3 if drawn is gaussian else 6e-3)
