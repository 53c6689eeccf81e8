"""The built-in edits: what an adapter does to a base model at one site.

Weight edits change a parameter: `apply(weight)` is their whole meaning, on float64 (or any float)
tensors in canonical orientation, and `delta()` is the additive part that needs no base, if there is
one. Activation edits change what flows: `forward` is called by the runtime at a place of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeGuard, runtime_checkable

from adaptmerge.adapters.graph import Edit, Site, fits
from adaptmerge.algebra.factors import (
    Diag,
    Factor,
    Leaf,
    Misshapen,
    Product,
    Rows,
    Sum,
    Term,
    whole_term,
)
from adaptmerge.algebra.forms import Form, form_of, norms_beside
from adaptmerge.algebra.low_rank import as_low_rank
from adaptmerge.algebra.moved import moved_norms
from adaptmerge.algebra.weight_rows import rows_of
from adaptmerge.lazy import torch
from adaptmerge.tensors.caches import remembered
from adaptmerge.tensors.dtypes import F64, DType
from adaptmerge.tensors.refs import TensorRef, computed


@runtime_checkable
class WeightEdit(Edit, Protocol):
    """An edit of one parameter."""

    def delta(self) -> Factor | None:
        """What is added to the parameter whatever the base is; None when it depends on the base."""

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """The edited parameter, of the same shape, from the (out, in) matrix or vector `weight`."""


@dataclass(frozen=True, slots=True)
class Add:
    """W + delta; for a vector parameter delta is (n, 1)."""

    kind: ClassVar[str] = "add"
    site: Site
    factor: Factor

    def delta(self) -> Factor | None:
        return self.factor

    def form_on(self, weight: torch.Tensor) -> Form | None:
        """What it adds, if that is thin."""
        return form_of(self.factor)

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.factor.dense().to(weight).reshape(weight.shape)


@dataclass(frozen=True, slots=True)
class Dora:
    """m / |W + delta|_row * (W + delta), row norms over all but the first axis (Liu et al. 2024)."""

    kind: ClassVar[str] = "dora"
    family: ClassVar[str] = "lora"
    site: Site
    factor: Factor
    magnitude: TensorRef

    def delta(self) -> Factor | None:
        return None

    @property
    def axis(self) -> int:
        """The axis that is normed over: that of the inputs, of an embedding that of the tokens."""
        return 0 if self.site.layer.kind == "embedding" else 1

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        moved = weight + self.factor.dense().to(weight).reshape(weight.shape)
        magnitude = self.magnitude.read().to(weight).flatten()
        share: torch.Tensor = magnitude / torch.linalg.vector_norm(moved, dim=self.axis)
        return moved * (share[None, :] if self.axis == 0 else share[:, None])

    def form_on(self, weight: torch.Tensor) -> Form | None:
        """(c - 1) W + c delta with c = m / |W + delta|, if that is thin."""
        form = form_of(self.factor)
        if form is None or self.axis == 0:
            return None
        norms = norms_beside(weight, form := form.on(weight.device))
        if norms is None:
            return None
        by = self.magnitude.read().to(norms).flatten() / norms
        return Form(form.up * by[:, None], form.down, by - 1.0)

    def on(self, weight: TensorRef) -> Factor:
        """diag(c - 1) W + diag(c) delta with c = m / |W + delta|; columns, for an embedding."""
        stretched = Diag(computed(Share(self, weight, less=1.0)))
        moved = Diag(computed(Share(self, weight)))
        if self.axis == 0:
            return Sum((Product((Leaf(weight), stretched)), Product((self.factor, moved))))
        return Sum((Product((stretched, Leaf(weight))), Product((moved, self.factor))))


@dataclass(frozen=True, slots=True)
class Share:
    """c - less of a DoRA on a base weight, c = m / |W + delta|: a vector still to be computed."""

    edit: Dora
    weight: TensorRef
    less: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.weight.shape[1 - self.edit.axis],)

    @property
    def dtype(self) -> DType:
        return F64

    def read(self) -> torch.Tensor:
        return share_of(self.edit, self.weight) - self.less


@remembered
def share_of(edit: Dora, weight: TensorRef) -> torch.Tensor:
    """m / |W + delta| of a DoRA on a base weight, float64."""
    with made_for(edit, weight):
        norms = norms_of(weight, edit.factor, edit.axis)
        return edit.magnitude.read().double().flatten() / norms


@contextmanager
def made_for(edit: Any, weight: TensorRef) -> Iterator[None]:
    """Raises Misshapen where shapes of an edit and a weight of the base do not go together inside."""
    try:
        yield
    except (RuntimeError, IndexError) as problem:
        if "memory" in str(problem):
            raise
        raise Misshapen(
            f"{edit.site} of the adapter does not fit {weight.name} of the base, of shape "
            f"{list(weight.shape)} ({problem})"
        ) from None


def norms_of(weight: TensorRef, factor: Factor, axis: int) -> torch.Tensor:
    """|W + delta| over an axis, float64."""
    return moved_norms(rows_of(weight, axis), *_moves(factor, axis))


def expect_norms(weight: TensorRef, factors: Sequence[Factor], axis: int) -> None:
    """Has one pass over the weight serve the norms of several deltas, in a block of `read_once`."""
    for factor in factors:
        rows_of(weight, axis).expect(_moves(factor, axis)[1])


def _moves(factor: Factor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What rows are moved by (columns, for axis 0): how far each, and in which directions."""
    terms = factor.thin()
    up = torch.cat([term.up.double() * term.scale for term in terms], dim=1)
    down = torch.cat([term.down.double() for term in terms])
    return (up, down) if axis else (down.T, up.T)


