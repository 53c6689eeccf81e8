"""Which parameters of a model are one matrix, and which modules have a row for each token.

The model's class in `transformers` knows: it is built without weights from the config, tied as it is once
loaded, and looked at. Where it cannot be had (a type that `transformers` does not know, code of its own, a
base of which only headers may be looked at), the config says whether there is a tie, and the
checkpoint's names and shapes between what: see `stated`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any

from adaptmerge.adapters.module_paths import INPUTS, OUTPUTS, VOCABULARY, layer_index
from adaptmerge.bases.classes import skeleton, stored_name
from adaptmerge.errors import InputError
from adaptmerge.tensors.refs import TensorRef

FLAG = "tie_word_embeddings"
ROWS = "vocab_size"


@dataclass(frozen=True, slots=True)
class Ties:
    """The names of parameters that are one, and the modules that tokens enter and leave by.

    stored_as: what checkpoints call these parameters, where that is another name.
    read_by_forward: whether a forward asks the config about ties, and so computes otherwise without.
    by_class: whether the model's class says all this.
    """

    groups: tuple[tuple[str, ...], ...] = ()
    embedding: str | None = None
    head: str | None = None
    read_by_forward: bool = False
    by_class: bool = True
    stored_as: Mapping[str, str] = field(default_factory=dict)

    @property
    def vocabulary(self) -> frozenset[str]:
        """The modules that have a row for each token."""
        ends = {module for module in (self.embedding, self.head) if module}
        own = {f"{module}.weight" for module in ends}
        shared = {name for group in self.groups if own & {*group} for name in group}
        return frozenset(ends | {name.rpartition(".")[0] for name in shared})


def ties_of(config: Mapping[str, Any]) -> Ties | None:
    """What the class of a config.json ties; None where there is no such class."""
    return _of_class(json.dumps(config, sort_keys=True, default=str))


def untying(config: Mapping[str, Any], group: tuple[str, ...]) -> dict[str, Any]:
    """The entries of a config.json with which its class keeps these parameters apart; none where it ties
    them whatever the config says, computes otherwise then, or keeps layers apart, too."""
    entries = _untied(config)
    before, after = ties_of(config), ties_of({**config, **entries})
    if before is None or after is None:
        return entries
    lost = set(before.groups) - set(after.groups)
    whole_layers = any(layer_index(name) is not None for names in lost for name in names)
    if before.read_by_forward or whole_layers or group not in lost:
        return {}
    return entries


def stated(config: Mapping[str, Any], tensors: Mapping[str, TensorRef]) -> Ties:
    """What a checkpoint says without its class: where the config ties embeddings and no head is stored, the
    embedding is the head, too, under whichever of the usual names it is asked for."""
    inner, outer = (_called(names, tensors) for names in (INPUTS, OUTPUTS))
    if outer is not None or inner is None or not _flag(config):
        return Ties((), inner, outer, by_class=False)
    group = (f"{inner}.weight", *(f"{head}.weight" for head in OUTPUTS))
    return Ties((group,), inner, OUTPUTS[0], by_class=False)


def resized(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The entries of a config.json that say how many tokens there are, once there are so many."""
    inner = {
        key: {**part, ROWS: rows}
        for key, part in config.items()
        if isinstance(part, Mapping) and key.endswith("text_config") and ROWS in part
    }
    return inner if inner and ROWS not in config else {ROWS: rows}


def called_vocabulary(module: str) -> bool:
    """Whether a module has the name of one whose rows are tokens: all there is to go by without a base."""
    return module.rpartition(".")[2] in VOCABULARY


@lru_cache(maxsize=64)
def _of_class(config: str) -> Ties | None:
    try:
        model: Any = skeleton(json.loads(config))
    except InputError:
        return None
    found = dict(model.named_parameters(remove_duplicate=False))
    shared: dict[int, list[str]] = {}
    for name, parameter in found.items():
        shared.setdefault(id(parameter), []).append(name)
    groups = tuple(tuple(names) for names in shared.values() if len(names) > 1)
    inner, outer = (_path(model, f"get_{side}_embeddings") for side in ("input", "output"))
    ends = [f"{module}.weight" for module in (inner, outer) if module]
    named = [name for name in {*ends, *chain(*groups)} if name in found]
    return Ties(groups, inner, outer, _is_read(model), stored_as=_renamed(model, named))


def _renamed(model: Any, parameters: Iterable[str]) -> dict[str, str]:
    pairs = ((name, stored_name(model, name)) for name in parameters)
    return {name: stored for name, stored in pairs if stored != name}


def _path(model: Any, getter: str) -> str | None:
    """The path of the module that a getter gives; None where the class has none."""
    try:
        wanted = getattr(model, getter)()
    except NotImplementedError:
        return None
    modules = model.named_modules(remove_duplicate=False)
    return next((name for name, module in modules if wanted is module and name), None)


def _is_read(model: Any) -> bool:
    forwards = (inspect.unwrap(kind.forward) for kind in {type(m) for m in model.modules()})
    codes = (getattr(forward, "__code__", None) for forward in forwards)
    return any(FLAG in code.co_names for code in codes if code is not None)


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The flag, and parts of a config that have it set, without it."""
    parts = {
        key: {**part, **_untied(part)}
        for key, part in config.items()
        if isinstance(part, Mapping) and any(_flags(part))
    }
    return {FLAG: False, **parts}


def _flag(config: Mapping[str, Any]) -> bool:
    return any(_flags(config))


def _flags(config: Mapping[str, Any]) -> Iterator[bool]:
    yield bool(config.get(FLAG))
    for part in config.values():
        if isinstance(part, Mapping):
            yield from _flags(part)


def _called(names: tuple[str, ...], tensors: Mapping[str, TensorRef]) -> str | None:
    """The one module outside of layers that has such a name and a matrix; None where several have."""
    modules = [name.removesuffix(".weight") for name, ref in tensors.items() if len(ref.shape) == 2]
    found = [m for m in modules if m.rpartition(".")[2] in names and layer_index(m) is None]
    return found[0] if len(found) == 1 else None
