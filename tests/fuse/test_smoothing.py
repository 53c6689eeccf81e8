"""Adapters of the original on a smoothed base, judged by PEFT on the model before smoothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuse.fusions import Fusion, Fusions
from fuse.models import ia3, llama_base
from fuse.plain_models import model_of, outputs, values
from fuse.smoothed import KINDS, factors, smoothed_base, smoothed_experts, times
from fuse.tiny import LAYERS, Tiny
from peft_cases import MODELS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adaptmerge.commands import verify as library
from adaptmerge.commands.fuse import FuseOptions, FuseReport, fuse
from adaptmerge.commands.fuse.on_base.row_column_scales import ScaledPair, scaling_of
from adaptmerge.errors import CannotMerge, UsageError
from adaptmerge.formats.inputs import InputSpec
from adaptmerge.tensors.dtypes import F32, F64
from adaptmerge.tensors.refs import TensorRef, listed

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT advises the person who trains
LORA = "lora-r8-shakespeare"
FAMILIES = (
    LORA,
    "loha-r4-shakespeare",
    "lokr-r4-perl",
    "vera-r64-shakespeare",
    "oft-b16-cheaders",
    "ia3-shakespeare",
    "lora-r4-dora-embed-cheaders",
)
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def original(tiny: Tiny) -> Path:
    return tiny("base")


@pytest.fixture(scope="module")
def small(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smaller(tiny(LORA), tmp_path_factory.mktemp("small") / "small")


def smaller(adapter: Path, folder: Path) -> Path:
    """A LoRA whose delta is 8 % of the weights, which the grids of these bases hold."""
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**config, "lora_alpha": 0.2 * config["lora_alpha"]}), "utf-8")
    return folder


@pytest.fixture(scope="module")
def made(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Quantised bases, each made once."""
    found: dict[tuple[str, bool], Path] = {}

    def get(kind: str = "awq", *, smooth: bool = True) -> Path:
        if (kind, smooth) not in found:
            folder = tmp_path_factory.mktemp("base") / kind
            found[kind, smooth] = smoothed_base(original, folder, kind, smooth=smooth)
        return found[kind, smooth]

    return get


def fused(
    base: Path, adapter: Path, out: Path, original: Path | None, **options: Any
) -> FuseReport:
    """As an adapter of the original where one is given, else as one of the base."""
    how: dict[str, Any] = {"trained_on": "quantised" if original is None else "original", **options}
    given = FuseOptions(original=None if original is None else str(original), **how)
    return fuse(str(base), [InputSpec(str(adapter), "a", 1.0)], out, given)


def before_smoothing(base: Path, original: Path) -> dict[str, Tensor]:
    """The values of a smoothed base with the smoothing taken back by the very factors it was made with."""
    found, stored = values(base), load_file(original / "model.safetensors")
    config = json.loads((original / "config.json").read_text("utf-8"))
    for name, by in factors(config).items():
        found[f"{name}.weight"] = times(found[f"{name}.weight"], by, -1)
    moved = ("layernorm.weight", "bias")
    return found | {name: value.double() for name, value in stored.items() if name.endswith(moved)}


def truth(original: Path, base: Path, adapter: Path) -> Tensor:
    """What PEFT computes on the quantised model as it was before smoothing."""
    from peft import PeftModel

    model = model_of(original, before_smoothing(base, original))
    return outputs(PeftModel.from_pretrained(model, adapter).eval())


def error(original: Path, base: Path, adapter: Path, out: Path) -> float:
    """Of the fused model's outputs, relative to the adapter's effect."""
    wanted = truth(original, base, adapter)
    plain = outputs(model_of(original, values(base)))
    found = outputs(model_of(original, values(out)))
    return float((found - wanted).norm() / (wanted - plain).norm())


@pytest.mark.parametrize("kind", ["awq", "int8"])
def test_smoothing_by_hand_changes_nothing_but_rounding(
    kind: str, made: Made, original: Path
) -> None:
    plain = outputs(model_of(original, before_smoothing(made(kind), original)))
    found = outputs(model_of(original, values(made(kind))))
    assert (found - plain).norm() < 1e-3 * plain.norm()  # norms are stored in 16 bits


@pytest.mark.parametrize("name", FAMILIES)
def test_the_adapter_is_that_of_the_original(
    name: str, made: Made, original: Path, tiny: Tiny, tmp_path: Path
) -> None:
    adapter = tiny(name)
    fused(made(), adapter, tmp_path / "out", original, quant="fp32")
    assert error(original, made(), adapter, tmp_path / "out") < 0.01


def test_biases_of_scaled_rows(tmp_path: Path) -> None:
    """IA3 scales the bias of v_proj, too, which smoothing has divided."""
    original = llama_base(tmp_path / "original", torch.float32, attention_bias=True, head_dim=16)
    tensors = load_file(original / "model.safetensors")
    for name in [name for name in tensors if name.endswith("bias")]:
        tensors[name] = torch.linspace(-1, 1, len(tensors[name]))
    save_file(tensors, original / "model.safetensors", {"format": "pt"})
    base = smoothed_base(original, tmp_path / "base", "awq")
    adapter = ia3(original, tmp_path / "adapter", 0, ["v_proj", "q_proj"])
    fused(base, adapter, tmp_path / "out", original, quant="fp32")
    assert error(original, base, adapter, tmp_path / "out") < 0.01


