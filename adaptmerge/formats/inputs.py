"""The one grammar of inputs, [NAME=]SOURCE[:WEIGHT][?alpha=32&task=1&init=DIR&adapter=NAME], and opening
what it names.

SOURCE is a directory, a .safetensors or .bin file, a hub id org/name[@revision][//subfolder] or the address
of its page (hf://, https://huggingface.co/). A weight may also stand last. What exists on disk as written
wins over any reading as name, weight or query, so paths with '=' or ':' and Windows drive letters work.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adaptmerge.adapters.graph import Adapter, Bundle
from adaptmerge.adapters.module_paths import natural_key
from adaptmerge.adapters.number_types import type_problems
from adaptmerge.bases.base import Base
from adaptmerge.errors import AdaptmergeError, InputError, UsageError, did_you_mean
from adaptmerge.files import hub
from adaptmerge.files.listing import Listing
from adaptmerge.files.paths import exists
from adaptmerge.files.strict_json import capped
from adaptmerge.formats.format import Format, ReadOptions
from adaptmerge.formats.registry import detect
from adaptmerge.tensors.caches import forget

NAME = re.compile(r"(?P<name>[A-Za-z_][\w.-]*)=(?P<rest>.+)$")
WEIGHT = re.compile(r"(?P<rest>.+):(?P<weight>[-+]?[\d.]+(?:[eE][-+]?\d+)?|[-+]?nan|[-+]?inf)$")
OPTIONS = ("alpha", "task", "init", "adapter")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input as the user wrote it."""

    source: str
    name: str | None = None
    weight: float | None = None
    alpha: float | None = None
    task: int | None = None
    init: str | None = None
    adapter: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    held: Listing | None = field(default=None, repr=False)  # what is in memory, and in no file

    @property
    def default_name(self) -> str:
        """The folder's name or the file's stem; for a hub id the repository or its subfolder."""
        parts = re.split(r"[/\\]+", self.source.rstrip("/\\"))
        last = parts[-1].partition("@")[0]
        if last in ("", ".", ".."):
            last = Path(self.source).resolve().name
        return next((last.removesuffix(s) for s in SUFFIXES if last.endswith(s)), last) or "input"


Source = str | Path | InputSpec  # text has the grammar of the command line


@dataclass(frozen=True)
class Input:
    """An opened input: its files, the format they are in and the adapter they hold."""

    name: str
    spec: InputSpec
    listing: Listing
    format: Format
    adapter: Adapter
    revision: str | None = None

    @property
    def path(self) -> Path | None:
        """The file or folder on disk; None for what is in memory."""
        root = self.listing.root
        if not self.listing.on_disk:
            return None
        return root / self.listing.single if self.listing.single else root


def paths_of(inputs: Iterable[Input]) -> list[Path]:
    """Where inputs lie on the disk, of those that do."""
    return [item.path for item in inputs if item.path is not None]


def as_specs(sources: Source | Sequence[Source]) -> list[InputSpec]:
    """One source or several as specs. Raises UsageError for text that has not the grammar of inputs."""
    listed = [sources] if isinstance(sources, (str, Path, InputSpec)) else sources
    return [as_spec(source) for source in listed]


def as_spec(source: Source) -> InputSpec:
    """A source as a spec: text by the grammar of inputs, a path as it is."""
    if isinstance(source, InputSpec):
        return source
    return InputSpec(str(source)) if isinstance(source, Path) else parse_input(source)


def parse_input(text: str, folder: Path = Path()) -> InputSpec:
    """The parts of [NAME=]SOURCE[:WEIGHT][?alpha=32], SOURCE as seen from `folder`.

    Raises UsageError.
    """
    if exists(folder / text):
        return InputSpec(text)
    rest, last, options = _query(text, folder)
    name, rest = _split_name(rest, folder)
    rest, weight = _split_weight(rest, folder)
    if weight is not None and last is not None:
        raise UsageError(f"input {text!r}: has two weights, {weight:g} and {last:g}: leave one out")
    return InputSpec(hub.as_id(rest), name, last if weight is None else weight, **options)


def _split_name(text: str, folder: Path) -> tuple[str | None, str]:
    found = NAME.match(text)
    if not found or exists(folder / text) or exists(folder / _split_weight(text, folder)[0]):
        return None, text
    return found["name"], found["rest"]


def _split_weight(text: str, folder: Path) -> tuple[str, float | None]:
    found = WEIGHT.match(text)
    if not found or exists(folder / text):
        return text, None
    if _is_drive(found["rest"]) and not exists(folder / found["rest"]):
        return text, None
    return found["rest"], number(found["weight"], f"input {text!r}: weight")


