"""aLoRA: a LoRA that acts from the last invocation sequence of its input on (Greenewald et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.algebra.factors import Factor
from adaptmerge.lazy import torch


@dataclass(frozen=True, slots=True)
class Alora:
    """outputs + inputs @ delta^T at the positions from the last occurrence of `tokens` to the end.

    For the parameter "bias" the delta is a column, added at the same positions. Rows of a batch in
    which the tokens do not occur are the base's.
    """

    kind: ClassVar[str] = "alora"
    family: ClassVar[str] = "lora"
    site: Site
    factor: Factor
    tokens: tuple[int, ...]

    def delta(self) -> Factor | None:
        """What is added to the parameter where it acts."""
        return self.factor

    def forward(
        self, inputs: torch.Tensor, outputs: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """The outputs with the edit at all positions: at which it acts, only the model's tokens say."""
        delta = self.factor.dense().to(outputs)
        if self.site.param == "bias":
            return outputs + delta.flatten()
        return outputs + torch.nn.functional.linear(inputs, delta)

    def hooks(self, model: torch.nn.Module, path: str) -> list[Any]:
        """Hooks that let the module at `path` compute with the edit; the model must be given input_ids."""
        seen = _Invoked(self.tokens)

        def after(_: Any, args: tuple[Any, ...], kwargs: Any, outputs: torch.Tensor) -> Any:
            inputs = [*args, *kwargs.values()][0]
            active = seen.mask(outputs)
            return torch.where(active, self.forward(inputs, outputs, None), outputs)

        return [
            model.register_forward_pre_hook(seen.look, with_kwargs=True),
            model.get_submodule(path).register_forward_hook(after, with_kwargs=True),
        ]


@dataclass(eq=False)
class _Invoked:
    """Where the invocation of each row of the batch begins, counted from the end; 0: nowhere."""

    tokens: tuple[int, ...]
    counts: list[int] = field(default_factory=list)

    def look(self, _: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        """Before a forward of the model; one that continues a cache keeps what began before it."""
        if self.counts and _cached(kwargs):
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.counts = [] if ids is None else [self._count(row.tolist()) for row in ids]

    def _count(self, row: list[int]) -> int:
        size = len(self.tokens)
        starts = (
            i for i in range(len(row) - size, -1, -1) if tuple(row[i : i + size]) == self.tokens
        )
        return len(row) - next(starts, len(row))

    def mask(self, outputs: torch.Tensor) -> torch.Tensor:
        """(batch, positions, 1): true where the edit acts."""
        if len(self.counts) != outputs.shape[0]:
            return torch.zeros(1, dtype=torch.bool, device=outputs.device)
        length = outputs.shape[1]
        counts = torch.tensor(self.counts, device=outputs.device).clamp(max=length)
        places = torch.arange(length, device=outputs.device)
        return (places[None, :] >= length - counts[:, None])[..., None]


def _cached(kwargs: Any) -> bool:
    cache = kwargs.get("past_key_values")
    return cache is not None and (
        not hasattr(cache, "get_seq_length") or cache.get_seq_length() > 0
    )


def invoked_by(edit: Edit) -> tuple[int, ...]:
    """The tokens after which an edit acts; none for one that always does."""
    return edit.tokens if isinstance(edit, Alora) else ()
