"""Quantising anew while fusing, judged by bitsandbytes and transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import samples
import torch
from fuse.fusions import Fusion, Fusions
from fuse.made_models import quantised_base
from fuse.models import llama_base
from fuse.tiny import Tiny
from peft_cases import MODELS
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptmerge.bases.open import open_base
from adaptmerge.commands import verify as library
from adaptmerge.commands.fuse import FuseOptions, FuseReport, fuse
from adaptmerge.commands.fuse.on_base.provenance import RoundTrip
from adaptmerge.errors import CannotStore, InputError, UsageError
from adaptmerge.files.safetensors import read_header
from adaptmerge.formats.inputs import InputSpec
from adaptmerge.schemes.bitsandbytes.codes import round_trip
from adaptmerge.schemes.coded import dequantised
from adaptmerge.schemes.scheme import quantisers, scheme_of
from adaptmerge.schemes.view import view_of
from adaptmerge.tensors.refs import computed

BITSANDBYTES = ("nf4", "nf4,double", "fp4", "fp4,double", "int8")
OTHERS = ("int4-g128", "int8-channel", "fp8-channel", "gptq-int4-g128")
SITE = "model.layers.0.mlp.up_proj"
WIDE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "vocab_size": 64,
}
RANK, RATIO = 4, 0.01


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bfloat16 whose layers are narrower than a block."""
    return llama_base(tmp_path_factory.mktemp("plain") / "base")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bfloat16 with enough blocks in a row for scales to take up all errors."""
    return llama_base(tmp_path_factory.mktemp("wide") / "base", **WIDE)


@pytest.fixture(scope="module")
def adapter(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of one layer of the wide one, a hundredth of its weight."""
    return lora(wide, SITE, tmp_path_factory.mktemp("lora") / "adapter")


def lora(base: Path, module: str, folder: Path) -> Path:
    weight = load_file(base / "model.safetensors")[f"{module}.weight"].float()
    generator = torch.Generator().manual_seed(3)
    down = torch.randn(RANK, weight.shape[1], generator=generator)
    up = torch.randn(weight.shape[0], RANK, generator=generator)
    size = float((up @ down).norm()) * 2  # alpha / r of the config that `samples` writes
    return samples.write(folder, {module: (down, up * (RATIO * float(weight.norm()) / size))})


def quantised(base: Path, adapter: Path, out: Path, quant: str, **options: Any) -> FuseReport:
    return fuse(str(base), [InputSpec(str(adapter), "a")], out, FuseOptions(quant=quant, **options))


@pytest.fixture
def fresh(quant: str, wide: Path, adapter: Path, fusions: Fusions) -> Fusion:
    """The wide one with its LoRA, quantised, which several tests look at."""
    return fusions(wide, [InputSpec(str(adapter), "a")], quant=quant)


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def values(folder: Path) -> dict[str, Tensor]:
    """Every quantised weight as we read it, in float64."""
    found = view_of(open_base(str(folder))).coded.values()
    return {one.module: dequantised(one, (0, one.shape[0])).double() for one in found}


def bytes_of(value: Tensor) -> bytes:
    return bytes(value.reshape(-1).view(torch.uint8).numpy().tobytes()).rstrip(b" ")


