"""Which types of numbers the tensors of edits may have: real ones, and whole ones where they are places."""

from __future__ import annotations

from collections.abc import Sequence

from adaptmerge.adapters.graph import Edit
from adaptmerge.tensors.refs import TensorRef
from adaptmerge.tensors.walk import refs_by_field

# Fields of families that say where values go, or which are meant.
PLACES = frozenset({"places", "up_places", "down_places", "indices", "rows"})
NEITHER = ("BOOL", "C")  # how the names of types begin that are neither real nor whole


def type_problems(edits: Sequence[Edit]) -> list[str]:
    """What is wrong with the types of all tensors inside of edits, each said once."""
    found = (pair for edit in edits for pair in refs_by_field(edit))
    return list(dict.fromkeys(_sentence(ref) for field, ref in found if not _fits(ref, field)))


def _fits(ref: TensorRef, field: str) -> bool:
    return ref.dtype.is_float or (field in PLACES and not ref.dtype.name.startswith(NEITHER))


def _sentence(ref: TensorRef) -> str:
    return (
        f"tensor {ref.name!r} holds {ref.dtype} values: expected real numbers, such as f32 or bf16; if "
        "these are the codes of quantised weights, give the adapter as it was trained"
    )
