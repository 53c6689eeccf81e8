"""Edits that store a parameter, or rows of it, as it will be; and what cannot be merged at all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from adaptmerge.adapters.graph import Edit, Site
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
    changed: Edit = replace(edit, value=value)  # type: ignore[type-var]
    return changed
