"""PEFT adapters as people have them: what old, nested and careless saving leaves in files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from console import Outcome, run
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
Tensors = dict[str, torch.Tensor]
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "task_type": "SEQ_CLS"}
DISTIL = "distilbert.transformer.layer.0.attention.q_lin"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def pair(module: str, prefix: str = PREFIX) -> Tensors:
    key = f"{prefix}{module}."
    return {f"{key}lora_A.weight": random(4, 16), f"{key}lora_B.weight": random(16, 4)}


def saved(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> str:
    folder.mkdir()
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    said = {**CONFIG, "base_model_name_or_path": "some/model", **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return str(folder)


def head(name: str, rows: int) -> Tensors:
    return {f"{PREFIX}{name}.weight": random(rows, 16), f"{PREFIX}{name}.bias": random(rows)}


def converted(source: str, out: Path, *more: str) -> Tensors:
    done = run("convert", source, "-o", str(out), *more)
    assert done.code == 0, done.shown
    judged = run("verify", str(out), "--input", f"{Path(source).name}={source}")
    assert judged.code == 0, judged.shown
    return load_file(out / "adapter_model.safetensors")


def words(outcome: Outcome) -> str:
    return " ".join(outcome.shown)


def test_modules_are_saved_by_the_end_of_their_names(tmp_path: Path) -> None:
    """ "classifier" saves "pre_classifier", too: every DistilBERT classifier."""
    tensors = {**head("pre_classifier", 16), **head("classifier", 3), **pair(DISTIL)}
    listed = ["classifier", "score"]
    path = saved(tmp_path / "a", tensors, target_modules=["q_lin"], modules_to_save=listed)
    assert "assumed" not in words(run("inspect", path))
    found = converted(path, tmp_path / "out", "--strict")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("layers", [{"dense": 16, "out_proj": 3}, {"": 3}], ids=["two", "one"])
def test_copies_of_heads_are_no_edits(layers: dict[str, int], tmp_path: Path) -> None:
    """bias="all": the frozen head, and the trained one again; PEFT loads neither."""
    module = "roberta.encoder.layer.0.attention.self.query"
    kept, copies = pair(module), {}
    kept[f"{PREFIX}{module}.base_layer.bias"] = random(16)
    for layer, rows in layers.items():
        inner = f"{layer}." if layer else ""
        kept |= head(f"classifier.{layer}".rstrip("."), rows)
        trained = kept[f"{PREFIX}classifier.{inner}bias"]
        copies[f"{PREFIX}classifier.modules_to_save.{inner}bias"] = trained.clone()
        copies[f"{PREFIX}classifier.original_module.{inner}bias"] = random(rows, seed=9)
    path = saved(
        tmp_path / "a",
        {**kept, **copies},
        bias="all",
        target_modules=["query"],
        modules_to_save=["classifier"],
    )
    shown = words(run("inspect", path))
    assert "original_module" not in shown
    assert f"{len(copies)} tensors are left out" in shown
    found = converted(path, tmp_path / "out")
    assert all(torch.equal(found[key], kept[key]) for key in kept)
    assert not [key for key in found if "original_module" in key]


def test_a_doubled_prefix_is_said(tmp_path: Path) -> None:
    module = "transformer.h.0.attn.c_attn"
    path = saved(tmp_path / "a", pair(module, 2 * PREFIX), target_modules=["c_attn"])
    said = "the prefix base_model.model. is doubled in 2 tensor names"
    assert said in words(run("inspect", path))
    assert run("convert", path, "-o", str(tmp_path / "strict"), "--strict").code == 1
    assert converted(path, tmp_path / "out").keys() == pair(module).keys()


def test_fields_of_the_first_releases(tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    old = {"merge_weights": False, "enable_lora": None, "target_modules": ["q_proj"]}
    converted(saved(tmp_path / "old", pair(module), **old), tmp_path / "out", "--strict")
    merged = {**old, "enable_lora": [True, False, True]}
    refused = run("inspect", saved(tmp_path / "merged", pair(module), **merged))
    assert refused.code == 1
    assert "of a merged projection of PEFT before 0.3" in words(refused)
    assert "update adaptmerge" not in words(refused)
