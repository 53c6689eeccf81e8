"""What an extraction promises: the differences of the two checkpoints, read again."""

from __future__ import annotations

from pathlib import Path

from adaptmerge.bases.base import Base
from adaptmerge.bases.open import open_base
from adaptmerge.commands.extract import COMMAND, open_tuned
from adaptmerge.commands.extract.tuned import Wanted
from adaptmerge.commands.verify.checks import FAIL, PASS, Check
from adaptmerge.errors import InputError
from adaptmerge.files.typed import built
from adaptmerge.formats.inputs import Input
from adaptmerge.outputs.report import Report


def is_extraction(report: Report) -> bool:
    """Whether an output is the difference of two checkpoints."""
    return report.command == COMMAND


def tuned_input(
    output: Path, report: Report, path: str, base: Base | None
) -> tuple[Input | None, list[Check]]:
    """The tuned checkpoint as an adapter of the base, if it is the one of the report.

    Raises InputError without a base, which the deltas are measured from.
    """
    if base is None:
        raise InputError(
            "holds differences from a base model, without which they cannot be verified: pass --base DIR",
            where=str(output),
        )
    if open_base(path).fingerprint != report.inputs[0].get("fingerprint"):
        detail = f"{path} is not the model that was extracted from (its fingerprint differs)"
        return None, [Check("inputs", FAIL, detail)]
    wanted = built(Wanted, report.options.get(COMMAND), f"{path}: options.{COMMAND} of its report")
    item = open_tuned(path, base, wanted)
    return item, [Check("inputs", PASS, "the tuned model is the one that was extracted from")]
