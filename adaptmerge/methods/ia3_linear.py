"""ia3-linear: what PEFT's add_weighted_adapter does to IA3, l = sum of w l_i.

Weights that do not sum to 1 rescale the base itself, and a module that one adapter leaves alone counts
as 0 for it, not as 1. For compatibility only.
"""

from __future__ import annotations

from adaptmerge.methods.method import Method
from adaptmerge.methods.sums import scale_values

METHOD = Method(
    name="ia3-linear",
    summary="compatibility: PEFT's sum of IA3 vectors; rescales the base unless weights sum to 1",
    url="https://huggingface.co/docs/peft/developer_guides/model_merging",
    rules={"scale": scale_values},
    promise=scale_values,
    caution="ia3-linear sums the vectors as PEFT does: this is not the sum of the effects",
    linear=False,
)
