"""A module that computes with edits: thin ones beside it, all others as an edited copy of its parameters.

A copy takes the place of a parameter just before the forward that uses it and is dropped right after, so
at most one module's copies exist at a time, weights tied to another module stay as they are there, and
the originals are never written to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from adaptmerge.adapters.stored_edits import Replace
from adaptmerge.adapters.weight_edits import WeightEdit, is_formed
from adaptmerge.algebra.forms import Form, added
from adaptmerge.lazy import torch

_ACTIVE: WeakKeyDictionary[torch.nn.Module, list[Editing]] = WeakKeyDictionary()


@dataclass(eq=False)
class Editing:
    """The edits of one module during the caller's forward only, by parameter.

    Of contexts that nest only the innermost acts, with the edits of all of them in their order.
    """

    module: torch.nn.Module
    caller: torch.nn.Module
    edits: dict[str, list[WeightEdit]] = field(default_factory=dict)
    originals: dict[str, torch.nn.Parameter | None] = field(default_factory=dict)
    beside: Beside | None = None
    keeps: bool = False  # what was found beside a weight that stays in memory

    def register(self) -> list[Any]:
        """The hooks; what follows a forward comes before hooks that were there, as of releasing weights."""
        self.edits = self._with_outer()
        weight = self.module._parameters.get("weight")
        self.keeps = weight is not None and not weight.is_meta
        _ACTIVE.setdefault(self.module, []).append(self)
        return [
            self.caller.register_forward_pre_hook(lambda *_: self._before()),
            self.caller.register_forward_hook(
                lambda _, args, output: self._after(args, output), prepend=True, always_call=True
            ),
        ]

    def leave(self) -> None:
        """Out of the way of an outer context, with the parameters as they were."""
        self.restore()
        active = _ACTIVE.get(self.module, [])
        if self in active:
            active.remove(self)

    def _with_outer(self) -> dict[str, list[WeightEdit]]:
        outer = _ACTIVE.get(self.module)
        before = outer[-1].edits if outer else {}
        names = dict.fromkeys([*before, *self.edits])
        return {name: [*before.get(name, ()), *self.edits.get(name, ())] for name in names}

    def _before(self) -> None:
        if _ACTIVE[self.module][-1] is self:
            self.start()

    def _after(self, args: tuple[Any, ...], output: Any) -> Any:
        if _ACTIVE[self.module][-1] is self:
            return self.finish(args, output)
        return None

    def start(self) -> None:
        """Before a forward: sides beside the module, or edited parameters in it."""
        if not self.starts_beside():
            self._put()

    def starts_beside(self) -> bool:
        """Whether the forward needs no edited parameters: then sides are at hand for what follows it."""
        weight = self.module._parameters.get("weight")
        seen = None if weight is None else (weight.data_ptr(), weight._version)
        if self.beside is None or self.beside.seen != seen:
            self.beside = beside(self.module, self.caller, self.edits)
        return self.beside is not None

    def finish(self, args: tuple[Any, ...], output: Any) -> Any:
        """After it: the output with what the edits add, or the originals put back."""
        if self.beside is None or output is None or not args:
            self.restore()
            return output
        done = self.beside(args[0], output)
        self.beside = self.beside if self.keeps else None
        return done

    def _put(self) -> None:
        for name, edits in self.edits.items():
            original = self.module._parameters[name]
            edited = self._edited(original, edits)
            self.originals.setdefault(name, original)
            self.module._parameters[name] = edited

    def restore(self) -> None:
        """Puts back the originals."""
        for name, original in self.originals.items():
            self.module._parameters[name] = original
        self.originals.clear()

    def _edited(
        self, original: torch.nn.Parameter | None, edits: list[WeightEdit]
    ) -> torch.nn.Parameter | None:
        with torch.no_grad():
            start = zero_bias(self.module) if original is None else original.detach()
            whole = [edit for edit in edits if edit.site.expert is None]
            value = apply_edits(start, whole, transposed=is_transposed(self.module))
            _apply_to_experts(value, edits, transposed=stacks_transposed(self.module))
        if original is None and not bool(value.any()):
            return None
        return torch.nn.Parameter(value, requires_grad=False)


@dataclass(frozen=True)
class Beside:
    """What is added to the outputs of a linear or an embedding: rows * W x + up (down x)."""

    up: torch.Tensor
    down: torch.Tensor
    rows: torch.Tensor | None
    bias: torch.Tensor | None
    looks_up: bool
    seen: tuple[int, int]  # where the weight lies, and how often it was written to

    def __call__(self, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        wide = outputs.to(self.up.dtype)
        if self.looks_up:
            inner = self.up[inputs] @ self.down
        else:
            inner = (inputs.to(self.up.dtype) @ self.down.T) @ self.up.T
        if self.rows is not None:
            plain = wide if self.bias is None else wide - self.bias.to(wide)
            inner = inner + self.rows * plain
        return (wide + inner).to(outputs.dtype)


def beside(
    module: torch.nn.Module, caller: torch.nn.Module, edits: dict[str, list[WeightEdit]]
) -> Beside | None:
    """The edits as thin sides beside the module; None where they are no such thing."""
    weight = module._parameters.get("weight")
    if caller is not module or set(edits) != {"weight"} or weight is None or not _is_plain(module):
        return None
    form = _form(edits["weight"], weight.detach(), transposed=is_transposed(module))
    looks_up = isinstance(module, torch.nn.Embedding)
    if form is None or (looks_up and form.rows is not None):
        return None
    wide = torch.promote_types(weight.dtype, torch.float32)
    up, down, rows = (
        None if value is None else value.to(weight.device, wide)
        for value in (form.up, form.down, form.rows)
    )
    assert up is not None and down is not None
    seen = weight.data_ptr(), weight._version
    return Beside(up, down, rows, module._parameters.get("bias"), looks_up, seen)


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether the module computes with its weight as torch's own linear or embedding does."""
    computes = type(module).forward
    plain = torch.nn.Linear.forward, torch.nn.Embedding.forward
    limited = getattr(module, "max_norm", None) is not None
    return (computes in plain and not limited) or is_transposed(module)


