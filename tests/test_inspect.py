"""`inspect --base` says whether an adapter acts on that base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from console import run
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent / "fixtures/tinyllama"
BASE = str(ROOT / "base")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def lora(path: Path, *modules: str, outputs: int = 128) -> Path:
    path.mkdir()
    pairs = {
        f"base_model.model.{module}.lora_{side}.weight": torch.ones(shape)
        for module in modules
        for side, shape in {"A": (2, 128), "B": (outputs, 2)}.items()
    }
    save_file(pairs, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    return path


def test_all_modules_fit_their_own_base() -> None:
    said = run("inspect", str(ROOT / "lora-r8-shakespeare"), "--base", BASE).stdout
    assert "28 of 28 modules fit the base base" in said


@pytest.mark.parametrize(
    ("module", "outputs", "why"),
    [
        ("transformer.blocks.0.attn.wq", 128, "is not in the base base"),
        ("model.layers.7.self_attn.q_proj", 128, "is not in the base base"),
        ("model.layers.0.self_attn.q_proj", 64, "but the base base has [128, 128]"),
    ],
)
def test_what_does_not_fit_is_said(module: str, outputs: int, why: str, tmp_path: Path) -> None:
    path = lora(tmp_path / "other", module, outputs=outputs)
    outcome = run("inspect", str(path), "--base", BASE)
    assert outcome.code == 0
    assert "0 of 1 modules fit" in outcome.stdout
    assert why in " ".join(outcome.stdout.split())


def test_a_part_that_fits_is_counted_and_the_rest_shown_in_short(tmp_path: Path) -> None:
    q = "model.layers.{}.self_attn.q_proj"
    path = lora(tmp_path / "deep", *(q.format(layer) for layer in range(9)))
    outcome = run("inspect", str(path), "--base", BASE)
    assert "4 of 9 modules fit" in outcome.stdout
    assert "and 2 more" in outcome.stdout
    (found,) = json.loads(run("inspect", str(path), "--base", BASE, "--json").stdout)
    assert (found["fit"]["found"], found["fit"]["modules"]) == (4, 9)
    assert len(found["fit"]["problems"]) == 5


def test_scales_of_modules_that_are_absent_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "ia3"
    path.mkdir()
    key = "base_model.model.model.layers.7.self_attn.k_proj.ia3_l"
    save_file({key: torch.ones(64, 1)}, path / WEIGHTS)
    config = {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []}
    (path / CONFIG).write_text(json.dumps(config))
    said = run("inspect", str(path), "--base", BASE).stdout
    assert "0 of 1 modules fit" in said
    assert "is not in the base" in said


def test_scales_count_once_though_they_act_on_biases_too(tmp_path: Path) -> None:
    """T5 has no biases: what is counted is what PEFT trains."""
    path = tmp_path / "ia3"
    path.mkdir()
    keys = [
        f"base_model.model.{side}.block.{n}.layer.0.SelfAttention.k.ia3_l"
        for side in ("encoder", "decoder")
        for n in range(12)
    ]
    save_file({key: torch.ones(32, 1) for key in keys}, path / WEIGHTS)
    config = {"peft_type": "IA3", "target_modules": ["k"], "feedforward_modules": []}
    (path / CONFIG).write_text(json.dumps(config))
    said = run("inspect", str(path)).stdout
    assert "768 parameters in 24 sites" in said
    assert "bias" not in said
    assert said.count("block.*.layer.0.SelfAttention.k") == 2
    assert "\nblocks 0-11\n" in said
    (found,) = json.loads(run("inspect", str(path), "--json").stdout)
    assert [family["numbers"] for family in found["families"]] == 2 * [{"blocks": "0-11"}]


def test_experts_are_grouped_as_experts(tmp_path: Path) -> None:
    module = "model.layers.{}.mlp.experts.{}.up_proj"
    path = lora(tmp_path / "moe", *(module.format(n, e) for n in range(3) for e in range(3)))
    said = run("inspect", str(path)).stdout
    assert said.count("up_proj") == 1
    assert "\nlayers 0-2\nexperts 0-2\n" in said


def test_numbers_that_are_missing_show(tmp_path: Path) -> None:
    q, v = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.v_proj"
    modules = [*(q.format(n) for n in (0, 1, 2, 7)), *(v.format(n) for n in (1, 2))]
    said = run("inspect", str(lora(tmp_path / "some", *modules))).stdout
    assert "layers 0-2, 7 of self_attn.q_proj\nlayers 1-2 of self_attn.v_proj\n" in said


def test_a_number_that_is_always_the_same_stays(tmp_path: Path) -> None:
    said = run("inspect", str(lora(tmp_path / "one", "model.layers.5.self_attn.q_proj"))).stdout
    assert "model.layers.5.self_attn.q_proj" in said
    assert "2 parameters in 1 site\n" in said


@pytest.mark.parametrize(
    ("module", "likely"),
    [
        ("base.lm.model.layers.0.self_attn.q_proj", "base.lm.* of the adapter seems to be * of"),
        ("llm.layers.0.self_attn.q_proj", "llm.* of the adapter seems to be model.* of the base"),
    ],
)
def test_the_likely_prefix_is_said(module: str, likely: str, tmp_path: Path) -> None:
    said = run("inspect", str(lora(tmp_path / "a", module)), "--base", BASE).stdout
    assert "0 of 1 modules fit" in said
    assert likely in said


def test_no_prefix_is_made_up(tmp_path: Path) -> None:
    path = lora(tmp_path / "a", "transformer.blocks.0.attn.wq")
    assert "seems" not in run("inspect", str(path), "--base", BASE).stdout
