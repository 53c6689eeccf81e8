"""A model whose weights are read module by module from the checkpoint, and released after use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from adaptmerge.adapters.graph import Site
from adaptmerge.bases.base import Base
from adaptmerge.bases.classes import in_one_sentence, model_class, quietly
from adaptmerge.errors import InputError
from adaptmerge.lazy import torch
from adaptmerge.runtime.models import dtype_named, model_config, some
from adaptmerge.tensors.refs import TensorRef


@dataclass
class Streaming:
    """What is in memory now, and was at most: bytes of weights read from the checkpoint."""

    device: str
    held: int = 0
    peak: int = 0

    def take(self, nbytes: int) -> None:
        """Count a change of what is held."""
        self.held += nbytes
        self.peak = max(self.peak, self.held)


def stream_model(base: Base, dtype: str = "float32", device: str = "cpu") -> torch.nn.Module:
    """The model of a checkpoint without its weights: each module reads its own when it is called.

    Its attribute `streaming` counts the bytes held. Raises InputError when the checkpoint lacks
    weights, or has them under names or in shapes that only loading the whole model resolves.
    """
    where = str(base.path)
    config = model_config(base.path)
    with quietly(), in_one_sentence(where), _weights_on_meta():
        model = model_class(config)._from_config(
            config, dtype=dtype_named(dtype), attn_implementation="eager"
        )
    _to_meta(model)
    refs = _located(model, base)
    streaming = Streaming(device)
    with in_one_sentence(where):
        _load_buffers(model, base, device)
    for module in model.modules():
        own = {n: refs[id(p)] for n, p in module._parameters.items() if p is not None}
        if own:
            _Stream(module, own, streaming).register()
    model.streaming = streaming
    found: torch.nn.Module = model.eval()
    return found


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """torch.empty, with which modules allocate weights, gives tensors without storage."""
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            options = dict(kwargs or {})
            if func is torch.empty:
                options["device"] = "meta"
            return func(*args, **options)

    with Mode():
        yield


def _to_meta(model: torch.nn.Module) -> None:
    """Weights that were made otherwise lose their values, too; tied ones stay one parameter."""
    moved: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                bare = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
                module._parameters[name] = moved.setdefault(id(parameter), bare)


def _located(model: torch.nn.Module, base: Base) -> dict[int, TensorRef]:
    """The stored tensor of every parameter; a tied one may be stored under any of its names."""
    names: dict[int, list[str]] = {}
    parameters = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    found = {key: _stored(base, spellings) for key, spellings in names.items()}
    problems = [names[key][0] for key, ref in found.items() if ref is None]
    if problems:
        raise InputError(
            f"{len(problems)} weights of {type(model).__name__} are not stored under its names: "
            f"{some(problems)}; load the whole model instead",
            where=str(base.path),
        )
    refs = {key: ref for key, ref in found.items() if ref is not None}
    wrong = [
        f"{names[key][0]} has shape {list(ref.shape)}, expected {list(parameters[key].shape)}"
        for key, ref in refs.items()
        if ref.shape != tuple(parameters[key].shape)
    ]
    if wrong:
        raise InputError(wrong, where=str(base.path))
    return refs


def _stored(base: Base, names: list[str]) -> TensorRef | None:
    for name in names:
        module, _, param = name.rpartition(".")
        found = base.parameter(Site(module, param))
        if found is not None:
            return found
    return None


def _load_buffers(model: torch.nn.Module, base: Base, device: str) -> None:
    """Buffers are small and kept: those that the checkpoint stores take its values."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            stored = None
            if name not in module._non_persistent_buffers_set:
                stored = _stored(base, [f"{path}.{name}"])
            if stored is None and buffer.is_meta:
                raise InputError(f"the buffer {path}.{name} is neither stored nor computed")
            value = buffer if stored is None else stored.read().to(buffer.dtype)
            module._buffers[name] = value.to(device)


@dataclass(eq=False)
class _Stream:
    """The weights of one module, present during its forward only."""

    module: torch.nn.Module
    refs: dict[str, TensorRef]
    streaming: Streaming
    empty: dict[str, torch.nn.Parameter] = field(default_factory=dict)

    def register(self) -> None:
        self.module.register_forward_pre_hook(lambda *_: self.load())
        self.module.register_forward_hook(lambda *_: self.release(), always_call=True)

    def load(self) -> None:
        for name, ref in self.refs.items():
            bare = self.module._parameters[name]
            assert bare is not None
            value = ref.read().to(bare.dtype).to(self.streaming.device)
            self.empty.setdefault(name, bare)
            self.module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
            self.streaming.take(value.nbytes)

    def release(self) -> None:
        for name, bare in self.empty.items():
            held = self.module._parameters[name]
            assert held is not None
            self.streaming.take(-held.nbytes)
            self.module._parameters[name] = bare
        self.empty.clear()
