"""Is all that lies beside the tensors of an output what a writer puts there? It is written once more.

What changes nothing that is computed has no other witness: a config field that only a library reads, an
entry in the header of a file, a tokenizer that goes along.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adaptmerge import __version__
from adaptmerge.commands import combine, extract
from adaptmerge.commands.fuse import FuseReport
from adaptmerge.commands.verify.checks import FAIL, PASS, SKIPPED, Check
from adaptmerge.commands.verify.extracted import is_extraction
from adaptmerge.commands.verify.files import is_prose
from adaptmerge.commands.verify.stated import Stated
from adaptmerge.commands.verify.tables import differences, entries
from adaptmerge.errors import AdaptmergeError
from adaptmerge.files.listing import sha256_of
from adaptmerge.files.safetensors import read_header
from adaptmerge.files.sniff import whole
from adaptmerge.files.strict_json import parse
from adaptmerge.formats.format import Output, WriteOptions
from adaptmerge.formats.inputs import Input
from adaptmerge.formats.registry import format_named
from adaptmerge.outputs.adapters import DEFAULT, labels_of
from adaptmerge.outputs.report import Report
from adaptmerge.outputs.session import Result, header, write_all
from adaptmerge.tensors.refs import TensorRef

NAME = "settings"
SHOWN = 3
Header = tuple[Mapping[str, TensorRef], Mapping[str, str]]


@dataclass(frozen=True)
class Again(Output):
    """Keeps the headers of what a format writes, by the place of the file; all else is written there."""

    headers: dict[Path, Header] = field(default_factory=dict)

    def safetensors(
        self, name: str, tensors: Mapping[str, TensorRef], metadata: Mapping[str, str]
    ) -> None:
        self.headers[self.path(name)] = tensors, metadata


def check_written(stated: Stated) -> Check:
    """The check of configs, headers and files that go along, against those that would be written."""
    skipped = unwritable(stated.report)
    if skipped is not None:
        return skipped
    if stated.lacks_base:
        return Check(NAME, SKIPPED, "what is written depends on the base: pass --base DIR")
    try:
        with tempfile.TemporaryDirectory() as folder:
            problems, count = _problems(stated, Path(folder))
    except AdaptmergeError as problem:
        return Check(NAME, FAIL, f"cannot be written again: {problem.problems[0]}")
    return judged(problems, count)


def unwritable(report: Report | FuseReport) -> Check | None:
    """The check that is not made where another version wrote the output; None where this one did."""
    said = report.versions.get("adaptmerge")
    if said != __version__:
        what = (
            f"adaptmerge {said} wrote it, and this version ({__version__}) may write other fields"
        )
        return Check(NAME, SKIPPED, what)
    return None if report.files else Check(NAME, SKIPPED, "the report is of an earlier version")


def judged(problems: Sequence[str], count: int) -> Check:
    """The check of so many files."""
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if problems[SHOWN:] else ""
        return Check(NAME, FAIL, "; ".join(problems[:SHOWN]) + more, {"problems": problems})
    files = "1 file says" if count == 1 else f"{count} files say"
    return Check(NAME, PASS, f"{files} beside the tensors what is written for them")


def _problems(stated: Stated, folder: Path) -> tuple[list[str], int]:
    """What is said otherwise, and the number of files that were looked at."""
    again = _written(stated, folder)
    problems: list[str] = []
    for path, wanted in again.headers.items():
        name = path.relative_to(folder)
        problems += _unlike_header(name.as_posix(), wanted, _header(stated, name))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.relative_to(folder) for path in files if not is_prose(path.name)]
    for name in names:
        problems += unlike(name.as_posix(), folder / name, _place(stated, name))
    if again.single is None:
        written = {path.relative_to(folder).as_posix() for path in (*files, *again.headers)}
        problems += entries("files", stated.report.files or {}, written)
    return problems, len(names) + len(again.headers)


def _written(stated: Stated, folder: Path) -> Again:
    """The output as it would be written, with no tensors."""

    def path(name: str) -> Path:
        found = folder / name
        found.parent.mkdir(parents=True, exist_ok=True)
        return found

    single = None if stated.output.is_dir() else stated.output.name
    again = Again(path, single, header(stated.report))
    write_all(_result(stated), stated.report, again)
    return again


def _result(stated: Stated) -> Result:
    """What came out, described as its inputs are, not as it describes itself."""
    report = stated.report
    found = {name or DEFAULT: result.adapter for name, result in stated.results.items()}
    if is_extraction(report):
        (edits,) = [adapter.edits for adapter in found.values()]
        how = WriteOptions(
            report.output["ranks"], stated.base, version=report.options.get("version")
        )
        return extract.result_of(_tuned(stated), format_named(report.format), how, edits)
    prepared = stated.planned
    own = {
        name: [step for step in prepared.plan.steps if step.adapter in ("", name)] for name in found
    }
    parts = {name: (adapter.edits, labels_of(own[name])) for name, adapter in found.items()}
    return combine.result_of(prepared, parts)


def _tuned(stated: Stated) -> Input:
    """The tuned model, with the name of the base that was given when it was extracted from."""
    assert stated.base is not None
    assert stated.report.base is not None
    (item,) = stated.inputs
    name = extract.base_name(stated.base, str(stated.report.base.get("source")))
    return replace(item, adapter=replace(item.adapter, base=replace(item.adapter.base, name=name)))


def _place(stated: Stated, name: Path) -> Path:
    return stated.output / name if stated.output.is_dir() else stated.output


def _header(stated: Stated, name: Path) -> Header:
    file = read_header(_place(stated, name))
    return file.refs, file.metadata


def _unlike_header(name: str, wanted: Header, found: Header) -> Iterator[str]:
    """Where the header of a file differs: in its tensors, their kind, or what else it says."""
    kinds = [
        {key: (str(ref.dtype), list(ref.shape)) for key, ref in refs.items()}
        for refs, _ in (wanted, found)
    ]
    yield from differences(f"{name}: tensor", *kinds)
    yield from differences(f"{name}: metadata", *(_opened(told) for _, told in (wanted, found)))


def _opened(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Metadata with the tables that are in it as text."""
    return {name: _table(text) for name, text in metadata.items()}


def _table(text: str | bytes) -> Any:
    try:
        return parse(text)[0]
    except ValueError:
        return text


def unlike(name: str, wanted: bytes | Path, found: Path) -> list[str]:
    """Where a file differs from what it should hold, or the file that holds it: in which entries, if both
    are tables."""
    if not found.is_file():
        return [f"{name} is missing"]
    if _digest(wanted) == sha256_of(found):
        return []
    if found.suffix == ".json":
        held = whole(wanted) if isinstance(wanted, Path) else wanted
        unlike = list(differences(f"{name}:", _table(held), _table(whole(found))))
        return unlike or [f"{name} is spelled otherwise than it is written"]
    return [f"{name} is not what is written there"]


def _digest(held: bytes | Path) -> str:
    return sha256_of(held) if isinstance(held, Path) else hashlib.sha256(held).hexdigest()
