"""One way to write an output: staged, with a scratch for results, strict where asked, committed whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from adaptmerge import __version__
from adaptmerge.adapters.graph import Bundle
from adaptmerge.bases.open import MODEL_CONFIG, WEIGHT_FILES
from adaptmerge.errors import OutputError
from adaptmerge.files.scratch import Scratch
from adaptmerge.files.staging import Staging
from adaptmerge.formats.format import Format, Output, WriteOptions
from adaptmerge.formats.inputs import Input
from adaptmerge.formats.registry import formats
from adaptmerge.outputs import companions
from adaptmerge.outputs.adapters import left_by, write_bundle
from adaptmerge.outputs.checksums import checksums
from adaptmerge.outputs.report import (
    EXTRACT,
    FILE,
    METADATA_KEY,
    Report,
    check_strict,
    is_report,
    report_name,
)
from adaptmerge.outputs.target import is_file_name

PAGE = 4096  # bytes; headers are reserved in these


@dataclass(frozen=True, slots=True)
class Result:
    """What is written: adapters in a target's format, and the inputs whose files may travel along."""

    bundle: Bundle
    target: Format
    how: WriteOptions
    inputs: Sequence[Input]


class Session:
    """An output while it is being written; see `writing`."""

    def __init__(self, staging: Staging, output: Path, *, strict: bool) -> None:
        self.staging, self.strict = staging, strict
        self.single = output.name if is_file_name(output) else None
        self.main = ""

    @contextmanager
    def scratch(self, sites: Sequence[str], inputs: int = 0) -> Iterator[Scratch]:
        """A file for settled tensors, with room for the header of a result with these sites."""
        entries = sum(2 * (len(site) + 200) for site in sites)
        room = -(-(entries + PAGE + 512 * inputs) // PAGE) * PAGE
        with Scratch(self.staging.scratch("settled"), room) as scratch:
            yield scratch

    def write(self, result: Result, report: Report, scratch: Scratch) -> Report:
        """Stages all files, and returns the report as it is written: with their sha256. Raises
        AdaptmergeError for notes of the report that are fatal."""
        check_strict(report.notes, self.strict)
        output = Output(self.staging.path, self.single, header(report), scratch)
        self.main = write_all(result, report, output)
        name = report_name(self.single) if self.single else FILE
        found = replace(report, files=checksums(self.staging, output.digests, name))
        output.text(name, found.as_text())
        return found


def _refuse_models(output: Path) -> None:
    """transformers loads an adapter that lies beside a model with it: nobody asks for that by --force."""
    found = [name for name in WEIGHT_FILES if (output / name).is_file()]
    if found and (output / MODEL_CONFIG).is_file():
        raise OutputError(
            f"{output} holds a whole model ({found[0]}), which an adapter beside it would change: choose "
            "another -o"
        )


def header(report: Report) -> dict[str, str]:
    """The report's short form, for the header of the main file."""
    extracted = report.command == EXTRACT
    said = ("name", "fingerprint" if extracted else "sha256")
    inputs = [{key: item[key] for key in said} for item in report.inputs]
    method = EXTRACT if extracted else report.method
    short = {"version": __version__, "method": method, "inputs": inputs}
    return {METADATA_KEY: json.dumps(short, sort_keys=True)}


def write_all(result: Result, report: Report, output: Output) -> str:
    """Writes a result and what travels along; returns the name of the main file."""
    main = write_bundle(result.bundle, result.target, output, result.how)
    if output.single is None:
        companions.write(result.inputs, report, output)
    return main


@contextmanager
def writing(
    output: Path, inputs: Sequence[Path], *, force: bool, strict: bool
) -> Iterator[Session]:
    """A session whose files appear all together when the block ends, or not at all when it fails.

    Raises OutputError for an output that exists, unless `force`, is a whole model, or overlaps an input.
    """
    _refuse_models(output)
    obsolete = {name for found in formats().values() for name in found.files}
    obsolete |= left_by(output, obsolete)
    single = is_file_name(output)
    with Staging(output, force=force, inputs=inputs, single=single, is_orphan=is_report) as staging:
        session = Session(staging, output, strict=strict)
        yield session
        staging.commit(session.main, obsolete=obsolete)
