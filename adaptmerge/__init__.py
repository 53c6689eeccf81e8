"""Read, merge, convert, fuse and verify adapter checkpoints: the command line without the terminal.

The names below are the public API; each is imported on first use, so `import adaptmerge` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from adaptmerge.algebra.fit import Budget
    from adaptmerge.bases.open import open_base
    from adaptmerge.commands.calibrate import Calibration, calibrate
    from adaptmerge.commands.combine import Options, combine
    from adaptmerge.commands.extract import Extraction, extract
    from adaptmerge.commands.fuse import FuseOptions, FuseReport, fuse
    from adaptmerge.commands.in_memory import Combined, combine_in_memory
    from adaptmerge.commands.recipe import load_recipe
    from adaptmerge.commands.verify import Check, Questions, Verdict, verify
    from adaptmerge.commands.verify.difference import Difference, difference
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
    from adaptmerge.formats.in_memory import from_state_dict
    from adaptmerge.formats.inputs import Input, InputSpec, open_input, open_inputs, parse_input
    from adaptmerge.formats.peft.live import from_peft
    from adaptmerge.formats.registry import formats
    from adaptmerge.merging.weights import SiteRule, parse_rule
    from adaptmerge.methods.registry import methods
    from adaptmerge.outputs.report import Report, load_report
    from adaptmerge.runtime.attach import attach

_HOMES = {
    "algebra.fit": ("Budget",),
    "bases.open": ("open_base",),
    "commands.calibrate": ("Calibration", "calibrate"),
    "commands.combine": ("Options", "combine"),
    "commands.extract": ("Extraction", "extract"),
    "commands.fuse": ("FuseOptions", "FuseReport", "fuse"),
    "commands.in_memory": ("Combined", "combine_in_memory"),
    "commands.recipe": ("load_recipe",),
    "commands.verify": ("Check", "Questions", "Verdict", "verify"),
    "commands.verify.difference": ("Difference", "difference"),
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
    "formats.in_memory": ("from_state_dict",),
    "formats.inputs": ("Input", "InputSpec", "open_input", "open_inputs", "parse_input"),
    "formats.peft.live": ("from_peft",),
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
    "Calibration",
    "CannotMerge",
    "CannotStore",
    "Check",
    "Combined",
    "Difference",
    "Extraction",
    "FuseOptions",
    "FuseReport",
    "Input",
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
    "calibrate",
    "combine",
    "combine_in_memory",
    "difference",
    "extract",
    "formats",
    "from_peft",
    "from_state_dict",
    "fuse",
    "load_recipe",
    "load_report",
    "methods",
    "open_base",
    "open_input",
    "open_inputs",
    "parse_input",
    "parse_rule",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'adaptmerge' has no attribute {name!r}")
    return getattr(importlib.import_module(f"adaptmerge.{_HOME_OF[name]}"), name)
