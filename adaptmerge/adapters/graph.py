"""The canonical graph: where an adapter acts, what it is made of, and what was lost on the way. Pure data.

An Adapter is an ordered tuple of edits; each edit acts at one Site of the base model. A Bundle is the
set of named adapters that a format reads or writes as one unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

# The part of a layer that a network stands beside; "" where a site is a parameter.
Place = Annotated[str, Literal["", "attention", "cross", "mlp", "embedding", "layer"]]


@dataclass(frozen=True, slots=True)
class Layer:
    """What the module at a site is: "linear", "embedding", "conv" with its kernel size, "experts" whose
    parameter stacks as many matrices, or "parameter", a matrix of a module that is none of these.

    Weights are matrices (out, in); a convolution's is (out, in * prod(kernel)), an embedding's is
    (number of embeddings, dimension). Orientation on disk is a matter of formats, not of the graph.
    """

    kind: str = "linear"
    kernel: tuple[int, ...] = ()
    stacked: int = 0


@dataclass(frozen=True, slots=True)
class Site:
    """One parameter of one module of the base model, by its `transformers` module path; with `expert`,
    one matrix of the several that the parameter stacks.

    What stands beside a block inside a layer, and changes no parameter, is at a `place` of that layer.
    """

    module: str
    param: str = "weight"
    layer: Layer = field(default=Layer(), compare=False)
    expert: int | None = None
    place: Place = ""

    @property
    def path(self) -> str:
        """The parameter; for a weight its module."""
        return self.module if self.param == "weight" else f"{self.module}.{self.param}".lstrip(".")

    def __str__(self) -> str:
        inside = self.path if self.expert is None else f"{self.path}[{self.expert}]"
        return f"{inside}:{self.place}" if self.place else inside


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
    """A change to the base model at one site, a dataclass. `kind` selects the rules of merge methods and
    targets."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    kind: ClassVar[str]

    @property
    def site(self) -> Site:
        """Where it acts."""

    def __hash__(self) -> int:
        """Edits are data."""


class Key(NamedTuple):
    """What the edits of one kind at one site are known by, in groups, reports and listings alike."""

    site: Site
    kind: str

    def __str__(self) -> str:
        """The site, and the kind of edit where that is not the usual one."""
        return str(self.site) if self.kind == "add" else f"{self.site} ({self.kind})"

    @property
    def name(self) -> str:
        """The key as a part of a tensor's name."""
        return f"{self.site}.{self.kind}"


def key_of(edit: Edit) -> Key:
    """What an edit is known by, together with all of its kind at its site."""
    return Key(edit.site, edit.kind)


def fits(edit: Edit, protocol: Any) -> bool:
    """Whether an edit has what a protocol asks for: its class decides, so each class is asked once, since
    asking takes longer than much of what depends on the answer."""
    asked = type(edit), protocol
    if asked not in _FITS:
        _FITS[asked] = isinstance(edit, protocol)
    return _FITS[asked]


_FITS: dict[tuple[type, Any], bool] = {}


def fields_of(edit: Edit) -> dict[str, Any]:
    """What an edit holds, by field."""
    return {part.name: getattr(edit, part.name) for part in fields(edit)}


@dataclass(frozen=True, slots=True)
class BaseReference:
    """The base model an adapter was made for, as far as its files say.

    replication: the ranges of layers, one after the other, that its layers are copies of; () for none.
    """

    name: str | None = None
    revision: str | None = None
    architecture: str | None = None
    trained_on: str | None = None
    fingerprint: str | None = None
    replication: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Labels:
    """What the rows of a head stand for, in order; `problem` is how they are meant (problem_type)."""

    names: tuple[str, ...]
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """Edits in order, the base they belong to, Notes, and `hints`: a format's own spelling.

    Law: dropping all hints never changes what the adapter computes. `covers` are module suffixes of
    which the adapter has every module that the base has, as its files promise. `labels` say by owner
    what the rows of a head stand for, `tokens` which strings the ids of token rows do, where known.
    """

    name: str
    edits: tuple[Edit, ...]
    base: BaseReference = BaseReference()
    notes: tuple[Note, ...] = ()
    hints: Mapping[str, Any] = field(default_factory=dict)
    covers: frozenset[str] = frozenset()
    labels: Mapping[str, Labels] = field(default_factory=dict)
    tokens: Mapping[int, str] = field(default_factory=dict)

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
