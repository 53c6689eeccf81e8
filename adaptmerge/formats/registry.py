"""All formats by name, and which one an input is in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from adaptmerge.adapters.module_paths import natural_key
from adaptmerge.discovery import collect, constants_in
from adaptmerge.errors import InputError, UsageError, did_you_mean
from adaptmerge.files.listing import Listing
from adaptmerge.files.paths import exists
from adaptmerge.formats.format import Format
from adaptmerge.formats.unread import kind_of, refuse_state

LOOKED_INTO = 20  # folders of a folder that is no adapter, the last by their numbers


@cache
def formats() -> Mapping[str, Format]:
    """All formats by name."""
    return collect("adaptmerge.formats", "FORMAT")


def format_named(name: str) -> Format:
    """The format of that name. Raises UsageError with a suggestion."""
    if name == "safetensors":
        raise UsageError(f"{name} is a kind of file, no format: write -o NAME.{name} for one file")
    if name not in formats():
        raise UsageError(f"no format is named {name!r}: {did_you_mean(name, list(formats()))}")
    return formats()[name]


def detect(listing: Listing) -> Format:
    """The one format that an input is in. Raises InputError when none or several claim it.

    Formats of other distributions are looked up only for what no built-in format claims: finding
    them takes longer than reading a header.
    """
    refuse_state(listing)
    hits = _claims(listing)
    if len(hits) == 1:
        return hits[0]
    if hits:
        names = " and ".join(hit.name for hit in hits)
        raise InputError(f"could be {names}: keep only one of their files", where=listing.origin)
    raise InputError(_nothing_found(listing), where=listing.origin)


def _claims(listing: Listing) -> list[Format]:
    """The formats that claim an input."""
    built_in: Sequence[Format] = constants_in("adaptmerge.formats", "FORMAT")
    hits = [found for found in built_in if found.detect(listing)]
    hits = hits or [found for found in formats().values() if found.detect(listing)]
    beaten = {name for hit in hits for name in hit.before}
    return [hit for hit in hits if hit.name not in beaten]


def _nothing_found(listing: Listing) -> str:
    known = kind_of(listing)
    if listing.single:
        return (
            known or "holds no tensors that a known adapter format names: see 'adaptmerge formats'"
        )
    what = known or "holds no adapter of a known format (see 'adaptmerge formats')"
    inside = sorted((n for n in listing.folders if not n.startswith(".")), key=natural_key)
    adapters = [name for name in inside[-LOOKED_INTO:] if _holds_adapter(listing, name)]
    origin = listing.origin.rstrip("/\\")
    origin += "/" if exists(listing.origin) or "//" in origin else "//"
    if len(adapters) == 1:
        return f"{what}; the adapter is in {adapters[0]}: give {origin}{adapters[0]}"
    if adapters:
        shown = ", ".join(adapters[:3] + ["..."] * (len(adapters) > 3))
        return f"{what}; {shown} hold adapters: give one of them, e.g. {origin}{adapters[-1]}"
    return what + (f"; its folders are {', '.join(inside[:5])}" if inside and not known else "")


def _holds_adapter(listing: Listing, folder: str) -> bool:
    """Whether a folder inside is an adapter."""
    path = listing.root / folder
    try:
        return listing.on_disk and bool(_claims(Listing.of(path, str(path))))
    except InputError:
        return False
