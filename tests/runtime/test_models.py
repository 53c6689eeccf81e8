"""Loading, running and streaming base models, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import CASES
from safetensors.torch import load_file, save_file
from torch import nn

from adaptmerge.bases.open import open_base
from adaptmerge.errors import InputError
from adaptmerge.files.listing import Listing
from adaptmerge.formats.format import ReadOptions
from adaptmerge.formats.peft import read
from adaptmerge.runtime import attach, example_inputs, load_model, outputs_of, stream_model
from adaptmerge.runtime.stream import Streaming


@pytest.fixture
def base_dir(tmp_path: Path, fixtures: Path) -> Path:
    """A copy of a tiny base that a test may spoil."""
    folder: Path = shutil.copytree(fixtures / "adapterhub" / "llama" / "base", tmp_path / "base")
    return folder


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def inputs_for(folder: Path) -> dict[str, torch.Tensor]:
    return example_inputs(json.loads((folder / "config.json").read_text()))


def test_loads_the_named_class_eager_and_in_eval_mode(fixtures: Path) -> None:
    model: Any = load_model(fixtures / "tinyllama" / "base", dtype="bfloat16")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config._attn_implementation == "eager"
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_says_nothing_while_loading(fixtures: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(fixtures / "tinyllama" / "base")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("architectures", [None, [], ["LlamaFromSomewhere"], ["logging"]])
def test_falls_back_to_the_causal_language_model(architectures: Any, fixtures: Path) -> None:
    from adaptmerge.bases.classes import model_class
    from adaptmerge.runtime.models import model_config

    config = model_config(fixtures / "tinyllama" / "base")
    config.architectures = architectures
    assert model_class(config).__name__ == "LlamaForCausalLM"


def test_names_missing_weights(base_dir: Path) -> None:
    change_weights(base_dir, lambda tensors: tensors.pop("layers.0.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"lacks 1 weights of LlamaModel.*mlp\.up_proj\.weight"):
        load_model(base_dir)
    with pytest.raises(InputError, match=r"1 weights of LlamaModel are not.*mlp\.up_proj"):
        stream_model(open_base(str(base_dir)))


def test_refuses_remote_code(base_dir: Path) -> None:
    change_config(base_dir, auto_map={"AutoModel": "modeling_mine.MyModel"})
    for load in (load_model, lambda folder: stream_model(open_base(str(folder)))):
        with pytest.raises(InputError, match="asks for remote code"):
            load(base_dir)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"model_type": "unheard-of"}, "cannot be loaded"), ({"hidden_size": 48}, "cannot be loaded")],
)
def test_failures_are_one_sentence(values: dict[str, Any], message: str, base_dir: Path) -> None:
    change_config(base_dir, **values)
    with pytest.raises(InputError, match=message) as caught:
        load_model(base_dir)
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)


def test_refuses_what_is_no_model(tmp_path: Path, fixtures: Path) -> None:
    with pytest.raises(InputError, match="expected config.json"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(fixtures / "tinyllama" / "base", device="nowhere")
    with pytest.raises(InputError, match="no dtype is named 'float3'"):
        load_model(fixtures / "tinyllama" / "base", dtype="float3")


def test_example_inputs_are_seeded_and_fit_the_config() -> None:
    config = {"vocab_size": 10, "pad_token_id": 3, "max_position_embeddings": 12}
    one, same, other = (example_inputs(config, seed=seed) for seed in (0, 0, 1))
    assert one.keys() == {"input_ids", "attention_mask"}
    assert torch.equal(one["input_ids"], same["input_ids"])
    assert not torch.equal(one["input_ids"], other["input_ids"])
    assert one["input_ids"].shape == one["attention_mask"].shape == (2, 12)
    assert set(one["input_ids"].flatten().tolist()) <= set(range(10)) - {3}
    both = example_inputs({"text_config": {"vocab_size": 9}, "is_encoder_decoder": True}, length=5)
    assert both["decoder_input_ids"].shape == (2, 5)
    with pytest.raises(InputError, match="text models only"):
        example_inputs({"num_channels": 3})


FAMILIES = ["llama", "qwen2", "gpt2", "bert"]


def family_base(family: str, folder: Path) -> Path:
    return next(case for case in CASES.values() if case.family == family).save_base(folder)


def streaming(model: Any) -> Streaming:
    found = model.streaming
    assert isinstance(found, Streaming)
    return found


def assert_released(model: nn.Module) -> None:
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert streaming(model).held == 0


def whole_model(folder: Path, dtype: str = "float32") -> nn.Module:
    """With weights at addresses like those of streamed ones: kernels sum in another order at others."""
    model = load_model(folder, dtype=dtype)  # maps the file, whose tensors begin anywhere
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streaming_computes_exactly_the_same(family: str, dtype: str, tmp_path: Path) -> None:
    folder = family_base(family, tmp_path)
    streamed = stream_model(open_base(str(folder)), dtype)
    whole, inputs = whole_model(folder, dtype), inputs_for(folder)
    assert_released(streamed)
    assert torch.equal(outputs_of(streamed, inputs), outputs_of(whole, inputs))
    assert_released(streamed)
    largest = max(
        sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        for module in whole.modules()
    )
    assert streaming(streamed).peak == largest


@pytest.mark.parametrize("name", ["llama/base", "bert/base"])
def test_streaming_a_model_without_head(name: str, fixtures: Path) -> None:
    folder = fixtures / "adapterhub" / name
    streamed, inputs = stream_model(open_base(str(folder))), inputs_for(folder)
    assert torch.equal(outputs_of(streamed, inputs), outputs_of(whole_model(folder), inputs))


def test_streaming_a_tied_head(tmp_path: Path) -> None:
    from peft_cases import DECODER_SIZES, seeded
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**DECODER_SIZES, "tie_word_embeddings": True})
    model: Any = seeded(lambda: LlamaForCausalLM(config))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    streamed, inputs = stream_model(open_base(str(tmp_path))), inputs_for(tmp_path)
    assert torch.equal(outputs_of(streamed, inputs), outputs_of(whole_model(tmp_path), inputs))
    assert_released(streamed)


@pytest.mark.parametrize(
    "name", ["plain", "dora", "tokens", "head_llama", "conv1d_gpt2", "bias_all"]
)
def test_adapters_attach_to_a_streamed_model(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder, path = case.save_base(tmp_path / "base"), case.build(tmp_path / "adapter", seed=1)
    adapter = read(Listing.of(path, str(path)), ReadOptions()).single
    whole, streamed = whole_model(folder), stream_model(open_base(str(folder)))
    inputs = case.example_inputs()
    y_base = outputs_of(whole, inputs)
    with attach(whole, adapter), attach(streamed, adapter):
        y = outputs_of(streamed, inputs)
        assert torch.equal(y, outputs_of(whole, inputs))
        assert_released(streamed)
    assert not torch.equal(y, y_base)
    assert torch.equal(outputs_of(streamed, inputs), y_base)


def test_streamed_weights_are_released_after_an_exception(fixtures: Path) -> None:
    streamed = stream_model(open_base(str(fixtures / "tinyllama" / "base")))
    with pytest.raises(RuntimeError):
        streamed.get_submodule("lm_head")(torch.zeros(1, 3))
    assert_released(streamed)


def test_a_model_with_an_adapter_beside_it_is_not_run(base_dir: Path) -> None:
    """What it computed would be the model with the adapter."""
    (base_dir / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match="holds an adapter beside the model"):
        load_model(base_dir)
