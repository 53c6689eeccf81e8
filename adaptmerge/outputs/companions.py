"""Files that travel with an adapter: tokenizer, chat template, licence, and a model card of the result.

Policy: a tokenizer, chat template or licence is carried over when all inputs that have it agree byte for
byte. Where they differ a tokenizer and template are left out and each licence is kept under its input's
name; both are Notes. The model card is written anew.
"""

from __future__ import annotations

from collections.abc import Sequence

from adaptmerge.adapters.graph import Kind, Note
from adaptmerge.files.disk import copy_file
from adaptmerge.files.listing import sha256_of
from adaptmerge.formats.format import Output
from adaptmerge.formats.inputs import Input
from adaptmerge.formats.registry import format_named
from adaptmerge.outputs.report import Report

CARD = "README.md"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
TITLES = {"convert": "Converted", "extract": "Extracted"}
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")


def _holders(inputs: Sequence[Input], name: str) -> dict[str, list[Input]]:
    """Inputs that have the file, by its content."""
    found: dict[str, list[Input]] = {}
    for item in inputs:
        if item.listing.single is None and item.listing.has(name):
            found.setdefault(sha256_of(item.listing.root / name), []).append(item)
    return found


def notes(inputs: Sequence[Input]) -> list[Note]:
    """What is not carried over because the inputs differ in it."""
    said = []
    for name in (*TOKENIZER, *LICENCES):
        holders = _holders(inputs, name)
        if len(holders) > 1:
            names = ", ".join(item.name for items in holders.values() for item in items)
            kept = "all are kept" if name in LICENCES else "none is carried over"
            said.append(Note(Kind.INFO, f"{name} differs between {names}: {kept}"))
    return said


def write(inputs: Sequence[Input], report: Report, output: Output) -> None:
    """Stages the carried files and the model card."""
    for name in (*TOKENIZER, *LICENCES):
        holders = _holders(inputs, name)
        if len(holders) == 1:
            ((item, *_),) = holders.values()
            _copy(item, name, output, name)
        elif holders and name in LICENCES:
            for items in holders.values():
                _copy(items[0], name, output, f"{name}.{items[0].name}")
    output.text(CARD, card(inputs, report))


def _copy(item: Input, name: str, output: Output, as_name: str) -> None:
    copy_file(item.listing.root / name, output.path(as_name))


def card(inputs: Sequence[Input], report: Report) -> str:
    """A model card that names base, inputs, weights, method and error."""
    base = inputs[0].adapter.base.name
    title = TITLES.get(report.command, "Merged")
    oracle = format_named(report.format).oracle
    head = ["---", f"tags: [adapter, {title.lower()}]"]
    head += [f"library_name: {oracle.package}"] if oracle else []
    head += [f"base_model: {base}"] if base else []
    weights = report.options["weights"]
    rows = [f"| {item.name} | {item.format.name} | {weights[item.name]:.6g} |" for item in inputs]
    return "\n".join(
        [
            *head,
            "---",
            "",
            f"# {title} adapter",
            "",
            f"Method `{report.method}`, relative error {report.totals.error:.2e}. "
            "Details are in `adaptmerge.json`; `adaptmerge verify` checks them.",
            "",
            "| input | format | weight |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )
