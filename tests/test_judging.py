"""No verdict passes on what is not a number: every check judges an error by one function."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from console import run
from safetensors.torch import load_file, save_file

from adaptmerge.commands.verify.audit import Loss
from adaptmerge.commands.verify.checks import FAIL, PASS, UNDECIDABLE, within
from adaptmerge.commands.verify.forward import Comparison, compare, judge
from adaptmerge.commands.verify.fused.model import _judge
from adaptmerge.outputs.report import SiteLine
from adaptmerge.tensors.dtypes import F32

BAD = [math.nan, math.inf]
RIGHT = Comparison(0.0, 0.0, 0.5, 1e-5, 0.0, 1.0)
LINE = SiteLine("s", "s", "weight", "add", "fit", {}, {}, 1, 1.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("found", [*BAD, -math.inf, 2.0])
def test_an_error_passes_only_as_a_number_that_is_allowed(found: float) -> None:
    assert within(0.5, 1.0)
    assert within(1.0, 1.0)
    assert not within(found, 1.0)


@pytest.mark.parametrize("allowed", BAD)
def test_nothing_is_within_what_is_no_number(allowed: float) -> None:
    assert not within(0.5, allowed)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["error", "tolerance", "effect"])
def test_no_comparison_of_outputs_passes(name: str, value: float) -> None:
    assert {part.name for part in fields(Comparison)} >= {name}
    wrong = replace(RIGHT, **{name: value})
    assert judge("forward", RIGHT).status == PASS
    assert _judge(RIGHT, 0.0, 1.0).status == PASS
    if not (name == "effect" and value == math.inf):
        assert judge("forward", wrong).status != PASS
        assert _judge(wrong, 0.0, 1.0).status != PASS


@pytest.mark.parametrize("value", BAD)
def test_no_fused_model_passes_by_unknown_noise_or_share(value: float) -> None:
    assert _judge(RIGHT, value, 1.0).status != PASS
    assert _judge(RIGHT, 0.0, value).status != PASS


def test_outputs_that_are_nan_fail() -> None:
    y = torch.randn(1, 3, 5)
    found = judge("forward", compare(y * math.nan, y, torch.zeros_like(y), F32))
    assert found.status == FAIL


@pytest.mark.parametrize("value", BAD)
def test_what_a_site_lost_is_never_nothing(value: float) -> None:
    assert Loss(LINE, 0.5, 1.0, 1.0, capped=False).excess == 0.0
    assert Loss(LINE, value, 1.0, 1.0, capped=False).excess == math.inf
    assert Loss(LINE, 0.5, 1.0, value, capped=False).excess == 0.5


@pytest.mark.parametrize(("bad", "reported"), [(math.nan, True), (math.inf, False)])
def test_a_fused_model_with_a_bad_weight_fails(
    bad: float, reported: bool, fixtures: Path, tmp_path: Path
) -> None:
    tiny, out = fixtures / "tinyllama", tmp_path / "fused"
    adapter, base = str(tiny / "lora-r8-perl"), str(tiny / "base")
    assert run("fuse", base, adapter, "--dtype", "bf16", "-o", str(out)).code == 0
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = bad
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    more = ["--input", f"lora-r8-perl={adapter}"]
    if not reported:
        (out / "adaptmerge.json").unlink()
        more = ["--adapter", adapter]
    found = run("verify", str(out), "--base", base, "--json", *more)
    assert found.code == 3, found.shown
    status = {c["name"]: c["status"] for c in json.loads(found.stdout)["checks"]}
    assert status["weights"] == "fail"
    assert status["forward"] in ("fail", "undecidable")


def test_an_adapter_of_idle_modules_is_not_judged() -> None:
    """As of a vision tower beside text alone: nothing was seen of it, right or wrong."""
    same = torch.ones(1, 2, 3)
    found = judge("forward", compare(same, same, same, F32), idle=True)
    assert found.status == UNDECIDABLE
    assert "takes part" in found.detail
    assert judge("forward", compare(same, same, same, F32)).status == FAIL
