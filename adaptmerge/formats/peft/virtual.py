"""What PEFT's families of virtual tokens have in common: one tensor, and the sizes of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from adaptmerge.adapters.families.prefix import Prefix
from adaptmerge.adapters.families.prompt import Prompt
from adaptmerge.adapters.graph import Edit, Kind, Note, Site
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Spelling
from adaptmerge.tensors.refs import TensorRef

PREFIX = "base_model."  # the model is wrapped once only
TENSOR = "prompt_embeddings"
SITE = Site("", "prompt")
SIZES = {
    "num_virtual_tokens": None,
    "token_dim": None,
    "num_transformer_submodules": None,
    "num_attention_heads": None,
    "num_layers": None,
}
UNKNOWN = ("fan_in_fan_out", "bias")  # fields that these configs do not have


def own(reading: Reading, name: str = TENSOR) -> TensorRef:
    """A tensor of the adapter, taken off. Raises KeyError."""
    found = reading.keys.take(name)
    if found is None:
        raise KeyError(name)
    return reading.looked_at(name, found)


def parts(reading: Reading) -> int:
    """2 for encoder-decoder models, 1 for others."""
    said = reading.setting("num_transformer_submodules")
    found = said or (2 if reading.setting("task_type") == "SEQ_2_SEQ_LM" else 1)
    if found not in (1, 2):
        raise Malformed(f"num_transformer_submodules is {found!r}: expected 1 or 2")
    return int(found)


def task_of(reading: Reading) -> str | None:
    """What the model is for; a Note where that is not said."""
    found = reading.setting("task_type")
    if not found:
        what = "its config has no task_type, without which PEFT leaves virtual tokens out: here they count"
        reading.notes.append(Note(Kind.ASSUMED, what))
    return str(found) if found else None


def prompt_values(reading: Reading) -> TensorRef:
    """(parts * n, dim). Raises Malformed when the config says otherwise."""
    values = own(reading)
    if len(values.shape) != 2:
        raise Malformed(f"{TENSOR} has shape {list(values.shape)}: expected (tokens, dimension)")
    said = [reading.setting("num_virtual_tokens"), reading.setting("token_dim")]
    rows, width = values.shape
    for name, found in zip(("num_virtual_tokens", "token_dim"), said, strict=True):
        if found is not None and (isinstance(found, bool) or not isinstance(found, int)):
            raise Malformed(f"{name} is {found!r}: expected a whole number")
    expected = (rows if said[0] is None else said[0] * parts(reading), said[1] or width)
    if values.shape != expected:
        raise Malformed(
            f"{TENSOR} has shape {list(values.shape)}, but its config says {list(expected)} "
            "(num_virtual_tokens * num_transformer_submodules, token_dim)"
        )
    return values


def read_prompt(family: str) -> Callable[[Reading], list[Edit]]:
    """The reader of a family that stores the finished prompt."""

    def read(reading: Reading) -> list[Edit]:
        return [Prompt(SITE, prompt_values(reading), family, parts(reading), task_of(reading))]

    return read


def read_prefix(family: str) -> Callable[[Reading], list[Edit]]:
    """The reader of a family that stores keys and values."""

    def read(reading: Reading) -> list[Edit]:
        values = own(reading)
        layers, heads, tokens = (
            _size(reading, name)
            for name in ("num_layers", "num_attention_heads", "num_virtual_tokens")
        )
        width = 2 * layers * _size(reading, "token_dim")
        if values.shape != (tokens, width) or width % (2 * layers * heads):
            raise Malformed(
                f"{TENSOR} has shape {list(values.shape)}, but its config says {[tokens, width]} "
                f"(num_virtual_tokens, num_layers * 2 * token_dim) in {heads} heads"
            )
        both = parts(reading), task_of(reading)
        return [Prefix(SITE, values, layers, heads, family, *both)]

    return read


def _size(reading: Reading, name: str) -> int:
    found = reading.setting(name)
    if not isinstance(found, int) or found < 1:
        raise Malformed(f"{name} is {found!r} in its config: expected a whole number of at least 1")
    return found


def nothing(edit: Edit) -> Parts:
    """No tensor lies below a module."""
    return {}


def prompt_spelling(edits: Sequence[Prompt]) -> Spelling:
    """The one tensor and its sizes."""
    (edit,) = edits
    return Spelling({TENSOR: plain(edit.values)}, prompt_sizes(edit))


def prompt_sizes(edit: Any) -> Mapping[str, Any]:
    """The task, and the sizes of an edit with `values` (parts * n, dim)."""
    rows, width = edit.values.shape
    return {
        "task_type": edit.task,
        "num_virtual_tokens": rows // edit.parts,
        "token_dim": width,
        "num_transformer_submodules": edit.parts,
    }


def prefix_spelling(edits: Sequence[Prefix]) -> Spelling:
    """The one tensor and its sizes."""
    (edit,) = edits
    fields = {
        "task_type": edit.task,
        "num_virtual_tokens": edit.length,
        "token_dim": edit.heads * edit.head_size,
        "num_transformer_submodules": edit.parts,
        "num_attention_heads": edit.heads,
        "num_layers": edit.layers,
    }
    return Spelling({TENSOR: plain(edit.values)}, fields)


def plain(ref: TensorRef) -> TensorRef:
    """The tensor as one of this file alone."""
    return replace(ref, shared=False)


def finish(edits: Sequence[Any], config: dict[str, Any]) -> dict[str, Any]:
    """Without the fields that only families of module weights have."""
    return {name: value for name, value in config.items() if name not in UNKNOWN}
