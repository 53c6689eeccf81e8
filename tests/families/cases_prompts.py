"""Virtual tokens (prompts, prefixes, adaption prompts) and trainable tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from families.cases import FamilyCase, noise
from peft_cases import DECODER_SIZES, seeded, token_inputs
from torch import Tensor, nn

ROWS = [3, 7, 11, 5]  # in the order that PEFT is given them, which is not sorted
CPT: dict[str, Any] = {
    "cpt_token_ids": [9, 2, 30, 4, 5],
    "cpt_mask": [1, 1, 1, 1, 1],
    "cpt_tokens_type_mask": [1, 2, 3, 4, 2],
}


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return seeded(lambda: MistralForCausalLM(MistralConfig(**DECODER_SIZES)))


def llama_classifier() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(**DECODER_SIZES, num_labels=3, pad_token_id=0)
    return seeded(lambda: LlamaForSequenceClassification(config))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2}
    config = T5Config(**sizes, num_heads=4, decoder_start_token_id=0, initializer_factor=0.4)
    return seeded(lambda: T5ForConditionalGeneration(config))


@dataclass(frozen=True)
class OwnModel(FamilyCase):
    """A case on a model of this module."""

    make: Callable[[], nn.Module] = t5

    @property
    def made_by(self) -> Callable[[], nn.Module]:
        return self.make

    def inputs(self) -> dict[str, Tensor]:
        found = token_inputs()
        if self.make is t5:
            found["decoder_input_ids"] = found["input_ids"].flip(1)[:, :7]
            found["decoder_attention_mask"] = torch.ones_like(found["decoder_input_ids"])
        return found


def case(name: str, config: str, model: str = "llama", **options: Any) -> FamilyCase:
    """A family that PEFT itself cannot merge into weights."""
    return FamilyCase(f"{name}_{model}", config, options, model, merges=False)


def own(
    name: str, config: str, make: Callable[[], nn.Module], task: str, **options: Any
) -> FamilyCase:
    label = f"{name}_{make.__name__}"
    return OwnModel(label, config, options, "llama", merges=False, task=task, make=make)


def seq2seq(name: str, config: str, **options: Any) -> FamilyCase:
    return own(name, config, t5, "SEQ_2_SEQ_LM", **options)


TOKENS: dict[str, Any] = {"num_virtual_tokens": 5}
ENCODED: dict[str, Any] = {**TOKENS, "encoder_hidden_size": 24}
PROJECTED: dict[str, Any] = {**ENCODED, "prefix_projection": True}
LAYERS = {"adapter_len": 6, "adapter_layers": 2}
strongly = partial(noise, size=1.0)  # gates begin at zero, whose products with noise are small

CASES = (
    *(case("prompt", "PromptTuningConfig", model, **TOKENS) for model in ("llama", "gpt2", "bert")),
    case("prompt_head", "PromptTuningConfig", **TOKENS, modules_to_save=["lm_head"]),
    case("p_tuning", "PromptEncoderConfig", **ENCODED),
    case("p_tuning_lstm", "PromptEncoderConfig", **ENCODED, encoder_reparameterization_type="LSTM"),
    case("p_tuning", "PromptEncoderConfig", "bert", **ENCODED),
    case("cpt", "CPTConfig", **CPT),
    case("cpt", "CPTConfig", "gpt2", **CPT),
    *(
        case("prefix", "PrefixTuningConfig", model, **TOKENS)
        for model in ("llama", "qwen2", "gpt2")
    ),
    case("prefix", "PrefixTuningConfig", "bert", **TOKENS),
    case("prefix_projection", "PrefixTuningConfig", **PROJECTED),
    case("cartridge", "CartridgeConfig", **TOKENS),
    case("cartridge_frozen", "CartridgeConfig", "gpt2", **TOKENS, num_frozen_tokens=3),
    own("prompt", "PromptTuningConfig", llama_classifier, "SEQ_CLS", **TOKENS),
    own("prefix", "PrefixTuningConfig", llama_classifier, "SEQ_CLS", **TOKENS),
    seq2seq("prompt", "PromptTuningConfig", **TOKENS),
    seq2seq("p_tuning", "PromptEncoderConfig", **ENCODED),
    seq2seq("prefix", "PrefixTuningConfig", **TOKENS),
    *(
        FamilyCase(f"adaption_{m}", "AdaptionPromptConfig", LAYERS, m, 1e-6, False, strongly)
        for m in ("llama", "gpt2")
    ),
    OwnModel(
        "adaption_mistral",
        "AdaptionPromptConfig",
        {"adapter_len": 4, "adapter_layers": 1},
        merges=False,
        randomise=strongly,
        make=mistral,
    ),
    FamilyCase("trainable_tokens", "TrainableTokensConfig", {"token_indices": ROWS}),
    FamilyCase(
        "trainable_tokens_both",
        "TrainableTokensConfig",
        {"token_indices": ROWS, "target_modules": ["embed_tokens", "lm_head"]},
    ),
    FamilyCase("trainable_tokens_gpt2", "TrainableTokensConfig", {"token_indices": ROWS}, "gpt2"),
    FamilyCase("trainable_tokens_bert", "TrainableTokensConfig", {"token_indices": ROWS}, "bert"),
)
