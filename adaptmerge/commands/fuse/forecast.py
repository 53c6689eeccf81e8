"""What a fusion into a quantised base will lose, before it is made: from norms, ranks and grids alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from adaptmerge.commands.fuse.pieces.write import Line
from adaptmerge.lazy import torch
from adaptmerge.rounding.codes import CodedMatrix, coded_error, sampled
from adaptmerge.rounding.error_feedback import ADAPTIVE
from adaptmerge.rounding.floats import GRID_ERROR
from adaptmerge.rounding.matrix import delta_of
from adaptmerge.rounding.scale_solver import SOFT
from adaptmerge.rounding.scales import ONLY, CodedRows
from adaptmerge.tensors.dtypes import DType

FEEDBACK = 0.5  # measured: 0.2 to 0.75 for ranks of 4 to 64 in 512 to 4096 columns


class Expected(NamedTuple):
    """Of one adapter in one matrix. ratio: |dW| / |W|. sub: the error that feedback will leave in the space
    of its inputs, relative to the delta (None: of full rank, not rounded with feedback, or taken up by
    scales). floor: that of computing in 16 bits."""

    ratio: float
    sub: float | None
    floor: float | None


def expected(line: Line, scales: str, running: DType | None) -> Sequence[Expected]:
    """What becomes of every part of a coded matrix; nothing of others.

    With q the grid's own |error| / |W| and r of R directions an adapter's, sub = 0.5 q sqrt(R r) / (in
    |dW|/|W|): the error of feedback is spread over all R alike. floor = 0.21 eps sqrt(r / in) / (|dW|/|W|).
    """
    if line.coded is None or not line.matrix.parts:
        return ()
    measured = sampled(CodedMatrix(line.coded, line.matrix))
    delta, columns = delta_of(line.matrix), line.matrix.shape[1]
    feeds = line.choice.rounding == ADAPTIVE and not _solves(line, scales)
    common = FEEDBACK * coded_error(line.coded) * math.sqrt(delta.basis.shape[1]) / columns
    rounds = None if running is None else GRID_ERROR * running.eps
    found = []
    for added, side, full in zip(measured.added, delta.thin, delta.dense, strict=True):
        ratio = math.sqrt(added / measured.weight) if measured.weight else 0.0
        rank = 0 if side is None or full else side.span.shape[1]
        per = math.sqrt(rank) / ratio if ratio else 0.0
        sub = common * per if feeds and per else None
        floor = None if rounds is None or not per else rounds * per / math.sqrt(columns)
        found.append(Expected(ratio, sub, floor))
    return found


def _solves(line: Line, scales: str) -> bool:
    """Whether scales take up what feedback leaves."""
    assert line.coded is not None
    codes, grid = line.coded.grid((0, 1))
    basis = delta_of(line.matrix).basis
    one = CodedRows(line.coded, (0, 1), grid, torch.empty(codes.shape), basis)
    return scales == ONLY or (not one.exchanges(scales) and one.strength(scales) < SOFT)
