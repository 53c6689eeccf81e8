"""What a verdict says where adapters were made for a base of another name than the one given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from adaptmerge.adapters.graph import Adapter
from adaptmerge.bases.base import Base
from adaptmerge.commands.verify.checks import SKIPPED, Check
from adaptmerge.merging.base_names import on_another_base


def with_doubts(check: Check, adapters: Mapping[str, Adapter], base: Base) -> Check:
    """The check of a base, with what speaks against it by name."""
    found = on_another_base(adapters, base)
    if not found:
        return check
    said = [f"{note.input} {note.what}" for note in found]
    numbers = {**check.numbers, "names": said}
    return replace(check, detail="; ".join([check.detail, *said]), numbers=numbers)


def names_alone(adapters: Mapping[str, Adapter], base: Base) -> list[Check]:
    """What is to be said where nothing but names tells which base it is."""
    bare = Check("base", SKIPPED, f"no report says whether {base.path.name} is the one")
    found = with_doubts(bare, adapters, base)
    return [] if found is bare else [found]