def _is_drive(text: str) -> bool:
    return len(text) == 1 and text.isalpha()


def _query(text: str, folder: Path) -> tuple[str, float | None, dict[str, Any]]:
    """What stands before the options, a weight behind them, and the options."""
    rest, mark, query = text.rpartition("?")
    if not mark:
        return text, None, {}
    query, weight = _split_weight(query, folder)
    options: dict[str, Any] = {}
    for pair in query.split("&"):
        key, equals, value = pair.partition("=")
        if key == "download" and "://" in rest:  # of a link that was copied
            continue
        if key not in OPTIONS or not equals:
            raise UsageError(f"input {text!r}: option {key!r}: {did_you_mean(key, OPTIONS)}")
        options[key] = _option(key, value, text)
    return rest, weight, options


def _option(key: str, value: str, text: str) -> str | float | int:
    if key in ("init", "adapter"):
        return value
    found = number(value, f"input {text!r}: {key}")
    if key == "alpha":
        return found
    if found < 0 or found != int(found):
        raise UsageError(f"input {text!r}: task is {value}: expected its number, from 0 on")
    return int(found)


def named(specs: Sequence[InputSpec]) -> list[InputSpec]:
    """The specs with unique names. Raises UsageError when two are given the same name."""
    given = [spec.name for spec in specs if spec.name]
    twice = sorted({name for name in given if given.count(name) > 1})
    if twice:
        raise UsageError(f"two inputs are named {twice[0]!r}: give each its own NAME=")
    free = iter(unique_names([s.default_name for s in specs if not s.name], given))
    return [replace(spec, name=spec.name or next(free)) for spec in specs]


def in_natural_order(specs: Sequence[InputSpec]) -> list[InputSpec]:
    """Checkpoints by their numbers: checkpoint-200 before checkpoint-1000."""
    return sorted(specs, key=lambda spec: natural_key(spec.source))


def open_input(source: Source, base: Base | None = None) -> Input:
    """The adapter that a source names, read anew. Raises InputError, naming the source."""
    spec = as_spec(source)
    forget()
    try:
        listing, revision = _listing(spec)
        found = detect(listing)
        if spec.alpha is not None and not found.takes_alpha:
            raise InputError(f"?alpha= is not needed: {found.name} says its scale; leave it out")
        options = ReadOptions(alpha=spec.alpha, base=base, task=spec.task, init=spec.init)
        bundle = found.read(listing, options)
    except AdaptmergeError as problem:
        raise problem.located(spec.source) from None
    name = spec.name or spec.default_name
    adapter = replace(_one_of(bundle, spec), name=name)
    if not adapter.edits:
        raise InputError("holds no edit at all", where=spec.source)
    problems = type_problems(adapter.edits)
    if problems:
        raise InputError(capped(problems), where=spec.source)
    return Input(name, spec, listing, found, adapter, revision)


def _listing(spec: InputSpec) -> tuple[Listing, str | None]:
    """The files of an input, and its commit when it came from the Hub."""
    if spec.held is not None:
        return spec.held, None
    path, revision = hub.resolve(spec.source)
    return Listing.of(path, spec.source), revision


def _one_of(bundle: Bundle, spec: InputSpec) -> Adapter:
    """The adapter of that name, or the only one."""
    names = ", ".join(bundle.adapters)
    if spec.adapter is None and len(bundle.adapters) != 1:
        sentence = f"holds several adapters ({names}): give one of them, as ?adapter=NAME"
        raise InputError(sentence, where=spec.source)
    if spec.adapter is None:
        return bundle.single
    if spec.adapter not in bundle.adapters:
        sentence = f"?adapter={spec.adapter}: it holds no adapter of that name ({names})"
        raise InputError(sentence, where=spec.source)
    return bundle.adapters[spec.adapter]


def open_inputs(sources: Source | Sequence[Source], base: Base | None = None) -> list[Input]:
    """All inputs, named uniquely. Raises one InputError with the problems of all of them."""
    opened, problems = [], []
    for spec in named(as_specs(sources)):
        try:
            opened.append(open_input(spec, base))
        except InputError as problem:
            problems.append(problem)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise InputError([str(problem) for problem in problems])
    return opened


def unique_names(names: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """The names, repeated and taken ones numbered from 2 on: a, a-2, a-3."""
    used = set(taken)
    result: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in used:
            number += 1
            candidate = f"{name}-{number}"
        used.add(candidate)
        result.append(candidate)
    return result


def number(text: str, where: str) -> float:
    """A finite number. Raises UsageError naming `where`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{where}: {text.strip()!r} is not a finite number")
    return value
