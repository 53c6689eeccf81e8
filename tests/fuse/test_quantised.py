"""Fusing into bitsandbytes checkpoints, judged by bitsandbytes, transformers and PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuse.fusions import Fusion, Fusions
from fuse.made_models import quantised_base
from safetensors.torch import load_file
from tiers import slow
from torch import Tensor

from adaptmerge.bases.open import open_base
from adaptmerge.commands import verify as library
from adaptmerge.commands.fuse import FuseOptions, FuseReport, fuse
from adaptmerge.errors import CannotMerge, UsageError
from adaptmerge.formats.inputs import InputSpec
from adaptmerge.schemes.view import view_of

KINDS = ("nf4", "nf4,double", "fp4", "int8")
FEWER = ("nf4,double", "int8", *slow("nf4", "fp4"))
WEIGHT = 0.1  # of an adapter whose delta then is 3 % of the weights


@pytest.fixture(scope="module")
def base(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny Llama as `transformers` saves it quantised, made once per kind."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("base") / kind
            made[kind] = quantised_base(fixtures / "tinyllama" / "base", folder, kind)
        return made[kind]

    return get


def fused(
    base: Path, adapter: Path, out: Path, weight: float = WEIGHT, **options: Any
) -> FuseReport:
    spec = InputSpec(str(adapter), "a", weight)
    return fuse(str(base), [spec], out, FuseOptions(**options))


@pytest.fixture
def arrived(kind: str, base: Callable[[str], Path], fixtures: Path, fusions: Fusions) -> Fusion:
    """The base of a kind with a LoRA of all its layers."""
    spec = InputSpec(str(fixtures / "tinyllama" / "lora-r8-perl"), "a", WEIGHT)
    return fusions(base(kind), [spec])


def values(path: Path) -> dict[str, Tensor]:
    """Every quantised weight as bitsandbytes itself dequantises it, loaded by transformers."""
    import bitsandbytes.functional as functional
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if hasattr(weight, "quant_state"):
            shape = weight.quant_state.shape
            # as one row: on some processors blocks across rows get each other's scales
            weight.quant_state.shape = torch.Size((1, shape.numel()))
            flat = functional.dequantize_4bit(weight.data, weight.quant_state)
            found[name] = flat.view(shape).float()
        elif hasattr(weight, "SCB"):
            found[name] = functional.int8_vectorwise_dequant(weight.data, weight.SCB).float()
    return found


def delta_of(adapter: Path, module: str) -> Tensor:
    """alpha / r B A by hand."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = f"base_model.model.{module}"
    up, down = tensors[f"{key}.lora_B.weight"], tensors[f"{key}.lora_A.weight"]
    scale: float = config["lora_alpha"] / config["r"]
    return scale * (up @ down)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_bitsandbytes(kind: str, base: Callable[[str], Path]) -> None:
    view = view_of(open_base(str(base(kind))))
    theirs = values(base(kind))
    assert len(theirs) == len(view.coded) == 28
    for module, wanted in theirs.items():
        ours = view.values.tensors[f"{module}.weight"].read()
        # the library dequantises to the dtype that the model was quantised from
        assert torch.equal(ours.to(torch.bfloat16).float(), wanted.to(torch.bfloat16).float())


@pytest.mark.parametrize("kind", FEWER)
def test_the_adapter_arrives(
    kind: str, base: Callable[[str], Path], fixtures: Path, arrived: Fusion
) -> None:
    adapter, report = fixtures / "tinyllama" / "lora-r8-perl", arrived.report
    before, after = values(base(kind)), values(arrived.folder)
    inner = squared = inside = 0.0
    for module, weight in before.items():
        delta = WEIGHT * delta_of(adapter, module)
        moved = after[module] - weight
        basis = torch.linalg.qr(delta_rows(adapter, module).T).Q
        inner += float((moved * delta).sum())
        squared += float(delta.square().sum())
        inside += float(((moved - delta) @ basis).square().sum())
    gain, sub = inner / squared, (inside / squared) ** 0.5
    loss = report.adapters["a"]
    assert squared > 0
    assert loss.gain == pytest.approx(gain, abs=2e-2)  # theirs rounds values to bfloat16
    assert loss.sub == pytest.approx(sub, abs=2e-2)
    assert gain > 0.97
    assert sub < 0.2


def delta_rows(adapter: Path, module: str) -> Tensor:
    tensors = load_file(adapter / "adapter_model.safetensors")
    return tensors[f"base_model.model.{module}.lora_A.weight"]


