"""Fusing into GGUF model files, judged by gguf-py's reader and what transformers computes with the base."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families.cases_moe import BOTH
from fuse.models import fuse, llama_base
from fuse.tiny import Tiny
from oracles import llama_cpp
from peft_cases import DECODER_SIZES, MOE_SIZES, logits, seeded
from safetensors.torch import load_file, save_file
from tiers import slow
from torch import Tensor

from adaptmerge import runtime
from adaptmerge.bases.open import open_base
from adaptmerge.commands import verify as library
from adaptmerge.errors import CannotMerge, InputError, UsageError
from adaptmerge.schemes.view import view_of

gguf = pytest.importorskip("gguf")
ADAPTER = "lora-r8-perl"
LOSSY: dict[str, Any] = {"allow": frozenset({"loss"})}
TIED = {"tie_word_embeddings": True}
LEGACY = ("Q8_0", "Q4_0", "Q5_1", *slow("Q4_1", "Q5_0"))


def contents(path: Path) -> dict[str, Any]:
    """Values of all tensors as gguf-py reads them, float32."""
    reader = gguf.GGUFReader(path)
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def raw(path: Path) -> dict[str, bytes]:
    return {t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors}


def small(kind: str) -> Callable[[], Any]:
    """Tiny models of other architectures, with norms that do something."""
    import transformers

    def make() -> Any:
        sizes = {**DECODER_SIZES, "hidden_size": 64, "intermediate_size": 96}
        if kind == "gemma":
            config = transformers.GemmaConfig(**{**sizes, **TIED, "head_dim": 16})
            return transformers.GemmaForCausalLM(config)
        if kind == "mixtral":
            own = {**MOE_SIZES, "hidden_size": 64, "intermediate_size": 96}
            return transformers.MixtralForCausalLM(
                transformers.MixtralConfig(**own, num_local_experts=3)
            )
        if kind == "qwen2":
            return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
        config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_inner=96, vocab_size=80)
        return transformers.GPT2LMHeadModel(config)

    return lambda: seeded(make)


@pytest.fixture(scope="module")
def models(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {"llama": tiny("base")}

    def get(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            model = small(kind)()
            model.save_pretrained(folder)
            made[kind] = folder
        return made[kind]

    return get


def written(base: Path, folder: Path, kinds: Mapping[str, str] | str = "F32", **how: Any) -> Path:
    folder.mkdir()
    return llama_cpp.model(base, folder / "model.gguf", kinds, **how)


def tokens(size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"input_ids": torch.randint(1, size, (2, 12), generator=generator)}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "mixtral", "gpt2"])
def test_the_view_computes_what_the_model_did(
    kind: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    """Names, orders of rows, norms, experts and the config: all of them, or outputs would differ."""
    base = models(kind)
    view = view_of(open_base(str(written(base, tmp_path / "gguf")))).values
    inputs = tokens(80)
    ours = runtime.outputs_of(runtime.stream_model(view), inputs)
    theirs = runtime.outputs_of(runtime.load_model(base), inputs)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_a_lora_arrives_in_a_model_of_floats(tiny: Tiny, tmp_path: Path) -> None:
    """Against alpha / r B A by hand, in the file's own order of rows."""
    base = written(tiny("base"), tmp_path / "base", "F16")
    fuse(base, {tiny(ADAPTER): 0.5}, tmp_path / "out", rounding="nearest")
    before, after = contents(base), contents(tmp_path / "out" / base.name)
    assert before.keys() == after.keys()
    wanted = llama_deltas(tiny, 0.5)
    for name, value in before.items():
        if name not in wanted:
            assert np.array_equal(after[name], value)
            continue
        target = (value.astype(np.float64) + wanted[name]).astype(np.float16)
        apart = np.abs(after[name] - target)
        assert np.mean(apart > 0) < 1e-3  # near ties
        assert np.all(apart <= np.spacing(np.abs(target)))