@pytest.mark.parametrize("model", ["narrow", "wide"])
@pytest.mark.parametrize("quant", BITSANDBYTES)
def test_untouched_layers_have_the_bytes_of_transformers(
    quant: str, model: str, plain: Path, wide: Path, tmp_path: Path
) -> None:
    base = wide if model == "wide" else plain
    module = SITE if model == "wide" else "model.layers.1.self_attn.o_proj"
    given = lora(base, module, tmp_path / "a")
    quantised(base, given, tmp_path / "out", quant, allow=frozenset({"loss"}))
    theirs = stored(quantised_base(base, tmp_path / "theirs", quant))
    ours = stored(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        if "state" not in name:
            assert ours[name].shape == value.shape
        if not name.startswith(module):
            assert bytes_of(ours[name]) == bytes_of(value), name
    said, wanted = (
        json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        for folder in ("out", "theirs")
    )
    if quant != "int8":  # layers compute in what weights were in, not in float32
        wanted["bnb_4bit_compute_dtype"] = "bfloat16"
    assert said == wanted
    assert list(said) == list(wanted)


@pytest.mark.parametrize("quant", [*BITSANDBYTES, *OTHERS])
def test_the_adapter_arrives_beside_the_noise_of_quantising(
    quant: str, wide: Path, adapter: Path, tmp_path: Path
) -> None:
    """By hand: the stored values less weight and delta, in the space of the adapter's inputs."""
    weight = stored(wide)[f"{SITE}.weight"].double()
    delta = samples.deltas(adapter)[SITE].double()
    found = {}
    for rounding in ("nearest", "adaptive"):
        out = tmp_path / rounding
        report = quantised(wide, adapter, out, quant, rounding=rounding, allow=frozenset({"loss"}))
        error = values(out)[SITE] - weight - delta
        sub = float((error @ torch.linalg.qr(delta_rows(adapter).T).Q).norm() / delta.norm())
        gain = 1 + float((error * delta).sum() / delta.square().sum())
        found[rounding] = sub, float(error.norm() / weight.norm())
        site = next(site for site in report.sites if site.site == SITE)
        assert report.adapters["a"].gain == pytest.approx(gain, abs=1e-4)
        assert report.adapters["a"].sub == pytest.approx(sub, rel=1e-2, abs=1e-6)
        assert site.error / site.weight_norm == pytest.approx(found[rounding][1], rel=1e-3)
        assert site.grid == pytest.approx(found[rounding][1], rel=0.35)
    free = quant in ("nf4", "fp4")  # scales of 32 bits, enough of them
    assert found["adaptive"][0] < (1e-5 if free else 0.15 * found["nearest"][0])
    assert found["adaptive"][1] < 1.1 * found["nearest"][1]


def delta_rows(adapter: Path) -> Tensor:
    tensors = load_file(adapter / samples.WEIGHTS)
    return tensors[f"{samples.PREFIX}{SITE}.lora_A.weight"].double()


@pytest.mark.parametrize("quant", ["nf4", "nf4,double", "int8"])
def test_nearest_codes_are_those_of_bitsandbytes_for_the_sum(
    quant: str, wide: Path, adapter: Path, tmp_path: Path
) -> None:
    import bitsandbytes.functional as functional

    quantised(wide, adapter, tmp_path / "out", quant, rounding="nearest", allow=frozenset({"loss"}))
    found, name = stored(tmp_path / "out"), f"{SITE}.weight"
    total = stored(wide)[name].float() + samples.deltas(adapter)[SITE].float()
    if quant == "int8":
        codes, absmax, _ = functional.int8_vectorwise_quant(total.half())
        assert float((found[name] != codes).float().mean()) < 1e-3  # sums are rounded otherwise
        assert torch.allclose(found[f"{SITE}.SCB"], absmax, rtol=1e-3)
        return
    double = quant.endswith("double")
    codes, state = functional.quantize_4bit(total, quant_type="nf4", compress_statistics=double)
    assert float((found[name] != codes.view(found[name].shape)).float().mean()) < 1e-3
    absmax = found[f"{name}.absmax"]
    apart = (absmax.float() - state.absmax.float()).abs() / state.absmax.float().abs().clamp(min=1)
    assert float(apart.max()) <= (1.0 if double else 1e-6)


@pytest.mark.parametrize("quant", BITSANDBYTES)
def test_transformers_loads_it_with_our_values(fresh: Fusion) -> None:
    from fuse.test_quantised import values as loaded

    ours, theirs = values(fresh.folder), loaded(fresh.folder)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 7
    for module, value in theirs.items():
        assert torch.equal(ours[module].bfloat16(), value.bfloat16()), module


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_logits_are_those_of_our_values(
    quant: str, wide: Path, adapter: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    quantised(wide, adapter, tmp_path / "out", quant, dtype="fp32")
    tokens = torch.arange(12)[None]
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").dequantize().eval()
    plain: Any = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32).eval()
    with torch.no_grad():
        before = plain(tokens).logits
        for module, value in values(tmp_path / "out").items():
            plain.get_submodule(module).weight.copy_(value)
        ours, found = plain(tokens).logits, theirs(tokens).logits.float()
    assert float((ours - before).norm()) > 1e-2 * float(before.norm())
    assert torch.allclose(ours, found, atol=1e-4 * float(ours.abs().max()))


@pytest.mark.parametrize("quant", ["nf4", "nf4,double", "int8"])
def test_what_was_trained_on_the_quantised_base_finds_it_again(
    quant: str, wide: Path, adapter: Path, tmp_path: Path
) -> None:
    report = quantised(wide, adapter, tmp_path / "out", quant, trained_on=quant)
    base = quantised_base(wide, tmp_path / "theirs", quant)
    before, after = stored(base), stored(tmp_path / "out")
    for name, value in before.items():
        if not name.startswith(SITE):
            assert bytes_of(after[name]) == bytes_of(value), name
    name = f"{SITE}.weight"
    same = fuse(str(base), [InputSpec(str(adapter), "a")], tmp_path / "same", FuseOptions())
    differ = (after[name] != stored(tmp_path / "same")[name]).float().mean()
    assert (
        float(differ) < 1e-3
    )  # bitsandbytes multiplies what codes of int8 stand for in another order
    site, wanted = (next(s for s in r.sites if s.site == SITE) for r in (report, same))
    assert site.moved == pytest.approx(wanted.moved, abs=1e-4)
    assert 0 < site.moved < 0.4  # type: ignore[operator]
    assert report.adapters["a"].sub == pytest.approx(same.adapters["a"].sub, abs=1e-4)
    others = [site for site in report.sites if site.site != SITE]
    assert all(one.moved == 0.0 and one.error <= 1e-6 * one.weight_norm for one in others)


@pytest.mark.parametrize("columns", [192, 96])
@pytest.mark.parametrize("trained_on", BITSANDBYTES)
def test_rows_of_what_a_base_was_in_training_are_those_of_the_whole(
    trained_on: str, columns: int, tmp_path: Path
) -> None:
    """Bit for bit, also where blocks do not end with rows."""
    weight = torch.randn(700, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"w": weight}, tmp_path / "w.safetensors")
    ref = read_header(str(tmp_path / "w.safetensors")).refs["w"]
    found, whole = computed(RoundTrip(ref, trained_on)), round_trip(weight, trained_on)
    assert torch.equal(found.read(), whole)
    for start, stop in ((0, 1), (3, 350), (699, 700)):
        assert torch.equal(found.slice(0, start, stop).read(), whole[start:stop])


