"""LoRA on a convolution with groups: its first side sees all inputs, so no grouped weight can hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from adaptmerge.adapters.graph import Site
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Grouped:
    """outputs + scale * up * (down * inputs): two convolutions, the second 1x1 in groups.

    down (r, in, *kernel) over all inputs with the stride and padding of the module, and no dilation, as
    PEFT builds it; up (out, r / groups). The delta links inputs and outputs of different groups.
    """

    kind: ClassVar[str] = "grouped"
    family: ClassVar[str] = "lora"
    site: Site
    up: TensorRef
    down: TensorRef
    scale: float

    @property
    def groups(self) -> int:
        return self.down.shape[0] // self.up.shape[1]

    def forward(
        self, inputs: torch.Tensor, outputs: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """For a module of stride 1 without padding; `hooks` reads the module's own."""
        return outputs + self._added(inputs, 1, 0)

    def hooks(self, model: torch.nn.Module, path: str) -> list[Any]:
        """Hooks that let the module at `path` compute with the edit."""

        def after(module: Any, args: tuple[Any, ...], outputs: torch.Tensor) -> torch.Tensor:
            return outputs + self._added(args[0], module.stride, module.padding)

        return [model.get_submodule(path).register_forward_hook(after)]

    def _added(self, inputs: torch.Tensor, stride: Any, padding: Any) -> torch.Tensor:
        functional: Any = torch.nn.functional
        kernel = self.down.shape[2:]
        convolve = getattr(functional, f"conv{len(kernel)}d")
        up = self.up.read().to(inputs).reshape(*self.up.shape, *(1 for _ in kernel))
        hidden = convolve(inputs, self.down.read().to(inputs), stride=stride, padding=padding)
        added: torch.Tensor = convolve(hidden, up, groups=self.groups)
        return self.scale * added
