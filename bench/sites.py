"""Seconds of rounding one synthetic NF4 matrix, by adaptmerge and by bitsandbytes, from memory.

On one thread each, as a worker of fuse() has it; for bitsandbytes that takes OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from adaptmerge.rounding.codes import SOLVE, CodedMatrix, requantise
from adaptmerge.rounding.error_feedback import ADAPTIVE
from adaptmerge.schemes.bitsandbytes.codes import NF4, quantise_4bit
from bench.formats import nf4
from bench.quantised import matrix_of, scaled

RATIO = 1e-2


def adaptive(out: int, width: int, rank: int) -> float:
    """Seconds of adding a delta of that rank to an NF4 matrix: reading its codes, rounding, scales."""
    site = packing(out, width, rank)
    return _second(lambda: requantise(site, ADAPTIVE, SOLVE, 0))


def packing(out: int, width: int, rank: int) -> CodedMatrix:
    """An NF4 matrix, and a delta of that rank, a hundredth of it."""
    weight = _drawn(out, width)
    held = nf4(weight)
    sides = (_drawn(out, rank), _drawn(rank, width))
    return CodedMatrix(held, matrix_of(held, scaled(held.values(), [sides], RATIO)))  # type: ignore[arg-type]


def nearest(out: int, width: int) -> float:
    """Seconds of our NF4 codes for a float32 matrix."""
    weight = _drawn(out, width)
    return _second(lambda: quantise_4bit(weight, NF4))


def bitsandbytes(out: int, width: int) -> float:
    """Seconds of bitsandbytes' quantize_4bit for the same matrix."""
    import bitsandbytes.functional as functional

    weight = _drawn(out, width)
    return _second(lambda: functional.quantize_4bit(weight, quant_type="nf4"))


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


def _second(work: Callable[[], object]) -> float:
    """Seconds of the second of two calls."""
    torch.set_num_threads(1)
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
