"""References to tensors: plain data that says where values are and what to do with them when read.

A TensorRef can be sliced, printed, hashed and sent to a worker; it holds no open file and no value.
Every `read()` reads again, by offset, so memory does not grow with the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from adaptmerge.lazy import torch
from adaptmerge.tensors.caches import Recent, once
from adaptmerge.tensors.dtypes import F32, DType
from adaptmerge.tensors.spans import as_tensor, read_span

LARGEST = 1 << 32  # entries of a tensor that is computed, not stored
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """A contiguous row-major run of bytes in a file, in the file's own little-endian layout."""

    path: str
    offset: int
    shape: Shape
    dtype: DType

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(math.prod(self.shape))

    def read(self) -> torch.Tensor:
        return as_tensor(read_span(self.path, self.offset, self.nbytes), self.dtype, self.shape)

    def rows(self, start: int, stop: int) -> Stored:
        stride = self.nbytes // self.shape[0] if self.shape[0] else 0
        return replace(
            self, offset=self.offset + start * stride, shape=(stop - start, *self.shape[1:])
        )


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor with one value everywhere."""

    value: float
    shape: Shape
    dtype: DType

    def read(self) -> torch.Tensor:
        return torch.full(self.shape, self.value, dtype=self.dtype.torch)


@dataclass(frozen=True, slots=True)
class Listed:
    """A small tensor written out as numbers (token indices and the like)."""

    values: tuple[float, ...]
    shape: Shape
    dtype: DType

    def read(self) -> torch.Tensor:
        return torch.tensor(self.values, dtype=self.dtype.torch).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Joined:
    """Several tensors of one dtype, concatenated along `axis`."""

    parts: tuple[TensorRef, ...]
    axis: int
    shape: Shape
    dtype: DType

    def read(self) -> torch.Tensor:
        return torch.cat([part.read() for part in self.parts], dim=self.axis)

    def rows(self, start: int, stop: int) -> Joined:
        """Some entries of the first axis, as a source that reads no others."""
        if self.axis:
            parts = [part.slice(0, start, stop) for part in self.parts]
        else:
            parts, at = [], 0
            for part in self.parts:
                first, last = max(start - at, 0), min(stop - at, part.shape[0])
                parts += [part.slice(0, first, last)] if first < last else []
                at += part.shape[0]
        return Joined(tuple(parts), self.axis, (stop - start, *self.shape[1:]), self.dtype)


@runtime_checkable
class Source(Protocol):
    """Where values come from: the classes above, or a node that computes them when they are read."""

    @property
    def shape(self) -> Shape:
        """Of the value."""

    @property
    def dtype(self) -> DType:
        """Of the value."""

    def read(self) -> torch.Tensor:
        """The value."""

    def __hash__(self) -> int:
        """Sources are data."""


@runtime_checkable
class Unsettled(Source, Protocol):
    """A source that a run computes before anything is written."""

    @property
    def store(self) -> DType | None:
        """What the value is rounded to; None: as the run decides."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Keep indices start..stop of one axis."""

    axis: int
    start: int
    stop: int

    def shape(self, shape: Shape) -> Shape:
        return (*shape[: self.axis], self.stop - self.start, *shape[self.axis + 1 :])

    def apply(self, value: torch.Tensor) -> torch.Tensor:
        return value.narrow(self.axis, self.start, self.stop - self.start)


@dataclass(frozen=True, slots=True)
class Permute:
    """Reorder the axes."""

    axes: tuple[int, ...]

    def shape(self, shape: Shape) -> Shape:
        return tuple(shape[axis] for axis in self.axes)

    def apply(self, value: torch.Tensor) -> torch.Tensor:
        return value.permute(self.axes)


@dataclass(frozen=True, slots=True)
class Reshape:
    """Read the same elements, in row-major order, under another shape."""

    target: Shape

    def shape(self, shape: Shape) -> Shape:
        if math.prod(shape) != math.prod(self.target):
            raise ValueError(f"cannot reshape {list(shape)} to {list(self.target)}")
        return self.target

    def apply(self, value: torch.Tensor) -> torch.Tensor:
        return value.reshape(self.target)


