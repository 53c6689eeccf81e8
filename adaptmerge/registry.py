"""Formats and methods: what each declares, and how they are found.

A format or method is one module (or package) of `adaptmerge.formats` / `adaptmerge.methods` with a
constant FORMAT / METHOD; other distributions add theirs through the entry point groups of the same
names. Importing a format must be cheap: no torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptmerge.base import Base
from adaptmerge.errors import AdaptmergeError, InputError, UsageError
from adaptmerge.files.dtypes import DType
from adaptmerge.files.listing import Listing
from adaptmerge.files.refs import TensorRef
from adaptmerge.files.safetensors import write_safetensors
from adaptmerge.files.scratch import Scratch
from adaptmerge.graph import Adapter, Bundle, Edit, Note, Site
from adaptmerge.names import did_you_mean, natural_key

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Stores:
    """What a target format has a place for; plan and lower read this and nothing else about it.

    kinds and layers: of edits and their sites. families: those whose own form it stores, only
    one per file if `one_family`. exclusive: kinds of which one file holds only one.
    low_rank: deltas must be stored as up and down. scale: "site" (each its own), "adapter" (one for
    all) or "none" (folded). one_rank: all sites have the same rank. base: the base is needed to write.
    params: of deltas; None stands for every one. several: one file holds several adapters.
    one_label_map: all heads of an adapter share one.
    """

    kinds: frozenset[str]
    layers: frozenset[str] = frozenset({"linear", "embedding", "conv", "experts", "parameter"})
    families: frozenset[str] = frozenset()
    exclusive: frozenset[str] = frozenset()
    one_family: bool = True
    low_rank: bool = True
    scale: str = "none"
    one_rank: bool = False
    base: bool = False
    params: frozenset[str] | None = frozenset({"weight", "bias"})
    dtypes: frozenset[str] = frozenset({"F32", "F16", "BF16"})
    several: bool = False
    one_label_map: bool = True


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How to read: `alpha` where a file does not say it, the base where names or edits need it.

    task: which task of a multi-task adapter. init: the folder of the adapter as it was before training,
    for those whose initialisation changed the base.
    """

    alpha: float | None = None
    base: Base | None = None
    task: int | None = None
    init: str | None = None


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """How to write: `ranks` "uniform" or "per-site"; the base where the format needs it.

    version: for which version of the format's own library; None for the newest known.
    """

    ranks: str = "uniform"
    base: Base | None = None
    modules: frozenset[str] | None = None  # all modules of the base, when known
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """Where a writer puts its files: `path(name)` is a staged file, `single` the name of the one file
    asked for (None: a directory). `metadata` goes into the header of the main file."""

    path: Callable[[str], Path]
    single: str | None
    metadata: Mapping[str, str]
    scratch: Scratch | None = None

    def safetensors(
        self, name: str, tensors: Mapping[str, TensorRef], metadata: Mapping[str, str]
    ) -> None:
        """Stages a safetensors file; a scratch that already is its data becomes it."""
        path = self.path(name)
        if self.scratch is None or not self.scratch.adopt(path, tensors, metadata):
            write_safetensors(path, tensors, metadata)


