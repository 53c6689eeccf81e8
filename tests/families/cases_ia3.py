"""IA3."""

from __future__ import annotations

from families.cases import LINEARS, FamilyCase

CONVS = ["conv", "point"]

CASES = (
    FamilyCase(
        "ia3", "IA3Config", {"target_modules": LINEARS, "feedforward_modules": ["down_proj"]}
    ),
    FamilyCase(
        "ia3_conv", "IA3Config", {"target_modules": CONVS, "feedforward_modules": []}, "conv"
    ),
    FamilyCase(
        "ia3_conv_in",
        "IA3Config",
        {"target_modules": CONVS, "feedforward_modules": ["conv"]},
        "conv",
    ),
)
