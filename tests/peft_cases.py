"""PEFT adapters with non-trivial weights on tiny random models, built from configs, no downloads.

    case = CASES["rslora"]
    adapter = case.build(tmp_path / "adapter", seed=1)       # what PEFT itself saves
    base = case.save_base(tmp_path / "base")                 # the model it belongs to
    y_base = logits(case.make_model(), case.example_inputs())
    y = peft_forward(case, adapter)                          # PEFT's own loading and forward

Every A, B, bias and magnitude is random and alpha differs from r, so that a dropped scale, a
swapped factor or an ignored tensor changes the outputs. Models are float32, in eval mode, and the
same on every call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import copies
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
DECODER_SIZES = {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False}
GPT2_SIZES = {
    "vocab_size": 128,
    "n_embd": 64,
    "n_inner": 96,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The model with fixed random weights, none of them at its trivial initial value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        model = build().float().eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def llama() -> nn.Module:
    """Grouped-query attention: q and o are 64 wide, k and v 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**DECODER_SIZES)))


def qwen2() -> nn.Module:
    """As Llama, with biases on q, k and v."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return seeded(lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER_SIZES)))


def gpt2() -> nn.Module:
    """Conv1D layers (weights stored as (in, out)), fused q, k and v, biases, tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return seeded(lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)))


def bert() -> nn.Module:
    """An encoder with a classification head of three labels."""
    from transformers import BertConfig, BertForSequenceClassification

    return seeded(lambda: BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)))


MOE_SIZES = {
    **DECODER_SIZES,
    "num_experts_per_tok": 2,
    "experts_implementation": "eager",  # the others compute no float64
}


def mixtral() -> nn.Module:
    """Three experts, stacked as (experts, out, in), gate and up in one parameter."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return seeded(lambda: MixtralForCausalLM(MixtralConfig(**MOE_SIZES, num_local_experts=3)))


def qwen2_moe() -> nn.Module:
    """As Mixtral, with an expert shared by all tokens."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {"moe_intermediate_size": 40, "shared_expert_intermediate_size": 56, "num_experts": 3}
    return seeded(lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**MOE_SIZES, **sizes)))


def qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"moe_intermediate_size": 40, "num_experts": 3, "head_dim": 16}
    return seeded(lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE_SIZES, **sizes)))


