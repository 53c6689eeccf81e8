"""Parameters stored whole beside an adapter: heads, embeddings, biases, base copies, token rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from adaptmerge.adapters.graph import Edit, Kind, Layer, Note, Site
from adaptmerge.adapters.module_paths import VOCABULARY, is_suffix
from adaptmerge.adapters.stored_edits import Replace, ReplaceRows
from adaptmerge.formats.peft.config import PeftConfig
from adaptmerge.formats.peft.keys import Keys
from adaptmerge.tensors.refs import TensorRef

BASE_COPY = "base_layer"
# What PEFT saves unasked when it is adapted or resized (save_embedding_layers).
EMBEDDINGS = VOCABULARY
# What PEFT adds to modules_to_save itself when it loads an adapter for a task.
IMPLIED = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def saved_edits(keys: Keys, config: PeftConfig, notes: list[Note]) -> list[Edit]:
    """Parameters stored whole: heads, embeddings, biases, base copies, and trainable tokens."""
    edits: list[Edit] = []
    indices = config.raw.get("trainable_token_indices")
    for module, rows in list(keys.tokens()):
        ids = _token_ids(indices, module)
        if ids is None or len(ids) != rows.shape[0]:
            keys.problems.append(
                f"{module}: {rows.shape[0]} trainable tokens are stored, but "
                f"trainable_token_indices gives {'none' if ids is None else len(ids)}"
            )
            continue
        edits.append(ReplaceRows(Site(module, "weight", Layer("embedding")), ids, rows))
    saved = list(keys.saved())
    matrices = {module for module, _, ref in saved if len(ref.shape) > 1}
    for module, param, ref in saved:
        edit = _replacement(keys, module, param, ref, config, notes)
        unlisted = edit.role == "unlisted" and module in matrices
        if unlisted and module.rpartition(".")[2] not in EMBEDDINGS:
            edit = replace(edit, owner=module)
        edits.append(edit)
    _say_listing(edits, config, notes)
    return edits


def _say_listing(edits: Sequence[Edit], config: PeftConfig, notes: list[Note]) -> None:
    """Words on modules_to_save where it says more or less than what is stored."""
    heads = [e for e in edits if isinstance(e, Replace) and e.role == "head"]
    owners = dict.fromkeys(edit.owner for edit in heads)
    for owner in owners:
        inside = {path for e in heads if e.owner == owner for path in _above(e.site.module)}
        listing = [n for n in config.modules_to_save if any(p.endswith(n) for p in inside)]
        if len(listing) > 1:
            what = f"is listed twice in modules_to_save: {', '.join(listing)}"
            notes.append(Note(Kind.INFO, what, site=owner))
        if not listing:
            found = "null" if config.raw.get("modules_to_save") is None else "without it"
            what = f"modules_to_save is {found}: PEFT adds this head for {_task(config)} itself"
            notes.append(Note(Kind.INFO, what, site=owner))
    implied = IMPLIED.get(_task(config), ())
    if config.modules_to_save and not set(config.modules_to_save) <= set(implied) and not owners:
        what = f"modules_to_save lists {', '.join(config.modules_to_save)}, but none is stored"
        notes.append(Note(Kind.INFO, what))


def _task(config: PeftConfig) -> str:
    return str(config.raw.get("task_type"))


def _replacement(
    keys: Keys, module: str, param: str, ref: TensorRef, config: PeftConfig, notes: list[Note]
) -> Replace:
    if module.endswith(f".{BASE_COPY}") or module == BASE_COPY:
        module = module.removesuffix(BASE_COPY).removesuffix(".")
        role = "bias" if param == "bias" else "base copy"
        return Replace(Site(module, param), ref, role)
    owner = _owner(module, config)
    if owner:
        return Replace(Site(module, param), ref, "head", owner)
    if param == "bias" and config.bias != "none":
        return Replace(Site(module, param), ref, "bias")
    if param not in ("weight", "bias"):
        keys.problems.append(f"tensor {ref.name!r} belongs to nothing this format knows")
    known = module.rpartition(".")[2] in EMBEDDINGS
    what = "stored whole though modules_to_save does not list it"
    notes.append(Note(Kind.INFO if known else Kind.ASSUMED, what, site=module))
    return Replace(Site(module, param), ref, "unlisted")


def _owner(module: str, config: PeftConfig) -> str | None:
    """The module saved whole that `module` is, or is part of; the outermost if several are.

    PEFT compares ends of names, not components: "classifier" saves "pre_classifier", too.
    """
    names = (*config.modules_to_save, *IMPLIED.get(_task(config), ()))
    return next((path for path in _above(module) if path.endswith(names)), None)


def _above(module: str) -> list[str]:
    """The module and those it lies in, the outermost first."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _token_ids(indices: Any, module: str) -> tuple[int, ...] | None:
    """The token ids of an embedding: a list means the input embedding, an object names modules."""
    if isinstance(indices, list):
        return tuple(int(index) for index in indices)
    if isinstance(indices, dict):
        found = next((ids for name, ids in indices.items() if is_suffix(name, module)), None)
        return None if found is None else tuple(int(index) for index in found)
    return None
