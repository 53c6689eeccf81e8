"""Fusing in tests: base models on disk, what `transformers` makes of the result, and errors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import copies
import torch
from families.cases import FamilyCase
from peft_cases import DECODER_SIZES, MODELS, logits, seeded
from safetensors.torch import load_file
from torch import Tensor, nn

from adaptmerge.commands.fuse import FuseOptions, FuseReport
from adaptmerge.commands.fuse import fuse as fuse_into
from adaptmerge.formats.inputs import InputSpec

SHARD = "60KB"  # gives every tiny model several files


def llama_tied() -> nn.Module:
    """As `peft_cases.llama`, with one matrix for tokens and head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {**DECODER_SIZES, "tie_word_embeddings": True}
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**sizes)))


MODELS["llama_tied"] = llama_tied


def llama_base(
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    shard: str | None = None,
    **sizes: Any,
) -> Path:
    """A random Llama in a dtype as `transformers` saves it."""

    def write(place: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(**{**DECODER_SIZES, **sizes})
        model: Any = seeded(lambda: LlamaForCausalLM(config)).to(dtype)
        model.save_pretrained(place, **({"max_shard_size": shard} if shard else {}))

    return copies.written(f"llama {dtype} {shard} {sorted(sizes.items())}", write, folder)


def ia3(base: Path, folder: Path, seed: int, modules: list[str]) -> Path:
    """Scales from 0.6 to 1.4 of outputs, of down_proj of what goes into it."""
    from peft import IA3Config, get_peft_model
    from transformers import AutoModelForCausalLM

    forward = [module for module in modules if module == "down_proj"]
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, IA3Config(target_modules=modules, feedforward_modules=forward))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.data = 0.6 + 0.8 * torch.rand(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def save_in_shards(case: FamilyCase, folder: Path, size: str = SHARD) -> Path:
    """The base of a case; in several files where `transformers` writes it."""
    model: Any = case.base_model()
    if not hasattr(model, "save_pretrained"):
        return case.save_base(folder)
    key = "shards", case.made_by, size
    copies.written(key, lambda place: model.save_pretrained(place, max_shard_size=size), folder)
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def fuse(
    base: Path, adapters: Mapping[Path, float] | Sequence[Path], output: Path, **options: Any
) -> FuseReport:
    """Fuses adapters, each with its weight if they have one."""
    weights: Mapping[Path, float | None]
    weights = adapters if isinstance(adapters, Mapping) else dict.fromkeys(adapters)
    specs = [InputSpec(str(path), weight=weight) for path, weight in weights.items()]
    return fuse_into(str(base), specs, output, FuseOptions(**options))


def load(folder: Path, like: nn.Module) -> nn.Module:
    """The model in a folder as its own library loads it, in float64, nothing missing and nothing left."""
    if not hasattr(like, "save_pretrained"):
        like.load_state_dict(load_file(folder / "model.safetensors"))
        return like.double()
    import transformers

    config = json.loads((folder / "config.json").read_text())
    kind: Any = getattr(transformers, config["architectures"][0])
    own: Any = like
    experts = (
        {"experts_implementation": "eager"} if hasattr(own.config, "num_experts_per_tok") else {}
    )
    model, report = kind.from_pretrained(folder, output_loading_info=True, **experts)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    loaded: nn.Module = model.double().eval()
    return loaded


def outputs(folder: Path, case: FamilyCase) -> Tensor:
    """What a fused model computes for the inputs of a case."""
    return logits(load(folder, case.base_model()), case.inputs())


def error(found: Tensor, truth: Tensor, plain: Tensor) -> float:
    """Relative to the adapters' effect, which must be one."""
    effect = (truth - plain).norm()
    assert effect > 1e-3 * plain.norm(), "the adapter does nothing: no proof"
    return float((found - truth).norm() / effect)


def changed(
    found: Mapping[str, Tensor], truth: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> float:
    """The error of parameters, relative to how far they have moved."""
    assert found.keys() == truth.keys()
    moved = sum(float((truth[k].double() - before[k]).square().sum()) for k in truth if k in before)
    apart = sum(float((found[k].double() - truth[k]).square().sum()) for k in truth)
    assert moved > 0, "the adapter does nothing: no proof"
    return float((apart / moved) ** 0.5)
