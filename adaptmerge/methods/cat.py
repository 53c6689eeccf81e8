"""cat: the weighted sum with all terms side by side, whether or not some are redundant."""

from __future__ import annotations

from adaptmerge.methods.linear import weighted_sum, weighted_values
from adaptmerge.registry import Method

METHOD = Method(
    name="cat",
    summary="linear without any reduction: ranks add up",
    rules={"add": weighted_sum, "replace": weighted_values},
    reduce=False,
)
