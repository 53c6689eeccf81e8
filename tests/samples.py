"""Plain LoRA folders written and read by hand, with nothing of the package under test."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
SHAPE = (12, 9)
Sides = tuple[Tensor, Tensor]


def random_sides(
    seed: int,
    rank: int = 3,
    modules: Sequence[str] = MODULES,
    shape: tuple[int, int] = SHAPE,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Sides]:
    """Module to (A, B)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        module: (
            torch.randn(rank, shape[1], generator=generator).to(dtype),
            torch.randn(shape[0], rank, generator=generator).to(dtype),
        )
        for module in modules
    }


def keys_of(sides: Mapping[str, Sides], prefix: str = PREFIX) -> dict[str, Tensor]:
    tensors = {}
    for module, (a, b) in sides.items():
        tensors[f"{prefix}{module}.lora_A.weight"] = a
        tensors[f"{prefix}{module}.lora_B.weight"] = b
    return tensors


def write(
    folder: Path,
    sides: Mapping[str, Sides],
    *,
    tensors: Mapping[str, Tensor] | None = None,
    without: Sequence[str] = (),
    **config: Any,
) -> Path:
    """A folder with these sides, further `tensors`, and a config that fits unless told otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = [a.shape[0] for a, _ in sides.values()]
    rank = ranks[0] if ranks else 1
    values = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in sides}),
        "base_model_name_or_path": "tiny/base",
        **config,
    }
    table = {key: value for key, value in values.items() if key not in without}
    (folder / CONFIG).write_text(json.dumps(table), encoding="utf-8")
    save_file({**keys_of(sides), **(tensors or {})}, folder / WEIGHTS)
    return folder


def adapter(folder: Path, seed: int, rank: int = 3, **options: Any) -> Path:
    """A random adapter on MODULES."""
    return write(folder, random_sides(seed, rank), **options)


def tensors_of(path: Path) -> dict[str, Tensor]:
    return load_file(path / WEIGHTS)


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / CONFIG).read_text())
    return found


def _pattern(table: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    hits = (v for k, v in (table or {}).items() if re.match(rf"(.*\.)?({k})$", module))
    return next(hits, default)


def deltas(path: Path) -> dict[str, Tensor]:
    """Module to dense delta in float64, by PEFT's definition of the scale."""
    config, tensors = config_of(path), tensors_of(path)
    found = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            rank = _pattern(config.get("rank_pattern"), module, config["r"])
            assert rank == a.shape[0] == b.shape[1]
            alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
            root = math.sqrt(rank) if config.get("use_rslora") else rank
            found[module] = alpha / root * (b.double() @ a.double())
    return found


def weighted_sum(paths: Sequence[Path], weights: Sequence[float]) -> dict[str, Tensor]:
    """The true sum; a module that an adapter lacks counts as zero."""
    total: dict[str, Tensor] = {}
    for path, weight in zip(paths, weights, strict=True):
        for module, delta in deltas(path).items():
            total[module] = total.get(module, torch.zeros_like(delta)) + weight * delta
    return total


def distance(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """The Frobenius distance over all modules; a missing module is zero."""
    total = 0.0
    for module in {**one, **two}:
        some = one.get(module, two.get(module))
        assert some is not None
        zero = torch.zeros_like(some)
        total += float((one.get(module, zero) - two.get(module, zero)).square().sum())
    return math.sqrt(total)


def size(found: Mapping[str, Tensor]) -> float:
    return distance(found, {})


def same_bits(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    """Equal keys, dtypes, shapes and bits."""
    return one.keys() == two.keys() and all(
        one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]) for key in one
    )


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, to see that nothing was written."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
