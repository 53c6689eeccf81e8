"""IA3."""

from __future__ import annotations

from families.cases import LINEARS, FamilyCase

CASES = (
    FamilyCase(
        "ia3", "IA3Config", {"target_modules": LINEARS, "feedforward_modules": ["down_proj"]}
    ),
)