def normed_axis(edit: Edit) -> int:
    """The axis of its weight that an edit norms over; that of the inputs, where it does not."""
    found: int = getattr(edit, "axis", 1)
    return found


@dataclass(frozen=True, slots=True)
class Scale:
    """diag(l) W for side "out", W diag(l) for side "in" (IA3, Liu et al. 2022)."""

    kind: ClassVar[str] = "scale"
    family: ClassVar[str] = "ia3"
    site: Site
    vector: TensorRef
    side: str = "out"

    def delta(self) -> Factor | None:
        return None

    def form_on(self, weight: torch.Tensor) -> Form | None:
        """(l - 1) W, of outputs."""
        if self.side != "out" or weight.ndim != 2:
            return None
        empty = torch.zeros(0, dtype=torch.float64)
        up, down = empty.reshape(weight.shape[0], 0), empty.reshape(0, weight.shape[1])
        return Form(up, down, self.vector.read().double().flatten() - 1.0)

    def on(self, weight: TensorRef) -> Factor:
        """diag(l - 1) W or W diag(l - 1)."""
        times = weight.shape[1] // self.vector.count if self.side == "in" else 1
        moved = Diag(computed(Deviation(self.vector, times)))
        if len(weight.shape) == 1:
            return Product((moved, Leaf(weight.reshape(weight.count, 1))))
        return Product((moved, Leaf(weight)) if self.side == "out" else (Leaf(weight), moved))

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        vector = self.vector.read().to(weight).flatten()
        if weight.ndim == 1:
            return weight * vector
        if self.side == "out":
            return weight * vector[:, None]
        return weight * vector.repeat_interleave(weight.shape[1] // len(vector))[None, :]


@dataclass(frozen=True, slots=True)
class Deviation:
    """A vector of scales less 1, each `times` over for the places of a kernel; still to be computed."""

    vector: TensorRef
    times: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.vector.count * self.times,)

    @property
    def dtype(self) -> DType:
        return F64

    def read(self) -> torch.Tensor:
        return self.vector.read().double().flatten().repeat_interleave(self.times) - 1.0


@dataclass(frozen=True, slots=True)
class Effect:
    """What the edits of one adapter add to the base's own weight at a site: apply(W) - W, in full."""

    at_once: ClassVar[bool] = True
    edits: tuple[Any, ...]
    weight: TensorRef

    @property
    def shape(self) -> tuple[int, int]:
        shape = self.weight.shape
        return shape[0], math.prod(shape[1:])

    def dense(self, rows: Rows = None) -> torch.Tensor:
        before = self.weight.read().double()
        value = (self._after(before) - before).reshape(self.shape)
        return value[slice(*rows)] if rows else value

    def _after(self, value: torch.Tensor) -> torch.Tensor:
        """The weight as the edits leave it. Raises Misshapen where they are for another shape."""
        for edit in self.edits:
            with made_for(edit, self.weight):
                value = edit.apply(value)
        return value

    def thin(self) -> list[Term]:
        return whole_term(self.dense())


