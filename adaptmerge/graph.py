"""The canonical graph: where an adapter acts, what it is made of, and what was lost on the way. Pure data.

An Adapter is an ordered tuple of edits; each edit acts at one Site of the base model. A Bundle is the
set of named adapters that a format reads or writes as one unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True, slots=True)
class Layer:
    """What the module at a site is: "linear", "embedding" or "conv" with its kernel size.

    Weights are matrices (out, in); a convolution's is (out, in * prod(kernel)), an embedding's is
    (number of embeddings, dimension). Orientation on disk is a matter of formats, not of the graph.
    """

    kind: str = "linear"
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Site:
    """One parameter of one module of the base model, by its `transformers` module path."""

    module: str
    param: str = "weight"
    layer: Layer = field(default=Layer(), compare=False)

    def __str__(self) -> str:
        return self.module if self.param == "weight" else f"{self.module}.{self.param}"


class Kind:
    """The names of what a Note can say."""

    ASSUMED = "assumed"
    APPROXIMATED = "approximated"
    DROPPED = "dropped"
    INFO = "info"
    FATAL_UNDER_STRICT = frozenset({ASSUMED, APPROXIMATED, DROPPED})


@dataclass(frozen=True, slots=True, order=True)
class Note:
    """Something a user should know: assumed, approximated or dropped (fatal under strict), or info."""

    kind: str
    what: str
    input: str = ""
    site: str = ""

    def __str__(self) -> str:
        place = " ".join(part for part in (self.input, self.site) if part)
        return f"{self.kind}: {place}: {self.what}" if place else f"{self.kind}: {self.what}"


class Edit(Protocol):
    """A change to the base model at one site. `kind` selects the rules of merge methods and targets."""

    kind: ClassVar[str]

    @property
    def site(self) -> Site:
        """Where it acts."""


@dataclass(frozen=True, slots=True)
class BaseReference:
    """The base model an adapter was made for, as far as its files say."""

    name: str | None = None
    revision: str | None = None
    architecture: str | None = None
    trained_on: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """Edits in order, the base they belong to, Notes, and `hints`: a format's own spelling.

    Law: dropping all hints never changes what the adapter computes. `covers` are module suffixes of
    which the adapter has every module that the base has, as its files promise.
    """

    name: str
    edits: tuple[Edit, ...]
    base: BaseReference = BaseReference()
    notes: tuple[Note, ...] = ()
    hints: Mapping[str, Any] = field(default_factory=dict)
    covers: frozenset[str] = frozenset()

    def with_edits(self, edits: Iterable[Edit]) -> Adapter:
        """The same adapter with other edits."""
        return replace(self, edits=tuple(edits))

    def sites(self) -> dict[Site, list[Edit]]:
        """Edits by site, in order."""
        found: dict[Site, list[Edit]] = {}
        for edit in self.edits:
            found.setdefault(edit.site, []).append(edit)
        return found


@dataclass(frozen=True, slots=True)
class Bundle:
    """The named adapters that one input or output holds."""

    adapters: Mapping[str, Adapter]

    @property
    def single(self) -> Adapter:
        """The only adapter of the bundle."""
        (adapter,) = self.adapters.values()
        return adapter

    @property
    def notes(self) -> tuple[Note, ...]:
        """The Notes of all adapters."""
        return tuple(note for adapter in self.adapters.values() for note in adapter.notes)


def bundle_of(adapter: Adapter) -> Bundle:
    """A bundle of one."""
    return Bundle({adapter.name: adapter})
