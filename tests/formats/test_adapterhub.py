"""AdapterHub adapters: what is read computes what the library computed; the rest is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from console import run
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptmerge.adapters.activation_edits import Bottleneck, Gated
from adaptmerge.adapters.graph import Adapter
from adaptmerge.errors import InputError
from adaptmerge.files.listing import Listing
from adaptmerge.formats.adapterhub import FORMAT
from adaptmerge.formats.format import ReadOptions
from adaptmerge.formats.registry import detect
from adaptmerge.runtime import attach, load_model, outputs_of
from adaptmerge.tensors.walk import refs_of

CASES = ["llama/seq_bn", "llama/lora_gating", "llama/ia3", "bert/vera"]
WEIGHTS = "adapter.safetensors"


def read(folder: Path) -> Adapter:
    listing = Listing.of(folder, str(folder))
    assert detect(listing) is FORMAT
    return FORMAT.read(listing, ReadOptions()).single


@pytest.fixture
def copy_of(tmp_path: Path, fixtures: Path) -> Callable[[str], Path]:
    def copied(name: str) -> Path:
        folder: Path = shutil.copytree(fixtures / "adapterhub" / name, tmp_path / "adapter")
        return folder

    return copied


def change_config(folder: Path, top: dict[str, Any] | None = None, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    raw = json.loads(path.read_text())
    raw["config"].update(fields)
    path.write_text(json.dumps({**raw, **(top or {})}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def error(y: Tensor, y_true: Tensor, y_base: Tensor) -> float:
    return float((y - y_true).norm() / (y_true - y_base).norm())


@pytest.mark.parametrize("name", CASES)
def test_computes_what_the_library_computed(name: str, fixtures: Path) -> None:
    recording = load_file(fixtures / "recorded" / "adapterhub" / f"{name}.safetensors")
    inputs = {"input_ids": recording["input_ids"]}
    model = load_model(fixtures / "adapterhub" / name.split("/")[0] / "base")
    with attach(model, read(fixtures / "adapterhub" / name)):
        y = outputs_of(model, inputs)
    # float32 outputs of two machines: 16 roundings of 2^-24 are 7e-5 of an effect of 1.5 %; bf16 has 2e-3
    assert error(y, recording["y"], recording["y_base"]) < 1e-4
    assert error(outputs_of(model, inputs), recording["y_base"], recording["y"]) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_read(name: str, fixtures: Path) -> None:
    folder = fixtures / "adapterhub" / name
    adapter = read(folder)
    assert {ref.name for ref in refs_of(adapter.edits)} == load_file(folder / WEIGHTS).keys()
    assert adapter.name == "ad"
    assert adapter.base.architecture == name.split("/")[0]
    assert adapter.notes == ()


@pytest.mark.parametrize("name", CASES)
def test_reads_pickles_and_single_files(name: str, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(name)
    kinds = [(edit.kind, edit.site) for edit in read(folder).edits]
    assert [(edit.kind, edit.site) for edit in read(folder / WEIGHTS).edits] == kinds
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_adapter.bin")
    (folder / WEIGHTS).unlink()
    assert sorted((edit.kind, str(edit.site)) for edit in read(folder).edits) == sorted(
        (kind, str(site)) for kind, site in kinds
    )


def test_shared_tensors_are_marked(fixtures: Path) -> None:
    refs = list(refs_of(read(fixtures / "adapterhub" / "bert" / "vera").edits))
    assert {ref.shared for ref in refs if "shared_parameters" in ref.name} == {True}
    assert {ref.shared for ref in refs if "shared_parameters" not in ref.name} == {False}


def test_a_gated_lora_is_not_scaled(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama/lora_gating")
    plain = [edit.factor.dense() for edit in read(folder).edits if isinstance(edit, Gated)]
    change_config(folder, alpha=32)
    scaled = [edit.factor.dense() for edit in read(folder).edits if isinstance(edit, Gated)]
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))


@pytest.mark.parametrize("target", ["peft", "gguf"])
def test_a_gate_is_not_lost_in_formats_without_gates(
    target: str, fixtures: Path, tmp_path: Path
) -> None:
    """It is not of the family of what it gates: written as a LoRA it was 1.09 of its effect off."""
    path = fixtures / "adapterhub" / "llama" / "lora_gating"
    base = str(path.parent / "base")
    found = run("convert", str(path), "--to", target, "--base", base, "-o", str(tmp_path / "out"))
    assert found.code == 1
    assert f"{target} has no place for gated edits" in found.stderr
    assert not list(tmp_path.iterdir())
    native = run("convert", str(path), "--to", "native", "-o", str(tmp_path / "native"))
    assert native.code == 0, native.shown


def ungated(folder: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if ".gate." in key]:
            del tensors[key]

    change_tensors(folder, drop)


@pytest.mark.parametrize(
    ("version", "scale", "noted"),
    [
        ("adapters.1.3.0", 2.0, False),
        ("adapters.1.1.0", 2.0, False),
        ("adapters.1.0.1", 1.0, True),
        ("3.2.1", 2.0, False),
    ],
)
def test_alpha_of_old_versions(
    version: str, scale: float, noted: bool, copy_of: Callable[[str], Path]
) -> None:
    folder = copy_of("llama/lora_gating")
    ungated(folder)
    change_config(folder, {"version": version}, use_gating=False)
    adapter = read(folder)
    tensors = load_file(folder / WEIGHTS)
    for edit in adapter.edits:
        path = f"{edit.site.module}.loras.ad.lora_"
        expected = tensors[f"{path}B"].double() @ tensors[f"{path}A"].double() * scale
        torch.testing.assert_close(edit.factor.dense(), expected)  # type: ignore[attr-defined]
    assert [note.kind for note in adapter.notes] == ["info"] * noted


def test_ia3_is_scaled_by_alpha(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama/ia3")
    change_config(folder, alpha=3)
    vector = load_file(folder / WEIGHTS)["model.layers.0.mlp.down_proj.loras.ad.lora_B"].flatten()
    found = [edit for edit in read(folder).edits if edit.site.module.endswith("0.mlp.down_proj")]
    assert [edit.site.param for edit in found] == ["weight", "bias"]
    assert all(torch.equal(edit.vector.read(), 3 * vector) for edit in found)  # type: ignore[attr-defined]


def bert_bottleneck(folder: Path, place: str, **fields: Any) -> dict[str, Tensor]:
    """Turns the Llama bottleneck into one of BERT; the file's tensors."""

    def rename(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            new = key.replace("model.layers", "bert.encoder.layer").replace(
                "output_adapters", place
            )
            tensors[new] = tensors.pop(key)

    change_tensors(folder, rename)
    change_config(folder, {"model_type": "bert"}, **fields)
    return load_file(folder / WEIGHTS)


@torch.no_grad()
@pytest.mark.parametrize("place", ["output", "attention.output"])
@pytest.mark.parametrize("before", [True, False])
def test_bottlenecks_where_the_sum_is_normalised(
    place: str, before: bool, copy_of: Callable[[str], Path], fixtures: Path
) -> None:
    """y = LN(h + scaling * f(s) + x) with s = LN(h + x) or h, written out."""
    folder = copy_of("llama/seq_bn")
    options = {"original_ln_before": before, "non_linearity": "swish", "scaling": 2.0}
    tensors = bert_bottleneck(folder, place, **options)
    block = load_model(fixtures / "adapterhub" / "bert" / "base")
    module: Any = block.get_submodule(f"encoder.layer.1.{place}")
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 5, module.dense.in_features, generator=generator)
    x = torch.randn(2, 5, 32, generator=generator)
    parts = {
        key.split(".adapters.ad.")[1]: tensor for key, tensor in tensors.items() if "layer.1" in key
    }
    h = module.dense(inputs)
    s = module.LayerNorm(h + x) if before else h
    down = s @ parts["adapter_down.0.weight"].T + parts["adapter_down.0.bias"]
    f = torch.nn.functional.silu(down) @ parts["adapter_up.weight"].T + parts["adapter_up.bias"]
    expected = module.LayerNorm(h + 2 * f + x)
    with attach(block, read(folder)):
        y = module(inputs, x)
    assert error(y, expected, module(inputs, x)) < 1e-5