def test_nearest_rounding_loses_it_and_is_stopped(
    base: Callable[[str], Path], fixtures: Path, tmp_path: Path
) -> None:
    adapter = fixtures / "tinyllama" / "lora-r8-perl"
    with pytest.raises(CannotMerge, match="rounding leaves"):
        fused(base("nf4"), adapter, tmp_path / "out", rounding="nearest")
    assert not (tmp_path / "out").exists()
    report = fused(
        base("nf4"), adapter, tmp_path / "out", rounding="nearest", allow=frozenset({"loss"})
    )
    assert report.adapters["a"].gain is not None
    assert report.adapters["a"].gain < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_untouched_tensors_keep_their_bytes(
    kind: str, base: Callable[[str], Path], fixtures: Path, tmp_path: Path
) -> None:
    report = fused(base(kind), fixtures / "tinyllama" / "lora-r16-rslora-qv-perl", tmp_path / "out")
    before, after = (
        load_file(path / "model.safetensors") for path in (base(kind), tmp_path / "out")
    )
    assert before.keys() == after.keys()
    changed = set(report.changed)
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        if name not in changed:
            assert torch.equal(after[name].view(torch.uint8), value.view(torch.uint8))
    assert {name for name in changed if "q_proj" not in name and "v_proj" not in name} == set()


@pytest.mark.parametrize("kind", FEWER)
def test_verify_proves_it_and_finds_a_flipped_code(
    kind: str, base: Callable[[str], Path], fixtures: Path, arrived: Fusion
) -> None:
    adapter = fixtures / "tinyllama" / "lora-r8-perl"
    questions = library.Questions(str(base(kind)), {"a": str(adapter)}, "cpu")
    verdict = library.verify(arrived.folder, questions)
    assert verdict.status == library.PASS, verdict.as_json()
    other = library.Questions(
        str(base(kind)), device="cpu", adapters=(InputSpec(str(adapter), "a", 3 * WEIGHT),)
    )
    assert library.verify(arrived.folder, other).status == library.FAIL


def test_row_factors_leave_the_codes_alone(
    base: Callable[[str], Path], fixtures: Path, tmp_path: Path
) -> None:
    report = fused(base("nf4"), fixtures / "tinyllama" / "ia3-shakespeare", tmp_path / "out")
    outer = [s for s in report.sites if "down_proj" not in s.site]
    assert outer
    assert all(site.moved == 0.0 and site.error < 1e-6 * site.weight_norm for site in outer)
    assert all(site.delta_norm > 0 for site in outer)


def test_dequantised_on_request(
    base: Callable[[str], Path], fixtures: Path, tmp_path: Path
) -> None:
    adapter = fixtures / "tinyllama" / "lora-r8-perl"
    fused(base("nf4"), adapter, tmp_path / "out", quant="fp32")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    view = view_of(open_base(str(base("nf4"))))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    for module in (m.removesuffix(".weight") for m in view.coded):
        wanted = view.values.tensors[f"{module}.weight"].read() + WEIGHT * delta_of(adapter, module)
        assert torch.allclose(stored[f"{module}.weight"], wanted, atol=1e-6)


def test_options_that_do_not_fit_the_base(
    base: Callable[[str], Path], fixtures: Path, tmp_path: Path
) -> None:
    adapter = fixtures / "tinyllama" / "lora-r8-perl"
    with pytest.raises(UsageError, match="is quantised already"):
        fused(base("nf4"), adapter, tmp_path / "out", trained_on="nf4")
    with pytest.raises(UsageError, match="say --quant bf16"):
        fused(base("nf4"), adapter, tmp_path / "out", dtype="bf16")
    with pytest.raises(UsageError, match="is not quantised"):
        fused(fixtures / "tinyllama" / "base", adapter, tmp_path / "out", quant="bf16")


def test_the_same_bytes_whatever_the_workers(
    base: Callable[[str], Path], fixtures: Path, tmp_path: Path
) -> None:
    adapter = fixtures / "tinyllama" / "lora-r16-rslora-qv-perl"
    for jobs in (1, 2):
        fused(base("nf4,double"), adapter, tmp_path / str(jobs), jobs=jobs)
    one, two = ((tmp_path / str(n) / "model.safetensors").read_bytes() for n in (1, 2))
    assert one == two


def test_trained_on_the_original_of_a_base_that_is_not_smoothed(
    base: Callable[[str], Path], fixtures: Path, tmp_path: Path
) -> None:
    adapter = fixtures / "tinyllama" / "lora-r16-rslora-qv-perl"
    report = fused(base("nf4"), adapter, tmp_path / "original", trained_on="original")
    assert "info: trained on the original weights" in " ".join(map(str, report.notes))
    fused(base("nf4"), adapter, tmp_path / "quantised", trained_on="quantised")
    one, two = (tmp_path / n / "model.safetensors" for n in ("original", "quantised"))
    assert one.read_bytes() == two.read_bytes()
    questions = library.Questions(str(base("nf4")), {"a": str(adapter)}, "cpu")
    assert library.verify(tmp_path / "original", questions).status == library.PASS
