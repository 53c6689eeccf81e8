"""Quantised checkpoints that are recognised and refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from schemes.bit_by_bit import packed_in

from adaptmerge.errors import InputError

TENSORS = {"model.layers.0.self_attn.q_proj.codes": torch.zeros(2, 2, dtype=torch.int16)}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": {"quant_method": "exl2"}}, "EXL2, which cannot be fused into"),
        ({"quantization_config": {"quant_method": "exl3"}}, "EXL3, .* along a trellis"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "AQLM, .* sums of vectors"),
        ({"quantization_config": {"quant_method": "QuIP#"}}, "QuIP, .* rotated"),
        ({"quip_params": {"codebook": "E8P12"}}, "QuIP, .* vectors of several weights"),
        ({"quantization_config": {"quant_method": "quarot"}}, "QuaRot, .* rotated"),
        ({"quantization_config": {"quant_method": "spinquant"}}, "SpinQuant, .* rotated"),
    ],
)
def test_refused_by_name(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"is quantised with {said}") as caught:
        packed_in(tmp_path, TENSORS, config)
    assert caught.value.where == str(tmp_path)
    assert len(caught.value.problems) == 1
