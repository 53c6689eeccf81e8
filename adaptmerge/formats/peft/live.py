"""Adapters of live PEFT models as inputs: what `save_pretrained` would write, without files.

Which tensors are an adapter's is for PEFT to say, family by family and release by release: it is asked as
it was loaded with the model, so that it is needed only where it is there.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Any

from adaptmerge.errors import InputError, did_you_mean
from adaptmerge.formats.in_memory import from_state_dict
from adaptmerge.formats.inputs import InputSpec
from adaptmerge.lazy import quietly

ASKED = "peft.utils.save_and_load"  # the module with the function that every release saves by


def from_peft(
    model: Any,
    adapter_name: str = "default",
    *,
    name: str | None = None,
    weight: float | None = None,
) -> InputSpec:
    """An input that holds a copy of an adapter of a live model, as it is now.

    model: what `peft.get_peft_model` or `PeftModel.from_pretrained` returns, or a model of transformers
    with adapters (`add_adapter`). name: what the input is called, else as the adapter; weight: as in the
    text of an input. Raises InputError for a model without such an adapter.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        raise InputError(
            f"a {type(model).__name__} has no adapters of PEFT: give what get_peft_model returned"
        )
    if adapter_name not in configs:
        known = [str(other) for other in configs]
        sentence = f"the model has no adapter {adapter_name!r}: {did_you_mean(adapter_name, known)}"
        raise InputError(sentence)
    return from_state_dict(
        _tensors(model, adapter_name),
        _config(model, configs[adapter_name]),
        name=name or adapter_name,
        weight=weight,
    )


def _tensors(model: Any, adapter_name: str) -> Mapping[str, Any]:
    with quietly():  # it says that it saves embeddings, too
        asked = importlib.import_module(ASKED)
        found: Mapping[str, Any] = asked.get_peft_model_state_dict(model, adapter_name=adapter_name)
    return found


def _config(model: Any, config: Any) -> dict[str, Any]:
    """The config as it would be saved."""
    values: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=_plain))
    base = _base(model, config)
    if not values.get("base_model_name_or_path"):
        values["base_model_name_or_path"] = (
            getattr(base, "__dict__", {}).get("name_or_path") or None
        )
    if values.get("task_type") is None:
        kind = type(base)
        values["auto_mapping"] = {
            "base_model_class": kind.__name__,
            "parent_library": kind.__module__,
        }
    return {**values, "inference_mode": True}


def _plain(value: object) -> object:
    """What JSON has no word for: sets in order, all else as text."""
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else str(value)


def _base(model: Any, config: Any) -> Any:
    """The model below PEFT's wrappers; of one of transformers itself, which has none."""
    if not hasattr(model, "get_base_model"):
        return model
    inner = model.base_model
    return inner if getattr(config, "is_prompt_learning", False) else getattr(inner, "model", inner)