def gpt_oss() -> nn.Module:
    """Experts stacked as (experts, in, out), with biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"head_dim": 16, "num_local_experts": 3, "max_position_embeddings": 4096}
    return seeded(lambda: GptOssForCausalLM(GptOssConfig(**{**MOE_SIZES, **sizes})))


class ConvNet(nn.Module):
    """Conv2d 3x3, Conv2d 1x1 and Conv1d with kernel 3, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.point = nn.Conv2d(12, 16, 1)
        self.line = nn.Conv1d(16, 10, 3, padding=1)
        self.head = nn.Linear(10, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = torch.tanh(self.point(torch.tanh(self.conv(pixels)))).flatten(2)
        out: Tensor = self.head(torch.tanh(self.line(hidden)).mean(2))
        return out


def conv() -> nn.Module:
    return seeded(ConvNet)


def token_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(0, 128, (2, 12), generator=generator)
    input_ids[:, :4] = torch.tensor([3, 7, 11, 5])  # the rows that trainable tokens replace
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def pixel_inputs() -> dict[str, Tensor]:
    return {"pixels": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "qwen2": qwen2,
    "gpt2": gpt2,
    "bert": bert,
    "conv": conv,
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "gpt_oss": gpt_oss,
}
TASKS = {"llama": "CAUSAL_LM", "qwen2": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS"}


@dataclass(frozen=True)
class PeftCase:
    """One way to configure a PEFT LoRA; `options(rank)` are LoraConfig's arguments."""

    name: str
    family: str
    options: Callable[[int], dict[str, Any]]
    dtype: torch.dtype = torch.float32

    @property
    def has_config(self) -> bool:
        """Whether the base is a `transformers` checkpoint (else a bare state dict)."""
        return self.family != "conv"

    def make_model(self) -> nn.Module:
        return copies.fresh(MODELS[self.family])

    def example_inputs(self) -> dict[str, Tensor]:
        return token_inputs() if self.has_config else pixel_inputs()

    def save_base(self, directory: Path) -> Path:
        """Write the base: a `transformers` checkpoint, or model.safetensors alone for ConvNet."""
        if self.has_config:
            return copies.save(MODELS[self.family], directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.make_model().state_dict(), directory / "model.safetensors")
        return directory

    def build(self, directory: Path, seed: int, rank: int = 4, **overrides: Any) -> Path:
        """A random adapter as PEFT saves it; `overrides` go to LoraConfig."""
        options = {**self.options(rank), **overrides}  # a case of the same name may have others
        key = f"{self.name} {seed} {rank} {sorted(options.items())}"
        return copies.written(
            key, lambda folder: self.build_anew(folder, seed, rank, **overrides), directory
        )

    def build_anew(self, directory: Path, seed: int, rank: int = 4, **overrides: Any) -> Path:
        """Have PEFT make and save one."""
        from peft import LoraConfig, get_peft_model

        options = {"r": rank, "lora_alpha": 2 * rank + 3, **self.options(rank), **overrides}
        config = LoraConfig(task_type=TASKS.get(self.family), **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to the person who trains
            model = get_peft_model(self.make_model(), config)
            config.base_model_name_or_path = f"tiny/{self.family}"
            randomise(model, seed, self.dtype)
            targets = config.target_modules or ()
            embeddings = not isinstance(targets, str) and "embed_tokens" in targets
            save_adapter(model, directory, save_embedding_layers=embeddings)
        return directory


def save_adapter(model: Any, directory: Path, **options: Any) -> None:
    """As PEFT saves it, but for the model card: to fill in its template takes longest."""
    with patch("peft.PeftModel.create_or_update_model_card"):
        model.save_pretrained(directory, **options)


@torch.no_grad()
def randomise(model: nn.Module, seed: int, dtype: torch.dtype) -> None:
    """Give every trained parameter a random value of the size that training would."""
    generator = torch.Generator().manual_seed(seed)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name in sorted(trained):
        parameter = trained[name]
        noise = torch.randn(parameter.shape, generator=generator)
        if "lora_magnitude" in name:
            value = parameter * (1 + 0.2 * noise).abs()
        elif "lora_" in name:
            value = 0.1 * noise
        else:  # copies of base tensors: heads, biases, token rows
            value = parameter + 0.2 * noise
        parameter.data = value.to(dtype)


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's output without gradients: its `logits`, or the tensor that it returns."""
    with torch.no_grad():
        out = model(**inputs)
    result: Tensor = out if isinstance(out, Tensor) else out.logits
    return result


def peft_model(case: PeftCase, adapter_dir: Path) -> nn.Module:
    """The case's base with an adapter folder as PEFT itself loads it."""
    from peft import PeftModel

    model: nn.Module = PeftModel.from_pretrained(case.make_model(), adapter_dir).eval()
    return model


def peft_forward(case: PeftCase, adapter_dir: Path) -> Tensor:
    return logits(peft_model(case, adapter_dir), case.example_inputs())


def patterns(rank: int) -> dict[str, Any]:
    """More rank in q, less in one layer's down_proj; alphas that follow neither."""
    return {
        "target_modules": LINEARS,
        "rank_pattern": {"q_proj": rank + 3, r"layers\.1\.mlp\.down_proj": max(1, rank // 2)},
        "alpha_pattern": {"v_proj": rank + 1, r"layers\.0\.self_attn\.q_proj": 5 * rank},
    }


def fixed(**options: Any) -> Callable[[int], dict[str, Any]]:
    return lambda rank: options


GPT2_TARGETS = ["c_attn", "c_proj", "c_fc"]
REGEX = r".*layers\.[01]\.(self_attn\.q_proj|mlp\.up_proj)"
QV = ["q_proj", "v_proj"]
_CASES = (
    PeftCase("plain", "llama", fixed(target_modules=LINEARS)),
    PeftCase("rslora", "llama", fixed(target_modules=LINEARS, use_rslora=True)),
    PeftCase("patterns", "llama", patterns),
    PeftCase("rslora_patterns", "llama", lambda rank: {**patterns(rank), "use_rslora": True}),
    PeftCase("lora_bias", "qwen2", fixed(target_modules=QV, lora_bias=True)),
    PeftCase("bias_lora_only", "qwen2", fixed(target_modules=[*QV, "up_proj"], bias="lora_only")),
    PeftCase("bias_all", "qwen2", fixed(target_modules=["q_proj", "up_proj"], bias="all")),
    PeftCase("conv1d_gpt2", "gpt2", fixed(target_modules=GPT2_TARGETS, fan_in_fan_out=True)),
    PeftCase(
        "bias_all_gpt2",
        "gpt2",
        fixed(target_modules=["c_attn"], fan_in_fan_out=True, bias="all"),
    ),
    PeftCase("embedding", "llama", fixed(target_modules=["embed_tokens", "q_proj"])),
    PeftCase("conv2d", "conv", fixed(target_modules=["conv", "point"])),
    PeftCase("conv1d", "conv", fixed(target_modules=["line", "head"])),
    PeftCase("dora", "llama", fixed(target_modules=[*QV, "down_proj"], use_dora=True)),
    PeftCase("head_llama", "llama", fixed(target_modules=QV, modules_to_save=["lm_head"])),
    PeftCase("head_bert", "bert", fixed(target_modules=["query", "value"])),
    PeftCase("tokens", "llama", fixed(target_modules=QV, trainable_token_indices=[3, 7, 11])),
    PeftCase("layer_subset", "llama", fixed(target_modules=LINEARS, layers_to_transform=[1])),
    PeftCase("regex", "llama", fixed(target_modules=REGEX)),
    PeftCase("bf16", "llama", fixed(target_modules=LINEARS), dtype=torch.bfloat16),
)
CASES: dict[str, PeftCase] = {case.name: case for case in _CASES}
