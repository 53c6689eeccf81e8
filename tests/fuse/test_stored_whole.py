"""Layers that an adapter stores whole, over a base that has them quantised: in 16 bits from now on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuse.made_models import quantised_base
from fuse.models import fuse, llama_base
from fuse.plain_models import model_of, outputs, values
from fuse.smoothed import KINDS, awq, int8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adaptmerge.commands.verify import FAIL, PASS, Questions, verify
from adaptmerge.errors import CannotMerge

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT advises the person who trains
GATE = "model.layers.{}.mlp.gate_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return llama_base(tmp_path_factory.mktemp("original") / "base", torch.float32, **sizes)


@pytest.fixture(scope="module")
def nf4(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised_base(original, tmp_path_factory.mktemp("base") / "nf4", "nf4")


def trained(original: Path, folder: Path, module: str) -> Path:
    """A LoRA of q_proj that adds nothing yet, with a module beside it that is trained whole."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(original)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=[module])
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if "modules_to_save" in name:
            value.data += 0.3 * value.std() * torch.randn(value.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gates(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(original, tmp_path_factory.mktemp("adapter") / "gates", "gate_proj")


def by_peft(original: Path, base: Path, adapter: Path) -> tuple[Tensor, Tensor]:
    """With and without the adapter, on the values of a quantised base, in float64."""
    from peft import PeftModel

    model = model_of(original, values(base))
    plain = outputs(model)
    return outputs(PeftModel.from_pretrained(model, adapter).eval()), plain


def error(found: Tensor, truth: Tensor, plain: Tensor) -> float:
    return float((found - truth).norm() / (truth - plain).norm())


def test_transformers_computes_with_the_values(
    original: Path, nf4: Path, gates: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    report = fuse(nf4, [gates], tmp_path / "out")
    model, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    stored = load_file(gates / "adapter_model.safetensors")
    for layer in range(2):
        module = GATE.format(layer)
        value = stored[f"base_model.model.{module}.weight"]
        assert type(model.get_submodule(module)) is nn.Linear
        assert torch.equal(model.get_submodule(module).weight, value.bfloat16().float())
        assert hasattr(model.get_submodule(module.replace("gate", "up")).weight, "quant_state")
    truth, plain = by_peft(original, nf4, gates)
    assert error(outputs(model), truth, plain) < 0.05  # it computes with the others in bfloat16
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    names = [GATE.format(layer) for layer in range(2)]
    assert said["llm_int8_skip_modules"] == ["lm_head", *names]
    assert sorted(n.site for n in report.notes if "bytes more" in n.what) == names


def test_in_float64(original: Path, nf4: Path, gates: Path, tmp_path: Path) -> None:
    fuse(nf4, [gates], tmp_path / "out")
    model = model_of(original, values(tmp_path / "out"))
    truth, plain = by_peft(original, nf4, gates)
    assert error(outputs(model), truth, plain) < 0.01  # values are rounded to bfloat16


def test_verify_proves_it(nf4: Path, gates: Path, tmp_path: Path) -> None:
    fuse(nf4, [gates], tmp_path / "out")
    questions = Questions(str(nf4), {"gates": str(gates)}, "cpu")
    verdict = verify(tmp_path / "out", questions)
    assert verdict.status == PASS, verdict.as_json()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors[f"{GATE.format(1)}.weight"] *= 1.1
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert verify(tmp_path / "out", questions).status == FAIL


def with_head(original: Path, folder: Path, kind: str, others: bool = True) -> Path:
    """The Llama with a quantised head, and some quantised layers beside it."""
    folder.mkdir()
    store: Callable[[Tensor, str], dict[str, Tensor]] = {"awq": awq, "int8": int8}[kind]
    tensors = load_file(original / "model.safetensors")
    config = json.loads((original / "config.json").read_text())
    for name in [n for n in tensors if n.startswith("lm_head") or (others and "up_proj" in n)]:
        tensors |= store(tensors.pop(name).double(), name.removesuffix(".weight"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = json.dumps({**config, "quantization_config": KINDS[kind][1]})
    (folder / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize(("kind", "key"), [("awq", "modules_to_not_convert"), ("int8", "ignore")])
def test_heads_in_other_layouts(kind: str, key: str, original: Path, tmp_path: Path) -> None:
    base, adapter = with_head(original, tmp_path / "base", kind), tmp_path / "adapter"
    trained(original, adapter, "lm_head")
    fuse(base, [adapter], tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert [n for n in stored if n.startswith("lm_head")] == ["lm_head.weight"]
    value = load_file(adapter / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(stored["lm_head.weight"], value.to(stored["lm_head.weight"].dtype))
    assert stored["lm_head.weight"].dtype.itemsize == 2
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said[key] == ["lm_head"]
    questions = Questions(str(base), {"adapter": str(adapter)}, "cpu")
    assert verify(tmp_path / "out", questions).status == PASS


def test_rows_of_a_quantised_head(original: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, rows = with_head(original, tmp_path / "base", "int8"), [3, 40]
    model: Any = AutoModelForCausalLM.from_pretrained(original)
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"lm_head": rows})
    model = get_peft_model(model, config)
    for name, value in model.named_parameters():
        if "trainable_tokens_delta" in name:
            value.data += 0.5
    model.save_pretrained(tmp_path / "adapter")
    fuse(base, [tmp_path / "adapter"], tmp_path / "out")
    before, after = (values(p)["lm_head.weight"] for p in (base, tmp_path / "out"))
    others = [row for row in range(len(before)) if row not in rows]
    assert torch.equal(after[others], before[others].bfloat16().double())
    first = load_file(original / "model.safetensors")["lm_head.weight"].double()
    assert torch.allclose(after[rows], first[rows] + 0.5, atol=5e-3)


def test_not_where_nothing_would_stay_quantised(original: Path, tmp_path: Path) -> None:
    base = with_head(original, tmp_path / "base", "int8", others=False)
    adapter = trained(original, tmp_path / "adapter", "lm_head")
    with pytest.raises(CannotMerge, match="every quantised layer would be stored"):
        fuse(base, [adapter], tmp_path / "out")


def test_not_where_loaders_cannot_leave_a_layer(
    original: Path, gates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaptmerge.commands.fuse import kept_wide

    base = with_head(original, tmp_path / "base", "int8")
    adapter = trained(original, tmp_path / "adapter", "lm_head")
    monkeypatch.setattr(kept_wide, "QUANT_CONFIG", "elsewhere")
    with pytest.raises(CannotMerge, match="stored whole by an adapter, and quantised in the base"):
        fuse(base, [adapter], tmp_path / "out")


def test_dequantised_as_before(nf4: Path, gates: Path, tmp_path: Path) -> None:
    fuse(nf4, [gates], tmp_path / "out", quant="bf16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
