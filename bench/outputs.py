"""The outputs of a base with an adapter beside it, in float32, and how far a fused model is from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.fused import TORCH, weigh

LENGTH = 64  # tokens of a sequence
SAMPLED = 64  # sequences
TEXT = Path("LICENSE")


def cast_base(source: Path, folder: Path, dtype: str) -> str:
    """A copy of a base in another dtype."""
    shutil.copytree(source, folder)
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors = {name: value.to(TORCH[dtype]) for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    changed = json.loads(config.read_text()) | {"dtype": str(TORCH[dtype]).removeprefix("torch.")}
    config.write_text(json.dumps(changed))
    return str(folder)


def evaluation_tokens(base: Path, adapter: str) -> torch.Tensor:
    """Sequences of 64 tokens: this repository's licence, and what the base with the adapter writes."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(base / "tokenizer.json")).encode(TEXT.read_text()).ids
    read = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    model = _with_adapter(str(base), adapter)
    torch.manual_seed(0)
    start = torch.zeros(SAMPLED, 1, dtype=torch.long)
    written = model.generate(  # type: ignore[operator]
        input_ids=start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=0,
        min_new_tokens=LENGTH,
        max_new_tokens=LENGTH,
        pad_token_id=0,
    )
    return torch.cat([read, written[:, 1:]])


class Reference:
    """A base with an adapter beside it."""

    def __init__(self, base: str, adapter: str, tokens: torch.Tensor) -> None:
        self.base, self.adapter = base, adapter
        self._tokens = tokens
        self._model = _with_adapter(base, adapter)

    def log_probabilities(self, weight: float) -> torch.Tensor:
        """Of every next token, the adapter counting `weight`."""
        weigh(self._model, weight)
        return _log_probabilities(self._model, self._tokens)

    def divergence(self, wanted: torch.Tensor, fused: str) -> float:
        """The mean KL divergence of a model without adapters, in nats per token."""
        found = _log_probabilities(_loaded(fused), self._tokens)
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def _loaded(folder: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def _with_adapter(base: str, adapter: str) -> torch.nn.Module:
    from peft import PeftModel

    model: torch.nn.Module = PeftModel.from_pretrained(_loaded(base), adapter)
    return model.eval()


@torch.no_grad()
def _log_probabilities(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=tokens).logits.double().log_softmax(-1)
    return found