def test_nearest_of_what_was_trained_on_the_quantised_base(
    wide: Path, adapter: Path, tmp_path: Path
) -> None:
    """The nearest codes on the grid of the base, and no others than a quantised base gets."""
    options = {"rounding": "nearest", "allow": frozenset({"loss"})}
    report = quantised(wide, adapter, tmp_path / "out", "nf4", trained_on="nf4", **options)
    base = quantised_base(wide, tmp_path / "base", "nf4")
    same = quantised(base, adapter, tmp_path / "same", "same", **options)
    one, two = stored(tmp_path / "out"), stored(tmp_path / "same")
    assert all(bytes_of(one[name]) == bytes_of(two[name]) for name in two)
    assert report.adapters["a"].gain == pytest.approx(same.adapters["a"].gain, abs=1e-6)


@pytest.mark.parametrize("quant", [*BITSANDBYTES, *OTHERS])
def test_verify_proves_it_and_finds_what_is_wrong(
    fresh: Fusion, wide: Path, adapter: Path, tmp_path: Path
) -> None:
    shutil.copytree(fresh.folder, tmp_path / "out")
    questions = library.Questions(str(wide), {"a": str(adapter)}, "cpu")
    verdict = library.verify(tmp_path / "out", questions)
    assert verdict.status == library.PASS, verdict.as_json()
    path = tmp_path / "out" / "model.safetensors"
    codes = view_of(open_base(str(tmp_path / "out"))).coded["model.layers.0.mlp.gate_proj.weight"]
    spoil(path, next(iter(codes.tensors)))
    verdict = library.verify(tmp_path / "out", questions)
    assert {check.name for check in verdict.checks if check.status == library.FAIL} >= {
        "files",
        "weights",
    }


def spoil(path: Path, name: str) -> None:
    """Swaps two rows of what is stored under a name."""
    tensors = load_file(path)
    value = tensors[name].view(torch.uint8)
    half = len(value) // 2
    tensors[name] = torch.cat([value[half:], value[:half]]).view(tensors[name].dtype)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("before", "after"), [("nf4", "int8"), ("int8", "nf4"), ("nf4", "fp8-channel")]
)
def test_a_quantised_base_in_another_layout(
    before: str, after: str, wide: Path, adapter: Path, tmp_path: Path
) -> None:
    base = quantised_base(wide, tmp_path / "base", before)
    (base / "quantize_config.json").write_text("{}")
    quantised(base, adapter, tmp_path / "out", after)
    weights, found = values(base), values(tmp_path / "out")
    assert found.keys() == weights.keys()
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    for module, weight in weights.items():
        delta = samples.deltas(adapter)[module].double() if module == SITE else 0
        assert float((found[module] - weight - delta).norm()) < 0.12 * float(weight.norm())
    verdict = library.verify(
        tmp_path / "out", library.Questions(str(base), {"a": str(adapter)}, "cpu")
    )
    assert verdict.status == library.PASS, verdict.as_json()


