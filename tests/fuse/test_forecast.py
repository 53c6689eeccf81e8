"""What a dry run foresees of fusing into a quantised base, against what is then measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import samples
import torch
from click.testing import CliRunner
from fuse.layers import MODULE, Fused, gaussian, layer, values, with_lora

from adaptmerge.cli import main
from adaptmerge.commands.fuse import FuseOptions, fuse, plan_fusion, predict
from adaptmerge.commands.fuse.forecast import Expected, expected
from adaptmerge.commands.fuse.report import percent
from adaptmerge.formats.inputs import InputSpec


@pytest.fixture(scope="module", params=["int8", "nf4"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layer(tmp_path_factory.mktemp("base") / request.param, request.param, 512, 2048)


def foreseen(base: Path, adapters: dict[str, Path], scales: str) -> dict[str, Expected]:
    specs = [InputSpec(str(path), name, 1.0) for name, path in adapters.items()]
    options = FuseOptions(scales=scales, allow=frozenset({"base", "loss"}))
    plan = plan_fusion(str(base), specs, options)
    (line,) = predict(plan)
    return dict(zip(adapters, expected(line, scales, plan.running), strict=True))


@pytest.mark.parametrize("ratio", [1e-3, 1e-2])
@pytest.mark.parametrize("rank", [8, 16, 32])
def test_sub_is_foreseen_within_a_factor_of_two(
    base: Path, ratio: float, rank: int, tmp_path: Path
) -> None:
    found: Fused = with_lora(base, tmp_path, ratio, rank, scales="keep")
    said = foreseen(base, {"a": tmp_path / "adapter"}, "keep")["a"]
    assert said.ratio == pytest.approx(ratio, rel=0.1)
    assert said.sub is not None
    assert 0.5 < said.sub / found.sub < 2


def test_floor_is_that_of_weights_in_16_bits(base: Path, tmp_path: Path) -> None:
    """The values themselves, rounded to bfloat16 as a layer does it when it runs."""
    found = with_lora(base, tmp_path, 1e-2, 16)
    said = foreseen(base, {"a": tmp_path / "adapter"}, "solve")["a"]
    error = found.after.float().bfloat16().double() - found.after
    basis = torch.linalg.qr(found.down.T).Q
    assert said.floor == pytest.approx(float((error @ basis).norm() / found.delta.norm()), rel=0.15)
    assert said.floor == pytest.approx(found.report.adapters["a"].floor, rel=0.1)


def test_each_of_two_adapters_has_its_own(base: Path, tmp_path: Path) -> None:
    size = float(values(base).norm())
    adapters = {}
    for seed, (name, ratio, rank) in enumerate((("a", 1e-2, 4), ("b", 2e-3, 16))):
        down, up = gaussian(rank, 2048, seed=9 + seed), gaussian(512, rank, seed=19 + seed)
        up *= ratio * size / (2 * float((up @ down).norm()))
        adapters[name] = samples.write(tmp_path / name, {MODULE: (down, up)})
    said = foreseen(base, adapters, "keep")
    specs = [InputSpec(str(path), name, 1.0) for name, path in adapters.items()]
    options = FuseOptions(scales="keep", allow=frozenset({"base", "loss"}))
    report = fuse(str(base), specs, tmp_path / "out", options)
    for name, loss in report.adapters.items():
        one = said[name].sub
        assert one is not None and loss.sub is not None
        assert 0.5 < one / loss.sub < 2


def test_what_scales_take_up_is_not_foreseen(base: Path, tmp_path: Path) -> None:
    """NF4 has a scale per 64 columns, int8 one a row."""
    with_lora(base, tmp_path, 1e-2, 16)
    said = foreseen(base, {"a": tmp_path / "adapter"}, "solve")["a"]
    assert (said.sub is None) == (base.name == "nf4")


def test_a_dry_run_shows_it(base: Path, tmp_path: Path) -> None:
    with_lora(base, tmp_path, 1e-2, 16)
    command = ["fuse", str(base), str(tmp_path / "adapter"), "--scales", "keep", "--dry-run"]
    command += ["--allow", "base"]
    shown = CliRunner().invoke(main, command).output
    data = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    (one,) = data["plan"][0]["expected"]
    assert one.keys() == {"ratio", "sub", "floor"}
    assert percent(one["sub"]) in shown
    assert percent(one["floor"]) in shown
