"""LILY: every token gets its own mixture of shared matrices (read to be shown only)."""

from __future__ import annotations

from adaptmerge.formats.peft import opaque
from adaptmerge.formats.peft.tuner import Tuner

WHY = (
    "LILY mixes its matrices anew for every token, which no change of weights does: keep the adapter as "
    "it is"
)

TUNER = Tuner(
    "LILY",
    summary="matrices mixed anew for every token",
    leaves=("lily_A", "lily_B", "lily_router"),
    module=opaque.read_module("lily", WHY),
    maths={"r": 32, "stride_A": 1, "num_B": 2, "scaling": 1.0},
    as_lora="never",
    merges="none",
    refused=WHY,
)
