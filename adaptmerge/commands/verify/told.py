"""Does a report say no more and no less than reports do, of options, inputs, base, files and output?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from adaptmerge.algebra.fit import Budget
from adaptmerge.commands import combine, extract
from adaptmerge.commands.verify.extracted import is_extraction
from adaptmerge.commands.verify.stated import Stated
from adaptmerge.commands.verify.tables import differences, entries, listed
from adaptmerge.outputs.described import described_input
from adaptmerge.outputs.report import Report

# What a report has in its tables; of inputs and options as they would be told again.
BASE = frozenset({"name", "fingerprint"})
OUTPUT = frozenset({"dtype", "ranks"})
VERSIONS = frozenset({"adaptmerge", "torch"})
SOMETIMES = frozenset({"adapters", "heads"})  # of outputs


def told_otherwise(stated: Stated) -> Iterator[str]:
    """What is missing in the tables of a report, is there without need, or is not as it was asked."""
    report = stated.report
    extracted = is_extraction(report)
    if not stated.lacks_base:
        yield from differences("options:", _options(stated), listed(report.options))
    for said, item in zip(report.inputs, stated.inputs, strict=True):
        keys = {*described_input(item, {}), *(["fingerprint"] if extracted else [])}
        yield from entries(f"input {item.name}", said, keys)
    if report.base is not None:
        yield from entries("base", report.base, BASE | ({"source"} if extracted else set()))
        if stated.base is not None and report.base.get("fingerprint") != stated.base.fingerprint:
            yield f"the fingerprint of the base is said to be {report.base.get('fingerprint')}"
    more = {"checkpoint_rounding"} if extracted else set[str]()
    yield from entries("output", report.output, OUTPUT | more, SOMETIMES)
    yield from entries("versions", report.versions, VERSIONS)
    if len(set(report.notes)) < len(report.notes):
        yield "a note is said twice"


def _options(stated: Stated) -> Any:
    """The options as a report of what they ask for would tell them."""
    if not is_extraction(stated.report):
        return listed(combine.said(stated.planned))
    return listed(extract.said(_asked(stated.report)))


def _asked(report: Report) -> extract.Extraction:
    """The options of an extraction."""
    said = report.options
    return extract.Extraction(
        budget=Budget(**said["budget"]),
        dtype=said["dtype"],
        version=said.get("version"),
        ranks=report.output["ranks"],
        **said[extract.COMMAND],
    )
