"""One forward for several adapters, each on its own rows of a batch: a base's weights are read once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from adaptmerge.adapters import experts
from adaptmerge.adapters.graph import Adapter
from adaptmerge.lazy import torch
from adaptmerge.runtime.attach import as_built, attach, editings, resolve
from adaptmerge.runtime.editing import Editing
from adaptmerge.runtime.models import outputs_of
from adaptmerge.runtime.places import is_activation

Inputs = Mapping[str, "torch.Tensor"]  # a name, so that importing this imports no torch


def outputs_of_each(
    model: torch.nn.Module, inputs: Inputs, adapters: Sequence[Adapter | None]
) -> list[torch.Tensor]:
    """The outputs of the model with each adapter (None: of the base), float32, on the CPU.

    In one forward where all that they edit sees whole rows of the batch; else one after the other. Raises
    InputError with all edits that have no place in the model.
    """
    if all(adapter is None or _keeps_rows(adapter) for adapter in adapters):
        try:
            return _together(model, inputs, adapters)
        except _Inseparable:
            pass
    return [_alone(model, inputs, adapter) for adapter in adapters]


class _Inseparable(Exception):
    """A module that is edited does not see the rows of the batch apart."""


def _alone(model: torch.nn.Module, inputs: Inputs, adapter: Adapter | None) -> torch.Tensor:
    if adapter is None:
        return outputs_of(model, inputs)
    with attach(model, adapter):
        return outputs_of(model, inputs)


def _keeps_rows(adapter: Adapter) -> bool:
    """Whether the adapter leaves the length of inputs, the layers and what flows to parameters alone."""
    return not adapter.base.replication and not any(map(is_activation, adapter.edits))


def _together(
    model: torch.nn.Module, inputs: Inputs, adapters: Sequence[Adapter | None]
) -> list[torch.Tensor]:
    count = len(adapters)
    placed = [_placed(model, adapter) for adapter in adapters]
    paths = dict.fromkeys(path for found in placed for path in found)
    if any(experts.matrix_of(path) for path in paths):
        raise _Inseparable  # called with the tokens that were routed to it
    wide = {name: torch.cat([value] * count) for name, value in inputs.items()}
    sizes = _sizes(wide)
    parted = [_Parted([found.get(path) for found in placed], sizes) for path in paths]
    with ExitStack() as undo:
        for module in parted:
            undo.enter_context(module.active())
        outputs = outputs_of(model, wide)
    rows = {value.shape[0] for value in wide.values()}
    if outputs.shape[0] % count or rows & set(outputs.shape[1:]):
        raise _Inseparable  # as where each text is compared with each image
    return list(torch.chunk(outputs, count))


def _placed(model: torch.nn.Module, adapter: Adapter | None) -> dict[str, Editing]:
    if adapter is None:
        return {}
    built = as_built(model, adapter)
    return editings(model, built, resolve(model, built))


def _sizes(inputs: Inputs) -> Collection[int]:
    """First dimensions that have every row of the batch: of rows, or of tokens of rows."""
    rows = {value.shape[0] for value in inputs.values()}
    tokens = {value.shape[0] * value.shape[1] for value in inputs.values() if value.ndim > 1}
    return rows | tokens


@dataclass(frozen=True)
class _Parted:
    """A module that is called once for each adapter's rows, with that adapter's edits."""

    parts: Sequence[Editing | None]
    sizes: Collection[int]

    @contextmanager
    def active(self) -> Iterator[None]:
        """While active, the module's forward is this one's."""
        caller = next(part.caller for part in self.parts if part is not None)
        own = caller.__dict__.get("forward")
        forward = caller.forward

        def parted(*args: Any, **kwargs: Any) -> Any:
            if args and all(part is None or part.starts_beside() for part in self.parts):
                return self._beside(args[0], forward(*args, **kwargs))
            return self._joined([self._call(forward, k, args, kwargs) for k in range(self.count)])

        caller.forward = parted
        try:
            yield
        finally:
            del caller.forward
            if own is not None:
                caller.forward = own

    @property
    def count(self) -> int:
        """The number of parts of the batch."""
        return len(self.parts)

    def _beside(self, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """One call for all rows, what the edits add for the rows of each."""
        pairs = [(self._part(inputs, k), self._part(outputs, k)) for k in range(self.count)]
        done = [
            after if part is None else part.finish((before,), after)
            for part, (before, after) in zip(self.parts, pairs, strict=True)
        ]
        return torch.cat(done)

    def _call(self, forward: Any, number: int, args: Any, kwargs: Any) -> Any:
        own = tuple(self._part(value, number) for value in args)
        named = {name: self._part(value, number) for name, value in kwargs.items()}
        if not any(isinstance(value, torch.Tensor) for value in (*own, *named.values())):
            raise _Inseparable
        editing = self.parts[number]
        if editing is None:
            return forward(*own, **named)
        editing.start()
        try:
            return editing.finish(own, forward(*own, **named))
        finally:
            editing.restore()

    def _part(self, value: Any, number: int) -> Any:
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            return value
        if value.shape[0] not in self.sizes:
            raise _Inseparable
        return torch.chunk(value, self.count)[number]

    def _joined(self, outputs: Sequence[Any]) -> Any:
        first = outputs[0]
        if isinstance(first, tuple):
            return tuple(self._joined(parts) for parts in zip(*outputs, strict=True))
        if not isinstance(first, torch.Tensor):
            return first
        if len({value.shape[1:] for value in outputs}) > 1:
            raise _Inseparable
        return torch.cat(list(outputs))
