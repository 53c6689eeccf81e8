"""Torch pickles (.bin, .pt, .pth, .ckpt), loaded as weights only: no code of a file is ever run."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from adaptmerge.errors import InputError
from adaptmerge.files import sniff
from adaptmerge.files.strict_json import capped, quoted
from adaptmerge.files.tensor_file import TensorFile
from adaptmerge.lazy import torch
from adaptmerge.tensors import dtypes
from adaptmerge.tensors.dtypes import DType
from adaptmerge.tensors.refs import Shape, TensorRef

_WRAPPERS = ("state_dict", "model")
_DEEPEST = 3
_Keys = tuple[Any, ...]
_EXPECTED = "a torch checkpoint"
_DAMAGED = "is damaged or was cut off: copy or download it again"
# how the weights-only unpickler of torch words its refusals of anything but data
_CODE = ("Unsupported global", "Unsupported class", "Trying to", "Can only", "was blocked")


@dataclass(frozen=True, slots=True)
class Pickled:
    """An entry of a torch pickle, loaded with weights_only; `key` is a path of dictionary keys."""

    path: str
    key: tuple[str, ...]
    shape: Shape
    dtype: DType

    def read(self) -> torch.Tensor:
        value = load_pickle(self.path)
        for part in self.key:
            value = value[part]
        tensor: torch.Tensor = value.detach()
        return tensor.contiguous()


@lru_cache(maxsize=4)
def _load_as_stamped(path: str, stamp: tuple[int, int]) -> Any:
    return load(path)


def load_pickle(path: str) -> Any:
    """The object in a torch pickle, on the CPU, loaded with weights_only and mapped where possible."""
    stat = Path(path).stat()
    return _load_as_stamped(path, (stat.st_size, stat.st_mtime_ns))


def load(path: str | os.PathLike[str]) -> Any:
    """The object in a torch pickle, on the CPU and mapped from the file where its format allows.

    Raises InputError when the file is no such pickle, is damaged, or would run code.
    """
    where = os.fspath(path)
    first = sniff.head(where)
    sniff.refuse(first, where, _EXPECTED, ("zip", "pickle"))
    mapped = _is_mappable(where) if sniff.kind(first) == "zip" else False
    try:
        return torch.load(where, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as problem:
        raise InputError(_refusal(str(problem)), where=where) from None
    except MemoryError:
        raise
    except Exception as problem:
        raise InputError(_reason(str(problem)), where=where) from None


def _is_mappable(where: str) -> bool:
    try:
        with zipfile.ZipFile(where) as archive:
            return all(item.compress_type == zipfile.ZIP_STORED for item in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):
        raise InputError(f"the zip archive {_DAMAGED}", where=where) from None


def _refusal(message: str) -> str:
    if not any(phrase in message for phrase in _CODE):
        return f"is not {_EXPECTED}, or it {_DAMAGED}"
    named = re.search(r"GLOBAL ([\w.]+)", message)
    wish = f" (it asks for {named[1]})" if named else ""
    return (
        f"it would run code when loaded{wish}; adaptmerge loads weights only; "
        "convert it to safetensors in an environment you trust"
    )


def _reason(message: str) -> str:
    if "TorchScript" in message:
        return (
            f"is a TorchScript program, not {_EXPECTED}; adaptmerge loads weights only; "
            "save its state_dict instead"
        )
    return f"is not {_EXPECTED}, or it {_DAMAGED}"


def read_pickle(path: str | os.PathLike[str]) -> TensorFile:
    """The tensors of a torch checkpoint; values that are no tensors become metadata, as JSON.

    Nested dictionaries are flattened with dots; `state_dict` and `model`, which only wrap, leave no
    trace in the keys. A bare tensor is called by the stem of its file. Raises InputError when
    tensors hide elsewhere, clash, or cannot be held.
    """
    where, absolute = os.fspath(path), str(Path(path).absolute())
    sniff.head(where)
    table = load_pickle(absolute)
    if isinstance(table, torch.Tensor):
        return _bare(absolute, table, where)
    if not isinstance(table, Mapping):
        raise InputError(
            f"holds a {type(table).__name__}, expected a dictionary of tensors: save a state_dict",
            where=where,
        )
    found: dict[str, TensorRef] = {}
    metadata: dict[str, str] = {}
    problems: list[str] = []
    for keys, value in _leaves(table, ()):
        name = _flat_name(keys)
        if name in found or name in metadata:
            problems.append(f"key {quoted(name)} is in two of its dictionaries: save one of them")
        elif isinstance(value, torch.Tensor):
            found[name] = _ref(absolute, keys, name, value, problems)
        elif _holds_tensor(value):
            problems.append(f"{quoted(name)} hides tensors too deep: save the state_dict alone")
        else:
            metadata[name] = _as_json(value)
    if problems:
        raise InputError(capped(problems), where=where)
    return TensorFile(absolute, found, metadata)


def _bare(path: str, value: torch.Tensor, where: str) -> TensorFile:
    name, problems = Path(path).stem, list[str]()
    ref = _ref(path, (), name, value, problems)
    if problems:
        raise InputError(problems, where=where)
    return TensorFile(path, {name: ref}, {})


def _leaves(table: Mapping[Any, Any], above: _Keys) -> Iterator[tuple[_Keys, Any]]:
    for key, value in table.items():
        keys = (*above, key)
        inner = isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
        if inner and len(keys) < _DEEPEST and _holds_tensor(value):
            yield from _leaves(value, keys)
        else:
            yield keys, value


def _holds_tensor(value: object) -> bool:
    """Whether there is a tensor anywhere inside; containers, which may hold themselves, are seen once."""
    waiting, seen = [value], set[int]()
    while waiting:
        part = waiting.pop()
        if isinstance(part, torch.Tensor):
            return True
        if isinstance(part, (Mapping, list, tuple, set)) and id(part) not in seen:
            seen.add(id(part))
            waiting += part.values() if isinstance(part, Mapping) else part
    return False


def _flat_name(keys: _Keys) -> str:
    wraps = [key for key in keys[:-1] if key not in _WRAPPERS]
    return ".".join(map(str, (*wraps, keys[-1])))


def _ref(path: str, keys: _Keys, name: str, value: torch.Tensor, problems: list[str]) -> TensorRef:
    if not all(isinstance(key, str) for key in keys):
        problems.append(f"tensor {quoted(name)} has a key that is not a string: rename it")
    plain = dtypes.is_plain(value)
    if not plain:
        problems.append(
            f"tensor {quoted(name)} is {value.layout} {value.dtype} on {value.device}, expected "
            "plain values: save it dense and in a standard dtype"
        )
    kind, shape = dtypes.of_torch(value.dtype) if plain else dtypes.F32, tuple(value.shape)
    return TensorRef(Pickled(path, keys, shape, kind), shape, kind, name=name)


def _as_json(value: object) -> str:
    try:
        return json.dumps(value, default=str)
    except (TypeError, ValueError, RecursionError):
        return json.dumps(str(value))
