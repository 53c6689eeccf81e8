"""The adapters and models that are measured on: made once, in a folder of their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.combining import as_dora, make_dora, make_experts, make_layer
from bench.models import make_model, make_model_adapter
from bench.nf4_model import SCALE, make_nf4_model
from bench.shapes import CONFIG, make_adapter, make_large, squares


class Data:
    """Synthetic adapters and models in a folder, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def adapters(self, count: int, layers: int) -> list[str]:
        """`count` adapters of the seven linears of that many layers."""
        make = partial(make_adapter, layers=layers)
        return [self._once(f"{layers}-layers-{i}", partial(make, seed=i)) for i in range(count)]

    def squares(self, count: int, layers: int, size: int) -> list[str]:
        """`count` adapters of two size x size linears per layer."""
        make = partial(make_adapter, layers=layers, shapes=squares(size))
        name = f"{layers}-square-{size}"
        return [self._once(f"{name}-{i}", partial(make, seed=i)) for i in range(count)]

    def large(self, layers: int, rank: int) -> str:
        """One adapter of that many layers and that rank."""
        return self._once(f"large-{layers}-{rank}", partial(make_large, layers=layers, rank=rank))

    def layer(self) -> str:
        """A base of one layer."""
        return self._once("layer", make_layer, "config.json")

    def doras(self, count: int) -> list[str]:
        """`count` DoRAs of that layer."""
        make = partial(make_dora, base=Path(self.layer()))
        return [self._once(f"dora-{i}", partial(make, seed=i)) for i in range(count)]

    def experts(self, count: int) -> list[str]:
        """`count` adapters of stacked experts."""
        return [self._once(f"experts-{i}", partial(make_experts, seed=i)) for i in range(count)]

    def model(self, size: str) -> str:
        """A base model of that size."""
        return self._once(f"model-{size}", partial(make_model, size=size), "config.json")

    def model_adapter(self, size: str, seed: int = 0) -> str:
        """An adapter of all linears of the model of that size."""
        make = partial(make_model_adapter, size=size, seed=seed)
        return self._once(f"model-{size}-adapter-{seed}", make)

    def model_dora(self, size: str, seed: int) -> str:
        """A DoRA of all linears of the model of that size."""
        base = Path(self.model(size))

        def make(folder: Path) -> Path:
            lora = make_model_adapter(folder, size=size, seed=seed)
            return as_dora(lora, base=base, seed=seed)

        return self._once(f"model-{size}-dora-{seed}", make)

    def nf4_model(self, size: str) -> str:
        """A base model of that size in NF4."""
        return self._once(f"nf4-{size}", partial(make_nf4_model, size=size), "config.json")

    def nf4_model_adapter(self, size: str) -> str:
        """An adapter of it, with larger deltas than that of the model in bfloat16."""
        make = partial(make_model_adapter, size=size, scale=SCALE)
        return self._once(f"nf4-{size}-adapter", make)

    def output(self, case: str) -> str:
        """Where a case may write."""
        return str(self.folder / f"out-{case}")

    def _once(self, name: str, make: Callable[[Path], Path], last: str = CONFIG) -> str:
        path = self.folder / name
        if not (path / last).exists():  # the file that is written last
            shutil.rmtree(path, ignore_errors=True)
            make(path)
        return str(path)
