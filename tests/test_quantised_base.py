"""Adapters merged and verified on a base that is quantised: what its weights stand for counts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from fuse.made_models import quantised_base
from oracles import llama_cpp
from safetensors.torch import load_file, save_file

from adaptmerge.commands import verify as library
from adaptmerge.commands.combine import Options, combine
from adaptmerge.formats.inputs import InputSpec
from adaptmerge.schemes.view import open_values

TINY = Path(__file__).parents[1] / "fixtures" / "tinyllama"
DORA, LORA = TINY / "lora-r4-dora-embed-cheaders", TINY / "lora-r8-perl"


@pytest.fixture(scope="module", params=["nf4", "gguf"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    if request.param == "nf4":
        return quantised_base(TINY / "base", folder / "nf4", "nf4")
    pytest.importorskip("gguf")
    return llama_cpp.model(TINY / "base", folder / "model.gguf", "Q8_0")


def plain(base: Path, folder: Path) -> Path:
    """The model with the same values in float32, as `transformers` stores it."""
    shutil.copytree(TINY / "base", folder)
    tensors = {name: ref.read().float() for name, ref in open_values(str(base)).tensors.items()}
    assert tensors.keys() == load_file(TINY / "base" / "model.safetensors").keys()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_sum_that_needs_the_base(base: Path, tmp_path: Path) -> None:
    """A DoRA's norms are those of the weights that the quantised model computes with."""
    specs = [InputSpec(str(DORA), "dora", 0.5), InputSpec(str(LORA), "lora", 0.5)]
    other = plain(base, tmp_path / "plain")
    for name, source in (("here", base), ("there", other), ("wrong", TINY / "base")):
        combine(specs, tmp_path / name, Options(base=str(source), heads="drop"))
    here, there, wrong = (
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("here", "there", "wrong")
    )
    assert here.keys() == there.keys() == wrong.keys()
    assert all(torch.allclose(here[k], there[k], rtol=1e-5, atol=1e-7) for k in here)
    assert any(not torch.allclose(here[k], wrong[k], rtol=1e-5, atol=1e-7) for k in here)


def test_verify_runs_what_the_weights_stand_for(base: Path, tmp_path: Path) -> None:
    combine([InputSpec(str(LORA), "lora", 0.5)], tmp_path / "out", Options(base=str(base)))
    questions = library.Questions(str(base), {"lora": str(LORA)}, "cpu")
    checks = {
        check.name: check.status for check in library.verify(tmp_path / "out", questions).checks
    }
    assert checks["forward"] == "pass"
    assert checks["base"] == "pass"
    assert "fail" not in checks.values()
