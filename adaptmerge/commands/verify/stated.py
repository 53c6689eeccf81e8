"""A report with what it is about, and the merge that it describes, planned again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from adaptmerge import __version__
from adaptmerge.adapters.experts import layout_of
from adaptmerge.algebra.fit import Budget
from adaptmerge.bases.base import Base
from adaptmerge.commands.combine import Options, Prepared, prepare
from adaptmerge.commands.fuse import FuseReport
from adaptmerge.commands.verify.promise import Promised
from adaptmerge.formats.inputs import Input, InputSpec
from adaptmerge.merging.weights import rule_of
from adaptmerge.outputs.companions import CARD
from adaptmerge.outputs.report import Report


@dataclass(frozen=True)
class Stated:
    """A report with what it is about. base: None where none was given, or the report has none."""

    report: Report
    output: Path
    promised: Sequence[Promised]
    inputs: Sequence[Input]
    results: Mapping[str, Input]
    base: Base | None
    base_source: str | None

    @property
    def lacks_base(self) -> bool:
        """Whether the merge had a base and the verification has none."""
        return self.report.base is not None and self.base is None

    @cached_property
    def planned(self) -> Prepared:
        """The merge as the report describes it. Raises AdaptmergeError where it describes none."""
        return prepare(self._specs(), self.output, self._options())

    def _specs(self) -> list[InputSpec]:
        weights = self.report.options["weights"]
        return [replace(item.spec, weight=weights[item.name]) for item in self.inputs]

    def _options(self) -> Options:
        report = self.report
        said = report.options
        edits = [edit for result in self.results.values() for edit in result.adapter.edits]
        layouts = {layout_of(edit.site) for edit in edits} - {None}
        return Options(
            method=report.method,
            rules=tuple(map(rule_of, said["rules"])),
            heads=said["heads"],
            allow=frozenset(said["allow"]),
            budget=Budget(**said["budget"]),
            dtype=said["dtype"],
            target=report.format,
            form=said["form"],
            ranks=report.output["ranks"],
            version=said.get("version"),
            experts=layouts.pop() if len(layouts) == 1 and self.base is not None else None,
            base=self.base_source if report.base is not None else None,
        )


def is_retold(report: Report | FuseReport) -> bool:
    """Whether this version would tell all of a report in the same words: others have other entries, as had
    those that hashed no file, or of a fused model its tensors alone."""
    hashed = report.files is not None if isinstance(report, Report) else CARD in report.files
    return hashed and report.versions.get("adaptmerge") == __version__
