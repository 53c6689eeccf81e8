"""The types of what is read from a model's config.json, and from its quantization_config.

Any other field may be there; null is the same as nothing. Fields that only one layout of quantised
weights has are looked at only where a base is in a known one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from adaptmerge.errors import InputError
from adaptmerge.files.strict_json import capped
from adaptmerge.files.typed import misfits

Names = list[str] | None


@dataclass(frozen=True)
class ModelConfig:
    """config.json of a model."""

    OPEN: ClassVar[bool] = True
    _name_or_path: str | None = None
    architectures: Names = None
    compression_config: Mapping[str, Any] | None = None
    dtype: str | Mapping[str, Any] | None = None
    id2label: Mapping[str, Any] | None = None
    is_encoder_decoder: bool | None = None
    model_type: str | None = None
    problem_type: str | None = None
    quantization_config: Mapping[str, Any] | None = None
    tie_word_embeddings: bool | None = None
    torch_dtype: str | Mapping[str, Any] | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class Weights:
    """How the weights of a group of modules are quantised, in compressed-tensors."""

    OPEN: ClassVar[bool] = True
    block_structure: str | list[int] | None = None
    num_bits: int | None = None


@dataclass(frozen=True)
class Group:
    """A group of modules that are quantised alike, in compressed-tensors."""

    OPEN: ClassVar[bool] = True
    format: str | None = None
    targets: Names = None
    weights: Weights | None = None


@dataclass(frozen=True)
class Sparsity:
    """How weights are stored sparse, in compressed-tensors."""

    OPEN: ClassVar[bool] = True
    format: str | None = None


@dataclass(frozen=True)
class QuantConfig:
    """quantization_config of a model, in the words of all layouts that are read."""

    OPEN: ClassVar[bool] = True
    _load_in_4bit: bool | None = None
    _load_in_8bit: bool | None = None
    backend: str | None = None
    bits: int | None = None
    bnb_4bit_compute_dtype: str | None = None
    checkpoint_format: str | None = None
    config_groups: Mapping[str, Group] | None = None
    dynamic: Mapping[str, Any] | None = None
    format: str | None = None
    group_size: int | None = None
    ignore: Names = None
    is_marlin_format: bool | None = None
    llm_int8_skip_modules: Names = None
    load_in_4bit: bool | None = None
    load_in_8bit: bool | None = None
    meta: Mapping[str, Any] | None = None
    modules_to_not_convert: Names = None
    quant_type: str | Mapping[str, Any] | None = None
    sparsity_config: Sparsity | None = None
    transform_config: Mapping[str, Any] | None = None
    version: str | None = None
    weight_block_size: list[int] | None = None


def checked_config(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The same. Raises InputError naming every field that is of another type than it must be."""
    _check(ModelConfig, config, "", where)
    return config


def check_quantisation(said: Mapping[str, Any], entry: str, where: str) -> None:
    """Raises InputError naming every field of a quantised model's config that is of another type than it
    must be."""
    _check(QuantConfig, said, entry, where)


def _check(kind: Any, value: Any, name: str, where: str) -> None:
    problems = misfits(kind, value, name)
    if problems:
        raise InputError(capped(problems), where=where)