@dataclass(frozen=True, slots=True)
class Oracle:
    """A format's own library, asked for the truth: deltas and outputs of an adapter as it loads it."""

    package: str
    deltas: Callable[[Any, Path], dict[str, torch.Tensor]]
    forward: Callable[[Any, Path, Mapping[str, Any]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Format:
    """One on-disk format. `write` returns the name of the main file; `refuses` says in advance, one
    sentence each, which edits it would not find a place for beyond what `stores` declares.
    `takes_alpha` is for formats whose files may leave the scale unsaid. `files` are the names in a
    folder that make it be of this format. `versions` are the releases of its own library that it can be
    written for, oldest first."""

    name: str
    title: str
    url: str
    detect: Callable[[Listing], bool]
    read: Callable[[Listing, ReadOptions], Bundle]
    write: Callable[[Bundle, Output, WriteOptions], str] | None = None
    stores: Callable[[WriteOptions], Stores] | None = None
    refuses: Callable[[Sequence[Edit], WriteOptions], list[str]] | None = None
    suffixes: tuple[str, ...] = ()
    takes_alpha: bool = False
    files: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    oracle: Oracle | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter's edit at a site, with its weight there, and what it was made of if not itself."""

    adapter: str
    weight: float
    edit: Edit
    made_of: tuple[Edit, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the adapter's own edits here."""
        return tuple(edit.kind for edit in self.made_of or (self.edit,))


EXACT = 1e-12  # weights that differ from a sum of 1 by no more than this sum to 1


@dataclass(frozen=True, slots=True)
class Meeting:
    """What meets at one site: the members, and the base's weight there (canonical) when it is known.

    notes: where a rule says what it approximates.
    """

    site: Site
    members: tuple[Member, ...]
    weight: TensorRef | None = None
    notes: list[Note] = field(default_factory=list)

    def say(self, kind: str, what: str) -> None:
        """Adds a Note about this site."""
        self.notes.append(Note(kind, what, site=str(self.site)))

    @property
    def total(self) -> float:
        """The sum of the weights."""
        return sum(member.weight for member in self.members)

    @property
    def rest(self) -> float:
        """What the weights leave of 1: the share of the base's own value; 0 where they sum to 1."""
        rest = 1.0 - self.total
        return rest if abs(rest) > EXACT else 0.0


Rule = Callable[[Meeting], Edit]


@dataclass(frozen=True, slots=True)
class Method:
    """One merge method: a rule per kind of edit, and what is true of it.

    A rule returns the merged edit, its factor and tensors as expressions that a run computes. `forms`
    are rules by the name of a family that deltas of that family are kept in on request. `reduce`
    False stacks terms even where redundant. `rank` gives the method's own cap from the input ranks.
    `promise` is what the result should be, for the verifier; None means the weighted sum of deltas.
    `caution` is a sentence shown with every result.
    """

    name: str
    summary: str
    rules: Mapping[str, Rule]
    forms: Mapping[str, Rule] = field(default_factory=dict)
    url: str = ""
    reduce: bool = True
    rank: Callable[[Sequence[int]], int] | None = None
    promise: Rule | None = None
    caution: str = ""
    linear: bool = True
    gauge_invariant: bool = True


def _modules(package: str) -> list[Any]:
    root = importlib.import_module(package)
    names = sorted(info.name for info in pkgutil.iter_modules(root.__path__))
    return [importlib.import_module(f"{package}.{name}") for name in names]


@cache
def _built_in(package: str, constant: str) -> tuple[Any, ...]:
    return tuple(getattr(m, constant) for m in _modules(package) if hasattr(m, constant))


def _collect(package: str, constant: str) -> dict[str, Any]:
    from importlib.metadata import entry_points

    table: dict[str, Any] = {}
    for item in (*_built_in(package, constant), *(e.load() for e in entry_points(group=package))):
        if item.name in table:
            raise AdaptmergeError(
                f"two {package} entries are named {item.name!r}: remove one package"
            )
        table[item.name] = item
    return table


@cache
def formats() -> Mapping[str, Format]:
    """All formats by name."""
    return _collect("adaptmerge.formats", "FORMAT")


@cache
def methods() -> Mapping[str, Method]:
    """All merge methods by name."""
    return _collect("adaptmerge.methods", "METHOD")


def format_named(name: str) -> Format:
    """The format of that name. Raises UsageError with a suggestion."""
    if name not in formats():
        raise UsageError(f"no format is named {name!r}: {did_you_mean(name, list(formats()))}")
    return formats()[name]


def method_named(name: str) -> Method:
    """The method of that name. Raises UsageError with a suggestion."""
    if name not in methods():
        raise UsageError(f"no method is named {name!r}: {did_you_mean(name, list(methods()))}")
    return methods()[name]


def detect(listing: Listing) -> Format:
    """The one format that an input is in. Raises InputError when none or several claim it.

    Formats of other distributions are looked up only for what no built-in format claims: finding
    them takes longer than reading a header.
    """
    built_in: Sequence[Format] = _built_in("adaptmerge.formats", "FORMAT")
    hits = [found for found in built_in if found.detect(listing)]
    hits = hits or [found for found in formats().values() if found.detect(listing)]
    beaten = {name for hit in hits for name in hit.before}
    hits = [hit for hit in hits if hit.name not in beaten]
    if len(hits) == 1:
        return hits[0]
    if hits:
        names = " and ".join(hit.name for hit in hits)
        raise InputError(f"could be {names}: keep only one of their files", where=listing.origin)
    raise InputError(_nothing_found(listing), where=listing.origin)


def _nothing_found(listing: Listing) -> str:
    if listing.single:
        return "holds no tensors that a known adapter format names: see 'adaptmerge formats'"
    inside = [name for name in listing.folders if not name.startswith((".", "checkpoint-"))]
    hint = f"; its folders are {', '.join(inside[:5])}" if inside else ""
    checkpoints = [name for name in listing.folders if name.startswith("checkpoint-")]
    if checkpoints:
        latest = max(checkpoints, key=natural_key)
        hint += f"; it has training checkpoints: name one, e.g. {latest}"
    return f"holds no adapter of a known format (see 'adaptmerge formats'){hint}"


def default_dtype(dtypes: Sequence[DType]) -> DType:
    """The dtype a merge is written in: the inputs' own when they agree, else float32."""
    from adaptmerge.files.dtypes import F32, widest

    floating = [dtype for dtype in dtypes if dtype.is_float and dtype.bits >= 16]
    return widest(floating) if floating else F32


__all__ = [
    "Adapter",
    "Format",
    "Meeting",
    "Member",
    "Method",
    "Oracle",
    "Output",
    "ReadOptions",
    "Stores",
    "WriteOptions",
    "default_dtype",
    "detect",
    "format_named",
    "formats",
    "method_named",
    "methods",
]
