"""What an output is made of: one adapter, or with separate heads one for each, and what the heads are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from adaptmerge.adapters.graph import Bundle, Kind, Labels, Note
from adaptmerge.adapters.stored_edits import owner_of, saved_module, stored_value
from adaptmerge.errors import CannotStore, InputError
from adaptmerge.formats.format import Format, Output, WriteOptions
from adaptmerge.formats.inputs import Input
from adaptmerge.merging.heads.policies import CONCAT, Policies
from adaptmerge.merging.plan import Plan, Step
from adaptmerge.merging.settle import Settled
from adaptmerge.outputs.report import load_report, report_path

DEFAULT = "default"  # the name of an only adapter
LABELS = "config.json"  # where an output's label map may lie


def adapters_of(steps: Sequence[Step]) -> list[str]:
    """The adapters of an output by name, where it holds several; none where it is one."""
    return list(dict.fromkeys(step.adapter for step in steps if step.adapter))


def by_adapter(settled: Sequence[Settled]) -> dict[str, list[Settled]]:
    """The settled sites of each adapter of the output."""
    names = adapters_of([item.step for item in settled])
    if not names:
        return {DEFAULT: list(settled)}
    return {name: [s for s in settled if s.step.adapter in ("", name)] for name in names}


def labels_of(steps: Sequence[Step]) -> dict[str, Labels]:
    """What the rows of each head of one adapter stand for."""
    return {owner_of(step.edit): step.labels for step in steps if step.labels is not None}


def tokens_of(inputs: Sequence[Input]) -> dict[int, str]:
    """The strings of trained tokens: what inputs say that are merged does not differ."""
    return {n: text for item in reversed(inputs) for n, text in item.adapter.tokens.items()}


def check_several(plan: Plan, target: Format, *, single: bool) -> None:
    """Raises CannotStore where several adapters are to go into a file that holds one."""
    names = adapters_of(plan.steps)
    if names and single and not plan.stores.several:
        raise CannotStore(
            f"--heads separate makes an adapter for each head ({', '.join(names)}), and a file of "
            f"{target.name} holds one: give -o a folder, or --to native"
        )


def label_notes(plan: Plan, target: Format) -> list[Note]:
    """Label maps that the target has no place for beside another."""
    if not plan.stores.one_label_map:
        return []
    maps: dict[tuple[str, Labels], str] = {}
    for step in plan.steps:
        if step.labels is not None:
            maps.setdefault((step.adapter, step.labels), owner_of(step.edit))
    first: dict[str, str] = {}
    notes = []
    for (adapter, _), owner in maps.items():
        if first.setdefault(adapter, owner) != owner:
            what = (
                f"its labels are not written: {target.name} has room for those of {first[adapter]}"
            )
            notes.append(Note(Kind.DROPPED, what, site=owner))
    return notes


def said_of_heads(settled: Sequence[Settled], heads: Policies) -> dict[str, Any]:
    """What a report says of heads and of several adapters; nothing where there are none."""
    found = {
        "adapters": adapters_of([item.step for item in settled]),
        "heads": head_lines([item.step for item in settled], heads),
    }
    return {key: value for key, value in found.items() if value}


def head_lines(steps: Sequence[Step], heads: Policies) -> list[dict[str, Any]]:
    """What each head of an output is made of; `rows` says for each row of a concat whose it is."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for step in steps:
        if not saved_module(step.edit):
            continue
        owner = owner_of(step.edit)
        line = {
            "module": owner,
            "adapter": step.adapter,
            "policy": heads.of(owner),
            "inputs": [member.adapter for member in step.members],
            "labels": None if step.labels is None else list(step.labels.names),
        }
        found.setdefault((step.adapter, owner), line)
        if step.action == CONCAT and step.labels is not None:
            found[step.adapter, owner] = {**line, "rows": _rows(step, step.labels)}
    return list(found.values())


def _rows(step: Step, labels: Labels) -> list[dict[str, str]]:
    counts = [(m.adapter, stored_value(m.edit).shape[0]) for m in step.members]
    owners = [name for name, rows in counts for _ in range(rows)]
    return [{"input": n, "label": label} for n, label in zip(owners, labels.names, strict=True)]


def write_bundle(bundle: Bundle, target: Format, output: Output, options: WriteOptions) -> str:
    """Writes a bundle in the target's format, several adapters in a folder each where a file holds one;
    returns the name of the main file."""
    assert target.write is not None
    assert target.stores is not None
    if len(bundle.adapters) == 1 or target.stores(options).several:
        return target.write(bundle, output, options)
    main = ""
    for name, adapter in bundle.adapters.items():
        part = replace(output, path=partial(_below, output, name), single=None, scratch=None)
        main = f"{name}/{target.write(Bundle({name: adapter}), part, options)}"
    return main


def _below(output: Output, folder: str, file: str) -> Path:
    return output.path(f"{folder}/{file}")


def left_by(output: Path, files: Collection[str]) -> set[str]:
    """The files of an output before that a new one in its place must not keep: labels, and adapters of
    their own."""
    if not report_path(output).is_file() or not output.is_dir():
        return set()
    try:
        before = load_report(output).output
    except InputError:
        return set()
    folders = [f"{name}/" for name in before.get("adapters", ())]
    found = {f"{folder}{file}" for folder in folders for file in (*files, LABELS)}
    return found | ({LABELS} if before.get("heads") else set())
