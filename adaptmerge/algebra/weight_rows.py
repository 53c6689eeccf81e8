"""The rows of a stored weight, measured beside thin deltas: |w|^2 and <w, a>, without a dense sum.

A weight is read once for all directions that are asked together. Products are made in float32, so many
at a time that the error of each partial sum is known, and added up in float64; squares are float64.
"""

from __future__ import annotations

from collections.abc import Iterator

from adaptmerge.lazy import torch
from adaptmerge.tensors.caches import once
from adaptmerge.tensors.refs import TensorRef

ENTRIES = 1 << 18  # of a weight that are looked at at once: small enough for the cache
PART = 256  # products that are added up in float32
SMALLEST = 2.0**-120  # above what a product, a factor or a sum in float32 may lose by underflow


def rows_of(weight: TensorRef, axis: int = 1) -> WeightRows:
    """The rows of a weight, or for axis 0 its columns; the same ones in a block of `read_once`."""
    return once(WeightRows, weight, axis)


class WeightRows:
    """What is known of the rows of a weight (for axis 0 its columns) that are normed over `axis`."""

    def __init__(self, weight: TensorRef, axis: int) -> None:
        self.weight, self.axis = weight, axis
        self.count, self.width = weight.shape[1 - axis], weight.shape[axis]
        self.squares = torch.zeros(0, dtype=torch.float64)
        self._products = torch.zeros(self.count, 0, dtype=torch.float64)
        self._known: dict[bytes, int] = {}
        self._expected: list[torch.Tensor] = []

    def expect(self, directions: torch.Tensor) -> None:
        """Directions (r, width) that will be asked for: the next pass finds their products too."""
        self._expected.append(directions)

    def products(self, directions: torch.Tensor) -> torch.Tensor:
        """<w, a> of every row w and direction a, (count, r) in float64, as near as `error` says."""
        keys = [_key(a) for a in directions]
        if not len(self.squares) or any(key not in self._known for key in keys):
            asked = {_key(a): a for side in (*self._expected, directions) for a in side}
            new = {key: a for key, a in asked.items() if key not in self._known}
            self._look(torch.stack(list(new.values())) if new else directions[:0])
            self._known |= {key: len(self._known) + at for at, key in enumerate(new)}
            self._expected = []
        return self._products[:, [self._known[key] for key in keys]]

    def error(self, up: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        """A bound of the error of sum_k up[:, k] <w, a_k>, (count,): |fl(w a) - w a| <= gamma |w| |a|.

        However they are added, n products have gamma = n u / (1 - n u), u being half the machine's epsilon
        (Higham, Accuracy and Stability of Numerical Algorithms, 3.1); two more are for rounding a and
        adding up the parts. Cauchy-Schwarz over the parts leaves that of the longest.
        """
        unit = PART + 2 if self._is_narrow else self.width + 2
        gamma = unit * torch.finfo(self._working).eps / 2
        gamma /= 1 - gamma
        sizes = torch.linalg.vector_norm(directions, dim=1) * gamma
        lost = self.width * SMALLEST * _powers(directions) * self._is_narrow
        of_size, of_one = (up.abs() @ torch.stack([sizes, lost], dim=1)).unbind(1)
        return self.squares.sqrt() * of_size + of_one

    def moved(self, rows: torch.Tensor, up: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        """|w + sum_k up[k] a_k| of some rows (n,), by the plain definition in float64."""
        up = up[rows]
        squares = torch.zeros(len(rows), dtype=torch.float64)
        for at, block in self._blocks():
            if self.axis == 0:
                block = block[:, rows].double() + directions[:, at].T @ up.T
                squares += block.square().sum(0)
                continue
            here = (rows >= at.start) & (rows < at.stop)
            if bool(here.any()):
                block = block[rows[here] - at.start].double() + up[here] @ directions
                squares[here] = block.square().sum(1)
        return squares.sqrt()

    @property
    def _is_narrow(self) -> bool:
        """Whether float32 holds the weight as it is."""
        return self.weight.dtype.bits <= 32

    @property
    def _working(self) -> torch.dtype:
        return torch.float32 if self._is_narrow else torch.float64

    def _look(self, directions: torch.Tensor) -> None:
        """One pass over the weight, for the squares and the products with new directions."""
        powers = _powers(directions)
        sides = (directions / powers[:, None]).T.to(self._working).contiguous()
        found = torch.zeros(self.count, len(directions), dtype=torch.float64)
        squares = torch.zeros(self.count, dtype=torch.float64)
        for at, block in self._blocks():
            narrow = block.to(self._working)
            if self.axis == 0:
                squares += block.double().square().sum(0)
                found += _in_parts(narrow.T, sides[at])
            else:
                squares[at] = torch.linalg.vector_norm(block.double(), dim=1).square()
                found[at] = _in_parts(narrow, sides)
        self.squares = squares
        self._products = torch.cat([self._products, found * powers], dim=1)

    def _blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        least = 1 if self.axis else PART
        return self.weight.in_blocks(max(least, ENTRIES // max(1, self.weight.shape[1])))


def _in_parts(rows: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """rows @ sides with so many products at a time in their dtype, which are added up in float64."""
    count = rows.shape[1] // PART
    whole = count * PART
    left = rows[:, :whole].reshape(len(rows), count, PART).transpose(0, 1)
    right = sides[:whole].reshape(count, PART, sides.shape[1])
    total = torch.bmm(left, right).sum(0, dtype=torch.float64)
    if whole < rows.shape[1]:
        total += rows[:, whole:] @ sides[whole:]
    return total


def _powers(directions: torch.Tensor) -> torch.Tensor:
    """A power of two for each direction, such that its largest entry is about one of them."""
    largest = (
        directions.abs().amax(1) if directions.numel() else directions.new_ones(len(directions))
    )
    known = torch.isfinite(largest) & (largest > 0)
    return torch.where(known, torch.exp2(torch.frexp(largest).exponent.double()), 1.0)


def _key(direction: torch.Tensor) -> bytes:
    return direction.numpy().tobytes()
