"""cat: the weighted sum with all terms side by side, whether or not some are redundant."""

from __future__ import annotations

from adaptmerge.methods.method import Method
from adaptmerge.methods.sums import FORMS, STACKED

METHOD = Method(
    name="cat",
    summary="linear without any reduction: ranks add up, prompts follow each other",
    rules=STACKED,
    forms=FORMS,
    reduce=False,
)
