"""Weights that adapters store whole, or rows of, where the base has them quantised.

Their values lie on no grid of the base's. Where loaders can leave single layers as they are, such a layer
is stored in 16 bits from now on.
"""

from __future__ import annotations

from collections.abc import Mapping

from adaptmerge.adapters.weight_edits import factor_of
from adaptmerge.bases.base import Base
from adaptmerge.merging.plan import Plan
from adaptmerge.schemes.coded import CodedWeight, stands_alone


def stored_whole(plan: Plan, base: Base, coded: Mapping[str, CodedWeight]) -> list[str]:
    """The names of the coded weights of which a plan replaces values, in order."""
    steps = (step for step in plan.steps if factor_of(step.edit) is None)
    places = (base.place(step.site) for step in steps)
    names = {place.name for place in places if place is not None} & coded.keys()
    return sorted(name for name in names if stands_alone(coded[name]))
