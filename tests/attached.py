"""What tests of attached adapters share: reading one, its error, and whether a model is as it was."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from adaptmerge.adapters.graph import Adapter
from adaptmerge.bases.base import Base
from adaptmerge.files.listing import Listing
from adaptmerge.formats.format import ReadOptions
from adaptmerge.formats.peft import read


def read_adapter(folder: Path, base: Base | None = None) -> Adapter:
    return read(Listing.of(folder, str(folder)), ReadOptions(base=base)).single


def error(y: Tensor, y_true: Tensor, y_base: Tensor) -> float:
    """The difference relative to what the adapter changes."""
    effect = (y_true - y_base).norm()
    assert effect > 1e-3 * y_base.norm()
    return float((y - y_true).norm() / effect)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
