"""The modules through which a model's words come in and go out."""

from __future__ import annotations

from typing import Any


def embeddings_of(model: Any) -> tuple[Any, Any]:
    """The input and the output embedding of a model; None for one that it has not, as models of images."""
    return _asked(model, "get_input_embeddings"), _asked(model, "get_output_embeddings")


def _asked(model: Any, name: str) -> Any:
    try:
        return getattr(model, name, lambda: None)()
    except (NotImplementedError, AttributeError):
        return None