def first_matrix(base: Path, theirs: Path) -> str:
    """A module that is quantised."""
    mark, before = ".weight.absmax", stored(base)
    quantised = (n.removesuffix(mark) for n in stored(theirs) if n.endswith(mark))
    return next(module for module in sorted(quantised) if f"{module}.weight" in before)


@pytest.mark.parametrize("name", ["gpt2", "bert", "qwen2", "mixtral", "qwen2_moe", "gpt_oss"])
def test_quantised_are_the_layers_that_transformers_quantises(name: str, tmp_path: Path) -> None:
    """Conv1D, an encoder with a head, biases, and experts, which stay as they are."""
    from transformers import BitsAndBytesConfig

    model: Any = MODELS[name]().bfloat16()
    model.save_pretrained(tmp_path / "base")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    type(model).from_pretrained(
        tmp_path / "base", quantization_config=four, dtype=torch.bfloat16
    ).save_pretrained(tmp_path / "theirs")
    module = first_matrix(tmp_path / "base", tmp_path / "theirs")
    rows, columns = stored(tmp_path / "base")[f"{module}.weight"].shape
    rows, columns = (columns, rows) if name == "gpt2" else (rows, columns)
    generator = torch.Generator().manual_seed(3)
    sides = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)
    turned: dict[str, Any] = {"fan_in_fan_out": True} if name == "gpt2" else {}
    adapter = samples.write(tmp_path / "a", {module: (sides[0], 0.02 * sides[1])}, **turned)
    report = quantised(
        tmp_path / "base", adapter, tmp_path / "out", "nf4", allow=frozenset({"loss"})
    )
    said = [note for note in report.notes if "experts are not quantised" in note.what]
    assert len(said) == (name in ("mixtral", "qwen2_moe", "gpt_oss"))
    theirs, ours = stored(tmp_path / "theirs"), stored(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        assert (ours[tensor].dtype, ours[tensor].shape) == (value.dtype, value.shape)
        if not tensor.startswith(f"{module}."):
            assert bytes_of(ours[tensor]) == bytes_of(value), tensor
    base = str(tmp_path / "base")
    verdict = library.verify(tmp_path / "out", library.Questions(base, {"a": str(adapter)}, "cpu"))
    assert verdict.status == library.PASS, verdict.as_json()
    if name == "gpt2":
        with pytest.raises(CannotStore, match="Conv1D"):
            quantised(tmp_path / "base", adapter, tmp_path / "no", "int8-channel")


def test_a_quantised_base_whose_layers_lie_the_other_way_round(tmp_path: Path) -> None:
    MODELS["gpt2"]().bfloat16().save_pretrained(tmp_path / "plain")  # type: ignore[operator]
    base = quantised_base(tmp_path / "plain", tmp_path / "base", "nf4")
    module = "transformer.h.0.attn.c_attn"
    generator = torch.Generator().manual_seed(3)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, 64), (192, 2)))
    adapter = samples.write(tmp_path / "a", {module: (down, 0.01 * up)}, fan_in_fan_out=True)
    quantised(base, adapter, tmp_path / "out", "same", allow=frozenset({"loss"}))
    moved = values(tmp_path / "out")[module] - values(base)[module]
    delta = samples.deltas(adapter)[module]
    assert float((moved * delta).sum() / delta.square().sum()) == pytest.approx(1, abs=0.05)
    verdict = library.verify(
        tmp_path / "out", library.Questions(str(base), {"a": str(adapter)}, "cpu")
    )
    assert verdict.status == library.PASS, verdict.as_json()


@pytest.mark.parametrize("trained_on", [None, "nf4"])
@pytest.mark.parametrize("name", ["ia3-shakespeare", "lora-r4-dora-embed-cheaders"])
def test_factors_of_rows_arrive(
    name: str, trained_on: str | None, tiny: Tiny, tmp_path: Path
) -> None:
    base, adapter = tiny("base"), tiny(name)
    report = quantised(base, adapter, tmp_path / "out", "nf4", trained_on=trained_on)
    assert report.adapters["a"].gain == pytest.approx(1, abs=0.01)
    assert report.noise < 0.11
    verdict = library.verify(
        tmp_path / "out", library.Questions(str(base), {"a": str(adapter)}, "cpu")
    )
    assert verdict.status == library.PASS, verdict.as_json()


