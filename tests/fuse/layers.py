"""A checkpoint of one random layer as bitsandbytes quantises it, a LoRA for it, and what a fusion did.

All by the definitions of the formats, in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import samples
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptmerge.commands.fuse import FuseOptions, FuseReport, fuse
from adaptmerge.formats.inputs import InputSpec

MODULE = "model.layers.0.mlp.up_proj"
FILE = "model.safetensors"


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(*shape: int, seed: int) -> Tensor:
    """Student's t with four degrees of freedom."""
    squares = sum(gaussian(*shape, seed=seed + number).square() for number in range(1, 5))
    return gaussian(*shape, seed=seed) / (torch.as_tensor(squares) / 4).sqrt()


def layer(
    folder: Path, kind: str, rows: int, columns: int, drawn: Callable[..., Tensor] = gaussian
) -> Path:
    """A base of one random layer: nf4 with float32 scales, nf4,double with quantised ones, int8 with one
    a row."""
    import bitsandbytes.functional as functional

    weight = 0.02 * drawn(rows, columns, seed=1)
    config: dict[str, Any] = {"quant_method": "bitsandbytes"}
    if kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        tensors = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0).byte()}
        config["load_in_8bit"] = True
    else:
        table, _, double = kind.partition(",")
        codes, state = functional.quantize_4bit(
            weight, quant_type=table, compress_statistics=bool(double)
        )
        parts = state.as_dict(packed=True)
        tensors = {"weight": codes, **{f"weight.{name}": value for name, value in parts.items()}}
        config |= {"load_in_4bit": True, "bnb_4bit_quant_type": table}
        config["bnb_4bit_use_double_quant"] = bool(double)
    folder.mkdir(parents=True)
    named = {f"{MODULE}.{name}": value.contiguous() for name, value in tensors.items()}
    save_file(named, folder / FILE, {"format": "pt"})
    text = json.dumps({"model_type": "llama", "quantization_config": config})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    """The tensors of the layer by their names in it."""
    tensors = load_file(folder / FILE)
    return {name.removeprefix(f"{MODULE}."): value for name, value in tensors.items()}


def values(folder: Path) -> Tensor:
    """What the stored layer stands for, float64."""
    tensors = stored(folder)
    if "SCB" in tensors:
        return tensors["weight"].double() * tensors["SCB"].double()[:, None] / 127
    state = next(value for name, value in tensors.items() if "bitsandbytes__" in name)
    said = json.loads(bytes(state.tolist()))
    pairs = tensors["weight"].view(-1)
    codes = torch.stack((pairs >> 4, pairs & 15), 1).flatten().int()
    scale = _scales(tensors, said).repeat_interleave(said["blocksize"])[: len(codes)]
    flat: Tensor = tensors["weight.quant_map"].double()[codes] * scale
    return flat.view(*said["shape"])


def _scales(tensors: dict[str, Tensor], said: dict[str, Any]) -> Tensor:
    """The scale of every block, float64."""
    absmax = tensors["weight.absmax"]
    if "weight.nested_absmax" not in tensors:
        return absmax.double()
    nested = tensors["weight.nested_absmax"].double()
    spread = nested.repeat_interleave(said["nested_blocksize"])[: len(absmax)]
    levels = tensors["weight.nested_quant_map"].double()[absmax.int()]
    found: Tensor = levels * spread + said["nested_offset"]
    return found


@dataclass(frozen=True)
class Fused:
    """What became of a layer: its values before and after, the delta, and what was reported."""

    before: Tensor
    after: Tensor
    delta: Tensor
    down: Tensor
    report: FuseReport

    @property
    def error(self) -> Tensor:
        return self.after - self.before - self.delta

    @property
    def sub(self) -> float:
        basis = torch.linalg.qr(self.down.T).Q
        return float((self.error @ basis).norm() / self.delta.norm())

    @property
    def frob(self) -> float:
        return float(self.error.norm() / self.delta.norm())


def with_lora(base: Path, folder: Path, ratio: float, rank: int = 16, **options: Any) -> Fused:
    """A LoRA with |delta| / |weight| of that ratio fused into a layer."""
    before = values(base)
    down = gaussian(rank, before.shape[1], seed=2)
    up = gaussian(before.shape[0], rank, seed=3)
    up *= ratio * float(before.norm()) / (2 * float((up @ down).norm()))  # alpha / r is 2
    adapter = samples.write(folder / "adapter", {MODULE: (down, up)})
    given = FuseOptions(**{"allow": frozenset({"base", "loss"}), **options})
    report = fuse(str(base), [InputSpec(str(adapter), "a")], folder / "out", given)
    delta = 2 * up.double() @ down.double()
    return Fused(before, values(folder / "out"), delta, down.double(), report)
