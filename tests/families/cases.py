"""Adapters of every PEFT family with non-trivial weights, as PEFT saves them, and what PEFT computes.

A module cases_*.py beside this one lists the CASES of some families; `all_cases()` finds them all.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import copies
import torch
from peft_cases import MODELS, TASKS, logits, pixel_inputs, save_adapter, token_inputs
from safetensors.torch import save_file
from torch import Tensor, nn

QV = ["q_proj", "v_proj"]
LINEARS = [*QV, "o_proj", "down_proj"]


@torch.no_grad()
def noise(model: nn.Module, size: float = 0.1) -> None:
    """Every trained parameter moved by random values of the seed that is set."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name in sorted(trained):
        added = torch.randn(trained[name].shape)
        trained[name].add_(size * added.to(trained[name].dtype))


@dataclass(frozen=True)
class FamilyCase:
    """One adapter: `config` is the name of a class of PEFT, `options` its arguments.

    tolerance: of the output error relative to the adapter's effect, in float64. merges: whether
    PEFT's own merge_and_unload is right for it (the forward always is the truth).
    """

    name: str
    config: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    model: str = "llama"
    tolerance: float = 1e-6
    merges: bool = True
    randomise: Callable[[nn.Module], None] = noise
    task: str | None = None

    @property
    def made_by(self) -> Callable[[], nn.Module]:
        """What makes the model, the same at every call."""
        return MODELS[self.model]

    def base_model(self) -> nn.Module:
        return copies.fresh(self.made_by)

    def inputs(self) -> dict[str, Tensor]:
        found = pixel_inputs() if self.model == "conv" else token_inputs()
        return {k: v.double() if v.is_floating_point() else v for k, v in found.items()}

    def save_base(self, folder: Path) -> Path:
        """The base as a checkpoint folder with a config."""
        model = self.base_model()
        if hasattr(model, "save_pretrained"):
            return copies.save(self.made_by, folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": f"tiny-{self.model}"}))
        return folder

    def build(self, folder: Path, seed: int = 0, **overrides: Any) -> Path:
        """Have PEFT save the adapter."""
        import peft

        kwargs = {"task_type": self.task or TASKS.get(self.model), **self.options, **overrides}
        with _quietly(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = peft.get_peft_model(
                self.base_model(), getattr(peft, self.config)(**kwargs)
            )
            self.randomise(model)
            save_adapter(model, folder)
        return folder

    def loaded(self, folder: Path) -> Any:
        """The base with the adapter as PEFT loads it, in float64."""
        from peft import PeftModel

        with _quietly():
            return PeftModel.from_pretrained(self.base_model(), folder).double().eval()

    def truth(self, folder: Path) -> Tensor:
        """The outputs of PEFT's own forward, unmerged."""
        with _quietly():
            return logits(self.loaded(folder), self.inputs())

    def plain(self) -> Tensor:
        """The outputs of the base."""
        of = type(self), self.made_by
        if of not in _PLAIN:
            _PLAIN[of] = logits(self.base_model().double(), self.inputs())
        return _PLAIN[of]

    def merged(self, folder: Path) -> dict[str, Tensor]:
        """The parameters after PEFT's own merge."""
        with _quietly():
            state: dict[str, Tensor] = self.loaded(folder).merge_and_unload().state_dict()
        return state


def family(name: str) -> tuple[str, str]:
    """What the first case stands for all of: PEFT's config and the model."""
    case = all_cases()[name]
    return case.config, case.model


_PLAIN: dict[tuple[type[FamilyCase], Callable[[], nn.Module]], Tensor] = {}


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def all_cases() -> dict[str, FamilyCase]:
    here = Path(__file__).parent
    names = sorted(m.name for m in pkgutil.iter_modules([str(here)]) if m.name.startswith("cases_"))
    found = [case for name in names for case in importlib.import_module(f"families.{name}").CASES]
    assert len({case.name for case in found}) == len(found), "two cases have one name"
    return {case.name: case for case in found}
