"""Experts that gpt-oss stacks in MXFP4: fused, and reloaded by transformers, beside PEFT on that base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families.cases_moe import BOTH
from fuse.models import fuse
from peft_cases import logits, seeded
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adaptmerge.bases.open import open_base
from adaptmerge.commands import verify as library
from adaptmerge.errors import CannotMerge
from adaptmerge.schemes.view import view_of

HIDDEN, INTER, EXPERTS, GROUP = 64, 96, 3, 32
NAMES = ("gate_up_proj", "down_proj")
SIZES = {"hidden_size": HIDDEN, "intermediate_size": INTER, "num_hidden_layers": 2, "head_dim": 16}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 80}
SIZES |= {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "max_position_embeddings": 4096}
# as of e2m1 in OCP Microscaling Formats 1.0
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def in_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks (experts, out, in / 32, 16) and scales of a stack (experts, in, out), by their definition."""
    groups = weight.transpose(1, 2).unflatten(2, (-1, GROUP))
    exponent = (groups.abs().amax(3).log2().floor() - 2).clamp(-127, 127)
    scaled = groups / 2 ** exponent[..., None]
    magnitude = (scaled.abs()[..., None] - E2M1).abs().argmin(-1)
    nibbles = (magnitude + 8 * (scaled < 0)).to(torch.uint8)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4, (exponent + 127).to(torch.uint8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GptOssConfig, GptOssForCausalLM

    folder = tmp_path_factory.mktemp("gpt-oss")
    model: Any = seeded(lambda: GptOssForCausalLM(GptOssConfig(**SIZES))).bfloat16()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith(NAMES)]:
        blocks, scales = in_mxfp4(tensors.pop(name).float())
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def loaded(folder: Path) -> nn.Module:
    """The model as transformers dequantises it, in float64."""
    from transformers import GptOssForCausalLM, Mxfp4Config

    model: Any = GptOssForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), experts_implementation="eager"
    )
    return model.double().eval()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 3 on all experts, |dW| / |W| about 0.05."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(loaded(base).float(), LoraConfig(target_modules=[], **BOTH))
    with torch.no_grad():
        for number, (name, value) in enumerate(model.named_parameters()):
            if "lora_" in name:
                generator = torch.Generator().manual_seed(number)
                value.copy_(torch.randn(value.shape, generator=generator) * 0.02)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {"input_ids": torch.randint(0, 80, (2, 12), generator=generator)}


def test_the_view_is_what_transformers_reads(base: Path) -> None:
    view, model = view_of(open_base(str(base))), loaded(base)
    for name, value in model.named_parameters():
        if name.endswith(NAMES):
            ref = view.values.tensors[name]
            assert torch.equal(ref.read().double(), value)
            assert torch.equal(ref.slice(0, 1, 2).read(), ref.read()[1:2])


def stacks(model: nn.Module) -> dict[str, Tensor]:
    return {n: v.detach() for n, v in model.named_parameters() if n.endswith(NAMES)}


def arrived(folder: Path, base: Path, adapter: Path) -> float:
    """How much of what PEFT's merge adds is in the weights that transformers reads; 1 is all."""
    from peft import PeftModel

    before, after = stacks(loaded(base)), stacks(loaded(folder))
    merged = stacks(PeftModel.from_pretrained(loaded(base), adapter).merge_and_unload())
    inner = squared = 0.0
    for name, weight in before.items():
        delta = merged[name] - weight
        inner += float(((after[name] - weight) * delta).sum())
        squared += float(delta.square().sum())
    assert squared > 0
    return inner / squared


def test_experts_arrive_and_reload(base: Path, adapter: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"allow": frozenset({"loss"})}
    report = fuse(base, [adapter], tmp_path / "out", **options)
    assert len(report.sites) == 2 * len(NAMES) * EXPERTS
    gain = arrived(tmp_path / "out", base, adapter)
    assert gain == pytest.approx(1, abs=0.05)
    assert report.adapters[adapter.name].gain == pytest.approx(gain, abs=1e-3)
    fuse(base, [adapter], tmp_path / "nearest", rounding="nearest", **options)
    assert arrived(tmp_path / "nearest", base, adapter) < 0.8


def test_only_the_experts_named_change(base: Path, adapter: Path, tmp_path: Path) -> None:
    """One expert of one layer: the bytes of all others stay."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {k: v.clone() for k, v in tensors.items() if ".layers.1." in k}
    rank = BOTH["r"]
    for key, value in kept.items():
        if "lora_B" in key:  # columns go by rank, then expert
            value.view(value.shape[0], rank, EXPERTS)[:, :, [0, 2]] = 0  # type: ignore[call-overload]
    one = tmp_path / "one"
    one.mkdir()
    save_file(kept, one / "adapter_model.safetensors")
    (one / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    fuse(base, [one], tmp_path / "out", allow=frozenset({"loss"}))
    before, after = (load_file(p / "model.safetensors") for p in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        if ".layers.1." in name and name.endswith("_blocks"):
            assert torch.equal(after[name][[0, 2]], value[[0, 2]])
            assert not torch.equal(after[name][1], value[1])
        else:
            assert torch.equal(after[name], value)


def test_verify_proves_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    fuse(base, [adapter], tmp_path / "out", allow=frozenset({"loss"}))
    questions = library.Questions(str(base), {adapter.name: str(adapter)})
    verdict = library.verify(tmp_path / "out", questions)
    weights = next(c for c in verdict.checks if c.name == "weights")
    assert weights.status == "pass", weights
    forward = next(c for c in verdict.checks if c.name == "forward")
    assert forward.status != "fail", forward
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("down_proj_blocks"))
    tensors[name][2] ^= 0x88  # other signs
    save_file(tensors, path, {"format": "pt"})
    broken = library.verify(tmp_path / "out", questions)
    assert "fail" in {c.status for c in broken.checks if c.name == "weights"}


def test_dequantised_as_transformers_loads_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import GptOssForCausalLM

    fuse(base, [adapter], tmp_path / "out", quant="fp32")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    model: Any = GptOssForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, experts_implementation="eager"
    )
    plain = logits(loaded(base), inputs())
    wanted = logits(PeftModel.from_pretrained(loaded(base), adapter), inputs())
    found = logits(model.double().eval(), inputs())
    assert (found - wanted).norm() < 1e-5 * (wanted - plain).norm()


def test_a_stack_stored_whole_is_refused(base: Path, tmp_path: Path) -> None:
    """What an adapter stores whole has no codes."""
    module = "model.layers.0.mlp.experts"
    folder = tmp_path / "whole"
    folder.mkdir()
    key = f"base_model.model.{module}.down_proj"
    save_file({key: torch.randn(EXPERTS, INTER, HIDDEN)}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    config |= {"modules_to_save": ["experts"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CannotMerge, match="stored whole"):
        fuse(base, [folder], tmp_path / "out")
