"""linear: the true weighted sum of the deltas (task arithmetic, Ilharco et al. 2023)."""

from __future__ import annotations

from adaptmerge.methods.method import Method
from adaptmerge.methods.sums import FORMS, SUMS

METHOD = Method(
    name="linear",
    summary="the true weighted sum of deltas; exact unless a budget is given",
    url="https://arxiv.org/abs/2212.04089",
    rules=SUMS,
    forms=FORMS,
)
