"""A merge whose result stays in memory: the tensors and the config that would be written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from adaptmerge.adapters.graph import Note
from adaptmerge.commands.combine import Options, Prepared, prepare, settled_result
from adaptmerge.errors import CannotStore
from adaptmerge.files.in_memory import InMemory, SnapshotScratch
from adaptmerge.files.tensor_file import TensorFile
from adaptmerge.formats.format import Output
from adaptmerge.formats.in_memory import ORIGIN
from adaptmerge.formats.inputs import InputSpec, Source
from adaptmerge.lazy import torch
from adaptmerge.outputs.adapters import adapters_of, write_bundle
from adaptmerge.outputs.report import Report, check_strict
from adaptmerge.parallel import Progress, silent
from adaptmerge.tensors.refs import TensorRef

NOWHERE = Path("merged")  # the name of a folder: no suffix asks for a format


def _no_file(name: str) -> Path:
    raise CannotStore(f"{name} is only written to a file: use combine with an output")


@dataclass(frozen=True)
class Kept(Output):
    """Keeps what a format writes."""

    documents: dict[str, Any] = field(default_factory=dict)
    files: dict[str, TensorFile] = field(default_factory=dict)

    def text(self, name: str, text: str) -> None:
        self.documents[name] = json.loads(text)

    def safetensors(
        self, name: str, tensors: Mapping[str, TensorRef], metadata: Mapping[str, str]
    ) -> None:
        named = {key: replace(ref, name=key) for key, ref in tensors.items()}
        self.files[name] = TensorFile(name, named, metadata)


@dataclass(frozen=True)
class _Made:
    """The files of a result, and its report."""

    kept: Kept
    main: str
    report: Report


class Combined:
    """A merge that is planned; it is computed when its tensors, config or report are first asked for.

    Each of them raises InputError for inputs that are not finite, and AdaptmergeError under `strict`.
    """

    def __init__(self, prepared: Prepared, progress: Progress = silent) -> None:
        self._prepared, self._progress = prepared, progress

    @property
    def notes(self) -> tuple[Note, ...]:
        """What is known before anything is computed: assumptions, and what is left out."""
        return self._prepared.notes

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the result on the CPU, under the keys that a file has; copies at every call."""
        refs = self._made.kept.files[self._made.main].refs
        return {name: ref.read() for name, ref in refs.items()}

    @property
    def config(self) -> dict[str, Any]:
        """The config beside the tensors: what `adapter_config.json` would say."""
        found: dict[str, Any] = self._made.kept.documents[self._prepared.target.files[0]]
        return found

    @property
    def report(self) -> Report:
        """What was done: norms, ranks and errors of every site, as `adaptmerge.json` has it."""
        return self._made.report

    def as_input(self, name: str = "merged", weight: float | None = None) -> InputSpec:
        """The result as an input of another merge, a fusion or a verification."""
        kept = self._made.kept
        held = InMemory.holding(f"{ORIGIN}{name}", kept.documents, kept.files)
        return InputSpec(f"{ORIGIN}{name}", weight=weight, held=held)

    @cached_property
    def _made(self) -> _Made:
        prepared = self._prepared
        result, report = settled_result(prepared, SnapshotScratch(), self._progress, "combine")
        check_strict(report.notes, prepared.options.strict)
        kept = Kept(_no_file, None, {})
        return _Made(kept, write_bundle(result.bundle, result.target, kept, result.how), report)


def combine_in_memory(
    sources: Source | Sequence[Source],
    options: Options = Options(),  # noqa: B008 - frozen
    progress: Progress = silent,
) -> Combined:
    """The merge of the inputs, planned, and computed when it is asked for; nothing is written.

    Raises AdaptmergeError for what headers and options can tell.
    """
    prepared = prepare(sources, NOWHERE, options)
    if not any(name.endswith(".safetensors") for name in prepared.target.files):
        _no_file(prepared.target.name)
    names = adapters_of(prepared.plan.steps)
    if names and not prepared.plan.stores.several:
        raise CannotStore(
            f"the heads make several adapters ({', '.join(names)}), and {prepared.target.name} holds one: "
            "use combine with a folder as output"
        )
    check_strict(prepared.notes, options.strict)
    return Combined(prepared, progress)
