"""Edits of what flows through a module: a small network beside it, or a gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.algebra.factors import Factor
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef


@runtime_checkable
class ActivationEdit(Edit, Protocol):
    """An edit of what flows through a module."""

    def forward(
        self, inputs: torch.Tensor, outputs: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """The new outputs of the module, from its inputs, outputs and the residual beside it."""


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """A small network beside a block: out + up(act(down(source))) (Houlsby et al. 2019).

    source is "sum" (block output plus residual), "output" or "residual"; `site.module` is the decoder
    or encoder layer and `site.place` the sub-block of it whose output is changed ("attention", "mlp").
    """

    kind: ClassVar[str] = "bottleneck"
    site: Site
    down: TensorRef
    down_bias: TensorRef
    up: TensorRef
    up_bias: TensorRef
    activation: str
    source: str = "sum"
    scale: float = 1.0

    def forward(
        self, inputs: torch.Tensor, outputs: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor:
        from transformers.activations import get_activation

        assert residual is not None
        source = {"sum": outputs + residual, "output": outputs, "residual": residual}[self.source]
        linear = torch.nn.functional.linear
        hidden = linear(source, self.down.read().to(source), self.down_bias.read().to(source))
        hidden = get_activation(self.activation)(hidden)
        added = linear(hidden, self.up.read().to(source), self.up_bias.read().to(source))
        return outputs + self.scale * added


@dataclass(frozen=True, slots=True)
class Gated:
    """An additive edit times an input-dependent gate: g * delta @ x, g = mean over positions of
    sigmoid(gate_weight @ x + gate_bias)."""

    kind: ClassVar[str] = "gated"
    site: Site
    factor: Factor
    gate_weight: TensorRef
    gate_bias: TensorRef

    def forward(
        self, inputs: torch.Tensor, outputs: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor:
        linear = torch.nn.functional.linear
        logits = linear(
            inputs, self.gate_weight.read().to(inputs), self.gate_bias.read().to(inputs)
        )
        gate = torch.sigmoid(logits).mean(dim=1, keepdim=True)
        return outputs + gate * linear(inputs, self.factor.dense().to(inputs))
