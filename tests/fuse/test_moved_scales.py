"""IA3 on what goes into down_proj of a quantised base, judged by PEFT: no code of it changes."""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fuse.made_models import quantised_base
from fuse.models import fuse, ia3, llama_base
from fuse.plain_models import model_of, outputs, values
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptmerge.commands.fuse.on_base.moved_scales import GATED
from adaptmerge.commands.verify import PASS, Questions, verify

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT advises the person who trains
IA3 = "ia3-shakespeare"


def by_peft(source: Path, base: Path, adapter: Path) -> Tensor:
    from peft import PeftModel

    model: Any = model_of(source, values(base))
    return outputs(PeftModel.from_pretrained(model, adapter).eval())


def error(found: Tensor, truth: Tensor, plain: Tensor) -> float:
    effect = (truth - plain).norm()
    assert effect > 1e-2 * plain.norm(), "the adapter does nothing: no proof"
    return float((found - truth).norm() / effect)


@pytest.fixture(scope="module")
def tiny(fixtures: Path) -> Path:
    return fixtures / "tinyllama"


@pytest.fixture(scope="module")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised_base(tiny / "base", tmp_path_factory.mktemp("base") / "nf4", "nf4")


def test_exact_and_no_code_changes(tiny: Path, base: Path, tmp_path: Path) -> None:
    report = fuse(base, [tiny / IA3], tmp_path / "out")
    truth = by_peft(tiny / "base", base, tiny / IA3)
    plain, found = (outputs(model_of(tiny / "base", values(p))) for p in (base, tmp_path / "out"))
    assert error(found, truth, plain) < 1e-5
    before, after = (load_file(p / "model.safetensors") for p in (base, tmp_path / "out"))
    codes = [name for name in before if name.endswith("proj.weight")]
    assert len(codes) == 28
    assert all(torch.equal(before[name], after[name]) for name in codes)
    assert any("rows of up_proj" in note.what for note in report.notes)
    assert not [site for site in report.sites if "down_proj" in site.site]


def test_verify_proves_it(tiny: Path, base: Path, tmp_path: Path) -> None:
    fuse(base, [tiny / IA3], tmp_path / "out")
    questions = Questions(str(base), {IA3: str(tiny / IA3)}, "cpu")
    verdict = verify(tmp_path / "out", questions)
    assert verdict.status == PASS
    (check,) = (check for check in verdict.checks if check.name == "forward")
    assert (
        check.numbers["relative_error"] < 1e-4
    )  # against scales of inputs, where they were trained
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight.absmax"] *= 1.02
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert verify(tmp_path / "out", questions).status != PASS


def scales(adapter: Path, layer: int) -> Tensor:
    tensors = load_file(adapter / "adapter_model.safetensors")
    (found,) = (value for name, value in tensors.items() if f"layers.{layer}.mlp" in name)
    return found.double().flatten()


def test_biases_and_several_adapters(tmp_path: Path) -> None:
    plain = llama_base(tmp_path / "plain", torch.float32, hidden_size=64, mlp_bias=True)
    tensors = load_file(plain / "model.safetensors")
    for name in [name for name in tensors if name.endswith("up_proj.bias")]:
        tensors[name] = torch.linspace(-1, 1, len(tensors[name]))
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    base = quantised_base(plain, tmp_path / "base", "nf4")
    one, two = (
        ia3(plain, tmp_path / name, seed, ["down_proj"]) for seed, name in enumerate(("one", "two"))
    )
    fuse(base, {one: 0.7, two: -0.4}, tmp_path / "out")
    before = values(base)
    wanted = dict(before)
    for name in [name for name in before if name.endswith("down_proj.weight")]:
        layer = int(name.split(".")[2])
        by = 1 + 0.7 * (scales(one, layer) - 1) - 0.4 * (scales(two, layer) - 1)
        wanted[name] = before[name] * by
    truth, base_only = (outputs(model_of(plain, found)) for found in (wanted, before))
    found = values(tmp_path / "out")
    biases = [name for name in found if name.endswith("up_proj.bias")]
    assert not any(torch.equal(found[name], before[name]) for name in biases)
    assert error(outputs(model_of(plain, found)), truth, base_only) < 5e-3  # biases are in bfloat16


@pytest.mark.parametrize("how", [{"scales": "keep"}, {"quant": "fp32"}])
def test_not_where_scales_are_kept_or_codes_are_gone(
    how: dict[str, Any], tiny: Path, base: Path, tmp_path: Path
) -> None:
    report = fuse(base, [tiny / IA3], tmp_path / "out", allow=frozenset({"loss"}), **how)
    fused = {site.site.rpartition(".")[2] for site in report.sites if site.weights}
    assert fused == {"k_proj", "v_proj", "down_proj"}


def test_not_beside_other_edits_of_up_proj(tiny: Path, base: Path, tmp_path: Path) -> None:
    adapters = {tiny / IA3: 1.0, tiny / "lora-r8-perl": 0.1}
    report = fuse(base, adapters, tmp_path / "out")
    touched = [site for site in report.sites if "down_proj" in site.site]
    assert len(touched) == 4
    assert not any("rows of up_proj" in note.what for note in report.notes)


def test_not_in_architectures_that_are_not_known(tiny: Path, base: Path, tmp_path: Path) -> None:
    """BitNet normalises between up_proj and down_proj."""
    other = Path(shutil.copytree(base, tmp_path / "other"))
    config = other / "config.json"
    config.write_text(config.read_text("utf-8").replace('"llama"', '"bitnet"'), "utf-8")
    report = fuse(other, [tiny / IA3], tmp_path / "out", allow=frozenset({"loss"}))
    assert not any("rows of up_proj" in note.what for note in report.notes)


@pytest.mark.parametrize("architecture", sorted(GATED))
def test_architectures_are_gated(architecture: str) -> None:
    """As their code in transformers says."""
    name = architecture.removesuffix("_text")
    try:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    except ModuleNotFoundError:
        pytest.skip("unknown to this version of transformers")
    code = re.sub(r"\s+", " ", inspect.getsource(module))
    assert "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))" in code
    assert code.count("self.down_proj(") == 1