@dataclass(frozen=True, slots=True)
class Multiply:
    """Multiply by a number, in float64, rounded once to the ref's dtype."""

    factor: float
    dtype: DType

    def shape(self, shape: Shape) -> Shape:
        return shape

    def apply(self, value: torch.Tensor) -> torch.Tensor:
        return (value.double() * self.factor).to(self.dtype.torch)


@dataclass(frozen=True, slots=True)
class Cast:
    """Round to another dtype."""

    dtype: DType

    def shape(self, shape: Shape) -> Shape:
        return shape

    def apply(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.dtype.torch)


@dataclass(frozen=True, slots=True)
class Shift:
    """Add a number, in float64, rounded once to the ref's dtype."""

    amount: float
    dtype: DType

    def shape(self, shape: Shape) -> Shape:
        return shape

    def apply(self, value: torch.Tensor) -> torch.Tensor:
        return (value.double() + self.amount).to(self.dtype.torch)


Step = Slice | Permute | Reshape | Multiply | Shift | Cast


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor described now and read later.

    shape and dtype are those of the value that `read()` returns. `name` is the key in its file, for
    messages. `shared` marks a tensor that many sites use and a run may keep in its bounded cache.
    """

    source: Source
    shape: Shape
    dtype: DType
    steps: tuple[Step, ...] = ()
    name: str = ""
    shared: bool = False

    def read(self) -> torch.Tensor:
        """The value, contiguous, in `dtype`. Raises InputError when the file has changed or ended."""
        return once(TensorRef._read, self)

    def _read(self) -> torch.Tensor:
        source, steps = self.source, self.steps
        rows = getattr(source, "rows", None)
        if steps and callable(rows) and isinstance(steps[0], Slice) and not steps[0].axis:
            source, steps = rows(steps[0].start, steps[0].stop), steps[1:]
        if isinstance(source, Stored) and _cuts_rows(steps):
            value = _CUT.get(source.read, source, source.nbytes)
            return _after(steps, value).clone(memory_format=torch.contiguous_format)
        return _after(steps, source.read()).contiguous()

    def in_blocks(self, rows: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Runs of so many rows with their places, each read by itself where the source has rows apart."""
        apart = not self.steps and callable(getattr(self.source, "rows", None))
        whole = None if apart else self.read()
        for start in range(0, self.shape[0], rows):
            at = slice(start, min(self.shape[0], start + rows))
            yield at, self.slice(0, at.start, at.stop)._read() if whole is None else whole[at]

    def then(self, step: Step, dtype: DType | None = None) -> TensorRef:
        """This tensor with one more step applied when it is read."""
        return replace(
            self,
            shape=step.shape(self.shape),
            dtype=dtype or self.dtype,
            steps=(*self.steps, step),
        )

    def taking(self, step: Step) -> TensorRef:
        """The step that a file states. Raises ValueError where it cannot be done with this tensor."""
        match step:
            case Slice(axis=axis, start=start, stop=stop):
                if not 0 <= axis < len(self.shape):
                    raise ValueError(f"{list(self.shape)} has no axis {axis}")
                return self.slice(axis, start, stop)
            case Permute(axes=axes):
                if sorted(axes) != list(range(len(self.shape))):
                    raise ValueError(f"the axes of {list(self.shape)} have no order {list(axes)}")
                return self.then(step)
            case Reshape():
                return self.then(step)
            case _:
                return self.then(step, step.dtype)

    def slice(self, axis: int, start: int, stop: int) -> TensorRef:
        """Indices start..stop of `axis`."""
        if (start, stop) == (0, self.shape[axis]):
            return self
        if not 0 <= start <= stop <= self.shape[axis]:
            raise ValueError(f"slice {start}:{stop} of axis {axis} of {list(self.shape)}")
        return self.then(Slice(axis, start, stop))

    def entry(self, number: int) -> TensorRef:
        """One entry of the first axis; of what is stored as it is, one whose rows can be read alone."""
        shape, name = self.shape[1:], f"{self.name}[{number}]"
        if isinstance(self.source, Stored) and not self.steps:
            part = replace(self.source.rows(number, number + 1), shape=shape)
            return TensorRef(part, shape, self.dtype, name=name)
        return replace(self.slice(0, number, number + 1).reshape(*shape), name=name)

    def permute(self, *axes: int) -> TensorRef:
        """The axes in another order; two permutations that undo each other leave no trace."""
        if axes == tuple(range(len(axes))):
            return self
        last = self.steps[-1] if self.steps else None
        if isinstance(last, Permute) and tuple(last.axes[axis] for axis in axes) == tuple(
            range(len(axes))
        ):
            return replace(self, shape=Permute(axes).shape(self.shape), steps=self.steps[:-1])
        return self.then(Permute(axes))

    @property
    def T(self) -> TensorRef:  # noqa: N802 - the name that torch and numpy use
        """The transpose of a matrix."""
        return self.permute(1, 0)

    def reshape(self, *shape: int) -> TensorRef:
        """The same elements in row-major order under another shape."""
        if shape == self.shape:
            return self
        before = self.steps[-1] if self.steps else None
        if isinstance(before, Reshape):
            bare = replace(self, steps=self.steps[:-1])
            if not bare.steps and bare.source.shape == shape:
                return replace(bare, shape=shape)
        return self.then(Reshape(shape))

    def scaled(self, factor: float) -> TensorRef:
        """The tensor times a number; narrow floats are widened to float32, so nothing is rounded twice."""
        if factor == 1.0:
            return self
        dtype = F32 if self.dtype.bits < 32 else self.dtype
        return self.then(Multiply(factor, dtype), dtype)

    def shifted(self, amount: float) -> TensorRef:
        """The tensor plus a number; narrow floats are widened to float32. Two that undo each other leave no
        trace."""
        dtype = F32 if self.dtype.bits < 32 else self.dtype
        if self.steps and self.steps[-1] == Shift(-amount, self.dtype):
            return replace(self, steps=self.steps[:-1])
        return self.then(Shift(amount, dtype), dtype) if amount else self

    def cast(self, dtype: DType) -> TensorRef:
        """The tensor rounded to `dtype`."""
        return self if dtype == self.dtype else self.then(Cast(dtype), dtype)

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the value in `dtype`."""
        return self.dtype.nbytes(self.count)


def stored(
    path: str | os.PathLike[str], offset: int, shape: Shape, dtype: DType, name: str
) -> TensorRef:
    """A ref to a row-major tensor at a byte offset of a file."""
    return TensorRef(Stored(os.fspath(path), offset, shape, dtype), shape, dtype, name=name)


def computed(source: Source, name: str = "", *, shared: bool = False) -> TensorRef:
    """A ref to what a node computes when it is read."""
    return TensorRef(source, source.shape, source.dtype, name=name, shared=shared)


def bounded(ref: TensorRef) -> TensorRef:
    """A tensor made from a few numbers. Raises ValueError for a size that no model has."""
    if min(ref.shape, default=1) < 0 or ref.count > LARGEST:
        raise ValueError(f"a computed tensor has shape {list(ref.shape)}")
    return ref


def constant(value: float, shape: Shape, dtype: DType) -> TensorRef:
    """A ref to a tensor with one value everywhere."""
    return TensorRef(Constant(value, shape, dtype), shape, dtype)


def listed(values: tuple[float, ...], shape: Shape, dtype: DType) -> TensorRef:
    """A ref that carries its few values itself."""
    return TensorRef(Listed(values, shape, dtype), shape, dtype)


def join(parts: list[TensorRef], axis: int) -> TensorRef:
    """The parts, of one dtype, concatenated along `axis`; one part is returned as it is."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if any(part.dtype != first.dtype for part in parts):
        raise ValueError(f"cannot join {[str(part.dtype) for part in parts]}")
    length = sum(part.shape[axis] for part in parts)
    shape = (*first.shape[:axis], length, *first.shape[axis + 1 :])
    return TensorRef(Joined(tuple(parts), axis, shape, first.dtype), shape, first.dtype)


def _after(steps: tuple[Step, ...], value: torch.Tensor) -> torch.Tensor:
    for step in steps:
        value = step.apply(value)
    return value


def _cuts_rows(steps: tuple[Step, ...]) -> bool:
    """Whether a stored tensor is cut across its rows, so that all of it is read for each of the parts."""
    first = next((step for step in steps if not isinstance(step, Reshape)), None)
    return isinstance(first, Slice) and first.axis > 0


_CUT = Recent(128 << 20)  # the sides that experts share are some 60 MB each in the largest models
