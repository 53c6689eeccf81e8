"""Matrices in factored form, with an algebra: what a delta is made of before anything is computed.

Every factor is frozen data with a `shape` (out, in) and refs to stored tensors. `dense()` is the plain
float64 definition, used to prove results; `thin()` gives the same matrix as low-rank terms, used to
compute them. A family that stores something else than these adds one class with the same four members.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from adaptmerge.algebra.linalg import working
from adaptmerge.errors import InputError
from adaptmerge.lazy import torch
from adaptmerge.tensors.dtypes import F64, DType
from adaptmerge.tensors.refs import TensorRef, computed

Rows = tuple[int, int] | None


class Misshapen(InputError, ValueError):
    """Matrices of shapes that do not go together: of a file that fits nothing, or not its config."""


class Term(NamedTuple):
    """scale * up @ down with up (out, r) and down (r, in), in the dtypes they are stored in."""

    up: torch.Tensor
    down: torch.Tensor
    scale: float


@runtime_checkable
class Factor(Protocol):
    """A matrix in factored form."""

    def __hash__(self) -> int:
        """Factors are data."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    def dense(self, rows: Rows = None) -> torch.Tensor:
        """Rows start..stop (default all) of the matrix in float64, by its plain definition."""

    def thin(self) -> list[Term]:
        """Low-rank terms whose sum is the matrix."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A stored matrix."""

    ref: TensorRef

    def __post_init__(self) -> None:
        if len(self.ref.shape) != 2:
            raise Misshapen(f"{self.ref.name}: a matrix has two dimensions, found {self.ref.shape}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.ref.shape[0], self.ref.shape[1]

    def dense(self, rows: Rows = None) -> torch.Tensor:
        return (self.ref.slice(0, *rows) if rows else self.ref).read().double()

    def thin(self) -> list[Term]:
        return whole_term(self.ref.read())


@dataclass(frozen=True, slots=True)
class Diag:
    """A square matrix with a stored vector on its diagonal."""

    ref: TensorRef

    @property
    def shape(self) -> tuple[int, int]:
        return self.ref.count, self.ref.count

    def dense(self, rows: Rows = None) -> torch.Tensor:
        start, stop = rows or (0, self.ref.count)
        return torch.diag(self.ref.read().double().flatten())[start:stop]

    def thin(self) -> list[Term]:
        value = self.ref.read().flatten()
        return [Term(torch.diag(value), torch.eye(self.ref.count, dtype=value.dtype), 1.0)]


@dataclass(frozen=True, slots=True)
class Product:
    """scale * parts[0] @ parts[1] @ ..."""

    parts: tuple[Factor, ...]
    scale: float = 1.0

    def __post_init__(self) -> None:
        for left, right in zip(self.parts, self.parts[1:], strict=False):
            if left.shape[1] != right.shape[0]:
                raise Misshapen(f"shapes {left.shape} and {right.shape} do not multiply")

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape[0], self.parts[-1].shape[1]

    def dense(self, rows: Rows = None) -> torch.Tensor:
        first, *others = self.parts
        if isinstance(first, Diag) and others:
            column = first.ref.read().double().flatten()[slice(*rows) if rows else slice(None)]
            return column[:, None] * Product(tuple(others), self.scale).dense(rows)
        value = first.dense(rows) * self.scale
        for part in others:
            if isinstance(part, Diag):
                value = value * part.ref.read().double().flatten()
            else:
                value = value @ part.dense()
        return value

    def thin(self) -> list[Term]:
        inner = [part for part in self.parts if not isinstance(part, Diag)]
        if len(inner) == 1:
            return [self._around(term) for term in inner[0].thin()]
        # of equal cuts the last: adapters that share their last matrix then share a whole side
        cuts = range(len(self.parts) - 1, 0, -1)
        cut = min(cuts, key=lambda i: self.parts[i].shape[0])
        return [_even(chain(self.parts[:cut]), chain(self.parts[cut:]), self.scale)]

    def _around(self, term: Term) -> Term:
        """The term between the diagonals that lie around the one matrix."""
        up, down, after = term.up, term.down, False
        for part in self.parts:
            if not isinstance(part, Diag):
                after = True
            elif after:
                down = working(down) * working(part.ref.read()).flatten()
            else:
                up = working(part.ref.read()).flatten()[:, None] * working(up)
        return _even(up, down, term.scale * self.scale)


@dataclass(frozen=True, slots=True)
class Sum:
    """parts[0] + parts[1] + ..."""

    parts: tuple[Factor, ...]

    def __post_init__(self) -> None:
        if len({part.shape for part in self.parts}) != 1:
            raise Misshapen(f"shapes {[part.shape for part in self.parts]} do not add")

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape

    def dense(self, rows: Rows = None) -> torch.Tensor:
        value = self.parts[0].dense(rows)
        for part in self.parts[1:]:
            value = value + part.dense(rows)
        return value

    def thin(self) -> list[Term]:
        return [term for part in self.parts for term in part.thin()]


@dataclass(frozen=True, slots=True)
class Hadamard:
    """The element-wise product; the rank of the result is at most the product of the ranks."""

    left: Factor
    right: Factor

    def __post_init__(self) -> None:
        if self.left.shape != self.right.shape:
            raise Misshapen(f"shapes {self.left.shape} and {self.right.shape} differ")

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape

    def dense(self, rows: Rows = None) -> torch.Tensor:
        return self.left.dense(rows) * self.right.dense(rows)

    def thin(self) -> list[Term]:
        return [_hadamard(a, b) for a in self.left.thin() for b in self.right.thin()]


@dataclass(frozen=True, slots=True)
class Kronecker:
    """The Kronecker product of two matrices."""

    left: Factor
    right: Factor

    @property
    def shape(self) -> tuple[int, int]:
        left, right = self.left.shape, self.right.shape
        return left[0] * right[0], left[1] * right[1]

    def dense(self, rows: Rows = None) -> torch.Tensor:
        start, stop = rows or (0, self.shape[0])
        return torch.kron(self.left.dense(), self.right.dense())[start:stop]

    def thin(self) -> list[Term]:
        return [_kronecker(a, b) for a in self.left.thin() for b in self.right.thin()]


@dataclass(frozen=True, slots=True)
class Place:
    """A block at (row, column) inside a matrix of zeros of shape (out, in)."""

    block: Factor
    shape: tuple[int, int]
    row: int = 0
    column: int = 0

    def __post_init__(self) -> None:
        ends = (self.row + self.block.shape[0], self.column + self.block.shape[1])
        if ends[0] > self.shape[0] or ends[1] > self.shape[1]:
            raise Misshapen(f"block {self.block.shape} at {self.row}, {self.column} is outside")

    def dense(self, rows: Rows = None) -> torch.Tensor:
        start, stop = rows or (0, self.shape[0])
        out = torch.zeros(stop - start, self.shape[1], dtype=torch.float64)
        low, high = max(start, self.row), min(stop, self.row + self.block.shape[0])
        if low < high:
            inside = self.block.dense((low - self.row, high - self.row))
            out[low - start : high - start, self.column : self.column + inside.shape[1]] = inside
        return out

    def thin(self) -> list[Term]:
        return [self._placed(term) for term in self.block.thin()]

    def _placed(self, term: Term) -> Term:
        rank = term.up.shape[1]
        up = term.up.new_zeros(self.shape[0], rank)
        down = term.down.new_zeros(rank, self.shape[1])
        up[self.row : self.row + term.up.shape[0]] = term.up
        down[:, self.column : self.column + term.down.shape[1]] = term.down
        return Term(up, down, term.scale)


@dataclass(frozen=True, slots=True)
class Values:
    """A tensor still to be computed: the entries of a factor under another shape, stored as `store`.

    neutral: the entry that does nothing, from which errors are measured.
    """

    factor: Factor
    shape: tuple[int, ...]
    store: DType | None = None
    neutral: float = 0.0

    @property
    def dtype(self) -> DType:
        return F64

    def read(self) -> torch.Tensor:
        return self.factor.dense().reshape(self.shape)


def values(factor: Factor, like: TensorRef, neutral: float = 0.0) -> TensorRef:
    """The entries of a factor as a tensor of the shape and dtype of another."""
    return computed(Values(factor, like.shape, like.dtype, neutral))


class Expanded:
    """For families that store something else: `expand()` is the same matrix in the algebra above.

    `family` names the family: formats that know it write the stored tensors back as they are.
    """

    __slots__ = ()
    family: ClassVar[str]

    def expand(self) -> Factor:
        """The exact rewrite."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        return self.expand().shape

    def dense(self, rows: Rows = None) -> torch.Tensor:
        return self.expand().dense(rows)

    def thin(self) -> list[Term]:
        return self.expand().thin()


class Whole:
    """For factors of full rank: `matrix()` is all of it, and its thin form saves nothing."""

    __slots__ = ()
    at_once: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        raise NotImplementedError

    def matrix(self) -> torch.Tensor:
        """The (out, in) matrix in float64."""
        raise NotImplementedError

    def dense(self, rows: Rows = None) -> torch.Tensor:
        value = self.matrix()
        return value[slice(*rows)] if rows else value

    def thin(self) -> list[Term]:
        return whole_term(self.matrix())


def whole_term(value: torch.Tensor) -> list[Term]:
    """A matrix as one term: itself beside the identity of its shorter side."""
    if value.shape[0] < value.shape[1]:
        return [Term(torch.eye(value.shape[0], dtype=value.dtype), value, 1.0)]
    return [Term(value, torch.eye(value.shape[1], dtype=value.dtype), 1.0)]


def _even(up: torch.Tensor, down: torch.Tensor, scale: float) -> Term:
    """A term whose sides are both float64 when one is."""
    if up.dtype != down.dtype and torch.float64 in (up.dtype, down.dtype):
        return Term(up.double(), down.double(), scale)
    return Term(up, down, scale)


def chain(parts: tuple[Factor, ...]) -> torch.Tensor:
    """The product of factors as one matrix; a single leaf keeps its stored values and dtype."""
    if len(parts) == 1:
        return _value(parts[0])
    if isinstance(parts[0], Diag):
        return working(parts[0].ref.read()).flatten()[:, None] * working(chain(parts[1:]))
    value = working(_value(parts[0]))
    for part in parts[1:]:
        if isinstance(part, Diag):
            value = value * working(part.ref.read()).flatten()
        else:
            right = working(_value(part))
            wide = torch.promote_types(value.dtype, right.dtype)
            value = value.to(wide) @ right.to(wide)
    return value


def _value(factor: Factor) -> torch.Tensor:
    if isinstance(factor, Leaf):
        return factor.ref.read()
    if isinstance(factor, Diag):
        return torch.diag(factor.ref.read().flatten())
    terms = factor.thin()
    total = sum(working(t.up) @ working(t.down) * t.scale for t in terms)
    assert isinstance(total, torch.Tensor)
    return total


def _hadamard(a: Term, b: Term) -> Term:
    """Row-wise Kronecker of the ups and column-wise of the downs (Khatri-Rao)."""
    up = torch.einsum("or,os->ors", working(a.up), working(b.up)).flatten(1)
    down = torch.einsum("ri,si->rsi", working(a.down), working(b.down)).flatten(0, 1)
    return Term(up, down, a.scale * b.scale)


def _kronecker(a: Term, b: Term) -> Term:
    up = torch.kron(working(a.up), working(b.up))
    down = torch.kron(working(a.down), working(b.down))
    return Term(up, down, a.scale * b.scale)


def rank_bound(factor: Factor) -> int:
    """An upper bound of the rank, from shapes alone."""
    limit = min(factor.shape)
    match factor:
        case Product(parts=parts):
            return min(rank_bound(part) for part in parts)
        case Sum(parts=parts):
            return min(limit, sum(rank_bound(part) for part in parts))
        case Hadamard(left=left, right=right) | Kronecker(left=left, right=right):
            return min(limit, rank_bound(left) * rank_bound(right))
        case Place(block=block):
            return rank_bound(block)
        case Expanded():
            return rank_bound(factor.expand())
        case _:
            return limit
