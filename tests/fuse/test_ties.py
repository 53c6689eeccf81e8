"""What a config leaves unsaid, and two runs to one output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fuse.models import error, fuse
from peft_cases import CASES, logits, peft_forward

from adaptmerge.errors import OutputError
from adaptmerge.files.staging import Staging
from adaptmerge.runtime import load_model


def test_a_config_that_leaves_out_its_default_tie(tmp_path: Path) -> None:
    """GPT-2's class ties head and embedding, and older configs do not say so."""
    case = CASES["conv1d_gpt2"]
    base = case.save_base(tmp_path / "base")
    adapter = case.build(tmp_path / "a", seed=1, target_modules=["wte", "c_attn"])
    config = json.loads((base / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (base / "config.json").write_text(json.dumps(config))
    fuse(base, [adapter], tmp_path / "out")
    plain = logits(case.make_model(), case.example_inputs())
    wanted = peft_forward(case, adapter)
    assert float((wanted - plain).norm()) > 0.1 * float(plain.norm())
    found = logits(load_model(tmp_path / "out"), case.example_inputs())
    assert error(found, wanted, plain) < 1e-5
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["tie_word_embeddings"] is False


def test_another_plan_may_not_write_the_same_output(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with Staging(target, force=False, inputs=[], key="one") as first:
        with pytest.raises(OutputError, match="another run"):
            Staging(target, force=False, inputs=[], key="two")
        first.discard()


def test_an_output_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with Staging(target, force=False, inputs=[], key="one") as staging:
        staging.path("config.json").write_text("{}")
        target.mkdir()
        (target / "mine").touch()
        with pytest.raises(OutputError, match="exists"):
            staging.commit("config.json")
        staging.discard()
    assert [path.name for path in target.iterdir()] == ["mine"]


def test_a_lone_file_by_any_name_becomes_a_model_that_loads(tmp_path: Path) -> None:
    case = CASES["plain"]
    base = case.save_base(tmp_path / "base")
    (base / "model.safetensors").rename(base / "weights.safetensors")
    adapter = case.build(tmp_path / "a", seed=1)
    fuse(base / "weights.safetensors", [adapter], tmp_path / "out")
    plain = logits(case.make_model(), case.example_inputs())
    found = logits(load_model(tmp_path / "out"), case.example_inputs())
    assert error(found, peft_forward(case, adapter), plain) < 1e-5