def llama_deltas(tiny: Tiny, weight: float) -> dict[str, Any]:
    """What the adapter adds to each tensor of a GGUF file."""
    config = json.loads((tiny(ADAPTER) / "adapter_config.json").read_text())
    tensors = load_file(tiny(ADAPTER) / "adapter_model.safetensors")
    base = json.loads((tiny("base") / "config.json").read_text())
    found = {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    for key, down in tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        up = tensors[key.replace("lora_A", "lora_B")]
        delta = weight * config["lora_alpha"] / config["r"] * (up.double() @ down.double()).numpy()
        for leaf, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if module.endswith(leaf):
                delta = llama_cpp.interleaved(delta, base[heads])
        found[f"{names.get_name(module)}.weight"] = delta
    return found


def test_what_stays_keeps_every_byte_of_the_file(tiny: Tiny, tmp_path: Path) -> None:
    base = written(tiny("base"), tmp_path / "base", "BF16")
    fuse(base, [tiny("lora-r16-rslora-qv-perl")], tmp_path / "out")
    one, two = base.read_bytes(), (tmp_path / "out" / base.name).read_bytes()
    assert len(one) == len(two)
    reader = gguf.GGUFReader(base)
    inside = [
        (t.data_offset, t.data_offset + t.n_bytes)
        for t in reader.tensors
        if "attn_q." in t.name or "attn_v." in t.name
    ]
    apart = np.flatnonzero(np.frombuffer(one, np.uint8) != np.frombuffer(two, np.uint8))
    assert len(apart)
    assert all(any(start <= at < stop for start, stop in inside) for at in apart)


def test_parts_of_a_split_model(tiny: Tiny, tmp_path: Path) -> None:
    base = written(tiny("base"), tmp_path / "base", "F16", tensors_per_file=8)
    names = sorted(p.name for p in base.parent.iterdir())
    assert len(names) == 3
    fuse(base, [tiny(ADAPTER)], tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.gguf")) == names
    whole = written(tiny("base"), tmp_path / "whole", "F16")
    fuse(whole, [tiny(ADAPTER)], tmp_path / "other")
    together: dict[str, bytes] = {}
    for name in names:
        together |= raw(tmp_path / "out" / name)
    assert together == raw(tmp_path / "other" / whole.name)
    (base.parent / names[1]).unlink()
    with pytest.raises(InputError, match="00002-of-00003"):
        open_base(str(base))


@pytest.mark.parametrize("kind", ["qwen2", "gemma", "mixtral", "gpt2"])
@pytest.mark.parametrize("types", ["F32", "F16"])
def test_other_architectures(
    kind: str, types: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    """Outputs of the fused model against PEFT's on the base that it was made of."""
    options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    if kind == "gpt2":
        options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    if kind == "mixtral":
        options = {"target_modules": ["q_proj"], **BOTH}
    adapter, wanted, plain = peft_on(models(kind), options, tmp_path / "adapter")
    base = written(models(kind), tmp_path / "base", types)
    fuse(base, [adapter], tmp_path / "out", rounding="nearest")
    view = view_of(open_base(str(tmp_path / "out"))).values
    found = runtime.outputs_of(runtime.stream_model(view), tokens(80)).double()
    assert (wanted - plain).norm() > 1e-3 * plain.norm()
    assert (found - wanted).norm() < (1e-4 if types == "F32" else 0.1) * (wanted - plain).norm()


def peft_on(base: Path, options: dict[str, Any], folder: Path) -> tuple[Path, Tensor, Tensor]:
    """A saved LoRA on a base, and outputs with and without it."""
    import peft
    from transformers import AutoModelForCausalLM

    own: Any = {"experts_implementation": "eager"} if "target_parameters" in options else {}
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, **own)
    plain = logits(model.eval(), tokens(80))
    sizes = {"r": 3, "lora_alpha": 8, **options}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **sizes)).eval()
    with torch.no_grad():
        for number, (name, value) in enumerate(model.named_parameters()):
            if "lora_" in name:
                generator = torch.Generator().manual_seed(number)
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder, logits(model, tokens(80)), plain


