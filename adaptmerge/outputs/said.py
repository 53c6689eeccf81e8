"""What a report must say of options, inputs and output for those who read it; it may say more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from adaptmerge.algebra.fit import Budget
from adaptmerge.files.typed import Number
from adaptmerge.merging.weights import SiteRule

Rules = Sequence[Annotated[Any, SiteRule]]


@dataclass(frozen=True, slots=True)
class SaidInput:
    """One input: where it lay, how it was read, and the digests of its files."""

    OPEN: ClassVar[bool] = True
    name: str
    source: str
    sha256: Mapping[str, str]
    revision: str | None
    alpha: Number | None
    task: int | None = None
    init: str | None = None
    adapter: str | None = None
    format: str = ""
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class SaidOptions:
    """The options of a merge."""

    OPEN: ClassVar[bool] = True
    weights: Mapping[str, Number]
    rules: Rules
    budget: Annotated[Any, Budget]
    heads: str | Mapping[str, str] | None
    form: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class SaidFusion:
    """The options of a fusion."""

    OPEN: ClassVar[bool] = True
    weights: Mapping[str, Number]
    rules: Rules
    allow: Sequence[str]
    plain: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class SaidOutput:
    """The output: its dtype, and its adapters where it holds several."""

    OPEN: ClassVar[bool] = True
    dtype: Annotated[str, Literal["bf16", "f16", "f32", "f64", "BF16", "F16", "F32", "F64"]]
    adapters: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class SaidBase:
    """The base."""

    OPEN: ClassVar[bool] = True
    name: str
    fingerprint: str | None = None
    original: str | None = None
