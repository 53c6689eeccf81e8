"""The tiny Llama of the fixtures and its adapters with the first two of four layers: half the work."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

LAYERS = 2
Tiny = Callable[[str], Path]


def cut(source: Path, folder: Path) -> Path:
    """A copy of a base or an adapter without the layers that follow."""
    shutil.copytree(source, folder)
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file({name: tensors[name] for name in tensors if _layer(name) < LAYERS}, path, metadata)
    config = folder / "config.json"
    if config.exists():
        said = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps({**said, "num_hidden_layers": LAYERS}), encoding="utf-8")
    return folder


def _layer(name: str) -> int:
    """The layer that a tensor is of; what is of none counts as of the first."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else 0
