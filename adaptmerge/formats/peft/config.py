"""adapter_config.json: where it is found for a directory or a lone file, and what its fields mean."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptmerge.adapters.graph import Kind
from adaptmerge.adapters.module_paths import suffixes
from adaptmerge.errors import InputError
from adaptmerge.files.listing import Listing
from adaptmerge.files.tensor_file import TensorFile

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
READABLE = (*WEIGHTS, "adapter_model.safetensors.index.json")
METADATA_KEY = "adapter_config"
FAMILY_MARKS = (".lora_A.", ".lora_embedding_A", ".ia3_l", ".vera_lambda_")

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


@dataclass(frozen=True, slots=True)
class Found:
    """A config, where it was found, and what was assumed."""

    values: Mapping[str, Any]
    where: str | None
    notes: tuple[tuple[str, str], ...] = ()


def find_config(listing: Listing, file: TensorFile) -> Found:
    """The config of an input: beside it for a directory; for a lone file its metadata, then
    <stem>.json, then an adapter_config.json beside it that fits; else what the keys say."""
    if listing.single is None and listing.has(CONFIG):
        return Found(listing.json(CONFIG), f"{listing.origin}/{CONFIG}")
    if METADATA_KEY in file.metadata:
        return Found(_embedded(file, listing), f"{listing.origin} (metadata)")
    if listing.single is None:
        return Found({"peft_type": _family(file)}, None)
    stem = f"{Path(listing.single).stem}.json"
    if listing.has(stem):
        return Found(listing.json(stem), stem)
    if listing.has(CONFIG) and _belongs(listing, file):
        return Found(listing.json(CONFIG), CONFIG)
    return Found({"peft_type": _family(file)}, None)


def _embedded(file: TensorFile, listing: Listing) -> Mapping[str, Any]:
    try:
        values = json.loads(file.metadata[METADATA_KEY])
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise InputError(
            f"its metadata entry {METADATA_KEY!r} is not a JSON object", where=listing.origin
        )
    return values


def _belongs(listing: Listing, file: TensorFile) -> bool:
    """Whether the adapter_config.json beside a lone file is this file's."""
    folder = Listing.of(listing.root, str(listing.root))
    adapters = [
        name
        for name in folder.names
        if name.endswith((".safetensors", ".bin", ".pt", ".pth")) and not _debris(name)
    ]
    if adapters == [listing.single] or listing.single in WEIGHTS:
        return True
    config = listing.json(CONFIG)
    ranks = {ref.shape[0] for key, ref in file.refs.items() if ".lora_A." in key}
    targets = config.get("target_modules")
    fits = isinstance(targets, list) and all(
        any(f".{target}.lora_" in f".{key}" for target in targets)
        for key in file.refs
        if ".lora_A." in key
    )
    return bool(ranks) and ranks == {config.get("r")} and fits


def _debris(name: str) -> bool:
    return bool(re.match(r"(optimizer|scheduler|scaler|training_args|rng_state)", name))


def _family(file: TensorFile) -> str:
    marks = {"ia3_l": "IA3", "vera_lambda": "VERA"}
    return next(
        (family for mark, family in marks.items() if any(mark in key for key in file.refs)), "LORA"
    )


@dataclass(frozen=True, slots=True)
class Patterns:
    """Values by regular expressions on module paths; the first that matches, as PEFT matches, wins.

    paths: every expression is a whole path, as writers spell them, and can be looked up.
    """

    values: Mapping[str, Any]
    paths: bool

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Patterns:
        """The patterns of a config's table."""
        return cls(values, all(key == exactly(key[1:].replace("\\", "")) for key in values))

    def find(self, module: str, default: Any) -> Any:
        """The value for a module."""
        if self.paths:
            return self.values.get(exactly(module), default)
        found = (v for key, v in self.values.items() if re.match(rf"(.*\.)?({key})$", module))
        return next(found, default)

    def unused(self, modules: Iterable[str]) -> list[str]:
        """The expressions that match none of the modules."""
        paths = list(modules)
        return [
            key
            for key in self.values
            if not any(re.match(rf"(.*\.)?({key})$", path) for path in paths)
        ]


