"""Rotations and what is stored of them: the Cayley transform and its series, and the group's log and exp.

All functions work on stacks of blocks (n, b, b) and keep dtype and device; give them float64.
"""

from __future__ import annotations

import math

from adaptmerge.algebra import decompose
from adaptmerge.lazy import torch

STRAIGHT = 1e-7  # an eigenvalue this close to -1 has no unique way back
ORTHOGONAL = 1e-8  # |R^T R - I| of what still counts as a rotation
SEPARATE = 1e-5  # eigenvalues closer than this may share their eigenvectors


def identity(like: torch.Tensor) -> torch.Tensor:
    """The identity of one block of `like`."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def block_size(count: int) -> int:
    """b of a skew block with `count` values above its diagonal. Raises ValueError if no b has."""
    size = (1 + math.isqrt(1 + 8 * count)) // 2
    if size * (size - 1) // 2 != count:
        raise ValueError(f"{count} values fill no skew-symmetric block: expected b * (b - 1) / 2")
    return size


def skew_of(vectors: torch.Tensor) -> torch.Tensor:
    """Skew blocks (n, b, b) from the rows of their upper triangles (n, b * (b - 1) / 2)."""
    size = block_size(vectors.shape[1])
    rows, columns = torch.triu_indices(size, size, 1, device=vectors.device)
    upper = vectors.new_zeros(vectors.shape[0], size, size)
    upper[:, rows, columns] = vectors
    return upper - upper.mT


def vectors_of(skew: torch.Tensor) -> torch.Tensor:
    """The upper triangles of skew blocks, row by row: the inverse of `skew_of`."""
    size = skew.shape[-1]
    rows, columns = torch.triu_indices(size, size, 1, device=skew.device)
    return skew[:, rows, columns]


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """(I - Q)(I + Q)^-1, a rotation for every skew Q (Cayley 1846)."""
    eye = identity(skew)
    turned: torch.Tensor = decompose.solve(eye + skew, eye - skew, left=False)
    return turned


def inverse_cayley(rotation: torch.Tensor) -> torch.Tensor:
    """Q = (I - R)(I + R)^-1. Raises ValueError where R turns by half a circle: no Q gives that."""
    _reject_half_turns(rotation)
    found = cayley(rotation)
    return (found - found.mT) / 2


def cayley_series(skew: torch.Tensor, terms: int, last: float = 1.0) -> torch.Tensor:
    """I + 2 Q + 2 Q^2 + ... + last Q^m: the Neumann series of (I + Q)(I - Q)^-1, cut (Qiu et al. 2025).

    m is `terms` - 1 but at least 3 from three terms on, where the last power counts once; with last = 2
    (written before PEFT 0.18) every power up to `terms` - 1 counts twice.
    """
    power = identity(skew).expand_as(skew)
    total = power.clone()
    for factor in _series(terms, last):
        power = power @ skew
        total = total + factor * power
    return total


def _series(terms: int, last: float) -> list[float]:
    if terms < 3 or last == 2.0:
        return [2.0] * (terms - 1)
    return [2.0] * (max(terms - 1, 3) - 1) + [last]


def nearest(blocks: torch.Tensor) -> torch.Tensor:
    """The orthogonal blocks closest to these (their polar factors): a cut series is no rotation."""
    left, _, right = decompose.svd(blocks)
    found: torch.Tensor = left @ right
    return found


def log(rotation: torch.Tensor) -> torch.Tensor:
    """The smallest skew S with exp(S) = R. Raises ValueError for no rotation and for half a turn.

    R and Q = inverse_cayley(R) have the same eigenvectors, and i Q is Hermitian, so they stay orthogonal
    where eigenvalues meet.
    """
    _reject_stretches(rotation)
    _, vectors = decompose.eigh(1j * inverse_cayley(rotation))
    vectors = _refined(vectors, rotation.to(vectors.dtype))
    turned = (vectors.mH @ rotation.to(vectors.dtype) @ vectors).diagonal(dim1=1, dim2=2)
    found = ((vectors * 1j * torch.angle(turned)[:, None, :]) @ vectors.mH).real
    return (found - found.mT) / 2


def _refined(vectors: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Eigenvectors after one step of perturbation theory: near half turns Q is large, and rounds them."""
    core = vectors.mH @ rotation @ vectors
    values = core.diagonal(dim1=1, dim2=2)
    gaps = values[:, None, :] - values[:, :, None]
    mixed = torch.where(gaps.abs() > SEPARATE, core / gaps, 0.0)
    found: torch.Tensor = torch.linalg.qr(vectors + vectors @ mixed).Q
    return found


def exp(skew: torch.Tensor) -> torch.Tensor:
    """The rotation of a skew S, by its exponential."""
    turned: torch.Tensor = torch.linalg.matrix_exp(skew)
    return turned


def reflections(rotation: torch.Tensor, count: int) -> torch.Tensor:
    """Unit columns u (b, count) with the product of I - 2 u u^T, from the left, equal to one block (b, b).

    Each reflection takes the most moved axis back, which leaves all that was at rest there. Raises
    ValueError when the block needs more of them, or an odd number more or less.
    """
    left = rotation.clone()
    columns: list[torch.Tensor] = []
    eye = identity(rotation)
    while len(columns) < count and float((left - eye).abs().max()) > 1e-14:
        moved = left - eye
        axis = moved[:, moved.norm(dim=0).argmax()]
        columns.append(axis / axis.norm())
        left = left - 2 * columns[-1][:, None] * (columns[-1] @ left)[None, :]
    if float((left - eye).abs().max()) > ORTHOGONAL or (count - len(columns)) % 2:
        raise ValueError(f"no product of {count} reflections: more, or one less, are needed")
    spare = [eye[:, 0]] * (count - len(columns))  # pairs of one reflection undo each other
    return torch.stack(columns + spare, dim=1)


def _reject_half_turns(rotation: torch.Tensor) -> None:
    closest = float(decompose.svdvals(rotation + identity(rotation)).min())
    if closest < STRAIGHT:
        raise ValueError(
            "a block has the eigenvalue -1: it turns by half a circle (or mirrors), where no direction of "
            "turning is the shortest and the Cayley transform has no value"
        )


def _reject_stretches(rotation: torch.Tensor) -> None:
    off = float((rotation.mT @ rotation - identity(rotation)).abs().max())
    if off > ORTHOGONAL:
        raise ValueError(
            f"a block is not orthogonal (R^T R - I is up to {off:.1e}): take the nearest rotation first"
        )