def test_bottleneck_widths_come_from_the_tensors(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama/seq_bn")
    change_config(folder, reduction_factor={"1": 8, "default": 4}, non_linearity="leakyrelu")
    edits = [edit for edit in read(folder).edits if isinstance(edit, Bottleneck)]
    assert {edit.activation for edit in edits} == {"leaky_relu"}
    assert {(edit.site.place, edit.source) for edit in edits} == {("mlp", "sum")}


def test_activations_of_files_without_a_version(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama/seq_bn")
    change_config(folder, non_linearity="gelu")
    raw = json.loads((folder / "adapter_config.json").read_text())
    del raw["version"]
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    edits = [edit for edit in read(folder).edits if isinstance(edit, Bottleneck)]
    assert {edit.activation for edit in edits} == {"gelu_new"}


def test_heads_are_noted(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama/ia3")
    save_file({"heads.ad.1.weight": torch.ones(2, 2)}, folder / "model_head.safetensors")
    (note,) = read(folder).notes
    assert note.kind == "dropped"
    assert "model_head.safetensors" in note.what


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama/seq_bn", {"phm_layer": True}, "bottleneck with Compacter"),
        ("llama/seq_bn", {"ln_before": True, "ln_after": True}, "ln_before.*ln_after"),
        ("llama/seq_bn", {"is_parallel": True}, "is_parallel"),
        ("llama/seq_bn", {"use_gating": True}, "use_gating"),
        ("llama/seq_bn", {"inv_adapter": "nice"}, "invertible adapter"),
        ("llama/seq_bn", {"scaling": "learned"}, "scaling 'learned'"),
        ("llama/seq_bn", {"residual_before_ln": "post_add"}, "residual_before_ln 'post_add'"),
        ("llama/seq_bn", {"original_ln_after": False}, "original_ln_after"),
        ("llama/seq_bn", {"non_linearity": "__import__"}, "the activation '__import__'"),
        ("llama/seq_bn", {"non_linearity": None}, "the activation None"),
        ("llama/seq_bn", {"architecture": "prefix_tuning"}, "AdapterHub prefix_tuning adapter"),
        ("llama/seq_bn", {"architecture": "prompt_tuning"}, "AdapterHub prompt_tuning adapter"),
        ("llama/seq_bn", {"architecture": "reft"}, "AdapterHub reft adapter"),
        ("llama/seq_bn", {"architecture": ["x"]}, "not read yet"),
        ("llama/seq_bn", {"architecture": "lora"}, "alpha is None"),
        ("llama/ia3", {"architecture": "mtl_lora"}, "AdapterHub mtl_lora adapter"),
        ("llama/ia3", {"use_gating": True}, "AdapterHub gated IA3 adapter"),
        ("llama/ia3", {"composition_mode": "add"}, "lora_A is missing"),
        ("llama/ia3", {"composition_mode": "times"}, "composition_mode 'times'"),
        ("llama/lora_gating", {"use_dora": True}, "AdapterHub DoRA adapter"),
        ("llama/lora_gating", {"use_gating": False}, r"gate\.weight' belongs to nothing"),
        ("llama/lora_gating", {"r": 8}, "are no pair of rank 8"),
        ("llama/lora_gating", {"r": 0, "alpha": "x"}, "2 problems"),
        (
            "llama/lora_gating",
            {"composition_mode": "scale", "use_gating": False},
            "is \\[out, 1\\]",
        ),
        ("bert/vera", {"use_dora": True}, "AdapterHub DVoRA adapter"),
        ("bert/vera", {"vera_d": None, "vera_b": None}, "lora_A, lora_B is missing"),
    ],
)
def test_refuses_by_name(
    name: str, fields: dict[str, Any], message: str, copy_of: Callable[[str], Path]
) -> None:
    folder = copy_of(name)
    change_config(folder, **fields)
    with pytest.raises(InputError, match=message):
        read(folder)


def test_refuses_unions_naming_their_parts(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama/seq_bn")
    parts = [{"architecture": "prefix_tuning"}, {}, {"architecture": "lora", "use_gating": True}]
    change_config(folder, architecture="union", configs=parts)
    with pytest.raises(InputError, match=r"union \(prefix_tuning, bottleneck, gated LoRA\)"):
        read(folder)


@pytest.mark.parametrize("what", ["adapter_fusion_config.json", "adapter_setup.json"])
def test_refuses_setups(what: str, tmp_path: Path) -> None:
    (tmp_path / what).write_text("{}")
    with pytest.raises(InputError, match="is an AdapterFusion layer|is a setup of several"):
        read(tmp_path)


def test_refuses_bottlenecks_of_other_models(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama/seq_bn")
    change_config(folder, {"model_type": "t5"})
    with pytest.raises(InputError, match="bottleneck of a t5 model"):
        read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(extra=torch.ones(1)), "'extra' belongs to nothing"),
        (lambda t: t.popitem(), "is missing"),
        (lambda t: t.clear(), "holds no gated LoRA"),
        (lambda t: t.update({key.replace("ad.", "b."): t[key] + 1 for key in list(t)}), "belongs to"),
        (
            lambda t: t.update({key.replace("layers.0", "layers.2").replace("ad.", "b."): t.pop(key)
                                for key in list(t) if "layers.0" in key}),
            r"several adapters \(ad, b\)",
        ),
        (
            lambda t: t.update({key.replace("q_proj", "c_attn"): t.pop(key) for key in list(t)
                                if "q_proj" in key}),
            "c_attn: adapts parts of a fused projection",
        ),
        (
            lambda t: t.update({key: torch.ones(2, 2) for key in t if "gate.weight" in key}),
            "the gate has shapes",
        ),
    ],
)  # fmt: skip
def test_refuses_files_that_do_not_fit(
    change: Callable[[dict[str, Tensor]], object], message: str, copy_of: Callable[[str], Path]
) -> None:
    folder = copy_of("llama/lora_gating")
    change_tensors(folder, change)
    with pytest.raises(InputError, match=message):
        read(folder)


@pytest.mark.parametrize("config", [None, "pfeiffer", [1]])
def test_refuses_configs_without_fields(config: Any, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama/ia3")
    change_config(folder, {"config": config})
    with pytest.raises(InputError, match="expected an object with all fields"):
        read(folder)


def test_says_which_weights_are_missing(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama/ia3")
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"expected adapter\.safetensors or pytorch_adapter\.bin"):
        read(folder)


def test_other_configs_are_not_claimed(fixtures: Path) -> None:
    folder = fixtures / "tinyllama" / "lora-r8-perl"
    assert not FORMAT.detect(Listing.of(folder, "peft"))
    assert not FORMAT.detect(Listing.of(folder / "adapter_model.safetensors", "peft"))
    with pytest.raises(InputError):
        FORMAT.read(Listing.of(folder, "peft"), ReadOptions())
