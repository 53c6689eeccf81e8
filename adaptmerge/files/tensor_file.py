"""The tensors of a file, whatever its container."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True)
class TensorFile:
    """The tensors of a file (or of an index and its shards) in the order of their data."""

    path: str
    refs: Mapping[str, TensorRef]
    metadata: Mapping[str, str]
