"""What a format of adapters on disk is: how it is told, read and written, and what it has a place for.

A format is one module (or package) of `adaptmerge.formats` with a constant FORMAT; other distributions add
theirs through the entry point group of that name. Importing a format must be cheap: no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adaptmerge.adapters.graph import Bundle, Edit
from adaptmerge.bases.base import Base
from adaptmerge.files.disk import write_text
from adaptmerge.files.listing import Listing
from adaptmerge.files.safetensors import write_safetensors
from adaptmerge.files.scratch import Scratch
from adaptmerge.tensors.refs import TensorRef

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
    """Where a writer puts its files, with `text` and `safetensors`; what else it writes goes into the
    staged file `path(name)`. `single` is the name of the one file asked for (None: a directory).
    `metadata` goes into the header of the main file. `digests`: the sha256 of staged files, where it is
    known from writing them."""

    path: Callable[[str], Path]
    single: str | None
    metadata: Mapping[str, str]
    scratch: Scratch | None = None
    digests: dict[Path, str] = field(default_factory=dict)

    def text(self, name: str, text: str) -> None:
        """Stages a text file."""
        write_text(self.path(name), text)

    def safetensors(
        self, name: str, tensors: Mapping[str, TensorRef], metadata: Mapping[str, str]
    ) -> None:
        """Stages a safetensors file; a scratch that already is its data becomes it."""
        path = self.path(name)
        adopted = None if self.scratch is None else self.scratch.adopt(path, tensors, metadata)
        self.digests[path] = adopted or write_safetensors(path, tensors, metadata)


class Answer(NamedTuple):
    """What a library's layer adds to its outputs for given inputs (count, in), and the rounding in that,
    relative to what is added."""

    given: torch.Tensor
    added: torch.Tensor
    noise: float


@dataclass(frozen=True, slots=True)
class Oracle:
    """A format's own library, asked for the truth: deltas and outputs of an adapter as it loads it.

    answers: what its layers add for so many random inputs each, by site; None where layers cannot be asked
    one by one.
    """

    package: str
    deltas: Callable[[Any, Path], dict[str, torch.Tensor]]
    forward: Callable[[Any, Path, Mapping[str, Any]], torch.Tensor]
    answers: Callable[[Any, Path, int], dict[str, Answer] | None] | None = None


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
