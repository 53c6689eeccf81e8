"""Small adapters made from the fixtures, for command lines: few sites, heads, damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
HEAD = "base_model.model.lm_head.weight"
KEPT = (".layers.0.self_attn.q_proj.", ".layers.0.self_attn.v_proj.", ".layers.1.mlp.up_proj.")


def make(folder: Path, fixtures: Path) -> None:
    """Fills `folder` with what the cases of tests/commands work on."""
    tiny = fixtures / "tinyllama"
    prose, code = tiny / "lora-r8-shakespeare", tiny / "lora-r8-cheaders"
    small(prose, folder / "prose")
    small(code, folder / "code")
    for number, source in ((2, prose), (10, code), (30, prose)):
        small(source, folder / "run" / f"checkpoint-{number}")
    with_head(folder / "prose", folder / "prose-headed", 1.0)
    with_head(folder / "code", folder / "code-headed", 2.0)
    other_base(folder / "code", folder / "stranger")
    damaged(folder / "prose", folder / "broken")
    lone = folder / "lone"
    lone.mkdir()
    shutil.copyfile(folder / "prose" / WEIGHTS, lone / "prose.safetensors")
    model(folder / "before", 0.0)
    model(folder / "after", 1.0)
    (folder / "empty.safetensors").touch()
    (folder / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "notes").mkdir()
    (folder / "notes" / "todo.txt").write_text("nothing here\n")


def small(source: Path, target: Path) -> None:
    """The adapter at three of its sites."""
    tensors = {
        key: value
        for key, value in load_file(source / WEIGHTS).items()
        if any(part in key for part in KEPT)
    }
    sites = sorted({key.split(".", 2)[2].rpartition(".lora_")[0] for key in tensors})
    save(target, tensors, {**config_of(source), "target_modules": sites})


def with_head(source: Path, target: Path, value: float) -> None:
    """The adapter with a trained head."""
    head = torch.full((1024, 128), value)
    config = {**config_of(source), "modules_to_save": ["lm_head"]}
    save(target, {**load_file(source / WEIGHTS), HEAD: head}, config)


def model(target: Path, tuned: float) -> None:
    """A full checkpoint of one layer; a tuned one has deltas of rank 2 and a little noise."""
    generator = torch.Generator().manual_seed(7)
    shapes = {"self_attn.q_proj": (16, 16), "mlp.up_proj": (24, 16), "input_layernorm": (16,)}
    tensors = {}
    for module, shape in shapes.items():
        value, noise = (torch.randn(shape, generator=generator) for _ in range(2))
        up, down = (torch.randn(n, 2, generator=generator) for n in (shape[0], shape[-1]))
        delta = up @ down.T + 0.1 * noise if len(shape) > 1 else 0.1 * noise
        tensors[f"model.layers.0.{module}.weight"] = value + tuned * delta
    target.mkdir(parents=True)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")


def other_base(source: Path, target: Path) -> None:
    config = {**config_of(source), "base_model_name_or_path": "someone/mistral-7b"}
    save(target, load_file(source / WEIGHTS), config)


def damaged(source: Path, target: Path) -> None:
    """The adapter with one NaN."""
    tensors = load_file(source / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save(target, tensors, config_of(source))


def config_of(source: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    return found


def save(target: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, object]) -> None:
    target.mkdir(parents=True)
    save_file(dict(tensors), target / WEIGHTS, {"format": "pt"})
    (target / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
