"""Module paths and llama.cpp's tensor names, both ways, and which rows llama.cpp reorders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from adaptmerge.bases.base import Base
from adaptmerge.errors import AdaptmergeError, InputError, MissingExtra
from adaptmerge.tensors.refs import TensorRef

EMBEDDING, HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True, slots=True)
class Architecture:
    """What llama.cpp makes of one model type of `transformers`.

    permuted: rows of q and k are reordered for its rotary embedding. tied: the head is the
    embedding unless the config says otherwise. shifted: 1 is added to norms. prefix: of the modules
    below the head.
    """

    name: str
    permuted: bool = False
    tied: bool = False
    shifted: bool = False
    prefix: str = "model"


# Model types whose linear weights llama.cpp's converter stores as they are, but for the rows of q
# and k (conversion/*.py of llama.cpp, October 2026). Others split, join or reshape weights.
ARCHITECTURES: Mapping[str, Architecture] = {
    "arcee": Architecture("arcee", permuted=True),
    "cohere": Architecture("command-r", tied=True),
    "cohere2": Architecture("cohere2", tied=True),
    "exaone4": Architecture("exaone4"),
    "gemma": Architecture("gemma", tied=True, shifted=True),
    "gemma2": Architecture("gemma2", tied=True, shifted=True),
    "gemma3_text": Architecture("gemma3", tied=True, shifted=True),
    "glm4": Architecture("glm4"),
    "gpt2": Architecture("gpt2", tied=True, prefix="transformer"),
    "granite": Architecture("granite", permuted=True),
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "mixtral": Architecture("llama", permuted=True),
    "nemotron": Architecture("nemotron", shifted=True),
    "olmo": Architecture("olmo", permuted=True),
    "olmo2": Architecture("olmo2"),
    "phi": Architecture("phi2"),
    "phi3": Architecture("phi3"),
    "qwen2": Architecture("qwen2"),
    "qwen2_moe": Architecture("qwen2moe"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "smollm3": Architecture("smollm3", permuted=True, tied=True),
    "stablelm": Architecture("stablelm"),
    "starcoder2": Architecture("starcoder2", tied=True),
}


def library() -> Any:
    """The package `gguf`, which holds the tables of names. Raises MissingExtra."""
    try:
        import gguf
    except ImportError:
        raise MissingExtra("gguf", "gguf") from None
    return gguf


@dataclass(frozen=True)
class Names:
    """The names of one base model's tensors in GGUF."""

    base: Base
    architecture: Architecture
    table: Any

    @classmethod
    def of(cls, base: Base, error: Callable[[str], AdaptmergeError]) -> Names:
        """The names for a base. Raises `error` when llama.cpp's names for it are not known."""
        found = ARCHITECTURES.get(base.architecture or "")
        gguf = library()
        number = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        blocks = base.config.get("num_hidden_layers", base.config.get("n_layer"))
        if found is None or found.name not in number:
            raise error(
                f"the base {base.path.name} is of type {base.architecture!r}, whose names in GGUF "
                f"are not known (known: {', '.join(ARCHITECTURES)})"
            )
        if type(blocks) is not int or blocks < 1:
            raise InputError(f"config.json says {blocks!r} layers", where=str(base.path))
        return cls(base, found, gguf.get_tensor_name_map(number[found.name], blocks))

    def tensor(self, module: str) -> str | None:
        """The name of a module's weight in GGUF; None when llama.cpp has no such tensor."""
        located = self.base.locate(module) or module
        if ".experts" in located:
            return None  # stored together, as one tensor of three dimensions
        spellings = (module, located, self._spelled(located))
        found = (self.table.get_name(spelling) for spelling in spellings)
        name = next((name for name in found if name), None)
        return None if name is None else f"{name}.weight"

    def module(self, tensor: str) -> str | None:
        """The module path whose weight has this name in GGUF."""
        return self._modules.get(tensor)

    def heads(self, tensor: str) -> int | None:
        """How many heads the rows of q or k have, where llama.cpp reorders them; else None."""
        config = self.base.config
        queries = config.get("num_attention_heads")
        keys = config.get("num_key_value_heads") or queries
        kind = tensor.split(".")[-2]
        if not self.architecture.permuted or kind not in ("attn_q", "attn_k"):
            return None
        found = (queries if kind == "attn_q" else keys) or 0
        if not isinstance(found, int):
            sentence = f"counts {found!r} heads in config.json, expected a whole number"
            raise InputError(sentence, where=str(self.base.path))
        return found

    @property
    def tied(self) -> bool:
        """Whether the base has no head of its own."""
        return bool(self.base.config.get("tie_word_embeddings", self.architecture.tied))

    @cached_property
    def _modules(self) -> dict[str, str]:
        held = sorted(self.base.modules | self.base.tied_modules)
        named = {self.tensor(module): self._spelled(module) for module in held}
        return {tensor: module for tensor, module in named.items() if tensor}

    def _spelled(self, module: str) -> str:
        """A checkpoint's name as a model with a head has it."""
        start = f"{self.architecture.prefix}."
        return module if module == "lm_head" or module.startswith(start) else start + module


def rows_problem(module: str, ref: TensorRef, heads: int) -> list[str]:
    """What is wrong with reordering the rows of `ref` for so many heads."""
    if heads > 0 and ref.shape[0] % (2 * heads) == 0:
        return []
    return [
        f"{module}: {ref.shape[0]} rows are not made of {heads} heads: is the base another model?"
    ]
