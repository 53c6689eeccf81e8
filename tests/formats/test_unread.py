"""What cannot be read is refused by its name, and no reader claims what is another's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
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
