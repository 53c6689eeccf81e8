"""The verifier on an accelerator: the same verdicts as on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaptmerge import runtime
from adaptmerge.bases.open import open_base
from adaptmerge.commands import verify
from adaptmerge.commands.combine import combine
from adaptmerge.formats.inputs import InputSpec, open_input
from adaptmerge.runtime.models import device_named

pytestmark = pytest.mark.gpu


def test_auto_finds_the_accelerator() -> None:
    assert device_named("auto") in ("cuda", "mps")


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_merge_verifies_there(fixtures: Path, tmp_path: Path, layerwise: bool) -> None:
    tiny = fixtures / "tinyllama"
    names = ("lora-r8-perl", "lora-r8-cheaders")
    combine([InputSpec(str(tiny / name)) for name in names], tmp_path / "out")
    questions = verify.Questions(
        base=str(tiny / "base"),
        inputs={name: str(tiny / name) for name in names},
        device="auto",
        layerwise=layerwise,
    )
    verdict = verify.verify(tmp_path / "out", questions)
    assert verdict.status == verify.PASS, verdict.checks


def test_outputs_agree_with_the_cpu(fixtures: Path) -> None:
    tiny = fixtures / "tinyllama"
    base = open_base(str(tiny / "base"))
    adapter = open_input(InputSpec(str(tiny / "lora-r8-perl"))).adapter
    outputs = []
    for device in ("cpu", device_named("auto")):
        model = runtime.load_model(base.path, device)
        inputs = {k: v.to(device) for k, v in runtime.example_inputs(base.config).items()}
        with runtime.attach(model, adapter):
            outputs.append(runtime.outputs_of(model, inputs).cpu())
    assert torch.allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)
