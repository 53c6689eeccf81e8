"""Decompositions that may not exist: of values that are not finite, or of a matrix without an inverse.

All of the package asks here, so that a matrix of a damaged file ends in a sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from adaptmerge.errors import InputError
from adaptmerge.lazy import torch


@contextmanager
def _existing() -> Iterator[None]:
    try:
        yield
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch does not list it
        raise InputError(
            "a matrix holds NaN or infinity, or has no inverse, so that it cannot be decomposed: inspect "
            "--values names such tensors"
        ) from None


def svd(matrix: torch.Tensor, *, full_matrices: bool = True) -> Any:
    """U, S, V^T. Raises InputError where there are none."""
    with _existing():
        return torch.linalg.svd(matrix, full_matrices=full_matrices)


def svd_lowrank(matrix: torch.Tensor, rank: int, rounds: int) -> Any:
    """U, S, V of about the strongest directions. Raises InputError where there are none."""
    with _existing():
        return torch.svd_lowrank(matrix, q=rank, niter=rounds)


def svdvals(matrix: torch.Tensor) -> torch.Tensor:
    """The singular values. Raises InputError where there are none."""
    with _existing():
        found: torch.Tensor = torch.linalg.svdvals(matrix)
    return found


def eigh(matrix: torch.Tensor) -> Any:
    """Eigenvalues and eigenvectors of a Hermitian matrix. Raises InputError where there are none."""
    with _existing():
        return torch.linalg.eigh(matrix)


def solve(matrix: torch.Tensor, right: torch.Tensor, *, left: bool = True) -> torch.Tensor:
    """X with A X = B, or with X A = B. Raises InputError where there is none."""
    with _existing():
        found: torch.Tensor = torch.linalg.solve(matrix, right, left=left)
    return found


def inv(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse. Raises InputError where there is none."""
    with _existing():
        found: torch.Tensor = torch.linalg.inv(matrix)
    return found
