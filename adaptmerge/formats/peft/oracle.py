"""PEFT itself, where installed, as the judge of what an adapter on disk computes."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaptmerge.files.safetensors import read_header
from adaptmerge.formats.peft.config import CONFIG, METADATA_KEY, WEIGHTS
from adaptmerge.lazy import torch
from adaptmerge.registry import Oracle


@contextmanager
def _quietly() -> Iterator[None]:
    """PEFT's warnings are about its own calls, not about the adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _as_folder(path: Path) -> Iterator[Path]:
    """The adapter as the folder that PEFT loads; a lone file is linked into a temporary one."""
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / WEIGHTS[0]).symlink_to(path.resolve())
        config = json.loads(read_header(path).metadata[METADATA_KEY])
        (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        yield folder


def deltas(model: Any, path: Path) -> dict[str, torch.Tensor]:
    """Module path to delta (out, in) in float64, as PEFT computes it, for families that have one."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    with _quietly(), _as_folder(path) as folder:
        wrapped = PeftModel.from_pretrained(model, str(folder)).double()
    found = {}
    for name, module in wrapped.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default")
            delta = delta.T if getattr(module, "fan_in_fan_out", False) else delta
            found[name] = delta.detach().flatten(1)
    return found


def forward(model: Any, path: Path, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The first output (logits or hidden states) of `model` with the adapter loaded by PEFT."""
    from peft import PeftModel

    with _quietly(), _as_folder(path) as folder:
        wrapped = PeftModel.from_pretrained(model, str(folder)).eval()
    with torch.no_grad():
        outputs: torch.Tensor = wrapped(**inputs)[0]
    return outputs


ORACLE = Oracle("peft", deltas, forward)
