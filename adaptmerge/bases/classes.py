"""The classes that `transformers` has for models, and what they raise and print while they are built."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from adaptmerge import lazy
from adaptmerge.errors import InputError
from adaptmerge.lazy import torch

COUNTS = re.compile("^(num|n|encoder|decoder)_(.*_)?(layers?|experts?|heads?|blocks?)$")
MOST = 20_000  # modules of a kind


def skeleton(said: Mapping[str, Any], where: str = "") -> torch.nn.Module:
    """The model of a config.json without weights, with the ties that loading makes. Raises InputError where
    `transformers` has no class for it."""
    from transformers import CONFIG_MAPPING

    with quietly(), in_one_sentence(where):
        kind = CONFIG_MAPPING[said.get("model_type")]
        decoded = getattr(kind, "_decode_special_floats", dict)(
            dict(said)
        )  # {"__float__": "Infinity"}
        return on_meta(kind.from_dict(decoded))


def stored_name(model: torch.nn.Module, parameter: str) -> str:
    """What checkpoints of a model call one of its parameters."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 stores all under their own names
        return parameter
    with quietly(), in_one_sentence(parameter):
        found = revert_weight_conversion(model, {parameter: model.get_parameter(parameter)})
    return next(iter(found)) if len(found) == 1 else parameter


def on_meta(config: Any) -> torch.nn.Module:
    """The model of a config of `transformers` on the meta device, tied as it is once loaded.

    Raises InputError for one that would take forever to build.
    """
    _check_counts(config.to_dict(), "")
    with torch.device("meta"):
        model: Any = model_class(config)(config)
    model.tie_weights()
    found: torch.nn.Module = model
    return found


def _check_counts(said: Mapping[str, Any], place: str) -> None:
    """Raises InputError for a number of layers, experts or heads that no model has."""
    for name, value in said.items():
        if isinstance(value, Mapping):
            _check_counts(value, f"{place}{name}.")
        elif COUNTS.search(str(name)) and isinstance(value, int) and value > MOST:
            raise InputError(f"{place}{name} is {value} in config.json, expected at most {MOST}")


def model_class(config: Any) -> Any:
    """The class that the config names, else the causal language model or bare model of its type."""
    import transformers

    for name in (config.architectures or ())[:1]:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise InputError(f"transformers has no model for the config type {config.model_type!r}")


@contextmanager
def in_one_sentence(where: str) -> Iterator[None]:
    """Whatever a library raises inside becomes an InputError with the first line of its message."""
    try:
        yield
    except InputError as problem:
        raise problem.located(where) from None
    except Exception as problem:
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise InputError(f"cannot be loaded: {first}", where=where) from problem


@contextmanager
def quietly() -> Iterator[None]:
    """No advice and no progress bars of `transformers`, and of what it imports, while the block runs."""
    from transformers.utils import logging

    logging.get_verbosity()  # it sets the level itself when first asked
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with lazy.quietly():
            yield
    finally:
        if bars:
            logging.enable_progress_bar()
