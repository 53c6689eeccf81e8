"""Every tensor and every entry of a quantised base changed: refused in a sentence, or fused into."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import console
import pytest
import samples
import torch
from damage import damaged
from safetensors.torch import load_file, save_file

QUANTISED = Path(__file__).resolve().parents[2] / "fixtures" / "quantised"
NAMES = sorted(path.parent.name for path in QUANTISED.glob("*/model.safetensors"))
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2.5,
    "x",
    "",
    [],
    {},
    [1],
    {"x": 1},
    [[1]],
    1 << 70,
    "\ud800",
)


def changed(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The config with one value, at any depth, of another kind."""
    for key, value in config.items():
        for other in VALUES:
            yield f"{key}: {other!r}", {**config, key: other}
        if isinstance(value, dict):
            for said, inner in changed(value):
                yield f"{key}.{said}", {**config, key: inner}


def adapter(folder: Path, name: str) -> Path:
    """A LoRA for the weights of a base."""
    expected = load_file(QUANTISED / name / "expected.safetensors")
    sides = {
        module: (torch.ones(2, weight.shape[1]), 0.01 * torch.ones(weight.shape[0], 2))
        for module, weight in expected.items()
        if weight.ndim == 2
    }
    samples.write(folder / "adapter", sides)
    return folder / "adapter"


def fuse(folder: Path, said: str) -> int:
    """The exit code of fusing, which may be refused; nothing of it stays."""
    given = ("--allow", "base,loss,nonfinite", "--max-loss", "100")
    out = folder / "out"
    outcome = console.run(
        "fuse", *map(str, (folder / "base", folder / "adapter", "-o", out)), *given
    )
    assert outcome.code in (0, 1), said
    assert outcome.code == 0 or outcome.stderr.startswith("error: "), said
    assert outcome.code == 0 or not out.exists(), said
    shutil.rmtree(out, ignore_errors=True)
    return outcome.code


def codes(name: str, folder: Path, step: int) -> set[int]:
    """The exit codes of fusing into the base, each time with something changed."""
    shutil.copytree(QUANTISED / name, folder / "base")
    adapter(folder, name)
    file, config = folder / "base" / "model.safetensors", folder / "base" / "config.json"
    tensors, said_of_all = load_file(file), json.loads(config.read_text("utf-8"))
    found = set()
    for said, others in islice(damaged(tensors), 0, None, step):
        save_file(others, file)
        found.add(fuse(folder, said))
    save_file(tensors, file)
    for said, other in islice(changed(said_of_all), 0, None, step):
        config.write_text(json.dumps(other), encoding="utf-8")
        found.add(fuse(folder, said))
    return found


@pytest.mark.parametrize("name", ["gptq-v1", "ct-int4", "hqq-4bit"])
def test_a_changed_base_is_refused_or_fused_into(name: str, tmp_path: Path) -> None:
    assert 1 in codes(name, tmp_path, 101)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_changed_base_is_refused_or_fused_into(name: str, tmp_path: Path) -> None:
    assert 1 in codes(name, tmp_path, 1)
