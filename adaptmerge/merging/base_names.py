"""What adapters call the base that they were made for, against each other and against the one given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from adaptmerge.adapters.graph import Adapter, Kind, Note
from adaptmerge.bases.base import Base

QUANTISED = re.compile(
    r"[-_.](unsloth|bnb|4bit|8bit|int4|int8|nf4|fp4|gptq|awq|gguf|fp8|bf16|fp16|hf|quantized|w4a16)\b"
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
CACHED = re.compile(r"models--(.+?)--(.+)")  # a folder of the Hub's cache


def named_bases(
    adapters: Mapping[str, Adapter], allowed: frozenset[str]
) -> tuple[list[Note], list[str]]:
    """What there is to say of bases that adapters name, and what is in the way: names that differ in
    spelling are a Note, others an error unless allowed."""
    names = {name: a.base.name for name, a in adapters.items() if a.base.name}
    if len(set(names.values())) < 2:
        return _revisions(adapters), []
    listed = ", ".join(f"{name}: {base}" for name, base in names.items())
    if len({_bare(base or "") for base in names.values()}) == 1:
        return [Note(Kind.INFO, f"base names are spelled differently ({listed})")], []
    if "base" in allowed:
        return [Note(Kind.ASSUMED, f"different bases were allowed ({listed})")], []
    return [], [
        f"the adapters name different bases ({listed}): their sum means nothing unless these are the "
        "same weights; if they are, pass --allow base"
    ]


def _revisions(adapters: Mapping[str, Adapter]) -> list[Note]:
    found = {name: a.base.revision for name, a in adapters.items() if a.base.revision}
    if len(set(found.values())) < 2:
        return []
    listed = ", ".join(f"{name}: {revision}" for name, revision in found.items())
    return [Note(Kind.ASSUMED, f"revisions of the base differ and are taken as one ({listed})")]


def on_another_base(
    adapters: Mapping[str, Adapter], base: Base | None, allowed: frozenset[str] = frozenset()
) -> list[Note]:
    """A Note on each adapter that was made for a base of another name than the one that is given, unless a
    fingerprint settles it.

    Where the given one has a name of its own (an id of the Hub, or `_name_or_path` in its config), that is
    taken to be another model: an assumption. A local folder says too little, and that is an info.
    """
    if base is None or "base" in allowed:
        return []
    doubts = {key: _doubt(adapter, base) for key, adapter in adapters.items()}
    return [replace(doubt, input=key) for key, doubt in doubts.items() if doubt is not None]


def _doubt(adapter: Adapter, base: Base) -> Note | None:
    name, known = adapter.base.name, adapter.base.fingerprint
    if known is not None:
        what = f"was made for a base with another fingerprint than {base.path.name}, taken for the same"
        return None if known == base.fingerprint else Note(Kind.ASSUMED, what)
    ids = _ids(base)
    if not name or _bare(name) in map(_bare, (*ids, base.path.stem, base.path.name)):
        return None
    if ids and HUB_ID.fullmatch(name):
        what = (
            f"was made for {name}, and the base says that it is {ids[0]}: taken to have the same weights; "
            "give the base that it was made for, or pass --allow base if this is it"
        )
        return Note(Kind.ASSUMED, what)
    what = (
        f"was made for {name}; whether {base.path.name} is that model, neither name nor config says"
    )
    return Note(Kind.INFO, what)


def _ids(base: Base) -> list[str]:
    """The names that a base has for itself: that of its folder in the Hub's cache, and its config's."""
    cached = (CACHED.fullmatch(part) for part in base.path.absolute().parts)
    found = [f"{match[1]}/{match[2]}" for match in cached if match]
    said = base.config.get("_name_or_path")
    return [*found, said] if isinstance(said, str) and HUB_ID.fullmatch(said) else found


def _bare(name: str) -> str:
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()
    previous = ""
    while previous != last:
        previous, last = last, QUANTISED.sub("", last)
    return last


def is_of_names(note: Note) -> bool:
    """Whether a note is one of those, which depend on what the given base is called."""
    return note.what.startswith("was made for ")
