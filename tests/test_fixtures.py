"""The checked-in fixtures: complete, small, and recorded from the bases that lie beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
RECORDED = FIXTURES / "recorded"
ADAPTERS = sorted(
    path.parent.relative_to(FIXTURES).as_posix()
    for path in FIXTURES.rglob("adapter_config.json")
    if (RECORDED / path.relative_to(FIXTURES).parts[0]).is_dir()
)
every_adapter = pytest.mark.parametrize("name", ADAPTERS)


def test_there_are_adapters() -> None:
    assert len(ADAPTERS) >= 17


@every_adapter
def test_recording_shows_an_effect(name: str) -> None:
    recording = load_file(RECORDED / f"{name}.safetensors")
    assert recording.keys() == {"input_ids", "y_base", "y"}
    y_base = recording["y_base"]
    effect = (recording["y"][:, -y_base.shape[1] :] - y_base).norm() / y_base.norm()
    assert 1e-2 < effect < 2
    versions = json.loads((RECORDED / name.split("/")[0] / "versions.json").read_text("utf-8"))
    assert {"torch", "transformers"} < versions.keys()


@pytest.mark.parametrize("base", sorted({str(Path(name).parent) for name in ADAPTERS}))
def test_base_computes_what_was_recorded(base: str) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    auto = AutoModelForCausalLM if base == "tinyllama" else AutoModel
    model = auto.from_pretrained(FIXTURES / base / "base", dtype=torch.float32).eval()
    recording = load_file(next((RECORDED / base).glob("*.safetensors")))
    with torch.no_grad():
        y_base = model(recording["input_ids"])[0]
    torch.testing.assert_close(y_base, recording["y_base"], rtol=1e-4, atol=1e-5)


def test_fixtures_stay_small() -> None:
    assert sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()) < 25e6
