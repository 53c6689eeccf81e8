"""Adapters written as GGUF, run by llama.cpp itself, against PEFT in transformers."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft_cases
import pytest
import torch
from oracles import llama_cpp
from peft_cases import CASES, PeftCase
from safetensors.torch import load_file, save_file

from adaptmerge.bases import llama_cpp as names
from adaptmerge.commands.combine import Options, combine
from adaptmerge.formats.gguf import write
from adaptmerge.formats.inputs import parse_input

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.oracle

TINY = Path(__file__).resolve().parents[2] / "fixtures" / "tinyllama"
PROMPT = [3, 7, 11, 5, 60, 90, 100, 34, 77]
EXACT = 1e-4  # of the effect: float32 on both sides
Array = llama_cpp.Array


def as_gguf(adapter: Path, base: Path, path: Path) -> Path:
    combine([parse_input(str(adapter))], path, Options(base=str(base)))
    return path


def expected(model: torch.nn.Module) -> Array:
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, -1]
    found: Array = logits.double().log_softmax(-1).numpy()
    return found


def relative_error(base: Path, adapter: Path, y: Array, folder: Path) -> float:
    """The largest error of llama.cpp's log-probabilities over the largest effect of the adapter."""
    model = llama_cpp.model(base, folder / "model.gguf")
    y_base = llama_cpp.logprobs(model, PROMPT, len(y))
    result = llama_cpp.logprobs(model, PROMPT, len(y), adapter)
    effect = np.abs(result - y_base).max()
    assert effect > 0.1, "the adapter changes nothing"
    return float(np.abs(result - y).max() / effect)


def error_of(case: PeftCase, folder: Path, **options: Any) -> float:
    adapter = case.build(folder / "adapter", seed=1, **options)
    path = adapter / "adapter_model.safetensors"
    lora = {key: value for key, value in load_file(path).items() if "lora_" in key}
    save_file(lora, path, {"format": "pt"})  # without PEFT's copies of the base's embedding
    base = case.save_base(folder / "base")
    written = as_gguf(adapter, base, folder / "adapter.gguf")
    return relative_error(base, written, expected(peft_cases.peft_model(case, adapter)), folder)


EXACT_CASES = ["plain", "rslora", "patterns", "rslora_patterns", "layer_subset", "embedding"]


@pytest.mark.parametrize("name", EXACT_CASES)
def test_llama(name: str, tmp_path: Path) -> None:
    """Scales of rsLoRA and alpha_pattern arrive, which llama.cpp's own converter loses."""
    assert error_of(CASES[name], tmp_path) < EXACT


def test_a_head(tmp_path: Path) -> None:
    assert error_of(CASES["plain"], tmp_path, target_modules=["lm_head", "q_proj"]) < EXACT


def test_rows_of_qwen_stay(tmp_path: Path) -> None:
    assert error_of(dataclasses.replace(CASES["plain"], family="qwen2"), tmp_path) < EXACT


def test_conv1d_of_gpt2(tmp_path: Path) -> None:
    """llama.cpp reads its GELU from a table of half precision: 1e-3, with and without an adapter."""
    assert error_of(CASES["conv1d_gpt2"], tmp_path) < 2e-3


def test_bfloat16(tmp_path: Path) -> None:
    """llama.cpp rounds the inputs of a bfloat16 matrix too."""
    assert error_of(CASES["bf16"], tmp_path) < 2e-2


@pytest.mark.parametrize("name", ["lora-r8-shakespeare", "lora-r16-rslora-qv-perl"])
def test_trained_adapters(name: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32)
    y = expected(PeftModel.from_pretrained(model, TINY / name).eval())
    written = as_gguf(TINY / name, TINY / "base", tmp_path / "adapter.gguf")
    assert relative_error(TINY / "base", written, y, tmp_path) < EXACT


def test_a_merge(tmp_path: Path) -> None:
    """The sum of two deltas, as PEFT computes it with both adapters active."""
    case = CASES["plain"]
    paths = [case.build(tmp_path / str(seed), seed=seed, rank=seed) for seed in (2, 3)]
    base = case.save_base(tmp_path / "base")
    specs = [parse_input(f"{path}:1") for path in paths]
    combine(specs, tmp_path / "sum.gguf", Options(base=str(base)))
    model: Any = peft_cases.peft_model(case, paths[0])
    model.load_adapter(paths[1], "other")
    model.base_model.set_adapter(["default", "other"])
    error = relative_error(base, tmp_path / "sum.gguf", expected(model.eval()), tmp_path)
    assert error < EXACT


def test_the_order_of_rows_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without the reordering llama.cpp loads the adapter and computes something else."""
    monkeypatch.setattr(write, "interleaved", lambda ref, heads: ref)
    assert error_of(CASES["plain"], tmp_path) > 0.1


def test_a_tied_embedding_aborts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why we refuse it: llama.cpp applies the delta of the embedding as one of the head."""
    monkeypatch.setitem(peft_cases.DECODER_SIZES, "tie_word_embeddings", True)
    monkeypatch.setattr(names.Names, "tied", False)
    case = CASES["embedding"]
    adapter = case.build(tmp_path / "adapter", seed=1)
    path = adapter / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "lora_" in k}, path, {"format": "pt"})
    base = case.save_base(tmp_path / "base")
    written = as_gguf(adapter, base, tmp_path / "adapter.gguf")
    model = llama_cpp.model(base, tmp_path / "model.gguf")
    assert np.isfinite(llama_cpp.logprobs(model, PROMPT, 128)).all()
    arguments = json.dumps([str(model), PROMPT, 128, str(written)])
    code = (
        f"import json; from oracles.llama_cpp import logprobs; logprobs(*json.loads({arguments!r}))"
    )
    tests = Path(__file__).resolve().parents[1]
    ran = subprocess.run([sys.executable, "-c", code], cwd=tests, capture_output=True, text=True)
    assert ran.returncode != 0
    assert "ggml_can_mul_mat" in ran.stderr
