"""Attaching an adapter to a model: while active, every forward uses the edited parameters.

A parameter is swapped just before the forward of its own module and put back right after, so at
most one module's edited copy exists at a time, weights tied to another module stay as they are
there, and the originals are never written to.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from adaptmerge.adapters import experts
from adaptmerge.adapters.graph import Adapter, Edit, Site
from adaptmerge.adapters.module_paths import other_versions, suffixes
from adaptmerge.adapters.stored_edits import Replace, ReplaceRows, why_opaque
from adaptmerge.adapters.weight_edits import WeightEdit, factor_of
from adaptmerge.errors import InputError
from adaptmerge.lazy import torch
from adaptmerge.runtime.places import hook_activation, is_activation
from adaptmerge.runtime.replicate import replicated


@contextmanager
def attach(model: torch.nn.Module, adapter: Adapter) -> Iterator[None]:
    """While active, `model` computes base and adapter; afterwards it is bit for bit what it was.

    Raises InputError with all edits that have no place in the model.
    """
    with ExitStack() as undo:
        undo.enter_context(replicated(model, adapter.base.replication))
        adapter = as_built(model, adapter)
        paths = _resolve(model, adapter)
        for swap in _swaps(model, adapter, paths):
            undo.callback(swap.restore)
            for handle in swap.register():
                undo.callback(handle.remove)
        for edit in adapter.edits:
            if is_activation(edit):
                for handle in hook_activation(model, paths[edit.site.module], edit):
                    undo.callback(handle.remove)
        yield


def as_built(model: torch.nn.Module, adapter: Adapter) -> Adapter:
    """The adapter with experts in the layout that the model has them in."""
    layouts = {experts.layout_of(edit.site) for edit in adapter.edits} - {None}
    if not layouts:
        return adapter
    names = [name for name, _ in model.named_modules() if experts.matrix_of(name)]
    layout = experts.PER_EXPERT if names else experts.FUSED
    if layouts <= {layout}:
        return adapter
    return experts.in_layout(adapter, layout, experts.style_of(None, names))


def _resolve(model: torch.nn.Module, adapter: Adapter) -> dict[str, str]:
    """The model's path of every module that is edited: equal, or equal up to one model prefix."""
    wanted = list(dict.fromkeys(edit.site.module for edit in adapter.edits))
    known = {name: None for name, _ in model.named_modules(remove_duplicate=False)}
    longer: dict[str, list[str]] = {}
    for name in known:
        longer.setdefault(name.partition(".")[2], []).append(name)
    paths = {module: _path(module, known, longer) for module in wanted}
    lost = [module for module, path in paths.items() if path is None]
    if lost:
        raise InputError(
            f"{type(model).__name__} has no {', '.join(lost)}: is this adapter for another model?"
        )
    found = {module: path for module, path in paths.items() if path is not None}
    taken = Counter(found.values())
    twice = [module for module, path in found.items() if taken[path] > 1]
    if twice:
        raise InputError(f"{', '.join(twice)} are not told apart by {type(model).__name__}")
    return found


def _path(module: str, known: Collection[str], longer: Mapping[str, list[str]]) -> str | None:
    if module in known:
        return module
    shorter = suffixes(module)[-2:-1]
    candidates = [*(name for name in shorter if name in known), *longer.get(module, ())]
    candidates = candidates or [name for name in other_versions(module) if name in known]
    return candidates[0] if len(candidates) == 1 else None


def _swaps(model: torch.nn.Module, adapter: Adapter, paths: Mapping[str, str]) -> list[Swap]:
    swaps: dict[str, Swap] = {}
    problems: list[str] = []
    for site, edits in adapter.sites().items():
        weight_edits = [edit for edit in edits if isinstance(edit, WeightEdit)]
        problems += [f"{site}: {_why_not(edit)}" for edit in edits if not _runs(edit)]
        path = paths[site.module]
        module = model.get_submodule(path)
        found = _problems(module, site, weight_edits)
        problems += [f"{site}: {problem}" for problem in found]
        if weight_edits and not found and site.param in module._parameters:
            swap = swaps.setdefault(path, Swap(module, _caller(model, path)))
            swap.edits.setdefault(site.param, []).extend(weight_edits)
    if problems:
        raise InputError(problems)
    _tie_rows(model, swaps)
    return list(swaps.values())


def _tie_rows(model: torch.nn.Module, swaps: dict[str, Swap]) -> None:
    """Rows of an input embedding are replaced in all modules that share its matrix, too, as PEFT does."""
    trained = next((swap for swap in swaps.values() if _is_entry(model, swap.module)), None)
    rows = [] if trained is None else _rows(trained)
    if trained is None or not rows:
        return
    for path, module in model.named_modules(remove_duplicate=False):
        shares = module._parameters.get("weight") is trained.module.weight
        if shares and module is not trained.module:
            swap = swaps.setdefault(path, Swap(module, module))
            if not _rows(swap):
                swap.edits["weight"] = [*rows, *swap.edits.get("weight", ())]


