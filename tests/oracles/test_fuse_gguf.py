"""GGUF models with adapters fused in, loaded and run by llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples
import torch
from fuse.models import llama_base
from oracles import llama_cpp
from oracles.test_llama_cpp import PROMPT, TINY

from adaptmerge import runtime
from adaptmerge.bases.open import open_base
from adaptmerge.commands.fuse import FuseOptions, fuse
from adaptmerge.formats.inputs import InputSpec
from adaptmerge.schemes.view import view_of

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.oracle

LOSS = frozenset({"loss"})
VOCABULARY = 1024
# of the effect: llama.cpp multiplies 16-bit and quantised weights with inputs rounded to 16 and 8 bits
ROUNDED = {"F32": 1e-4, "F16": 0.02, "BF16": 0.05, "Q8_0": 0.1, "Q4_0": 0.1, "Q5_1": 0.1}


def lora(config: dict[str, Any], folder: Path) -> Path:
    """Rank 2 on q, o and up, about a tenth as large as the weights."""
    hidden, generator = config["hidden_size"], torch.Generator().manual_seed(0)
    rows = {"self_attn.q_proj": hidden, "self_attn.o_proj": hidden}
    rows["mlp.up_proj"] = config["intermediate_size"]
    sides = {
        f"model.layers.{layer}.{name}": (
            torch.randn(2, hidden, generator=generator) * 0.1,
            torch.randn(count, 2, generator=generator) * 0.1,
        )
        for layer in range(config["num_hidden_layers"])
        for name, count in rows.items()
    }
    return samples.write(folder, sides)


def ours(path: Path) -> llama_cpp.Array:
    """Log-probabilities after the prompt of the model that the file is read as, in float32."""
    model = runtime.stream_model(view_of(open_base(str(path))).values)
    y = runtime.outputs_of(model, {"input_ids": torch.tensor([PROMPT])})
    found: llama_cpp.Array = y[0, -1].double().log_softmax(-1).numpy()
    return found


@pytest.mark.parametrize("kind", list(ROUNDED))
def test_llama_cpp_computes_the_fused_model(kind: str, tmp_path: Path) -> None:
    base = llama_cpp.model(TINY / "base", tmp_path / "base.gguf", kind)
    spec = InputSpec(str(TINY / "lora-r8-perl"), "perl")
    fuse(str(base), [spec], tmp_path / "out", FuseOptions(allow=LOSS))
    before = llama_cpp.logprobs(base, PROMPT, VOCABULARY)
    after = llama_cpp.logprobs(tmp_path / "out" / base.name, PROMPT, VOCABULARY)
    effect = np.abs(after - before).max()
    assert effect > 0.1
    assert np.abs(after - ours(tmp_path / "out" / base.name)).max() < ROUNDED[kind] * effect


K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "MXFP4")


@pytest.mark.parametrize("kind", K_QUANTS)
def test_k_quants_that_llama_cpp_made(kind: str, tmp_path: Path) -> None:
    """A random model 256 wide, quantised by ggml; the adapter arrives, and llama.cpp computes it."""
    model = llama_base(tmp_path / "model", torch.float32, hidden_size=256, intermediate_size=256)
    base = llama_cpp.model(model, tmp_path / "base.gguf", {"blk": kind})
    config = json.loads((model / "config.json").read_text())
    adapter = lora(config, tmp_path / "lora")
    fuse(str(base), [InputSpec(str(adapter), "a")], tmp_path / "out", FuseOptions(allow=LOSS))
    size = config["vocab_size"]
    before = llama_cpp.logprobs(base, PROMPT, size)
    after = llama_cpp.logprobs(tmp_path / "out" / base.name, PROMPT, size)
    effect = np.linalg.norm(after - before)
    assert effect > 0.1
    # inputs are rounded to 8 bits in blocks of 256
    assert np.linalg.norm(after - ours(tmp_path / "out" / base.name)) < 0.15 * effect


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_as_llama_cpp_computes_base_and_adapter(kind: str, tmp_path: Path) -> None:
    """Its own sum at run time, of the adapter that we write for it."""
    from adaptmerge.commands.combine import Options, combine

    base = llama_cpp.model(TINY / "base", tmp_path / "base.gguf", kind)
    spec = InputSpec(str(TINY / "lora-r8-perl"), "perl")
    combine([spec], tmp_path / "lora.gguf", Options(base=str(TINY / "base")))
    fuse(str(base), [spec], tmp_path / "out", FuseOptions(allow=LOSS))
    before = llama_cpp.logprobs(base, PROMPT, VOCABULARY)
    beside = llama_cpp.logprobs(base, PROMPT, VOCABULARY, tmp_path / "lora.gguf")
    after = llama_cpp.logprobs(tmp_path / "out" / base.name, PROMPT, VOCABULARY)
    effect = np.linalg.norm(beside - before)
    assert np.linalg.norm(after - beside) < (1e-4 if kind == "F32" else 0.1) * effect


def test_wide_weights_of_a_quantised_model(tmp_path: Path) -> None:
    base = llama_cpp.model(TINY / "base", tmp_path / "base.gguf", "Q4_0")
    spec = InputSpec(str(TINY / "lora-r8-perl"), "perl")
    fuse(str(base), [spec], tmp_path / "out", FuseOptions(quant="fp32"))
    before = llama_cpp.logprobs(base, PROMPT, VOCABULARY)
    after = llama_cpp.logprobs(tmp_path / "out" / base.name, PROMPT, VOCABULARY)
    effect = np.abs(after - before).max()
    assert effect > 0.1
    assert np.abs(after - ours(tmp_path / "out" / base.name)).max() < 1e-4 * effect