def test_the_same_bytes_in_shards_and_whatever_the_workers(
    wide: Path, adapter: Path, tmp_path: Path
) -> None:
    sharded = llama_base(tmp_path / "base", shard="1MB", **WIDE)
    for jobs in (1, 2):
        quantised(sharded, adapter, tmp_path / str(jobs), "nf4,double", jobs=jobs)
    files = sorted(path.name for path in (tmp_path / "1").glob("*.safetensors"))
    assert len(files) > 1
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    quantised(wide, adapter, tmp_path / "one", "nf4,double")
    together = {k: v for name in files for k, v in load_file(tmp_path / "1" / name).items()}
    whole = stored(tmp_path / "one")
    assert together.keys() == whole.keys()
    assert all(bytes_of(together[name]) == bytes_of(whole[name]) for name in whole)
    index = json.loads((tmp_path / "1" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()


def test_what_cannot_be_quantised_so(
    plain: Path, wide: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="did you mean 'nf4'"):
        quantised(wide, adapter, tmp_path / "out", "nf_4")
    with pytest.raises(UsageError, match=r"known: same, bf16, .*nf4.*int4-g128"):
        quantised(wide, adapter, tmp_path / "out", "q")
    narrow = lora(plain, "model.layers.1.self_attn.o_proj", tmp_path / "a")
    with pytest.raises(CannotStore, match="no whole groups of 128") as caught:
        quantised(plain, narrow, tmp_path / "out", "int4-g128")
    assert len(caught.value.problems) == 14


@pytest.mark.parametrize("quant", ["int4-g128", "int8-channel", "fp8-channel"])
def test_packed_layers_beside_experts_that_stay_as_they_are(quant: str, tmp_path: Path) -> None:
    """transformers takes experts of a packed checkpoint for packed ones, and finds none."""
    MODELS["qwen3_moe"]().bfloat16().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    module = "model.layers.0.self_attn.o_proj"
    given = lora(tmp_path / "base", module, tmp_path / "a")
    if quant == "fp8-channel":
        quantised(tmp_path / "base", given, tmp_path / "out", quant, allow=frozenset({"loss"}))
        assert module in values(tmp_path / "out")
        return
    with pytest.raises(CannotStore, match="does not load beside packed layers: use nf4") as caught:
        quantised(tmp_path / "base", given, tmp_path / "out", quant)
    assert "model.layers.0.mlp.experts.0." in str(caught.value)


def test_layers_that_are_not_stored_are_left_out(wide: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = stored(wide)
    lost = "model.layers.0.mlp.gate_proj"
    del tensors[f"{lost}.weight"]
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    (tmp_path / "base" / "config.json").write_text((wide / "config.json").read_text())
    quantised(tmp_path / "base", adapter, tmp_path / "out", "nf4")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head", lost]


def test_every_name_is_known_here() -> None:
    assert set(quantisers()) == {*BITSANDBYTES, *OTHERS}


@pytest.mark.parametrize("quant", [*BITSANDBYTES, *OTHERS])
def test_every_name_is_of_a_scheme_that_is_found_again(fresh: Fusion) -> None:
    base = open_base(str(fresh.folder))
    scheme = scheme_of(base)
    assert scheme is not None
    assert len(scheme.find(base)) == 7


def test_only_schemes_that_can_be_fused_into_are_listed(wide: Path, tmp_path: Path) -> None:
    config = json.loads((wide / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "spqr"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((wide / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"known: .*bitsandbytes-4bit") as caught:
        scheme_of(open_base(str(tmp_path)))
    assert "exl2" not in str(caught.value)


def test_a_quantised_base_quantised_the_same_way_anew(tiny: Tiny, tmp_path: Path) -> None:
    """Its config says so before and after."""
    base = quantised_base(tiny("base"), tmp_path / "base", "nf4")
    quantised(base, tiny("lora-r8-perl"), tmp_path / "out", "nf4")
    before, after = (json.loads((p / "config.json").read_text()) for p in (base, tmp_path / "out"))
    assert after["quantization_config"]["quant_method"] == "bitsandbytes"
    assert after.keys() == before.keys()
    assert len(values(tmp_path / "out")) == len(values(base)) > 0