def _is_entry(model: torch.nn.Module, module: torch.nn.Module) -> bool:
    try:
        return getattr(model, "get_input_embeddings", lambda: None)() is module
    except NotImplementedError:
        return False


def _rows(swap: Swap) -> list[WeightEdit]:
    return [edit for edit in swap.edits.get("weight", ()) if isinstance(edit, ReplaceRows)]


def _caller(model: torch.nn.Module, path: str) -> torch.nn.Module:
    """Whose forward computes with the parameters: nn.MultiheadAttention never calls its out_proj."""
    owner = model.get_submodule(path.rpartition(".")[0])
    inside = isinstance(owner, torch.nn.MultiheadAttention)
    return owner if inside else model.get_submodule(path)


def _runs(edit: Edit) -> bool:
    return isinstance(edit, WeightEdit) or is_activation(edit)


def _why_not(edit: Edit) -> str:
    return why_opaque(edit) or f"edits of kind {edit.kind!r} cannot be run yet"


def _problems(module: torch.nn.Module, site: Site, edits: Sequence[WeightEdit]) -> list[str]:
    """What speaks against editing this parameter, as far as shapes say."""
    if not edits:
        return []
    value = module._parameters.get(site.param)
    if value is None:
        return _absent_problems(module, site.param, edits)
    if not value.dtype.is_floating_point:
        return [f"the base stores it quantised as {value.dtype}: load an unquantised base"]
    if site.expert is not None and (value.ndim != 3 or site.expert >= value.shape[0]):
        return [f"the base has shape {list(value.shape)} there, and no expert {site.expert} in it"]
    shape, problems = canonical_shape(module, value.shape, site.expert), []
    for edit in edits:
        if isinstance(edit, Replace):
            shape = canonical_shape(module, edit.value.shape)
        factor = factor_of(edit)
        expected = shape if len(shape) == 2 else (shape[0], 1)
        if factor is not None and factor.shape != expected:
            problems.append(f"the base has shape {list(shape)}, the adapter {list(factor.shape)}")
    return problems


def _absent_problems(module: torch.nn.Module, param: str, edits: Sequence[WeightEdit]) -> list[str]:
    if param in module._parameters and param == "bias":
        return []
    if param == "bias" and "weight" in module._parameters and _stays_zero(module, edits):
        return []
    return [f"{type(module).__name__} has no {param}: is this adapter for another model?"]


def _stays_zero(module: torch.nn.Module, edits: Sequence[WeightEdit]) -> bool:
    return not bool(apply_edits(_zero_bias(module), edits).any())


@dataclass(eq=False)
class Swap:
    """The edited parameters of one module, in place of the originals during the caller's forward only."""

    module: torch.nn.Module
    caller: torch.nn.Module
    edits: dict[str, list[WeightEdit]] = field(default_factory=dict)
    originals: dict[str, torch.nn.Parameter | None] = field(default_factory=dict)

    def register(self) -> list[Any]:
        """The hooks; restoring comes before hooks that were there, such as releasing weights."""
        return [
            self.caller.register_forward_pre_hook(lambda *_: self.put()),
            self.caller.register_forward_hook(
                lambda *_: self.restore(), prepend=True, always_call=True
            ),
        ]

    def put(self) -> None:
        """Swap in the edited parameters."""
        for name, edits in self.edits.items():
            original = self.module._parameters[name]
            edited = self._edited(original, edits)
            self.originals.setdefault(name, original)
            self.module._parameters[name] = edited

    def restore(self) -> None:
        """Swap back the originals."""
        for name, original in self.originals.items():
            self.module._parameters[name] = original
        self.originals.clear()

    def _edited(
        self, original: torch.nn.Parameter | None, edits: list[WeightEdit]
    ) -> torch.nn.Parameter | None:
        with torch.no_grad():
            start = _zero_bias(self.module) if original is None else original.detach()
            whole = [edit for edit in edits if edit.site.expert is None]
            value = apply_edits(start, whole, transposed=is_transposed(self.module))
            _apply_to_experts(value, edits, transposed=stacks_transposed(self.module))
        if original is None and not bool(value.any()):
            return None
        return torch.nn.Parameter(value, requires_grad=False)


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


def _zero_bias(module: torch.nn.Module) -> torch.Tensor:
    """The bias that a module without one computes with."""
    weight = module._parameters["weight"]
    assert weight is not None
    width = canonical_shape(module, weight.shape)[0]
    device = "cpu" if weight.is_meta else weight.device
    return torch.zeros(width, dtype=weight.dtype, device=device)
