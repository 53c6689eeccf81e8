"""What files beside an adapter say of its heads and tokens: label maps (config.json), token strings.

Nothing of it changes what the adapter computes; it tells whose rows may be averaged or put together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from adaptmerge.adapters.graph import Adapter, Edit, Kind, Labels, Note
from adaptmerge.adapters.stored_edits import Replace, ReplaceRows
from adaptmerge.errors import InputError
from adaptmerge.files.listing import Listing
from adaptmerge.files.strict_json import object_in
from adaptmerge.files.tensor_file import TensorFile

MODEL_CONFIG = "config.json"
METADATA_KEY = "model_config"  # where a lone file has what a folder has in config.json
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")


def model_config(listing: Listing, file: TensorFile) -> Mapping[str, Any]:
    """The config of the model that was trained, as saved with the adapter; {} where there is none."""
    if listing.single is None and listing.has(MODEL_CONFIG):
        return listing.json(MODEL_CONFIG)
    try:
        return object_in(file.metadata.get(METADATA_KEY, "{}"), listing.origin)
    except InputError:
        return {}


def labels_of(
    edits: Sequence[Edit], config: Mapping[str, Any], notes: list[Note]
) -> dict[str, Labels]:
    """The labels of each head that has a row for each of them."""
    names = label_names(config)
    heads = [edit for edit in edits if isinstance(edit, Replace) and edit.owner]
    if names is None:
        if heads and config.get("id2label"):
            what = f"the label map of {MODEL_CONFIG} is left out: its numbers are not 0, 1, 2, ..."
            notes.append(Note(Kind.DROPPED, what))
        return {}
    problem = config.get("problem_type")
    labels = Labels(names, str(problem) if problem else None)
    found = {edit.owner: labels for edit in heads if edit.value.shape[:1] == (len(names),)}
    if heads and not found:
        what = f"{MODEL_CONFIG} has {len(names)} labels, which is the number of rows of no head"
        notes.append(Note(Kind.INFO, what))
    return found


def label_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The labels of a model config in the order of their rows; None where it has none in order."""
    table = config.get("id2label")
    if not isinstance(table, dict) or not table:
        return None
    numbers = [str(number) for number in range(len(table))]
    if set(map(str, table)) != set(numbers):
        return None
    spelled = {str(number): str(label) for number, label in table.items()}
    return tuple(spelled[number] for number in numbers)


def config_of(adapter: Adapter) -> dict[str, Any] | None:
    """The model config to write beside an adapter: its labels, and what was beside it before."""
    if not adapter.labels:
        return None
    labels = next(iter(adapter.labels.values()))
    before = adapter.hints.get("config", {})
    kept = {k: v for k, v in before.items() if k not in ("num_labels", "problem_type")}
    if adapter.base.architecture:
        kept.setdefault("model_type", adapter.base.architecture)
    return {
        **kept,
        "id2label": {str(number): label for number, label in enumerate(labels.names)},
        "label2id": {label: number for number, label in enumerate(labels.names)},
        **({"problem_type": labels.problem} if labels.problem else {}),
    }


def token_names(listing: Listing, edits: Sequence[Edit]) -> dict[int, str]:
    """The strings of the tokens whose rows are stored, as the tokenizer beside the adapter has them."""
    wanted = {row for edit in edits if isinstance(edit, ReplaceRows) for row in edit.rows}
    if not wanted or listing.single is not None:
        return {}
    found: dict[int, str] = {}
    for name in TOKENIZERS:
        if listing.has(name):
            found |= _READERS[name](listing.json(name))
    return {number: found[number] for number in sorted(wanted & found.keys())}


def _tokenizer(raw: Mapping[str, Any]) -> dict[int, str]:
    """Tokens by id of a tokenizer.json: the model's vocabulary, a table or a list, and added ones."""
    vocab = _table(raw.get("model")).get("vocab")
    listed = vocab if isinstance(vocab, list) else ()
    found = {i: str(item[0]) for i, item in enumerate(listed) if isinstance(item, list) and item}
    added = raw.get("added_tokens")
    tokens = [_table(token) for token in (added if isinstance(added, list) else ())]
    return {
        **found,
        **_by_id(_table(vocab)),
        **_by_id({str(t["content"]): t["id"] for t in tokens if {"id", "content"} <= t.keys()}),
    }


def _tokenizer_config(raw: Mapping[str, Any]) -> dict[int, str]:
    table = _table(raw.get("added_tokens_decoder"))
    return {
        int(number): str(_table(token)["content"])
        for number, token in table.items()
        if re.fullmatch(r"\d{1,9}", number, re.ASCII) and "content" in _table(token)
    }


def _by_id(table: Mapping[str, Any]) -> dict[int, str]:
    return {number: token for token, number in table.items() if isinstance(number, int)}


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


_READERS = dict(zip(TOKENIZERS, (_tokenizer, _tokenizer_config, _by_id), strict=True))
