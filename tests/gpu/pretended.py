"""A device that computes on the CPU but, as a real one, refuses tensors that lie elsewhere.

What is put there says that it is on `DEVICE`; an operation on tensors of both places, NumPy's view of one,
or reading its memory fails as it does with CUDA. So code for accelerators runs on machines without any.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "mps:0"  # the one kind that torch makes tensors of without asking for a driver
MOVES = ("copy_", "_to_copy")
GUARDED = (torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.contiguous)
USERS = (
    "adaptmerge.runtime.models",
    "adaptmerge.commands.verify",
    "adaptmerge.commands.verify.fused.model",
    "adaptmerge.commands.calibrate",
)


class There(torch.Tensor):
    """A tensor on the device; what it holds is on the CPU."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> There:
        made: There = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(DEVICE),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """Its values, which a device copies without being asked."""
        return self.held.tolist()


class Above(TorchFunctionMode):
    """What asks for a driver before a dispatch mode sees it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.tensor and given.get("device") is not None:
            return func(*args, **{**given, "device": "cpu"}).to(given["device"])
        if func in GUARDED and isinstance(args[0], There):
            return tree_map(_placed, func(*tree_map(_held, args)))
        if func is torch.Tensor.copy_ and isinstance(args[0], There):
            args[0].held.copy_(_held(args[1]))
            return args[0]
        return func(*args, **given)


class Device(TorchDispatchMode):
    """While active, tensors can be made and put on the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on what is held; the result is where a device would have it."""
    leaves = tree_leaves((args, kwargs))
    there = [leaf for leaf in leaves if isinstance(leaf, There)]
    name = func.overloadpacket.__name__
    if there and name not in MOVES:
        _refuse_others(func, leaves)
    wanted = kwargs.get("device")
    stays = wanted is None and bool(there)
    if wanted is not None and torch.device(wanted).type == torch.device(DEVICE).type:
        kwargs, stays = {**kwargs, "device": "cpu"}, True
    held_args, held_kwargs = tree_map(_held, (args, kwargs))
    found = func(*held_args, **held_kwargs)
    if name.endswith("_") and not name.endswith("__") and args:
        return args[0]
    return tree_map(_placed, found) if stays else found


def _refuse_others(func: Any, leaves: list[Any]) -> None:
    """Only tensors of one value may lie on the CPU beside others on a device."""
    here = [
        leaf
        for leaf in leaves
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, There) and leaf.ndim
    ]
    if here:
        shapes = [list(tensor.shape) for tensor in here]
        raise RuntimeError(f"{func}: tensors of shapes {shapes} are on cpu, others on {DEVICE}")


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, There) else leaf


def _placed(leaf: Any) -> Any:
    return There(leaf) if isinstance(leaf, torch.Tensor) else leaf


@contextmanager
def pretended() -> Iterator[str]:
    """While active, that is the device which is asked for, by whatever name."""
    grad = torch.is_grad_enabled()
    torch.set_grad_enabled(False)  # the graph of gradients would ask for a driver
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    patches = [patch(f"{user}.device_named", lambda name: DEVICE) for user in USERS]
    try:
        for one in patches:
            one.start()
        with Device(), Above():
            yield DEVICE
    finally:
        for one in patches:
            one.stop()
        torch.__future__.set_overwrite_module_params_on_conversion(before)
        torch.set_grad_enabled(grad)
