"""All formats by name, and which one an input is in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from adaptmerge.adapters.module_paths import natural_key
from adaptmerge.discovery import collect, constants_in
from adaptmerge.errors import InputError, UsageError, did_you_mean
from adaptmerge.files.listing import Listing
from adaptmerge.formats.format import Format
from adaptmerge.formats.unread import kind_of


@cache
def formats() -> Mapping[str, Format]:
    """All formats by name."""
    return collect("adaptmerge.formats", "FORMAT")


def format_named(name: str) -> Format:
    """The format of that name. Raises UsageError with a suggestion."""
    if name not in formats():
        raise UsageError(f"no format is named {name!r}: {did_you_mean(name, list(formats()))}")
    return formats()[name]


def detect(listing: Listing) -> Format:
    """The one format that an input is in. Raises InputError when none or several claim it.

    Formats of other distributions are looked up only for what no built-in format claims: finding
    them takes longer than reading a header.
    """
    built_in: Sequence[Format] = constants_in("adaptmerge.formats", "FORMAT")
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
    known = kind_of(listing)
    if known is not None:
        return known
    if listing.single:
        return "holds no tensors that a known adapter format names: see 'adaptmerge formats'"
    inside = [name for name in listing.folders if not name.startswith((".", "checkpoint-"))]
    hint = f"; its folders are {', '.join(inside[:5])}" if inside else ""
    checkpoints = [name for name in listing.folders if name.startswith("checkpoint-")]
    if checkpoints:
        latest = max(checkpoints, key=natural_key)
        hint += f"; it has training checkpoints: name one, e.g. {latest}"
    return f"holds no adapter of a known format (see 'adaptmerge formats'){hint}"
