"""What the user asked of a merge, names resolved: the question that planning answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adaptmerge.adapters.graph import Adapter, Labels, Site
from adaptmerge.algebra.fit import Budget
from adaptmerge.bases.base import Base
from adaptmerge.formats.format import Format, Stores
from adaptmerge.merging.heads.policies import Policies
from adaptmerge.merging.weights import Weights
from adaptmerge.methods.method import Method
from adaptmerge.tensors.dtypes import DType
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked of a merge, names resolved. form: a family that all deltas become.

    adapters: the inputs by name, for what they say beside their edits (labels, tokens).
    """

    method: Method
    weights: Weights
    target: Format
    stores: Stores
    budget: Budget = Budget()
    dtype: DType | None = None
    heads: Policies = Policies()
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    base: Base | None = None
    form: str | None = None
    allowed: frozenset[str] = field(default_factory=frozenset)

    def weight(self, site: Site) -> TensorRef | None:
        """The base's weight at a site, canonical, where it is known."""
        return None if self.base is None else self.base.weight(site)

    def labels(self, adapter: str, owner: str) -> Labels | None:
        """What the rows of an input's head stand for, where it is known."""
        found = self.adapters.get(adapter)
        return None if found is None else found.labels.get(owner)
