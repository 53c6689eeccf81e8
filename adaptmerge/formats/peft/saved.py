"""Parameters stored whole beside an adapter: heads, embeddings, biases, base copies, token rows."""

from __future__ import annotations

from typing import Any

from adaptmerge.edits import Replace, ReplaceRows
from adaptmerge.files.refs import TensorRef
from adaptmerge.formats.peft.config import PeftConfig
from adaptmerge.formats.peft.keys import Keys
from adaptmerge.graph import Edit, Kind, Layer, Note, Site
from adaptmerge.names import is_suffix

BASE_COPY = "base_layer"
# What PEFT saves unasked when it is adapted or resized (save_embedding_layers).
EMBEDDINGS = (
    "embed_tokens",
    "lm_head",
    "wte",
    "word_embeddings",
    "shared",
    "embed_in",
    "embed_out",
)


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
    for module, param, ref in list(keys.saved()):
        edits.append(_replacement(keys, module, param, ref, config, notes))
    return edits


def _replacement(
    keys: Keys, module: str, param: str, ref: TensorRef, config: PeftConfig, notes: list[Note]
) -> Edit:
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
    """The module saved whole that `module` is, or is part of; the outermost if several are."""
    parts = module.split(".")
    above = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    listed = (path for path in above if any(is_suffix(n, path) for n in config.modules_to_save))
    return next(listed, None)


def _token_ids(indices: Any, module: str) -> tuple[int, ...] | None:
    """The token ids of an embedding: a list means the input embedding, an object names modules."""
    if isinstance(indices, list):
        return tuple(int(index) for index in indices)
    if isinstance(indices, dict):
        found = next((ids for name, ids in indices.items() if is_suffix(name, module)), None)
        return None if found is None else tuple(int(index) for index in found)
    return None
