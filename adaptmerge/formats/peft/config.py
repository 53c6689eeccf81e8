"""adapter_config.json: where it is found for a directory or a lone file, and what its fields mean."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptmerge.adapters.graph import Kind
from adaptmerge.adapters.module_paths import suffixes
from adaptmerge.errors import InputError
from adaptmerge.files.listing import Listing
from adaptmerge.files.strict_json import object_in
from adaptmerge.files.tensor_file import TensorFile
from adaptmerge.formats.peft.config_problems import problems_of

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
READABLE = (*WEIGHTS, "adapter_model.safetensors.index.json")
METADATA_KEY = "adapter_config"
FAMILY_MARKS = (".lora_A.", ".lora_embedding_A", ".ia3_l", ".vera_lambda_")
ASSUMED_SCALE = (
    Kind.ASSUMED,
    "no config was found: alpha = r is assumed, so the scale is 1; say ?alpha=NUMBER if not",
)


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
    where = f"{listing.origin} (metadata entry {METADATA_KEY!r})"
    return object_in(file.metadata[METADATA_KEY], where)


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
        problems = problems_of(raw)
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
