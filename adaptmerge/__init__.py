"""Read, merge, convert and verify adapter checkpoints.

The names below are the public API; each is imported on first use, so `import adaptmerge` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from adaptmerge.base import open_base
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
    from adaptmerge.extract import Extraction
    from adaptmerge.fit import Budget
    from adaptmerge.inputs import InputSpec, open_input, open_inputs, parse_input
    from adaptmerge.merge import Options, combine
    from adaptmerge.recipe import load_recipe
    from adaptmerge.registry import formats, methods
    from adaptmerge.report import Report, load_report
    from adaptmerge.runtime.attach import attach
    from adaptmerge.verify import Questions, Verdict
    from adaptmerge.verify.difference import difference
    from adaptmerge.weights import SiteRule, parse_rule

_HOMES = {
    "base": ("open_base",),
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
    "extract": ("Extraction",),
    "fit": ("Budget",),
    "inputs": ("InputSpec", "open_input", "open_inputs", "parse_input"),
    "merge": ("Options", "combine"),
    "recipe": ("load_recipe",),
    "registry": ("formats", "methods"),
    "report": ("Report", "load_report"),
    "runtime": ("attach",),
    "verify": ("Questions", "Verdict"),
    "verify.difference": ("difference",),
    "weights": ("SiteRule", "parse_rule"),
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