def test_norms_that_have_one_added(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Gemma multiplies by 1 + w, and llama.cpp stores that: so must a norm be that was trained."""
    module = "model.layers.1.input_layernorm"
    size = json.loads((models("gemma") / "config.json").read_text())["hidden_size"]
    value = torch.linspace(-0.5, 0.5, size)
    folder = tmp_path / "adapter"
    folder.mkdir()
    key = f"base_model.model.{module}.weight"
    save_file({key: value}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    base = written(models("gemma"), tmp_path / "base")
    fuse(base, [folder], tmp_path / "out")
    found = contents(tmp_path / "out" / base.name)["blk.1.attn_norm.weight"]
    assert np.allclose(found, 1 + value.numpy(), atol=1e-7)
    assert "fail" not in statuses(base, folder, tmp_path / "out").values()


def statuses(base: Path, adapter: Path, out: Path) -> dict[str, str]:
    questions = library.Questions(str(base), {adapter.name: str(adapter)})
    return {check.name: check.status for check in library.verify(out, questions).checks}


@pytest.mark.parametrize("kind", LEGACY)
def test_a_lora_arrives_in_blocks(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    """gain and sub by hand, from the values that gguf-py reads in both files."""
    base = written(tiny("base"), tmp_path / "base", kind)
    report = fuse(base, {tiny(ADAPTER): 0.1}, tmp_path / "out", **LOSSY)
    assert base.stat().st_size == (tmp_path / "out" / base.name).stat().st_size
    before, after = contents(base), contents(tmp_path / "out" / base.name)
    inner = squared = 0.0
    for name, delta in llama_deltas(tiny, 0.1).items():
        inner += float(((after[name] - before[name].astype(np.float64)) * delta).sum())
        squared += float(np.square(delta).sum())
    assert squared > 0
    gain = report.adapters[ADAPTER].gain
    assert gain == pytest.approx(inner / squared, abs=1e-4)
    assert gain == pytest.approx(1, abs=0.02)
    one, two = raw(base), raw(tmp_path / "out" / base.name)
    assert {name for name in one if one[name] != two[name]} == llama_deltas(tiny, 0.1).keys()


def test_nearest_rounding_of_blocks_loses_it(tiny: Tiny, tmp_path: Path) -> None:
    base = written(tiny("base"), tmp_path / "base", "Q4_0")
    with pytest.raises(CannotMerge, match="rounding leaves"):
        fuse(base, {tiny(ADAPTER): 0.1}, tmp_path / "out", rounding="nearest")


def test_mixed_types(tiny: Tiny, tmp_path: Path) -> None:
    """As llama.cpp mixes them: what is left of a name that says nothing is F32."""
    kinds = {
        "attn_q": "Q4_0",
        "attn_k": "Q8_0",
        "ffn": "Q5_1",
        "token_embd": "F16",
        "output": "BF16",
    }
    base = written(tiny("base"), tmp_path / "base", kinds)
    fuse(base, {tiny(ADAPTER): 0.5}, tmp_path / "out", **LOSSY)
    one, two = gguf.GGUFReader(base), gguf.GGUFReader(tmp_path / "out" / base.name)
    assert [t.tensor_type for t in one.tensors] == [t.tensor_type for t in two.tensors]
    assert set(statuses(base, tiny(ADAPTER), tmp_path / "out").values()) <= {"pass", "undecidable"}


def test_experts_in_blocks(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Three experts stacked in one tensor; the file's bytes of others stay."""
    adapter, _, _ = peft_on(models("mixtral"), {"target_modules": [], **BOTH}, tmp_path / "adapter")
    base = written(models("mixtral"), tmp_path / "base", "Q8_0")
    report = fuse(base, [adapter], tmp_path / "out", **LOSSY)
    assert report.adapters[adapter.name].gain == pytest.approx(1, abs=0.02)
    one, two = raw(base), raw(tmp_path / "out" / base.name)
    assert {n for n in one if one[n] != two[n]} == {n for n in one if "_exps" in n}
    assert "fail" not in statuses(base, adapter, tmp_path / "out").values()


@pytest.mark.parametrize("wide", ["bf16", *slow("fp16", "fp32")])
def test_dequantised_into_floats(wide: str, tiny: Tiny, tmp_path: Path) -> None:
    base = written(tiny("base"), tmp_path / "base", {"attn": "Q4_0", "ffn": "Q8_0"})
    fuse(base, {tiny(ADAPTER): 0.5}, tmp_path / "out", quant=wide, rounding="nearest")
    reader = gguf.GGUFReader(tmp_path / "out" / base.name)
    kind = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[wide]
    assert {t.tensor_type.name for t in reader.tensors if t.name.startswith("blk")} <= {kind, "F32"}
    before, after = contents(base), contents(tmp_path / "out" / base.name)
    eps = {"bf16": 2**-8, "fp16": 2**-11, "fp32": 2**-23}[wide]
    for name, delta in llama_deltas(tiny, 0.5).items():
        target = before[name].astype(np.float64) + delta
        assert np.abs(after[name] - target).max() <= eps * np.abs(target).max()
    assert reader.fields["general.architecture"].contents() == "llama"
    assert set(statuses(base, tiny(ADAPTER), tmp_path / "out").values()) <= {"pass", "undecidable"}


def test_verify_finds_a_flipped_code(tiny: Tiny, tmp_path: Path) -> None:
    base = written(tiny("base"), tmp_path / "base", "Q8_0")
    fuse(base, [tiny(ADAPTER)], tmp_path / "out")
    assert set(statuses(base, tiny(ADAPTER), tmp_path / "out").values()) == {"pass"}
    path = tmp_path / "out" / base.name
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    data = bytearray(path.read_bytes())
    for row in range(64):
        data[int(tensor.data_offset) + row * 136 + 2] ^= 0x55
    path.write_bytes(data)
    found = statuses(base, tiny(ADAPTER), path.parent)
    assert (found["files"], found["weights"]) == ("fail", "fail")


def test_a_type_that_cannot_be_made_anew_is_refused(tmp_path: Path) -> None:
    """Only where an adapter changes it."""
    model = llama_base(tmp_path / "model", torch.float32, hidden_size=256, num_hidden_layers=1)
    base = written(model, tmp_path / "base", {"attn_q": "Q8_0", "attn_v": "TQ2_0"})
    one, _, _ = peft_on(model, {"target_modules": ["q_proj", "v_proj"]}, tmp_path / "one")
    with pytest.raises(CannotMerge, match=r"v_proj: is stored as TQ2_0.*Q4_K"):
        fuse(base, [one], tmp_path / "out")
    two, _, _ = peft_on(model, {"target_modules": ["q_proj"]}, tmp_path / "two")
    fuse(base, [two], tmp_path / "out")
    assert (
        raw(tmp_path / "out" / base.name)["blk.0.attn_v.weight"] == raw(base)["blk.0.attn_v.weight"]
    )


def test_what_is_no_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    from adaptmerge.commands.combine import Options, combine
    from adaptmerge.formats.inputs import parse_input

    combine([parse_input(str(tiny(ADAPTER)))], tmp_path / "a.gguf", Options(base=str(tiny("base"))))
    with pytest.raises(InputError, match="no model"):
        fuse(tmp_path / "a.gguf", [tiny(ADAPTER)], tmp_path / "out")
    base = written(tiny("base"), tmp_path / "base")
    with pytest.raises(UsageError, match="the output is a folder"):
        fuse(base, [tiny(ADAPTER)], tmp_path / "out.gguf")
    (base.parent / "other.gguf").write_bytes(base.read_bytes())
    with pytest.raises(
        InputError, match=r"several GGUF files: name one of model\.gguf, other\.gguf"
    ):
        open_base(str(base.parent))
    data = bytearray(base.read_bytes())
    data[data.index(b"llama") : data.index(b"llama") + 5] = b"mamba"
    (tmp_path / "mamba.gguf").write_bytes(data)
    with pytest.raises(InputError, match="architecture 'mamba', whose names are not known"):
        open_base(str(tmp_path / "mamba.gguf"))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_tied_model_gets_a_head_of_its_own(models: Callable[[str], Path], tmp_path: Path) -> None:
    """A head that was trained is stored beside the embedding, as llama.cpp reads an untied model."""
    folder = tmp_path / "tied"
    make = small("qwen2")
    model = make()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(folder)
    base = written(folder, tmp_path / "base", "F16")
    assert "output.weight" not in contents(base)
    adapter, wanted, _ = peft_on(folder, {"target_modules": ["lm_head"]}, tmp_path / "adapter")
    fuse(base, [adapter], tmp_path / "out", rounding="nearest")
    after = contents(tmp_path / "out" / base.name)
    assert after.keys() == contents(base).keys() | {"output.weight"}
    assert np.array_equal(after["token_embd.weight"], contents(base)["token_embd.weight"])
    view = view_of(open_base(str(tmp_path / "out"))).values
    found = runtime.outputs_of(runtime.stream_model(view), tokens(80)).double()
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_a_head_stored_whole_is_in_16_bits(tiny: Tiny, tmp_path: Path) -> None:
    """Every tensor of a GGUF file has its own type: a trained head lies on no grid."""
    adapter = tiny("lora-r4-dora-embed-cheaders")
    base = written(tiny("base"), tmp_path / "base", "Q4_0")
    report = fuse(base, [adapter], tmp_path / "out", **LOSSY)
    types = {
        t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / base.name).tensors
    }
    assert types["output.weight"] == "F16"
    assert types["blk.0.attn_q.weight"] == "Q4_0"
    stored = load_file(adapter / "adapter_model.safetensors")
    (head,) = (value for key, value in stored.items() if "lm_head" in key)
    found = contents(tmp_path / "out" / base.name)["output.weight"]
    assert np.array_equal(found, head.half().float().numpy())
    assert any("stored in f16" in note.what for note in report.notes)
    assert "fail" not in statuses(base, adapter, tmp_path / "out").values()


def test_layers_that_lose_most_can_grow(tiny: Tiny, tmp_path: Path) -> None:
    """Two entries a row's block: codes alone keep little of so small an adapter."""
    base = written(tiny("base"), tmp_path / "base", {"attn_q": "Q4_0", "ffn": "Q8_0"})
    how: dict[str, Any] = {"scales": "keep", "max_loss": 0.05}
    with pytest.raises(CannotMerge):
        fuse(base, {tiny(ADAPTER): 0.05}, tmp_path / "no", **how)
    report = fuse(base, {tiny(ADAPTER): 0.05}, tmp_path / "out", max_growth=0.3, **how)
    types = {
        t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / base.name).tensors
    }
    assert types["blk.0.attn_q.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"
    assert any("stored in f16" in note.what for note in report.notes)
