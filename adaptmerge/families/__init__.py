"""One file per family of adapters beyond the built-in edits: what it stores and the formula of it.

An additive family is a factor (`factors.Expanded` or `factors.Whole`) inside an `Add`; one that depends
on the base is a weight edit of its own with `apply(weight)`. How a format spells it is no matter of
these files.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType


@cache
def modules() -> tuple[ModuleType, ...]:
    """All family modules, imported."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    return tuple(importlib.import_module(f"{__name__}.{name}") for name in names)
