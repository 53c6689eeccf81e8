"""Whether a head shares the matrix of its embedding, as model classes have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from adaptmerge.runtime.linears import ties_head

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
SIZES |= {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
}


def composite(kind: str, **said: Any) -> Any:
    """A model with vision, whose text has a config of its own that says nothing of ties."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**SIZES, "rope_parameters": rope}
    return getattr(transformers, kind)(text_config=text, vision_config=VISION, **said)


@pytest.mark.parametrize("kind", ["Qwen2_5_VLConfig", "Qwen2VLConfig"])
@pytest.mark.parametrize("tied", [False, True])
def test_ties_of_composite_models(kind: str, tied: bool, tmp_path: Path) -> None:
    config = composite(kind, tie_word_embeddings=tied)
    assert not hasattr(config.get_text_config(), "tie_word_embeddings")
    model = transformers.AutoModelForImageTextToText.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path)
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert ties_head(tmp_path) is shared is tied


@pytest.mark.parametrize("tied", [False, True])
def test_ties_of_language_models(tied: bool, tmp_path: Path) -> None:
    transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied).save_pretrained(tmp_path)
    assert ties_head(tmp_path) is tied


def test_a_model_without_a_head_ties_none(tmp_path: Path) -> None:
    transformers.ViTConfig(hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path)
    assert ties_head(tmp_path) is False
