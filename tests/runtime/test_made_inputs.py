"""Verifying adapters of models that take more than tokens: sounds, images, and images with texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import console
import pytest
import samples
import torch

from adaptmerge import runtime
from adaptmerge.errors import InputError

TEXT = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 16, "eos_token_id": 2}
IMAGE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 8}
IMAGE |= {"num_attention_heads": 2, "patch_size": 4}


def whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8}
    sizes |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")}
    sizes |= {"vocab_size": 30, "max_source_positions": 12, "max_target_positions": 12}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 2)
    return WhisperForConditionalGeneration(
        WhisperConfig(**sizes, **tokens, decoder_start_token_id=2)
    )


def images() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**IMAGE))


def clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=8))


MODELS: Sequence[Callable[[], Any]] = (whisper, images, clip)


def projection(model: Any) -> str:
    """The path of a query projection that no text goes through."""
    names = [name for name, _ in model.named_modules() if name.endswith("q_proj")]
    return str(next(name for name in names if "text" not in name))


@pytest.mark.parametrize("make", MODELS)
def test_outputs_of_models_that_take_no_tokens_are_compared(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
        sides = (torch.randn(2, 16), torch.randn(16, 2))
    model.save_pretrained(tmp_path / "base")
    samples.write(tmp_path / "a", {projection(model): sides})
    base = ("--base", str(tmp_path / "base"))
    out = str(tmp_path / "out")
    assert console.run("combine", str(tmp_path / "a"), "-o", out, *base).code == 0
    found = console.run("verify", out, *base, "--device", "cpu")
    rows = [line.split() for line in found.stdout.splitlines()]
    assert found.code == 0, found.stdout + found.stderr
    assert ["forward", "pass"] in [row[:2] for row in rows], found.stdout


def test_a_model_of_another_kind_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CLIPVisionModel

    images().save_pretrained(tmp_path / "base")
    monkeypatch.setattr(CLIPVisionModel, "main_input_name", "input_smells")
    with pytest.raises(InputError, match="CLIPVisionModel takes input_smells"):
        runtime.inputs_for(tmp_path / "base")
