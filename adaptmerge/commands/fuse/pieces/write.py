"""Writing the files of a fused checkpoint: pieces of tensors are computed in parallel and written in order.

A piece is some rows of one matrix, or a run of bytes to copy; its bytes do not depend on the workers. Only
the caller's thread writes, and few pieces are under way, so memory does not grow with the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from adaptmerge.algebra.linalg import one_thread_each
from adaptmerge.commands.fuse.options import FuseOptions
from adaptmerge.commands.fuse.pieces.layout import Copy, Fused, Recoded, Shard
from adaptmerge.errors import InputError
from adaptmerge.files.disk import tensor_bytes
from adaptmerge.files.safetensors import write_pieces
from adaptmerge.files.scratch import Scratch
from adaptmerge.lazy import torch
from adaptmerge.parallel import ordered, short_turns, workers_default
from adaptmerge.rounding.codes import CodedMatrix, choose_coded, requantise
from adaptmerge.rounding.floats import Choice, choose, settle_rows
from adaptmerge.rounding.matrix import Matrix, Measured, not_finite
from adaptmerge.rounding.scales import SOLVE
from adaptmerge.schemes.coded import CodedWeight
from adaptmerge.tensors.dtypes import U8, DType
from adaptmerge.tensors.refs import Reshape, Slice, Stored, TensorRef, constant
from adaptmerge.tensors.spans import read_span

SPAN = 8 << 20  # bytes that are copied at once


class Settings(NamedTuple):
    """How a shard is written, whatever is in it."""

    rounding: str
    seed: int
    workers: int
    allow_nonfinite: bool = False
    scales: str = SOLVE


def settings_of(options: FuseOptions) -> Settings:
    """How the shards of a fusion are written."""
    return Settings(
        options.rounding,
        options.seed,
        options.jobs or workers_default(),
        "nonfinite" in options.allow,
        options.scales,
    )


class Line(NamedTuple):
    """What became of one matrix of a tensor: how it was rounded, what nearest rounding would have kept, and
    what rounding did. coded: how it is stored where it is quantised."""

    tensor: str
    matrix: Matrix
    choice: Choice
    measured: Measured
    coded: CodedWeight | None = None

    @property
    def stored_as(self) -> str:
        """The dtype of what is stored, or that it is codes."""
        return str(self.matrix.dtype) if self.coded is None else "quantised"


@dataclass(frozen=True, slots=True)
class Written:
    """A written shard: the sha256 of its file, and a line for every matrix that was computed."""

    sha256: str
    lines: tuple[Line, ...]


class Piece(NamedTuple):
    """Some rows of what is computed as that number, or bytes of a stored tensor; cast to a dtype."""

    number: int | None
    rows: tuple[int, int]
    dtype: DType
    ref: TensorRef | None = None
    part: Fused | None = None


Advance = Callable[[int], None]  # told how many bytes more are done


def survey(shard: Shard, settings: Settings) -> list[Choice]:
    """How every matrix of a shard is rounded, from a look at some of its rows."""
    with one_thread_each(), ThreadPoolExecutor(settings.workers) as pool:
        work = partial(_choice, rounding=settings.rounding)
        return list(ordered(pool, settings.workers, work, shard.made))


def _choice(made: Fused | CodedMatrix, rounding: str) -> Choice:
    if isinstance(made, CodedMatrix):
        return choose_coded(made, rounding)
    return choose(made.matrix, rounding)


def write_shard(
    shard: Shard, path: Path, beside: Path, settings: Settings, progress: Advance
) -> Written:
    """Writes one file, with a temporary one beside it, and says what is in it.

    Raises InputError naming tensors that are not finite.
    """
    choices = survey(shard, settings)
    sums: dict[int, Measured] = {}
    with (
        one_thread_each(),
        short_turns(),
        ThreadPoolExecutor(settings.workers) as pool,
        _recoded(shard, beside, settings, pool) as coded,
    ):
        sums |= coded.measured

        def pieces() -> Iterator[bytes | memoryview]:
            yield shard.header
            done = ordered(
                pool,
                settings.workers,
                lambda piece: _compute(piece, choices, settings),
                _pieces(shard, coded.refs),
            )
            for piece, (data, measured) in done:
                if piece.number is not None and measured is not None:
                    before = sums.get(piece.number)
                    sums[piece.number] = measured if before is None else before.plus(measured)
                yield data

        digest = write_pieces(path, pieces(), progress)
    lines = lines_of(shard, choices, [sums[i] for i in range(len(choices))])
    if not settings.allow_nonfinite:
        _check_finite(lines)
    return Written(digest, tuple(lines))


def lines_of(shard: Shard, choices: Sequence[Choice], measured: Sequence[Measured]) -> list[Line]:
    """A line for each of what a shard computes."""
    coded = [one.weight if isinstance(one, CodedMatrix) else None for one in shard.made]
    matrices = [one.matrix for one in shard.made]
    return list(map(Line, shard.names, matrices, choices, measured, coded))


class Repackings(NamedTuple):
    """The tensors that coded weights are stored as from now on, by name, and what rounding did."""

    refs: dict[str, TensorRef]
    measured: dict[int, Measured]


@contextmanager
def _recoded(
    shard: Shard, beside: Path, settings: Settings, pool: ThreadPoolExecutor
) -> Iterator[Repackings]:
    """The coded weights of a shard, settled into a temporary file that lasts as long as the block."""
    found = Repackings({}, {})
    if not shard.coded_matrices:
        yield found
        return
    numbers = {one: number for number, one in enumerate(shard.made) if isinstance(one, CodedMatrix)}
    with Scratch(beside) as scratch:
        work = partial(_requantised, settings=settings)
        results = ordered(pool, settings.workers, work, shard.coded_matrices)
        for coded, (tensors, measured) in zip(shard.coded_matrices, results, strict=True):
            found.refs.update({name: scratch.put(value) for name, value in tensors.items()})
            if coded in numbers:
                found.measured[numbers[coded]] = measured
        yield found
    beside.unlink()


def _requantised(
    coded: CodedMatrix, settings: Settings
) -> tuple[dict[str, torch.Tensor], Measured]:
    choice = choose_coded(coded, settings.rounding)
    done = requantise(coded, choice.rounding, settings.scales, settings.seed)
    return coded.weight.pack(done.codes, done.grid), done.measured


def _pieces(shard: Shard, recoded: Mapping[str, TensorRef]) -> Iterator[Piece]:
    number = 0
    for tensor in shard.tensors:
        for part in tensor.parts:
            if isinstance(part, Copy):
                yield from _runs(part.ref, tensor.dtype)
                continue
            if isinstance(part, Recoded):
                yield from _runs(recoded.get(part.name, part.stored), tensor.dtype)
                number += part.leads
                continue
            whole = [(0, part.matrix.shape[0])]
            ranges = part.matrix.row_ranges() if part.in_order else whole
            for rows in ranges:
                yield Piece(number, rows, tensor.dtype, None, part)
            number += 1
        if tensor.gap:
            yield from _runs(constant(0.0, (tensor.gap,), U8), U8)


def _runs(ref: TensorRef, dtype: DType) -> Iterator[Piece]:
    """A stored tensor in runs of rows of bounded size; as one where it cannot be cut."""
    flat = _flat(ref) if dtype == ref.dtype else None
    if flat is not None:
        for start in range(0, flat.nbytes, SPAN):
            length = min(SPAN, flat.nbytes - start)
            raw = replace(flat, offset=flat.offset + start, shape=(length,))
            yield Piece(None, (0, length), dtype, TensorRef(raw, (length,), ref.dtype))
        return
    rows = ref.shape[0] if ref.shape else 1
    step = max(1, SPAN // max(1, ref.nbytes // max(1, rows)))
    if not ref.shape:
        yield Piece(None, (0, 1), dtype, ref)
    for start in range(0, rows if ref.shape else 0, step):
        stop = min(rows, start + step)
        yield Piece(None, (start, stop), dtype, ref.slice(0, start, stop))


def _flat(ref: TensorRef) -> Stored | None:
    """The run of bytes that a ref is, if it is one."""
    source, steps = ref.source, list(ref.steps)
    if not isinstance(source, Stored):
        return None
    if steps and isinstance(steps[0], Slice) and steps[0].axis == 0:
        first = steps.pop(0)
        assert isinstance(first, Slice)
        source = source.rows(first.start, first.stop)
    return source if all(isinstance(step, Reshape) for step in steps) else None


def _compute(
    piece: Piece, choices: Sequence[Choice], settings: Settings
) -> tuple[Piece, tuple[memoryview, Measured | None]]:
    """The bytes of a piece and, of rows that were computed, what rounding did to them."""
    if piece.ref is not None:
        return piece, (_copied(piece), None)
    assert piece.part is not None
    assert piece.number is not None
    choice = choices[piece.number]
    found = settle_rows(piece.part.matrix, piece.rows, choice.rounding, settings.seed)
    value = found.value if piece.part.in_order else piece.part.stored(found.value)
    return piece, (tensor_bytes(value), found.measured)


def _copied(piece: Piece) -> memoryview:
    ref = piece.ref
    assert ref is not None
    if isinstance(ref.source, Stored) and not ref.steps and piece.dtype == ref.dtype:
        return tensor_bytes(read_span(ref.source.path, ref.source.offset, ref.shape[0]))
    return tensor_bytes(ref.read().to(piece.dtype.torch))


def _check_finite(lines: Sequence[Line]) -> None:
    """Raises InputError with all tensors that went into something that is not finite."""
    problems = []
    for line in lines:
        sums = (line.measured.error, line.measured.weight, line.measured.delta)
        if all(map(math.isfinite, sums)):
            continue
        problems += not_finite(line.matrix) or [
            f"{line.matrix.site}: the sum is beyond the range of its dtype"
        ]
    if problems:
        advice = "pass --allow nonfinite to fuse it all the same"
        raise InputError([*problems[:-1], f"{problems[-1]}; {advice}"])
