"""svd: the weighted sum cut to the largest input rank, the best approximation there is."""

from __future__ import annotations

from adaptmerge.methods.method import Method
from adaptmerge.methods.sums import FORMS, SUMS

METHOD = Method(
    name="svd",
    summary="linear with --rank of the largest input rank",
    url="https://doi.org/10.1007/BF02288367",
    rules=SUMS,
    forms=FORMS,
    rank=max,
    linear=False,
)
