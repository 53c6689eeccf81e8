"""Codes of a few bits in words, and the tensors beside them, as several schemes store them.

Codes follow one another from the lowest bit of the first byte upwards, and words are little-endian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from adaptmerge.bases.base import Base
from adaptmerge.errors import InputError
from adaptmerge.lazy import torch
from adaptmerge.schemes.coded import CodedWeight
from adaptmerge.schemes.scheme import checked, config_of
from adaptmerge.tensors.refs import TensorRef

WORDS = ("I32", "U32")
Tensors = tuple[tuple[str, TensorRef], ...]
# the coded weight of a module; where it is malformed, None and problems that are appended
Reader = Callable[[str, list[str]], CodedWeight | None]


def runs(values: torch.Tensor, length: int) -> torch.Tensor:
    """Values (..., n) as runs (..., n / length, length)."""
    return values.reshape(*values.shape[:-1], values.shape[-1] // length, length)


def unpacked(raw: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes (..., 8 n / bits), uint8, in bytes (..., n) along the last axis, the low bits first."""
    if 8 % bits == 0:
        parts = [raw >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
        return torch.stack(parts, -1).flatten(-2)
    raw = torch.nn.functional.pad(raw, (0, -raw.shape[-1] % bits))
    held = torch.nn.functional.pad(runs(raw, bits), (0, 1)).int()
    parts = []
    for start in range(0, 8 * bits, bits):
        pair = held[..., start // 8] | held[..., start // 8 + 1] << 8
        parts.append((pair >> start % 8 & (1 << bits) - 1).to(torch.uint8))
    return torch.stack(parts, -1).flatten(-2)


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The bytes (..., n bits / 8), uint8, of codes (..., n): what `unpacked` reads."""
    if 8 % bits == 0:
        parts = runs(codes, 8 // bits)
        return _joined([parts[..., i] << bits * i for i in range(8 // bits)])
    single = torch.stack([codes >> bit & 1 for bit in range(bits)], -1).flatten(-2)
    return packed(single, 1)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    found = parts[0].clone()
    for part in parts[1:]:
        found |= part
    return found


def as_bytes(words: torch.Tensor) -> torch.Tensor:
    """Words (..., n) as the bytes (..., 4 n) that they are."""
    held = words.contiguous()
    if held.stride(-1) != 1:  # which a side of 1 may keep, contiguous or not
        held = torch.empty(words.shape, dtype=words.dtype).copy_(words)
    return held.view(torch.uint8)


def as_stored(raw: torch.Tensor, ref: TensorRef) -> torch.Tensor:
    """Bytes in the dtype and shape of a stored tensor."""
    return raw.reshape(-1).view(ref.dtype.torch).view(ref.shape)


def rounded(scale: torch.Tensor, ref: TensorRef) -> torch.Tensor:
    """Scales rounded to the dtype of those stored, and no further than its largest number."""
    most = torch.finfo(ref.dtype.torch).max
    return scale.clamp(-most, most).to(ref.dtype.torch).to(scale.dtype)


def said(base: Base, *methods: str) -> Mapping[str, Any] | None:
    """The quantization_config of a base whose quant_method is one of these; None for others."""
    found = config_of(base)
    return found if str(found.get("quant_method")).lower() in methods else None


def modules(base: Base, suffix: str) -> Iterator[str]:
    """The modules that hold a tensor named so."""
    ends = "." + suffix
    return (name.removesuffix(ends) for name in base.tensors if name.endswith(ends))


def named(base: Base, module: str, *suffixes: str) -> Tensors:
    """Those of a module's tensors that there are, by their names in the checkpoint."""
    names = (f"{module}.{suffix}" for suffix in suffixes)
    return tuple((name, base.tensors[name]) for name in names if name in base.tensors)


def missing(base: Base, module: str, *suffixes: str) -> list[str]:
    """A problem for each of a module's tensors that is not there."""
    names = (f"{module}.{suffix}" for suffix in suffixes)
    return [f"{name} is missing" for name in names if name not in base.tensors]


def flat(tensors: Tensors) -> list[str]:
    """A problem for each tensor that is no matrix with entries."""
    return [
        f"{name} has the shape {list(ref.shape)}, expected two sides that are not 0"
        for name, ref in tensors
        if len(ref.shape) != 2 or not ref.count
    ]


def misfits(tensors: Tensors, expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A problem for each tensor, by the last part of its name, whose shape is not the expected one."""
    return [
        f"{name} has the shape {list(ref.shape)}, expected {list(shape)}"
        for name, ref in tensors
        for shape in [expected.get(name.rpartition(".")[2])]
        if shape is not None and ref.shape != shape
    ]


def mistyped(tensors: Tensors, expected: Mapping[str, Sequence[str]]) -> list[str]:
    """A problem for each tensor, by the last part of its name, whose dtype is not one of those expected."""
    return [
        f"{name} is stored as {ref.dtype}, expected {' or '.join(dtypes).lower()}"
        for name, ref in tensors
        for dtypes in [expected.get(name.rpartition(".")[2])]
        if dtypes is not None and ref.dtype.name not in dtypes
    ]


def held_wrong(ref: TensorRef, dtypes: Sequence[str], count: int) -> list[str]:
    """The problem of a tensor that does not hold so many values of one of these dtypes."""
    if ref.dtype.name in dtypes and ref.count == count:
        return []
    kinds = " or ".join(dtypes).lower()
    return [f"{ref.name} is {ref.dtype} {list(ref.shape)}, expected {count} values of {kinds}"]


def find(
    base: Base, title: str, suffix: str, read: Reader, refused: Sequence[str] = ()
) -> Mapping[str, CodedWeight]:
    """The coded weights of the modules that hold a tensor named so. Raises InputError with what is refused
    in the config; else with all problems, or when nothing is found."""
    if refused:
        raise InputError(refused, where=str(base.path))
    problems: list[str] = []
    ones = ((module, read(module, problems)) for module in modules(base, suffix))
    found = {module: one for module, one in ones if one is not None}
    nothing = f"its config says that {title} quantised it, but no weight is"
    return checked(base, found, problems, nothing)
