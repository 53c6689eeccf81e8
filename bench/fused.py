"""An adapter fused into a base, by fuse() or by PEFT, and what is left of it in the files written."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from adaptmerge.commands.fuse import FuseOptions
from adaptmerge.commands.fuse import fuse as fuse_with_adaptmerge
from adaptmerge.formats.inputs import InputSpec
from bench.shapes import CONFIG, TENSORS

NEAREST, STOCHASTIC, ADAPTIVE = "nearest", "stochastic", "adaptive"
# PEFT holds adapters in float32, or on request in the dtype of the base
PEFT, PEFT_16 = "PEFT", "PEFT, 16 bits"
WAYS = (NEAREST, STOCHASTIC, ADAPTIVE, PEFT, PEFT_16)
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16}
MODEL = "model.safetensors"
UP, DOWN = ".lora_B.weight", ".lora_A.weight"


class Loss(NamedTuple):
    """Sums over entries: weight and delta squared, error times delta, squared error inside."""

    weight: float
    delta: float
    inner: float
    inside: float

    @property
    def gain(self) -> float:
        """How much of the delta arrived: 1 is all."""
        return 1 + self.inner / self.delta

    @property
    def sub(self) -> float:
        """The error in the space of the adapter's inputs, relative to the delta."""
        return math.sqrt(self.inside / self.delta)


def fuse(way: str, base: str, adapter: str, weight: float, output: Path) -> Mapping[str, Loss]:
    """Fuses in one of WAYS; the loss of every module, in float64 from the files written."""
    shutil.rmtree(output, ignore_errors=True)
    if way in (PEFT, PEFT_16):
        _fuse_with_peft(base, adapter, weight, output, wide=way == PEFT)
    else:
        options = FuseOptions(rounding=way, allow=frozenset({"loss"}))
        fuse_with_adaptmerge(base, [InputSpec(adapter, weight=weight)], output, options)
    return losses(base, adapter, weight, str(output))


def losses(base: str, adapter: str, weight: float, fused: str) -> Mapping[str, Loss]:
    """What became of a LoRA of every module, by the plain definitions."""
    before, after = (load_file(Path(folder) / MODEL) for folder in (base, fused))
    found = {}
    for module, up, down in factors(adapter, weight):
        start, end = (tensors[f"{module}.weight"].double() for tensors in (before, after))
        delta = up @ down
        error = end - start - delta
        basis, _ = torch.linalg.qr(down.T)
        found[module] = Loss(
            float(start.square().sum()),
            float(delta.square().sum()),
            float((error * delta).sum()),
            float((error @ basis).square().sum()),
        )
    return found


def total(found: Mapping[str, Loss]) -> Loss:
    """The loss over all modules."""
    return Loss(*map(sum, zip(*found.values(), strict=True)))


def relative(base: str, adapter: str) -> float:
    """|dW|/|W| of an adapter at weight 1."""
    sums = total(losses(base, adapter, 1.0, base))
    return math.sqrt(sums.delta / sums.weight)


def factors(adapter: str, weight: float) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    config = json.loads((Path(adapter) / CONFIG).read_text())
    scale = weight * config["lora_alpha"] / config["r"]
    tensors = load_file(Path(adapter) / TENSORS)
    for name in [name for name in tensors if name.endswith(DOWN)]:
        key = name.removesuffix(DOWN)
        up, down = tensors[key + UP].double() * scale, tensors[name].double()
        yield key.removeprefix("base_model.model."), up, down


def _fuse_with_peft(base: str, adapter: str, weight: float, output: Path, *, wide: bool) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = json.loads((Path(base) / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, config["dtype"]))
    with_adapter = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=wide)
    weigh(with_adapter, weight)
    with_adapter.merge_and_unload().save_pretrained(output)


def weigh(model: torch.nn.Module, weight: float) -> None:
    """Scales the adapter of a PEFT model."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", weight)