@runtime_checkable
class FactoredOnBase(WeightEdit, Protocol):
    """An edit that depends on the base and knows a better form of what it adds than the dense one."""

    def on(self, weight: TensorRef) -> Factor:
        """What it adds to the base weight (out, in)."""


@runtime_checkable
class Formed(WeightEdit, Protocol):
    """An edit that knows what it adds as rows of the weight and two thin sides."""

    def form_on(self, weight: torch.Tensor) -> Form | None:
        """What it adds to the weight (out, in), in float64; None where that is no such form."""


def is_formed(edit: Edit) -> TypeGuard[Formed]:
    """Whether an edit may know a form of what it adds."""
    return fits(edit, Formed)


class RowNorming(Protocol):
    """An edit that stretches each row of W + delta to a magnitude."""

    @property
    def factor(self) -> Factor:
        """delta."""

    @property
    def magnitude(self) -> TensorRef:
        """The norm of each row."""


def norms_rows(edit: Any) -> TypeGuard[RowNorming]:
    """Whether an edit is m / |W + delta| * (W + delta), row by row."""
    return isinstance(edit, Dora) and edit.axis == 1


@runtime_checkable
class Additive(Edit, Protocol):
    """An edit that may know what it adds: of a parameter, or to what flows after some token."""

    def delta(self) -> Factor | None:
        """What is added whatever the base is; None when it depends on the base."""


def is_additive(edit: Edit) -> TypeGuard[Additive]:
    """Whether an edit may know what it adds."""
    return fits(edit, Additive)


def delta_of(edit: Edit) -> Factor | None:
    """What an edit adds whatever the base is; None where that depends on it, or nothing is added."""
    return edit.delta() if is_additive(edit) else None


def delta_on(edits: Sequence[Edit], weight: TensorRef) -> Factor:
    """What the weight edits of one adapter at one site add to the base weight, canonical (out, in)."""
    if len(edits) == 1:
        delta = delta_of(edits[0])
        if delta is not None:
            return delta
        if isinstance(edits[0], FactoredOnBase):
            if len(weight.shape) != (1 if edits[0].site.param == "bias" else 2):
                found = f"found {list(weight.shape)} in the base"
                raise Misshapen(f"{weight.name}: a matrix has two dimensions, {found}")
            return edits[0].on(weight)
    if not weight.shape:
        raise Misshapen(f"{weight.name}: found a single number in the base, expected a matrix")
    return Effect(tuple(edits), weight)


def family_of(edit: Edit) -> str:
    """The family whose own form the edit is in: "lora", "ia3", "loha", ...; "" for a generic one, and for
    one that does more with its factor than to add it, such as a gate."""
    own: str = getattr(edit, "family", "")
    factor = factor_of(edit)
    if own or factor is None or not is_additive(edit):
        return own
    return getattr(factor, "family", "") or ("lora" if _is_stored(factor) else "")


def _is_stored(factor: Factor) -> bool:
    column = factor.shape[1] == 1 and len(getattr(factor, "parts", ())) == 1
    return as_low_rank(factor) is not None or column


def vera(up: TensorRef, up_scale: TensorRef, down: TensorRef, down_scale: TensorRef) -> Product:
    """diag(b) B diag(d) A (Kopiczko et al. 2024), B and A shared by all sites."""
    return Product((Diag(up_scale), Leaf(up), Diag(down_scale), Leaf(down)))


def factor_of(edit: Edit) -> Factor | None:
    """The factor that a run may refit, for edits that are made of one."""
    found: Factor | None = getattr(edit, "factor", None)
    return found


def scaled_by(edit: Edit) -> TensorRef | None:
    """The vector that an edit scales inputs or outputs by; None for other edits."""
    return edit.vector if isinstance(edit, Scale) else None


def side_of(edit: Edit) -> str:
    """Whether an edit acts on what flows "in" or "out", where it is of one side; else "out"."""
    found: str = getattr(edit, "side", "out")
    return found


def refitted(edit: Edit, factor: Factor) -> Edit:
    """The same edit made of another factor."""
    return replace(edit, **{"factor": factor})
