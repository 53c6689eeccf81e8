"""The test adapters themselves: each changes the outputs, reproducibly, as its name says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft_cases import CASES, PeftCase, logits, peft_forward
from safetensors import safe_open
from safetensors.torch import load_file

every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def keys(adapter: Path) -> set[str]:
    return set(load_file(adapter / "adapter_model.safetensors"))


@every_case
def test_effect_is_not_zero(case: PeftCase, tmp_path: Path) -> None:
    y_base = logits(case.make_model(), case.example_inputs())
    y = peft_forward(case, case.build(tmp_path, seed=1))
    assert y.dtype == torch.float32
    assert 1e-3 < (y - y_base).norm() / y_base.norm() < 10


@every_case
def test_seed_decides_the_values(case: PeftCase, tmp_path: Path) -> None:
    folders = [case.build_anew(tmp_path / str(i), seed) for i, seed in enumerate((1, 1, 2))]
    one, same, other = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert one.keys() == same.keys() == other.keys()
    assert all(torch.equal(one[key], same[key]) for key in one)
    trained = [key for key in one if ".base_layer.weight" not in key]
    assert not any(torch.equal(one[key], other[key]) for key in trained)
    assert all(tensor.any() for tensor in one.values())


@every_case
def test_alpha_is_not_rank(case: PeftCase, tmp_path: Path) -> None:
    config = json.loads((case.build(tmp_path, seed=1) / "adapter_config.json").read_text())
    assert config["lora_alpha"] != config["r"] == 4


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert"])
def test_saved_base_is_the_model(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    case = next(case for case in CASES.values() if case.family == family)
    auto = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
    loaded = auto.from_pretrained(case.save_base(tmp_path)).eval()
    inputs, model = case.example_inputs(), case.make_model()
    state = loaded.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    # mapped weights lie at other addresses, where kernels sum in another order: 2^-24 sqrt(96), 20 layers
    wanted = logits(model, inputs)
    assert (logits(loaded, inputs) - wanted).norm() < 1e-5 * wanted.norm()


def test_saved_convolutions_are_the_model(tmp_path: Path) -> None:
    case = CASES["conv2d"]
    saved = load_file(case.save_base(tmp_path) / "model.safetensors")
    state = case.make_model().state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], state[key]) for key in saved)


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("lora_bias", "q_proj.lora_B.bias"),
        ("bias_lora_only", "q_proj.base_layer.bias"),
        ("bias_all", "k_proj.bias"),
        ("bias_all_gpt2", "ln_1.bias"),
        ("embedding", "embed_tokens.lora_embedding_A"),
        ("dora", "q_proj.lora_magnitude_vector"),
        ("head_llama", "lm_head.weight"),
        ("head_bert", "classifier.bias"),
        ("tokens", "token_adapter.trainable_tokens_delta"),
    ],
)
def test_holds_what_its_name_says(name: str, fragment: str, tmp_path: Path) -> None:
    assert any(fragment in key for key in keys(CASES[name].build(tmp_path, seed=1)))


def test_layer_subset_leaves_layer_0_alone(tmp_path: Path) -> None:
    assert not any("layers.0." in key for key in keys(CASES["layer_subset"].build(tmp_path, 1)))


def test_bf16_is_stored_as_bf16(tmp_path: Path) -> None:
    path = CASES["bf16"].build(tmp_path, seed=1) / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118


def test_overrides_reach_the_config(tmp_path: Path) -> None:
    adapter = CASES["plain"].build(tmp_path, seed=1, rank=2, target_modules=["k_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert all("k_proj" in key for key in tensors)
    assert {tensor.shape for tensor in tensors.values()} == {(2, 64), (32, 2)}
