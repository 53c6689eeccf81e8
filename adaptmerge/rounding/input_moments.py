"""Second moments of what flows into linear layers, as a diagonal and a sketch, and the file of them.

For the inputs x (in,) of a module, C = mean of x x^T over tokens. `MODULE.mean_square` (in,) is its
diagonal and `MODULE.sketch` (k, in), which may be absent, rows S with S^T S <= C: C is taken to be S^T S
with what the diagonal has beyond it. MODULE is as in the checkpoint. Metadata: what the numbers were
measured on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adaptmerge.algebra import decompose
from adaptmerge.errors import InputError
from adaptmerge.files.safetensors import read_header
from adaptmerge.lazy import torch
from adaptmerge.rounding.metric import Metric
from adaptmerge.tensors.dtypes import F32
from adaptmerge.tensors.refs import TensorRef

MEAN_SQUARE, SKETCH = "mean_square", "sketch"
FORMAT, VERSION = "adaptmerge.moments", "1"
RANK = 32  # rows of a sketch
TURN = 64  # tokens that are taken up together at least
BUFFER = 2  # times as many are kept until the end, for what is cut off early may have been leading
LEAST = 1.0  # what inputs beside the sketch count at least: those that were silent may yet speak
FEW = 1e-4  # of the mean square that is taken to lie beside a sketch at least
BEYOND = 1e-3  # relative to the diagonal, by which a sketch may exceed it: rounding


@dataclass(frozen=True, slots=True)
class Moments:
    """What is stored of the inputs of one module."""

    mean_square: TensorRef
    sketch: TensorRef | None = None


@dataclass(frozen=True)
class MomentsFile:
    """The moments in a file, by module, and what they were measured on."""

    path: Path
    modules: Mapping[str, Moments]
    said: Mapping[str, str] = field(default_factory=dict)


def open_moments(path: Path) -> MomentsFile:
    """The moments in a safetensors file. Raises InputError with all that is wrong in it."""
    found = read_header(path)
    modules: dict[str, Moments] = {}
    problems = []
    for name, ref in found.refs.items():
        module, _, what = name.rpartition(".")
        if what not in (MEAN_SQUARE, SKETCH) or not ref.dtype.is_float:
            problems.append(
                f"{name} ({ref.dtype}): expected MODULE.{MEAN_SQUARE} or MODULE.{SKETCH}, floats"
            )
        elif what == MEAN_SQUARE:
            sketch = found.refs.get(f"{module}.{SKETCH}")
            modules[module] = Moments(ref, sketch)
            problems += _misshapen(module, ref, sketch)
        elif f"{module}.{MEAN_SQUARE}" not in found.refs:
            problems.append(f"{name}: {module}.{MEAN_SQUARE} is not there")
    version = found.metadata.get("version", VERSION)
    if version != VERSION:
        problems.append(f"is of version {version}, expected {VERSION}: measure anew")
    if not found.refs:
        problems.append(f"holds no moments: expected MODULE.{MEAN_SQUARE}")
    if problems:
        raise InputError(problems, where=str(path))
    return MomentsFile(path, modules, found.metadata)


def _misshapen(module: str, mean_square: TensorRef, sketch: TensorRef | None) -> list[str]:
    if len(mean_square.shape) != 1:
        shape = list(mean_square.shape)
        return [f"{module}.{MEAN_SQUARE}: shape {shape}, expected one number per input"]
    if sketch is None or (len(sketch.shape) == 2 and sketch.shape[1] == mean_square.shape[0]):
        return []
    return [
        f"{module}.{SKETCH}: shape {list(sketch.shape)}, expected (rows, {mean_square.shape[0]})"
    ]


def metric_of(moments: Moments, most: int) -> Metric | None:
    """How errors in a weight count: by C, with at most so many directions of its sketch; None where nothing
    flows in.

    The unit is the geometric mean of two: the mean square of all inputs, which in trained models may be
    that of a few, and of what lies beside the sketch, next to which nothing else would count. Errors
    nowhere count less than without moments, so that they need not grow anywhere.

    Raises InputError for moments that none can have.
    """
    squares = moments.mean_square.read().double()
    sketch = _sketch_of(moments, squares.shape[0])
    _check(moments, squares, sketch)
    mean = float(squares.mean())
    if mean == 0:
        return None
    leading = leading_rows(sketch, most)
    rest = (squares - leading.square().sum(0)).clamp(min=0)
    unit = math.sqrt(mean * max(float(rest.mean()), FEW * mean))
    return Metric((rest / unit).clamp(min=LEAST), leading.T / math.sqrt(unit))


def _sketch_of(moments: Moments, count: int) -> torch.Tensor:
    if moments.sketch is None:
        return torch.zeros(0, count, dtype=torch.float64)
    return moments.sketch.read().double()


def _check(moments: Moments, squares: torch.Tensor, sketch: torch.Tensor) -> None:
    name = moments.mean_square.name
    if not bool(torch.isfinite(squares).all()) or bool((squares < 0).any()):
        raise InputError("has values below zero or that are not finite", where=name)
    if moments.sketch is not None and not bool(torch.isfinite(sketch).all()):
        raise InputError("has values that are not finite", where=moments.sketch.name)
    most = squares * (1 + BEYOND) + BEYOND * squares.mean()
    if bool((sketch.square().sum(0) > most).any()):
        raise InputError(
            f"is less than the sketch beside it has by itself: expected {SKETCH}^T {SKETCH} <= C",
            where=name,
        )


def leading_rows(rows: torch.Tensor, most: int) -> torch.Tensor:
    """At most so many rows (k, in), orthogonal, float64, with the leading part of rows^T rows: never more
    of it than there is."""
    if not rows.shape[0]:
        return rows.double()
    rows = rows.double()
    squares, turns = decompose.eigh(rows @ rows.T)
    kept = int((squares > 1e-12 * squares[-1]).sum())
    turns = turns.flip(1)[:, : min(most, kept)]
    found: torch.Tensor = turns.T @ rows
    return found


class Accumulated:
    """The moments of inputs that arrive some at a time, in memory that does not grow with them."""

    def __init__(self, rank: int = RANK) -> None:
        self._rank, self.tokens = rank, 0
        self._squares: torch.Tensor | None = None
        self._rows: torch.Tensor | None = None

    def take(self, inputs: torch.Tensor) -> None:
        """Some more inputs (tokens, in)."""
        room = BUFFER * self._rank
        for part in torch.split(inputs.cpu(), max(TURN, room)):
            part = part.double()
            squares = part.square().sum(0)
            self._squares = squares if self._squares is None else self._squares + squares
            held = part if self._rows is None else torch.cat([self._rows, part])
            self._rows = leading_rows(held, room)
        self.tokens += inputs.shape[0]

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """What is stored of them, float32: means over tokens."""
        assert self._squares is not None and self._rows is not None
        found = {f"{module}.{MEAN_SQUARE}": self._squares / self.tokens}
        if self._rank:
            sketch = leading_rows(self._rows, self._rank) / self.tokens**0.5
            found[f"{module}.{SKETCH}"] = sketch
        return {name: value.to(F32.torch).contiguous() for name, value in found.items()}
