"""Verify, attach and quantised bases on a device: the verdicts and outputs of the CPU.

Each runs on an accelerator where there is one (marked `gpu`), and always on a device that is pretended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from families.built import BuiltCases
from families.cases import all_cases
from fuse.layers import layer
from fuse.models import fuse
from gpu.pretended import DEVICE, pretended
from tiers import first_of

from adaptmerge import runtime
from adaptmerge.bases.open import open_base
from adaptmerge.commands import verify
from adaptmerge.commands.combine import combine
from adaptmerge.errors import InputError
from adaptmerge.formats.inputs import InputSpec, open_input
from adaptmerge.runtime.models import device_named
from adaptmerge.schemes.coded import dequantised
from adaptmerge.schemes.view import view_of

pytest.importorskip("peft")
REAL, PRETENDED = "accelerator", "pretended"
Tiny = Callable[[str], Path]
FAMILIES = [name for name, case in all_cases().items() if case.model != "conv"]


@pytest.fixture(params=[pytest.param(REAL, marks=pytest.mark.gpu), PRETENDED])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a test computes."""
    with nullcontext(device_named("auto")) if request.param == REAL else pretended() as name:
        yield name


@pytest.mark.gpu
def test_auto_finds_the_accelerator() -> None:
    assert device_named("auto") in ("cuda", "mps")


def test_the_pretended_device_refuses_what_a_device_does() -> None:
    with pretended():
        there, here = torch.ones(2, 3, device=DEVICE), torch.ones(2, 3)
        assert there.device == torch.device(DEVICE)
        assert torch.equal((there + 1).cpu(), here + 1)
        for wrong in (
            lambda: there + here,
            lambda: here @ there.T,
            lambda: torch.stack([here, there]),
        ):
            with pytest.raises(RuntimeError, match="are on cpu, others on"):
                wrong()
        with pytest.raises((RuntimeError, TypeError)):
            np.asarray(there)


def assert_passes(output: Path, tiny: Tiny, names: Sequence[str], *, layerwise: bool) -> None:
    """On the device that is in use, with the outputs of the model compared."""
    inputs = {name: str(tiny(name)) for name in names}
    questions = verify.Questions(str(tiny("base")), inputs, "auto", layerwise)
    found = verify.verify(output, questions)
    assert found.status == verify.PASS, found.checks
    assert "forward" in {check.name for check in found.checks if check.status == verify.PASS}


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize(
    "names",
    [("lora-r8-perl", "lora-r8-cheaders"), ("lora-r4-dora-embed-cheaders",)],
    ids=["merge", "dora"],
)
def test_a_merge_verifies_there(
    names: tuple[str, ...], layerwise: bool, device: str, tiny: Tiny, tmp_path: Path
) -> None:
    combine([InputSpec(str(tiny(name))) for name in names], tmp_path / "out")
    assert_passes(tmp_path / "out", tiny, names, layerwise=layerwise)


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_model_fused_into_nf4_verifies_there(
    layerwise: bool, device: str, tiny: Tiny, tmp_path: Path
) -> None:
    lossy = {"quant": "nf4", "max_loss": 100.0, "allow": frozenset({"loss"})}
    fuse(tiny("base"), [tiny("lora-r8-perl")], tmp_path / "out", **lossy)
    assert_passes(tmp_path / "out", tiny, ["lora-r8-perl"], layerwise=layerwise)


@pytest.mark.parametrize("name", first_of(FAMILIES, lambda name: all_cases()[name].config))
def test_families_compute_there_what_they_do_on_the_cpu(
    name: str, built: BuiltCases, device: str
) -> None:
    found = built(name)
    try:
        base = open_base(str(found.base))
        adapter = open_input(InputSpec(str(found.path)), base).adapter
        outputs = [outputs_on("cpu", base.path, adapter)]
    except InputError as problem:
        pytest.skip(f"no model that runs alone: {problem}")
    outputs.append(outputs_on(device, base.path, adapter))
    assert torch.allclose(*outputs, rtol=1e-3, atol=1e-3)


def outputs_on(device: str, base: Path, adapter: runtime.Adapter) -> torch.Tensor:
    model = runtime.load_model(base, device, adapter=adapter)
    with runtime.attach(model, adapter):
        return runtime.outputs_of(model, runtime.example_inputs(open_base(str(base)).config))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4,double", "int8"])
def test_bitsandbytes_reads_there_what_we_read(kind: str, tmp_path: Path) -> None:
    """Quantised on the device by the library itself, and read back by its kernels."""
    import bitsandbytes.functional as functional

    base = layer(tmp_path / "base", kind, 32, 128)
    (weight,) = view_of(open_base(str(base))).coded.values()
    ours = dequantised(weight, (0, 32))
    if kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(ours.half().cuda())
        theirs = codes.float() * scales.float()[:, None] / 127
    else:
        codes, state = functional.quantize_4bit(ours.cuda(), quant_type=kind.partition(",")[0])
        theirs = functional.dequantize_4bit(codes, state)
    assert torch.allclose(theirs.cpu().float(), ours, rtol=2e-3, atol=1e-6)
