"""The types of the fields of an adapter_config.json: of those that all families have, and of their own."""

from __future__ import annotations

from collections.abc import Mapping
from types import GenericAlias
from typing import Any

from adaptmerge.files.typed import Number, misfits

Names = str | list[str] | None
# Fields whose default does not tell their type, or that may be more than it tells.
TYPES: Mapping[str, Any] = {
    "base_model_name_or_path": str | None,
    "bias": str | None,
    "exclude_modules": Names,
    "fan_in_fan_out": bool | None,
    "init_weights": bool | str | None,
    "layers_pattern": Names,
    "layers_to_transform": int | list[int] | None,
    "modules_to_save": Names,
    "peft_version": str | None,
    "revision": str | None,
    "target_modules": Names,
    "task_type": str | None,
    # of single families
    "adapter_layers": int | None,
    "adapter_len": int | None,
    "adapters": Any,
    "alpha": Number | None,
    "cayley_neumann_eps": Number | None,
    "effective_rank": Number | None,  # a whole number, or a share
    "feedforward_modules": Names,
    "init_lora_weights": Any,
    "r": int | None,
    "token_indices": list[int] | None,
    "trainable_token_indices": list[int] | Mapping[str, list[int]] | None,
}
COMMON_TYPES = tuple(TYPES)[: tuple(TYPES).index("adapter_layers")]
MOST = {"num_cayley_neumann_terms": 1000, "psoft_svd_lowrank_niter": 1000}  # rounds of a loop


def common_problems(raw: Mapping[str, Any]) -> list[str]:
    """The fields of all families that are of another type than they must be."""
    given = [name for name in (*COMMON_TYPES, "trainable_token_indices") if name in raw]
    return [problem for name in given for problem in misfits(TYPES[name], raw[name], name)]


def own_problems(
    raw: Mapping[str, Any], maths: Mapping[str, Any], patterns: Mapping[str, str]
) -> list[str]:
    """The fields of a family that are of another type than their defaults; null stands for these."""
    problems = []
    for name, default in maths.items():
        value, hint = raw.get(name), _type(name, default)
        if value is not None and name not in patterns.values():
            problems += misfits(hint, value, name) or _beyond(name, value)
        table = raw.get(patterns[name]) if name in patterns else None
        if table:
            kind: Any = GenericAlias(Mapping, (str, hint))
            problems += misfits(kind, table, patterns[name])
    return problems


def _type(name: str, default: Any) -> Any:
    if name in TYPES:
        return TYPES[name]
    if isinstance(default, float) or (type(default) is int and "alpha" in name):
        return Number
    return {bool: bool, int: int, str: str}.get(type(default), Any)


def _beyond(name: str, value: int) -> list[str]:
    most = MOST.get(name)
    if most is None or 0 <= value <= most:
        return []
    return [f"{name} is {value}: expected a number from 1 to {most}"]
