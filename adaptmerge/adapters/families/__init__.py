"""One file per family of adapters beyond the built-in edits: what it stores and the formula of it.

An additive family is a factor (`factors.Expanded` or `factors.Whole`) inside an `Add`; one that depends
on the base is a weight edit of its own with `apply(weight)`. How a format spells it is no matter of
these files.
"""

from __future__ import annotations

from types import ModuleType

from adaptmerge.discovery import modules_in


def modules() -> tuple[ModuleType, ...]:
    """All family modules, imported."""
    return modules_in(__name__)
