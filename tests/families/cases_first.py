"""LoHa, HRA, IA3 and VeRA."""

from __future__ import annotations

from families.cases import LINEARS, QV, FamilyCase

CASES = (
    FamilyCase("loha", "LoHaConfig", {"target_modules": LINEARS, "r": 3, "alpha": 7}),
    FamilyCase("hra", "HRAConfig", {"target_modules": LINEARS, "r": 4}),
    FamilyCase("hra_gs", "HRAConfig", {"target_modules": LINEARS, "r": 4, "apply_GS": True}),
    FamilyCase(
        "ia3", "IA3Config", {"target_modules": LINEARS, "feedforward_modules": ["down_proj"]}
    ),
    FamilyCase("vera", "VeraConfig", {"target_modules": QV, "r": 6}),
)
