"""Tiny models whose embedding is their head, too, each of which calls the two otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import copies
import torch
from peft_cases import seeded
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TOKENS: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    layers = {"encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8}
    places = {"max_source_positions": 30, "max_target_positions": 32, "decoder_start_token_id": 1}
    config = WhisperConfig(**TOKENS, **layers, **heads, **sizes, **places)
    return seeded(lambda: WhisperForConditionalGeneration(config))


def mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4}
    return seeded(lambda: MambaForCausalLM(MambaConfig(**TOKENS, **sizes)))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    config = T5Config(**TOKENS, **sizes, decoder_start_token_id=0, initializer_factor=0.4)
    return seeded(lambda: T5ForConditionalGeneration(config))


def umt5() -> nn.Module:
    from transformers import UMT5Config, UMT5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    config = UMT5Config(**TOKENS, **sizes, decoder_start_token_id=0, initializer_factor=0.4)
    return seeded(lambda: UMT5ForConditionalGeneration(config))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = BertConfig(**TOKENS, **sizes, intermediate_size=48, max_position_embeddings=32)
    return seeded(lambda: BertForMaskedLM(config))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(**TOKENS, **sizes, intermediate_size=48, tie_word_embeddings=True)
    return seeded(lambda: LlamaForCausalLM(config))


@dataclass(frozen=True)
class TiedModel:
    """How a model is made, and what its modules of one matrix are called: an embedding that it computes
    with, its head, and others."""

    make: Callable[[], nn.Module]
    embedding: str
    head: str
    others: tuple[str, ...] = ()

    @property
    def tied(self) -> frozenset[str]:
        """The tensors that are one."""
        return frozenset(f"{module}.weight" for module in (self.embedding, self.head, *self.others))

    def base(self, folder: Path) -> Path:
        """The model as `transformers` saves it."""
        return copies.save(self.make, folder)

    def plain(self) -> Tensor:
        """What it computes without any adapter."""
        return logits(copies.fresh(self.make))

    def trained(self, folder: Path, **options: Any) -> Tensor:
        """Writes a random PEFT adapter; returns what base and adapter compute side by side."""
        from peft import LoraConfig, get_peft_model

        options = {"r": 4, "lora_alpha": 4, "init_lora_weights": False, **options}
        torch.manual_seed(3)
        model: Any = get_peft_model(copies.fresh(self.make), LoraConfig(**options)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name or "trainable_tokens" in name:
                    parameter += 0.3 * torch.randn(parameter.shape)
        model.save_pretrained(folder, save_embedding_layers=False)
        return logits(model)

    def with_rows(self, folder: Path, tokens: list[int]) -> Tensor:
        """What the real model computes with the adapter, but for its token rows, and with these put into
        its one matrix."""
        from peft import PeftModel

        stored = load_file(folder / "adapter_model.safetensors")
        (key,) = (name for name in stored if "token_adapter" in name)
        rows = stored.pop(key)
        rest = folder.with_name("rest")
        rest.mkdir()
        save_file(stored, rest / "adapter_model.safetensors", {"format": "pt"})
        config = json.loads((folder / "adapter_config.json").read_text())
        (rest / "adapter_config.json").write_text(
            json.dumps({**config, "trainable_token_indices": None})
        )
        model: Any = copies.fresh(self.make)
        with torch.no_grad():
            model.get_input_embeddings().weight[tokens] = rows
        return logits(PeftModel.from_pretrained(model, str(rest)).eval())

    def computed(self, folder: Path) -> Tensor:
        """What a folder computes as `transformers` loads it, nothing missing and nothing left."""
        kind: Any = type(copies.fresh(self.make))
        model, report = kind.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert not report["mismatched_keys"]
        return logits(model.eval())


TIED = {
    "whisper": TiedModel(whisper, "model.decoder.embed_tokens", "proj_out"),
    "mamba": TiedModel(mamba, "backbone.embeddings", "lm_head"),
    "t5": TiedModel(t5, "decoder.embed_tokens", "lm_head", ("shared", "encoder.embed_tokens")),
    "umt5": TiedModel(umt5, "decoder.embed_tokens", "lm_head", ("shared", "encoder.embed_tokens")),
    "bert": TiedModel(bert, "bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    "llama": TiedModel(llama, "model.embed_tokens", "lm_head"),
}


def logits(model: Any) -> Tensor:
    """What a model computes of seeded inputs, in float64."""
    tokens = torch.arange(4, 64).reshape(3, 20)
    inputs = {"input_ids": tokens}
    if hasattr(model.config, "num_mel_bins"):
        inputs = {
            "input_features": torch.randn(3, 8, 60, generator=torch.Generator().manual_seed(1))
        }
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens.flip(1)
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found.double()
