"""Read, merge, convert and verify adapter checkpoints.

The names below are the public API; each is imported on first use, so `import adaptmerge` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from adaptmerge.algebra.fit import Budget
    from adaptmerge.bases.open import open_base
    from adaptmerge.commands.combine import Options, combine
    from adaptmerge.commands.extract import Extraction
    from adaptmerge.commands.recipe import load_recipe
    from adaptmerge.commands.verify import Questions, Verdict
    from adaptmerge.commands.verify.difference import difference
    from adaptmerge.errors import (
        AdaptmergeError,
        CannotMerge,
        CannotStore,
        InputError,
        MissingExtra,
        OutputError,
        UsageError,
        VerificationFailed,
    )
    from adaptmerge.formats.inputs import InputSpec, open_input, open_inputs, parse_input
    from adaptmerge.formats.registry import formats
    from adaptmerge.merging.weights import SiteRule, parse_rule
    from adaptmerge.methods.registry import methods
    from adaptmerge.outputs.report import Report, load_report
    from adaptmerge.runtime.attach import attach

_HOMES = {
    "algebra.fit": ("Budget",),
    "bases.open": ("open_base",),
    "commands.combine": ("Options", "combine"),
    "commands.extract": ("Extraction",),
    "commands.recipe": ("load_recipe",),
    "commands.verify": ("Questions", "Verdict"),
    "commands.verify.difference": ("difference",),
    "errors": (
        "AdaptmergeError",
        "CannotMerge",
        "CannotStore",
        "InputError",
        "MissingExtra",
        "OutputError",
        "UsageError",
        "VerificationFailed",
    ),
    "formats.inputs": ("InputSpec", "open_input", "open_inputs", "parse_input"),
    "formats.registry": ("formats",),
    "merging.weights": ("SiteRule", "parse_rule"),
    "methods.registry": ("methods",),
    "outputs.report": ("Report", "load_report"),
    "runtime": ("attach",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AdaptmergeError",
    "Budget",
    "CannotMerge",
    "CannotStore",
    "Extraction",
    "InputError",
    "InputSpec",
    "MissingExtra",
    "Options",
    "OutputError",
    "Questions",
    "Report",
    "SiteRule",
    "UsageError",
    "Verdict",
    "VerificationFailed",
    "attach",
    "combine",
    "difference",
    "formats",
    "load_recipe",
    "load_report",
    "methods",
    "open_base",
    "open_input",
    "open_inputs",
    "parse_input",
    "parse_rule",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'adaptmerge' has no attribute {name!r}")
    return getattr(importlib.import_module(f"adaptmerge.{_HOME_OF[name]}"), name)
