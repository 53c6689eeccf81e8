"""Attaching an adapter to a model: while active, every forward computes with its edits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from adaptmerge.adapters import experts
from adaptmerge.adapters.graph import Adapter, Edit, Site
from adaptmerge.adapters.module_paths import other_versions, suffixes
from adaptmerge.adapters.stored_edits import Replace, ReplaceRows, why_opaque
from adaptmerge.adapters.weight_edits import WeightEdit, factor_of
from adaptmerge.errors import InputError
from adaptmerge.lazy import torch
from adaptmerge.runtime.editing import Editing, apply_edits, canonical_shape, zero_bias
from adaptmerge.runtime.embeddings import embeddings_of
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
        paths = resolve(model, adapter)
        for editing in editings(model, adapter, paths).values():
            undo.callback(editing.leave)
            for handle in editing.register():
                undo.callback(handle.remove)
        for edit in adapter.edits:
            if is_activation(edit):
                for handle in hook_activation(model, paths[edit.site.module], edit):
                    undo.callback(handle.remove)
        yield


@contextmanager
def called(model: torch.nn.Module, adapter: Adapter) -> Iterator[dict[str, bool]]:
    """The modules that an adapter changes, and whether each was called while active; none where their names
    are those of layers that are made when it is attached."""
    adapter = as_built(model, adapter)
    paths = {} if adapter.base.replication else resolve(model, adapter)
    found = {path: not path for path in paths.values()}

    def note(path: str) -> Callable[..., None]:
        return lambda *_: found.update({path: True})

    callers = {path: _caller(model, path) for path in found if path}
    handles = [caller.register_forward_pre_hook(note(path)) for path, caller in callers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


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


def resolve(model: torch.nn.Module, adapter: Adapter) -> dict[str, str]:
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


def editings(
    model: torch.nn.Module, adapter: Adapter, paths: Mapping[str, str]
) -> dict[str, Editing]:
    """The edits of weights by the path of their module. Raises InputError with all that have no place."""
    placed: dict[str, Editing] = {}
    problems: list[str] = []
    for site, edits in adapter.sites().items():
        weight_edits = [edit for edit in edits if isinstance(edit, WeightEdit)]
        problems += [f"{site}: {_why_not(edit)}" for edit in edits if not _runs(edit)]
        path = paths[site.module]
        module = model.get_submodule(path)
        found = _problems(module, site, weight_edits)
        problems += [f"{site}: {problem}" for problem in found]
        if weight_edits and not found and site.param in module._parameters:
            editing = placed.setdefault(path, Editing(module, _caller(model, path)))
            editing.edits.setdefault(site.param, []).extend(weight_edits)
    if problems:
        raise InputError(problems)
    _tie_rows(model, placed)
    return placed


def _tie_rows(model: torch.nn.Module, placed: dict[str, Editing]) -> None:
    """Rows of an input embedding are replaced in all modules that share its matrix, too, as PEFT does."""
    trained = next((one for one in placed.values() if _is_entry(model, one.module)), None)
    rows = [] if trained is None else _rows(trained)
    if trained is None or not rows:
        return
    for path, module in model.named_modules(remove_duplicate=False):
        shares = module._parameters.get("weight") is trained.module.weight
        if shares and module is not trained.module:
            editing = placed.setdefault(path, Editing(module, module))
            if not _rows(editing):
                editing.edits["weight"] = [*rows, *editing.edits.get("weight", ())]


def _is_entry(model: torch.nn.Module, module: torch.nn.Module) -> bool:
    return embeddings_of(model)[0] is module


def _rows(editing: Editing) -> list[WeightEdit]:
    return [edit for edit in editing.edits.get("weight", ()) if isinstance(edit, ReplaceRows)]


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
    return not bool(apply_edits(zero_bias(module), edits).any())