def exactly(module: str) -> str:
    """The pattern that matches this module path and no other."""
    return "^" + re.escape(module)


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The fields that change what an adapter computes, with PEFT's defaults; `raw` is the whole."""

    raw: Mapping[str, Any]
    where: str
    peft_type: str
    r: int | None
    alpha: float | None
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    replication: tuple[tuple[int, int], ...] = ()
    ranks: Patterns = Patterns({}, True)
    alphas: Patterns = Patterns({}, True)

    @classmethod
    def of(cls, raw: Mapping[str, Any], where: str) -> PeftConfig:
        """The typed config. Raises InputError with all fields that are missing or malformed."""
        problems = _problems(raw)
        if problems:
            raise InputError(problems, where=where)
        return cls(
            raw=raw,
            where=where,
            peft_type=str(raw.get("peft_type", "LORA")),
            r=raw.get("r"),
            alpha=raw.get("lora_alpha"),
            use_rslora=bool(raw.get("use_rslora")),
            use_dora=bool(raw.get("use_dora")),
            bias=raw.get("bias") or "none",
            modules_to_save=_names(raw.get("modules_to_save")),
            replication=tuple((first, stop) for first, stop in raw.get("layer_replication") or ()),
            ranks=Patterns.of(raw.get("rank_pattern") or {}),
            alphas=Patterns.of(raw.get("alpha_pattern") or {}),
        )

    @property
    def base_model(self) -> str | None:
        name = self.raw.get("base_model_name_or_path")
        return str(name) if name else None

    @property
    def revision(self) -> str | None:
        revision = self.raw.get("revision")
        return str(revision) if revision else None

    def rank(self, module: str) -> int | None:
        """The rank the config gives a module; None when there is no config."""
        found: int | None = self.ranks.find(module, self.r)
        return found

    def scale(self, module: str, rank: int, alpha: float | None) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023)."""
        value = self.alphas.find(module, self.alpha)
        value = alpha if value is None else value
        if value is None:
            return 1.0
        return float(value) / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def has_no_bias(self) -> bool:
        """Whether a config is there and says nothing of biases of lora_B."""
        return self.r is not None and not self.raw.get("lora_bias")

    def unselected(self, modules: Iterable[str]) -> list[str]:
        """The modules that target_modules, where it is spelled out, does not make PEFT adapt."""
        targets = self.raw.get("target_modules")
        paths = {module: module.partition(".base_layer.")[0] for module in modules}
        if isinstance(targets, str) and targets != "all-linear":
            return [module for module, path in paths.items() if not re.fullmatch(targets, path)]
        if not isinstance(targets, list):
            return []
        listed = frozenset(targets)
        return [module for module, path in paths.items() if listed.isdisjoint(suffixes(path))]

    def covers(self, modules: Iterable[str]) -> frozenset[str]:
        """The listed target suffixes, where the config promises that all their modules are adapted."""
        targets = self.raw.get("target_modules")
        filters = ("layers_to_transform", "layers_pattern", "exclude_modules")
        if not isinstance(targets, list) or any(self.raw.get(name) for name in filters):
            return frozenset()
        adapted = {suffix for module in modules for suffix in suffixes(module)}
        return frozenset(target for target in targets if target in adapted)

    def hints(self) -> dict[str, Any]:
        """What a writer of this format keeps and that never changes outputs, or spells the same."""
        return dict(self.raw)


def _names(listed: Any) -> tuple[str, ...]:
    """Names in a list; one name alone is a list of one."""
    return (listed,) if isinstance(listed, str) else tuple(listed or ())


def _problems(raw: Mapping[str, Any]) -> list[str]:
    problems = []
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
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


ASSUMED_SCALE = (
    Kind.ASSUMED,
    "no config was found: alpha = r is assumed, so the scale is 1; say ?alpha=NUMBER if not",
)
