"""What cannot be read is refused by its name, and no reader claims what is another's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples
import torch
from console import run
from safetensors.torch import save_file

Q, UNET = "model.layers.0.self_attn.q_proj.", "unet.mid_block.attentions.0.attn1.to_q."
DIT = "transformer.transformer_blocks.0.attn.to_q."
KOHYA = "lora_unet_mid_block_attentions_0_attn1_to_q."
ONE, TWO = torch.zeros(4, 16), torch.zeros(16, 4)
FILES = {
    "diffusers": {f"{UNET}lora.down.weight": ONE, f"{UNET}lora.up.weight": TWO},
    "diffusers, names as in PEFT": {f"{UNET}lora_A.weight": ONE, f"{UNET}lora_B.weight": TWO},
    "diffusers, a transformer": {f"{DIT}lora_A.weight": ONE, f"{DIT}lora_B.weight": TWO},
    "kohya": {f"{KOHYA}lora_down.weight": ONE, f"{KOHYA}alpha": torch.tensor(4.0)},
    "MLX": {f"{Q}lora_a": ONE.T.contiguous(), f"{Q}lora_b": TWO.T.contiguous()},
    "torchtune": {"layers.0.attn.q_proj.lora_a.weight": ONE},
    "LitGPT": {"transformer.h.0.attn.qkv.lora_A": ONE, "transformer.h.0.attn.qkv.lora_B": TWO},
    "mistral-finetune": {
        "layers.0.attention.wq.lora_A.weight": ONE,
        "layers.0.attention.wq.lora_B.weight": TWO,
    },
    "LLaMA-Adapter": {"adapter_query.weight": ONE, "layers.0.attention.gate": TWO},
    "NeMo": {"decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight": ONE},
    "textual inversion": {"emb_params": ONE},
    "IP-Adapter": {"image_proj.proj.weight": ONE, "ip_adapter.1.to_k_ip.weight": TWO},
    "ControlNet": {"controlnet_cond_embedding.conv_in.weight": ONE},
    "whole model, of diffusers": {"down_blocks.0.resnets.0.conv1.weight": ONE},
    "whole model": {"model.embed_tokens.weight": TWO, f"{Q}weight": ONE},
}


def refused(path: Path) -> str:
    outcome = run("inspect", str(path))
    assert outcome.code == 1
    return " ".join(outcome.stderr.split())


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_called_by_its_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file(FILES[name], path)
    assert name.partition(",")[0] in refused(path)


def test_metadata_of_a_pipeline_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    tensors = {"a.lora_A.weight": ONE, "a.lora_B.weight": TWO}
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps({"unet.r": 4})})
    assert "is a LoRA of a diffusers pipeline" in refused(path)


def test_files_without_tensors_that_we_know(tmp_path: Path) -> None:
    np.savez(tmp_path / "adapters.npz", x=np.zeros(1))
    (tmp_path / "model.nemo").write_bytes(b"x" * 100)
    (tmp_path / "model.onnx").write_bytes(b"x" * 100)
    assert "MLX" in refused(tmp_path / "adapters.npz")
    assert "NVIDIA NeMo" in refused(tmp_path / "model.nemo")
    assert "is an ONNX model" in refused(tmp_path / "model.onnx")


def test_a_folder_is_called_by_its_config(tmp_path: Path) -> None:
    said = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 20.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    save_file(FILES["MLX"], tmp_path / "adapters.safetensors")
    assert "is an adapter of MLX" in refused(tmp_path)


@pytest.mark.parametrize(
    "module", ["transformer.h.0.attn.c_attn", "transformer.blocks.0.attn.Wqkv"]
)
def test_language_models_with_a_transformer_inside_are_no_pipelines(
    module: str, tmp_path: Path
) -> None:
    path = tmp_path / "some.safetensors"
    save_file({f"{module}.lora_A.weight": ONE, f"{module}.lora_B.weight": TWO}, path)
    outcome = run("inspect", str(path))
    assert outcome.code == 0, outcome.shown


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("x.onnx_adapter", b"\x20\0\0\0TORT" + bytes(64), "is an ONNX adapter"),
        ("renamed.dat", b"\x20\0\0\0TORT" + bytes(64), "is an ONNX adapter"),
        ("renamed.model", b"\x08\x0a\x12\x07pytorch\x1a" + bytes(64), "is an ONNX model"),
        ("x.lora.h5", b"\x89HDF\r\n\x1a\n" + bytes(64), "is an HDF5 file, as Keras writes"),
        ("x.tar.gz", b"\x1f\x8b" + bytes(64), "is an archive: unpack it"),
        ("x.tar", bytes(257) + b"ustar" + bytes(64), "is a tar archive: unpack it"),
        ("adapter_config.json", b"{}", "is the config of an adapter: give the folder"),
        ("optimizer.pt", b"x", "is the state of a training, no adapter"),
        ("training_args.bin", b"x", "is the state of a training, no adapter"),
        ("m.yml", b"models: []\nmerge_method: ties\n", "is a recipe of mergekit"),
        ("r.yaml", b"inputs: [a, b]\n", "start it with adaptmerge run"),
        ("axolotl.yaml", b"base_model: x\n", "is a configuration of a training"),
    ],
)
def test_a_file_is_told_by_its_content(
    name: str, content: bytes, what: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert what in refused(tmp_path / name)


def test_a_shard_of_a_model_is_told_by_its_name(tmp_path: Path) -> None:
    save_file({"model.layers.9.mlp.up_proj.weight": ONE}, tmp_path / "model-2-of-2.safetensors")
    assert "is a whole model" in refused(tmp_path / "model-2-of-2.safetensors")


def test_arrays_of_mlx_are_told_by_their_names(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {f"{Q}lora_a": np.zeros(1)}
    np.savez(tmp_path / "run.npz", **arrays)
    np.savez(tmp_path / "other.npz", x=np.zeros(1))
    assert "is an adapter of MLX" in refused(tmp_path / "run.npz")
    assert "is an archive of NumPy arrays, no adapter" in refused(tmp_path / "other.npz")


def test_run_says_that_a_recipe_is_of_mergekit(tmp_path: Path) -> None:
    (tmp_path / "m.yml").write_text("models:\n  - model: a\nmerge_method: ties\n")
    outcome = run("run", str(tmp_path / "m.yml"))
    assert outcome.code == 1
    assert "is a recipe of mergekit" in outcome.stderr


def test_a_folder_of_a_model_is_one_by_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert "is a whole model" in refused(tmp_path)


@pytest.mark.parametrize(
    ("folder", "what"),
    [
        ("global_step10", "in shards of DeepSpeed.*zero_to_fp32.py"),
        ("pytorch_model_fsdp_0", "in shards of FSDP.*accelerate merge-weights"),
    ],
)
def test_shards_of_trainings(folder: str, what: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    assert re.search(what, refused(tmp_path))


def test_shards_of_torch(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    assert "in shards of torch.distributed" in refused(tmp_path)


def test_a_training_run_says_where_its_adapter_is(tmp_path: Path) -> None:
    samples.adapter(tmp_path / "run" / "final", 1)
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    said = refused(tmp_path / "run")
    assert "is the folder of a training run" in said
    assert f"the adapter is in final: give {tmp_path}/run/final" in said
    for step in (200, 1000):
        samples.adapter(tmp_path / "run" / f"checkpoint-{step}", step)
    said = refused(tmp_path / "run")
    assert "checkpoint-200, checkpoint-1000, final hold adapters" in said
    assert f"e.g. {tmp_path}/run/final" in said


def test_a_training_run_of_a_whole_model_names_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    save_file(FILES["whole model"], tmp_path / "checkpoint-5" / "model.safetensors")
    said = refused(tmp_path)
    assert "is the folder of a training run" in said
    assert "give" not in said