@pytest.mark.parametrize("smooth", [False, True])
def test_clipping_is_no_smoothing(
    smooth: bool, made: Made, original: Path, tiny: Tiny, tmp_path: Path
) -> None:
    base, adapter = made("clipped awq", smooth=smooth), tiny(LORA)
    report = fused(base, adapter, tmp_path / "out", original, quant="fp32")
    assert any("is not smoothed" in note.what for note in report.notes) != smooth
    if smooth:
        assert error(original, base, adapter, tmp_path / "out") < 0.01


def loaded(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    how = {"dtype": torch.float64, "experts_implementation": "eager"}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    return model


def test_experts_and_their_router(tmp_path: Path) -> None:
    """An adapter of stacked experts, over a base that has them one by one; the router stays plain."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model: Any = MODELS["qwen3_moe"]()
    model.save_pretrained(tmp_path / "original")
    tensors = load_file(tmp_path / "original" / "model.safetensors")
    config = json.loads((tmp_path / "original" / "config.json").read_text("utf-8"))
    wanted = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
    parameters = [f"mlp.{name}" for name in wanted]
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=parameters))
    randomised(model).save_pretrained(tmp_path / "adapter")
    stored, before = smoothed_experts(tensors)
    for name, held, more in (
        ("base", stored, {"quantization_config": KINDS["int8"][1]}),
        ("before", before, {}),
    ):
        (tmp_path / name).mkdir()
        save_file(held, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **more}))
    fused(
        tmp_path / "base",
        tmp_path / "adapter",
        tmp_path / "out",
        tmp_path / "original",
        quant="fp32",
    )
    plain = outputs(loaded(tmp_path / "before"))
    under: Any = loaded(tmp_path / "before")
    truth = outputs(PeftModel.from_pretrained(under, tmp_path / "adapter").eval())
    found = outputs(loaded(tmp_path / "out"))
    assert (truth - plain).norm() > 0.01 * plain.norm()
    assert (found - truth).norm() < 0.01 * (truth - plain).norm()


def randomised(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=generator)
    return model


def test_without_the_original_it_would_be_another(
    made: Made, original: Path, tiny: Tiny, tmp_path: Path
) -> None:
    adapter = tiny(LORA)
    fused(made(), adapter, tmp_path / "out", None, quant="fp32")
    assert error(original, made(), adapter, tmp_path / "out") > 0.15


@pytest.fixture
def on_the_grid(made: Made, original: Path, small: Path, fusions: Fusions) -> Fusion:
    """The small one as an adapter of the original, in int8."""
    how = {"trained_on": "original", "original": str(original)}
    return fusions(made("int8"), [InputSpec(str(small), "a", 1.0)], **how)


def test_on_the_grid(
    made: Made, original: Path, small: Path, on_the_grid: Fusion, tmp_path: Path
) -> None:
    report = on_the_grid.report
    assert error(original, made("int8"), small, on_the_grid.folder) < 0.1
    (found,) = (note for note in report.notes if note.kind == "approximated")
    assert "scales of 8 layers were estimated" in found.what  # v, o, up and down of both layers
    assert str(original) not in report.as_text()
    fused(made("int8"), small, tmp_path / "without", None)
    assert error(original, made("int8"), small, tmp_path / "without") > 0.2


@pytest.mark.parametrize("kind", ["awq", "int8"])
def test_verify_needs_the_original_and_proves_it(
    kind: str, made: Made, original: Path, tiny: Tiny, tmp_path: Path
) -> None:
    adapter = tiny(LORA)
    fused(made(kind), adapter, tmp_path / "out", original)
    with pytest.raises(UsageError, match="pass --original"):
        library.verify(tmp_path / "out", library.Questions(str(made(kind)), {"a": str(adapter)}))

    def ask(source: Path) -> library.Verdict:
        options = FuseOptions(original=str(source))
        questions = library.Questions(str(made(kind)), {"a": str(adapter)}, "cpu", fuse=options)
        return library.verify(tmp_path / "out", questions)

    assert ask(original).status == library.PASS
    other = Path(shutil.copytree(original, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    (check,) = (check for check in ask(other).checks if check.name == "base")
    assert check.status == library.FAIL
    assert "is not the original" in check.detail


@pytest.fixture(scope="module")
def reportless(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base in int8, whose rounding is small enough beside the adapter to decide, an
    adapter, and both fused as another tool leaves it: without the original a later layer lost much."""
    folder, tinyllama = tmp_path_factory.mktemp("reportless"), fixtures / "tinyllama"
    smaller(tinyllama / LORA, folder / "small")
    smoothed_base(tinyllama / "base", folder / "base", "int8")
    fused(folder / "base", folder / "small", folder / "out", tinyllama / "base")
    (folder / "out" / "adaptmerge.json").unlink()
    return folder


@pytest.mark.parametrize("told", [True, False])
def test_a_model_without_report_is_verified_with_the_original(
    told: bool, reportless: Path, fixtures: Path
) -> None:
    original = str(fixtures / "tinyllama" / "base")
    options = FuseOptions(trained_on="original", original=original) if told else FuseOptions()
    specs = (InputSpec(str(reportless / "small"), "a", 1.0),)
    questions = library.Questions(
        str(reportless / "base"), device="cpu", adapters=specs, fuse=options
    )
    status = library.verify(reportless / "out", questions).status
    assert status == (library.PASS if told else library.FAIL)


def test_a_base_that_is_not_smoothed_keeps_its_inputs(
    made: Made, original: Path, tiny: Tiny, tmp_path: Path
) -> None:
    base, adapter = made(smooth=False), tiny("lora-r16-rslora-qv-perl")
    report = fused(base, adapter, tmp_path / "with", original)
    fused(base, adapter, tmp_path / "without", None)
    one, two = (tmp_path / n / "model.safetensors" for n in ("with", "without"))
    assert one.read_bytes() == two.read_bytes()
    assert any("is not smoothed" in note.what for note in report.notes)


def test_row_and_column_factors_leave_codes_alone(
    made: Made, original: Path, tiny: Tiny, tmp_path: Path
) -> None:
    report = fused(made(), tiny("ia3-shakespeare"), tmp_path / "out", original)
    outer = [site for site in report.sites if "k_proj" in site.site]
    assert outer
    assert all(site.moved == 0.0 and site.delta_norm > 0 for site in outer)


def test_norms_that_were_smoothed_are_not_replaced(
    made: Made, original: Path, tiny: Tiny, tmp_path: Path
) -> None:
    adapter = tiny("lntuning-cheaders")
    with pytest.raises(CannotMerge, match="smoothing changed it") as caught:
        fused(made(), adapter, tmp_path / "out", original)
    assert len(caught.value.problems) == 2 * LAYERS  # two norms in each layer, and not the last one


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda value: torch.randn_like(value), "away from that of --original"),
        (lambda value: value[:-8], r"has the shape \[120, 128\] there"),
    ],
)
def test_another_model_is_refused(
    changed: Callable[[Tensor], Tensor],
    said: str,
    made: Made,
    original: Path,
    tiny: Tiny,
    tmp_path: Path,
) -> None:
    other = Path(shutil.copytree(original, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = changed(tensors[name]).contiguous()
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(CannotMerge, match=said) as caught:
        fused(made(), tiny(LORA), tmp_path / "out", other)
    assert len(caught.value.problems) == 1
    assert "layers.1.self_attn.q_proj" in str(caught.value)


def test_options_that_do_not_fit(made: Made, original: Path, tiny: Tiny, tmp_path: Path) -> None:
    adapter = tiny(LORA)
    with pytest.raises(UsageError, match="say --original DIR"):
        fused(made(), adapter, tmp_path / "out", None, trained_on="original")
    with pytest.raises(UsageError, match="is for --trained-on original"):
        fused(made(), adapter, tmp_path / "out", original, trained_on="quantised")
    with pytest.raises(UsageError, match="and a quantised base"):
        fused(original, adapter, tmp_path / "out", original)


def ref(value: Tensor) -> TensorRef:
    dtype = F64 if value.dtype == torch.float64 else F32
    return listed(tuple(value.flatten().tolist()), tuple(value.shape), dtype)


@pytest.mark.parametrize("more", [0.0, 1.0])
def test_norms_tell_the_exact_factors(more: float) -> None:
    """Of norms that multiply by their weight, and of those that multiply by 1 plus it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator, dtype=torch.float64)
    wanted = torch.exp(torch.randn(64, generator=generator, dtype=torch.float64))
    norm = 0.5 + torch.rand(64, generator=generator, dtype=torch.float64)
    noise = 0.05 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    stored = weight * wanted * (1 + noise)
    other = (ref(torch.rand(64, dtype=torch.float64)), ref(torch.rand(64, dtype=torch.float64)))
    pair = ScaledPair(
        ref(stored), ref(weight), (other, (ref((norm + more) / wanted - more), ref(norm)))
    )
    found = scaling_of(pair)
    assert found.outputs is None
    assert found.error == 0.0
    assert found.inputs is not None
    assert torch.allclose(found.inputs, wanted, rtol=1e-9)
    alone = scaling_of(ScaledPair(ref(stored), ref(weight)))
    assert alone.inputs is not None
    assert 0.003 < alone.error < 0.008  # 0.05 / sqrt(96)
    assert float((alone.inputs / wanted - 1).square().mean().sqrt()) < 2 * alone.error


def test_weights_of_another_model_fit_in_no_scaling() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(64, 96, generator=generator, dtype=torch.float64) for _ in range(2))
    assert scaling_of(ScaledPair(ref(one), ref(two))).apart > 0.9
