"""What is wrong with the fields of an adapter_config.json, and which variants of LoRA they may name."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from adaptmerge.formats.peft.fields import common_problems

# Variants of a LoRA, of which PEFT computes one at a time; and what the value of each must be.
VARIANTS = {
    "alora_invocation_tokens": "a list of token ids",
    "arrow_config": "an object",
    "kasa_config": "an object",
    "monteclora_config": "an object",
    "use_bdlora": "an object",
    "use_dora": "true or false",
    "use_qalora": "true or false",
    "velora_config": "an object",
}
# What the objects of variants that compute otherwise may hold.
SUBFIELDS = {
    "kasa_config": ("beta", "gamma"),
    "use_bdlora": ("target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"),
}
# Initialisations by what they did to the base: nothing, or a part of it moved into the adapter that
# the base says again ("pissa", "olora") or that only the adapter as initialised says.
UNMOVED_INITS = ("gaussian", "eva", "orthogonal", "mica")
MOVED_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def problems_of(raw: Mapping[str, Any]) -> list[str]:
    """All fields that are missing or malformed, one sentence each."""
    problems = common_problems(raw)
    family = raw.get("peft_type", "LORA")
    if not isinstance(family, str):
        problems.append(f"peft_type is {family!r}: expected a name such as LORA")
    if family == "LORA" and len(raw) > 1:
        problems += _lora_problems(raw)
    return problems or _table_problems(raw)


def _table_problems(raw: Mapping[str, Any]) -> list[str]:
    """What no family can read: tables that are none, and patterns and layers that cannot be matched."""
    problems = _target_problems(raw.get("target_modules"))
    for name, table in raw.items():
        if name.endswith("_pattern") and name != "layers_pattern" and table:
            problems += _key_problems(name, table)
    if raw.get("layer_replication") and not _are_ranges(raw["layer_replication"]):
        found = raw["layer_replication"]
        problems.append(f"layer_replication is {found!r}: expected pairs of first and last + 1")
    return problems


def _key_problems(name: str, table: Any) -> list[str]:
    if not isinstance(table, dict):
        return [f"{name} is {table!r}: expected an object of patterns"]
    problems = []
    for pattern in table:
        try:
            re.compile(pattern)
        except re.error as problem:
            problems.append(f"{name}: {pattern!r} is no regular expression: {problem}")
    return problems


def _lora_problems(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    if not _is_rank(raw.get("r")):
        problems.append(f"r is {raw.get('r')!r}: expected the rank, a whole number of at least 1")
    if not _is_number(raw.get("lora_alpha")):
        problems.append(f"lora_alpha is {raw.get('lora_alpha')!r}: expected a number")
    for name in ("rank_pattern", "alpha_pattern"):
        problems += _pattern_problems(name, raw.get(name) or {})
    problems += _target_problems(raw.get("target_modules"))
    if raw.get("bias", "none") not in (None, "none", "all", "lora_only"):
        problems.append(f"bias is {raw['bias']!r}: expected none, all or lora_only")
    parameters = raw.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        problems.append(f"target_parameters is {parameters!r}: expected names of parameters")
    return problems + _variant_problems(raw) + _init_problems(raw.get("init_lora_weights"))


def variants_in(raw: Mapping[str, Any]) -> list[str]:
    """The variants that a config sets; an empty object sets one with all its defaults."""
    return [name for name in VARIANTS if raw.get(name) not in (None, False, [])]


def _variant_problems(raw: Mapping[str, Any]) -> list[str]:
    found = variants_in(raw)
    problems = [
        f"{name} is {raw[name]!r}: expected {VARIANTS[name]}"
        for name in found
        if not _FITS[VARIANTS[name]](raw[name])
    ]
    problems += [
        f"{name}.{field} is {value!r}, which this version does not know: update adaptmerge"
        for name in found
        for field, value in _fields(raw[name]).items()
        if field not in SUBFIELDS.get(name, (field,)) and value
    ]
    if len(found) > 1:
        problems.append(f"{' and '.join(found)} are set: PEFT computes only one of them at a time")
    ranges = raw.get("layer_replication")
    if ranges and not _are_ranges(ranges):
        problems.append(f"layer_replication is {ranges!r}: expected pairs of first and last + 1")
    return problems


def _fields(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


_FITS: Mapping[str, Callable[[Any], bool]] = {
    "an object": lambda value: isinstance(value, dict),
    "true or false": lambda value: isinstance(value, bool),
    "a list of token ids": lambda value: isinstance(value, list) and all(map(_is_index, value)),
}


def _are_ranges(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(map(_is_index, pair))
        and pair[0] < pair[1]
        for pair in value
    )


def _init_problems(init: Any) -> list[str]:
    if init is None or isinstance(init, bool):
        return []
    known = isinstance(init, str) and (
        init.lower() in (*UNMOVED_INITS, *MOVED_INITS) or re.fullmatch(r"pissa_niter_\d+", init)
    )
    if known:
        return []
    names = ", ".join((*UNMOVED_INITS, *MOVED_INITS))
    return [
        f"init_lora_weights is {init!r}, which this version does not know (known: true, false, {names}): "
        "it may have changed the base; update adaptmerge"
    ]


def _target_problems(targets: Any) -> list[str]:
    if isinstance(targets, list) and not all(isinstance(target, str) for target in targets):
        return [f"target_modules is {targets!r}: expected names of modules"]
    try:
        re.compile(targets if isinstance(targets, str) else "")
    except re.error as problem:
        return [f"target_modules is no regular expression: {problem}"]
    return []


def _pattern_problems(name: str, patterns: Any) -> list[str]:
    if not isinstance(patterns, dict):
        return [f"{name} is not an object of pattern to number"]
    problems = []
    for pattern, value in patterns.items():
        try:
            re.compile(pattern)
        except re.error as problem:
            problems.append(f"{name}: {pattern!r} is no regular expression: {problem}")
        if name == "rank_pattern" and not _is_rank(value):
            problems.append(f"{name}: {pattern!r} is {value!r}: expected a rank")
        elif not _is_number(value):
            problems.append(f"{name}: {pattern!r} is {value!r}: expected a number")
    return problems


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return (
        abs(value) <= sys.float_info.max
    )  # of which NaN is none, nor is a whole number without end


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
