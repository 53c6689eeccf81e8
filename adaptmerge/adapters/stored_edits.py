"""Edits that store a parameter, or rows of it, as it will be; and what cannot be merged at all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, TypeGuard, runtime_checkable

from adaptmerge.adapters.graph import Edit, Site, fits
from adaptmerge.algebra.factors import Factor
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Replace:
    """The parameter itself is stored.

    role: "head" (part of `owner`, a module saved whole), "bias", "base copy" (the base's own value,
    kept beside an adapter) or "unlisted" (stored whole though nothing lists it; of a head all the same
    where it has an `owner`).
    """

    kind: ClassVar[str] = "replace"
    site: Site
    value: TensorRef
    role: str = "head"
    owner: str = ""

    def delta(self) -> Factor | None:
        return None

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        return self.value.read().to(weight)


@dataclass(frozen=True, slots=True)
class ReplaceRows:
    """Some rows of an embedding are stored: trainable tokens. `rows` are token ids.

    family: "trainable_tokens" for an adapter of nothing else, "" for rows beside another family. tied:
    whether they repeat those of the embedding that this module shares its weight with.
    """

    kind: ClassVar[str] = "rows"
    site: Site
    rows: tuple[int, ...]
    values: TensorRef
    family: str = ""
    tied: bool = False

    def delta(self) -> Factor | None:
        return None

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        rows = torch.tensor(self.rows, device=weight.device)
        return weight.index_copy(0, rows, self.values.read().to(weight))


@dataclass(frozen=True, slots=True)
class Opaque:
    """Tensors of a family that no merge can be right for, kept to be looked at; `why` says the reason."""

    kind: ClassVar[str] = "opaque"
    site: Site
    what: str
    why: str
    tensors: tuple[TensorRef, ...] = ()


def with_value(edit: Edit, value: TensorRef) -> Edit:
    """The same edit storing another value."""
    return replace(edit, **{"value": value})


@runtime_checkable
class StoresValue(Edit, Protocol):
    """An edit that stores a parameter as it will be."""

    @property
    def value(self) -> TensorRef:
        """The parameter."""


def stores_value(edit: Edit) -> TypeGuard[StoresValue]:
    """Whether an edit stores a parameter as it will be."""
    return fits(edit, StoresValue)


def stored_value(edit: Edit) -> TensorRef:
    """The parameter that an edit stores. Raises TypeError for edits that store none."""
    if not stores_value(edit):
        raise TypeError(f"{edit.kind} edits store no parameter")
    return edit.value


def stores_rows(edit: Edit) -> TypeGuard[ReplaceRows]:
    """Whether an edit stores some rows of an embedding."""
    return isinstance(edit, ReplaceRows)


def token_rows(edit: Edit) -> ReplaceRows:
    """The edit as one of token rows. Raises TypeError for others."""
    if not stores_rows(edit):
        raise TypeError(f"{edit.kind} edits store no token rows")
    return edit


def trained_tokens(edit: Edit) -> tuple[int, ...]:
    """The tokens whose rows an edit stores; none for other edits."""
    return edit.rows if stores_rows(edit) else ()


def saved_module(edit: Edit) -> str:
    """The module saved whole that an edited parameter belongs to, a head's; "" for others."""
    return edit.owner if isinstance(edit, Replace) else ""


def owner_of(edit: Edit) -> str:
    """The module that a parameter stored whole belongs to: the head's, else its own."""
    return saved_module(edit) or edit.site.module


def role_of(edit: Edit) -> str:
    """What a parameter stored whole is, see `Replace`; "" for other edits."""
    return edit.role if isinstance(edit, Replace) else ""


def why_opaque(edit: Edit) -> str:
    """Why an edit can only be looked at, as it says itself; "" for edits that can be more."""
    found: str = getattr(edit, "why", "")
    return found
