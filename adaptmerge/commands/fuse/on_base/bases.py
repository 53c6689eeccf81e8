"""The forms of one base model that a fusion tells apart."""

from __future__ import annotations

from dataclasses import dataclass

from adaptmerge.bases.base import Base


@dataclass(frozen=True)
class Bases:
    """One base model, in four forms.

    on_disk: as its files store it. values: with its weights as numbers, its layers copied where the
    adapters are for copies, and what its class takes for granted in its config. trained: as the adapters
    were trained on it. original: what a smoothed one was quantised from, where that is known.
    """

    on_disk: Base
    values: Base
    trained: Base
    original: Base | None = None