def _form(edits: Sequence[WeightEdit], weight: torch.Tensor, *, transposed: bool) -> Form | None:
    """The sum of the edits; edits of which one depends on the weight are no sum."""
    if any(edit.site.expert is not None or not is_formed(edit) for edit in edits):
        return None
    seen = weight.cpu() if weight.device.type == "mps" else weight
    seen = seen.T if transposed else seen
    forms = [edit.form_on(seen) for edit in edits if is_formed(edit)]
    found = [form for form in forms if form is not None]
    if len(found) < len(edits) or (len(found) > 1 and any(f.rows is not None for f in found)):
        return None
    return added(found)


def apply_edits(
    stored: torch.Tensor, edits: Sequence[WeightEdit], *, transposed: bool = False
) -> torch.Tensor:
    """The parameter as its module stores it, edited in order in float64 and rounded once.

    Edits see the canonical matrix; a Replace holds the parameter as its module stores it.
    """
    place = torch.device("cpu") if stored.device.type == "mps" else stored.device
    value, shape = stored.to(place).double(), stored.shape
    for edit in edits:
        if isinstance(edit, Replace):
            value = edit.apply(value)
            shape = value.shape
        else:
            value = _canonical(value, transposed)
            value = _as_stored(edit.apply(value), shape, transposed)
    done = value.to(stored.dtype).to(stored.device).contiguous()
    return done.clone() if done.data_ptr() == stored.data_ptr() else done


def _apply_to_experts(
    value: torch.Tensor, edits: Sequence[WeightEdit], *, transposed: bool
) -> None:
    """Edits the matrices that a parameter stacks, in place."""
    by_expert: dict[int, list[WeightEdit]] = {}
    for edit in edits:
        if edit.site.expert is not None:
            by_expert.setdefault(edit.site.expert, []).append(edit)
    for expert, own in by_expert.items():
        value[expert] = apply_edits(value[expert], own, transposed=transposed)


def _canonical(value: torch.Tensor, transposed: bool) -> torch.Tensor:
    """(out, in) for matrices, (out, in * kernel) for convolutions, vectors as they are."""
    if value.ndim == 2 and transposed:
        return value.T
    return value.flatten(1) if value.ndim > 2 else value


def _as_stored(value: torch.Tensor, shape: Sequence[int], transposed: bool) -> torch.Tensor:
    return value.T if value.ndim == 2 and transposed else value.reshape(*shape)


def is_transposed(module: torch.nn.Module) -> bool:
    """Whether the module stores its weight as (in, out), as GPT-2's layers do."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def stacks_transposed(module: torch.nn.Module) -> bool:
    """Whether the module stacks the weights of its experts as (experts, in, out)."""
    return bool(getattr(module, "is_transposed", False))


def canonical_shape(
    module: torch.nn.Module, shape: Sequence[int], expert: int | None = None
) -> tuple[int, ...]:
    """The shape of a parameter of the module, or of one expert's matrix in it, as edits see it."""
    if expert is not None:
        return (shape[2], shape[1]) if stacks_transposed(module) else (shape[1], shape[2])
    if len(shape) == 2 and is_transposed(module):
        return shape[1], shape[0]
    return (shape[0], math.prod(shape[1:])) if len(shape) > 2 else tuple(shape)


def zero_bias(module: torch.nn.Module) -> torch.Tensor:
    """The bias that a module without one computes with."""
    weight = module._parameters["weight"]
    assert weight is not None
    width = canonical_shape(module, weight.shape)[0]
    device = "cpu" if weight.is_meta else weight.device
    return torch.zeros(width, dtype=weight.dtype, device=device)
