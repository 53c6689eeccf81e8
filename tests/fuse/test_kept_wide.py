"""Layers that stay in 16 bits where quantising would lose an adapter: --max-growth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import samples
import torch
from fuse.made_models import quantised_base
from fuse.models import llama_base
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from adaptmerge.bases.open import open_base
from adaptmerge.commands import verify as library
from adaptmerge.commands.fuse import FuseOptions, FuseReport, fuse
from adaptmerge.errors import CannotMerge, UsageError
from adaptmerge.formats.inputs import InputSpec
from adaptmerge.schemes.view import view_of

QUANTISED = Path(__file__).parents[2] / "fixtures" / "quantised"
LAYER = "model.layers.0"
SMALL, LARGE = f"{LAYER}.self_attn.k_proj", f"{LAYER}.mlp.up_proj"
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
RATIO, STRICT = (
    0.01,
    0.05,
)  # of weights so narrow, of which some of the delta is lost whatever is done


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_base(tmp_path_factory.mktemp("plain") / "base", **SIZES)


@pytest.fixture(scope="module")
def nf4(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised_base(plain, tmp_path_factory.mktemp("nf4") / "base", "nf4")


@pytest.fixture(scope="module")
def adapter(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of a small and a large layer, of a rank that their blocks are too few for."""
    weights = load_file(plain / "model.safetensors")
    sides = {}
    for number, module in enumerate((SMALL, LARGE)):
        weight = weights[f"{module}.weight"].float()
        generator = torch.Generator().manual_seed(number)
        down = torch.randn(8, weight.shape[1], generator=generator)
        up = torch.randn(weight.shape[0], 8, generator=generator)
        size = float((up @ down).norm()) * 2  # alpha / r of the config that `samples` writes
        sides[module] = down, up * (RATIO * float(weight.norm()) / size)
    return samples.write(tmp_path_factory.mktemp("lora") / "a", sides)


def fused(base: Path, adapter: Path, out: Path, **options: Any) -> FuseReport:
    asked = {"max_loss": STRICT, **options}
    return fuse(str(base), [InputSpec(str(adapter), "a")], out, FuseOptions(**asked))


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found["quantization_config"]  # type: ignore[no-any-return]


def size(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("quant", ["same", "nf4", "int4-g128"])
def test_layers_that_lose_are_stored_plainly(
    quant: str, plain: Path, nf4: Path, adapter: Path, tmp_path: Path
) -> None:
    base = nf4 if quant == "same" else plain
    with pytest.raises(CannotMerge, match="rounding leaves"):
        fused(base, adapter, tmp_path / "out", quant=quant)
    report = fused(base, adapter, tmp_path / "out", quant=quant, max_growth=9.0)
    before = view_of(open_base(str(base))).values.tensors
    after = tensors(tmp_path / "out")
    for module in (SMALL, LARGE):
        value, delta = after[f"{module}.weight"], samples.deltas(adapter)[module]
        error = value.double() - before[f"{module}.weight"].read().double() - delta
        assert value.dtype == torch.bfloat16
        assert float(error.norm()) < 0.6 * float(delta.norm())  # half a step of bfloat16
        assert not [
            name
            for name in after
            if name.startswith(f"{module}.weight") and name != f"{module}.weight"
        ]
    key = "ignore" if quant == "int4-g128" else "llm_int8_skip_modules"
    assert config(tmp_path / "out")[key] == ["lm_head", LARGE, SMALL]
    assert report.adapters["a"].sub is not None
    assert report.adapters["a"].sub < STRICT
    said = {note.site: note.what for note in report.notes if "bytes more" in note.what}
    count = after[f"{SMALL}.weight"].numel()
    assert said.keys() == {SMALL, LARGE}
    if quant != "int4-g128":  # two codes a byte, four bytes for 64, the JSON and the table
        packed = count // 2 + count // 16 + 64
        assert int(said[SMALL].split()[3].replace(",", "")) == pytest.approx(
            2 * count - packed, abs=100
        )


def test_the_smallest_come_first_and_no_more_than_the_budget(
    nf4: Path, adapter: Path, tmp_path: Path
) -> None:
    count = tensors(nf4)[f"{SMALL}.weight"].numel() * 2
    enough = 1.6 * count / size(nf4)
    options = {"max_growth": enough, "allow": frozenset({"loss"})}
    report = fused(nf4, adapter, tmp_path / "out", **options)
    assert [n.site for n in report.notes if "bytes more" in n.what] == [SMALL]
    assert size(tmp_path / "out") <= (1 + enough) * size(nf4)
    assert tensors(tmp_path / "out")[f"{LARGE}.weight"].dtype == torch.uint8
    report = fused(
        nf4, adapter, tmp_path / "none", max_growth=0.8 * enough, allow=frozenset({"loss"})
    )
    assert not [n for n in report.notes if "bytes more" in n.what]


def test_nothing_is_stored_plainly_where_nothing_is_lost(
    nf4: Path, adapter: Path, tmp_path: Path
) -> None:
    fused(nf4, adapter, tmp_path / "a", max_loss=0.9)
    fused(nf4, adapter, tmp_path / "b", max_loss=0.9, max_growth=9.0)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert one == two
    assert config(tmp_path / "b") == config(nf4)


@pytest.mark.parametrize("quant", ["same", "nf4", "int8-channel"])
def test_verify_proves_it_as_it_was_decided(
    quant: str, plain: Path, nf4: Path, adapter: Path, tmp_path: Path
) -> None:
    base = nf4 if quant == "same" else plain
    max_loss = STRICT if quant != "int8-channel" else 0.001
    fused(
        base,
        adapter,
        tmp_path / "out",
        quant=quant,
        max_growth=9.0,
        max_loss=max_loss,
        allow=frozenset({"loss"}),
    )
    questions = library.Questions(str(base), {"a": str(adapter)}, "cpu")
    verdict = library.verify(tmp_path / "out", questions)
    assert verdict.status == library.PASS, verdict.as_json()
    path = tmp_path / "out" / "config.json"
    said = json.loads(path.read_text())
    said["quantization_config"].pop(
        "ignore" if quant == "int8-channel" else "llm_int8_skip_modules"
    )
    said["quantization_config"]["llm_int8_skip_modules"] = None
    path.write_text(json.dumps(said))
    verdict = library.verify(tmp_path / "out", questions)
    assert [c.name for c in verdict.checks if c.status == library.FAIL] == [
        *("files", "config", "settings")
    ]


@pytest.mark.parametrize("quant", ["same", "nf4"])
def test_transformers_loads_the_plain_layers_as_such(
    quant: str, plain: Path, nf4: Path, adapter: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    base = nf4 if quant == "same" else plain
    fused(base, adapter, tmp_path / "out", quant=quant, max_growth=9.0)
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    stored = tensors(tmp_path / "out")
    for module in (SMALL, LARGE):
        layer = model.get_submodule(module)
        assert type(layer) is torch.nn.Linear
        assert torch.equal(layer.weight, stored[f"{module}.weight"])
    assert hasattr(model.get_submodule(f"{LAYER}.mlp.down_proj").weight, "quant_state")
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        ("awq-gemm", "modules_to_not_convert"),
        ("fp8-block", "modules_to_not_convert"),
        ("ct-mixed", "ignore"),
        ("ct-fp8-channel", "ignore"),
    ],
)
def test_other_layouts_list_them_too(layout: str, key: str, tmp_path: Path) -> None:
    base = QUANTISED / layout
    expected = load_file(base / "expected.safetensors")
    module, adapter = of_first(expected, tmp_path)
    weight = expected[module]
    before = config(base).get(key) or ["lm_head"]
    fused(base, adapter, tmp_path / "out", max_growth=9.0, max_loss=1e-9, allow=frozenset({"loss"}))
    assert config(tmp_path / "out")[key] == [*before, module]
    after = tensors(tmp_path / "out")
    assert [name for name in after if name.startswith(f"{module}.")] == [f"{module}.weight"]
    wanted = weight.double() + samples.deltas(adapter)[module]
    assert float((after[f"{module}.weight"].double() - wanted).norm()) < 4e-3 * float(wanted.norm())
    others = view_of(open_base(str(tmp_path / "out"))).coded
    assert others.keys() == {f"{name}.weight" for name in expected if name != module}


def of_first(expected: dict[str, Tensor], folder: Path) -> tuple[str, Path]:
    """A module of these and a LoRA of it alone."""
    module, weight = next(iter(expected.items()))
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(2, weight.shape[1], generator=generator)
    up = torch.randn(weight.shape[0], 2, generator=generator)
    up *= RATIO * float(weight.norm()) / float((up @ down).norm())
    return module, samples.write(folder / "a", {module: (down, up)})


AUTO_AWQ = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}


@pytest.mark.parametrize(
    "said", [AUTO_AWQ, {**AUTO_AWQ, "modules_to_not_convert": ["visual"]}, None]
)
def test_awq_lists_them_in_its_own_file_too(said: dict[str, Any] | None, tmp_path: Path) -> None:
    """Earlier versions of AutoAWQ read modules_to_not_convert from quant_config.json alone."""
    base, name = tmp_path / "base", "quant_config.json"
    shutil.copytree(QUANTISED / "awq-gemm", base)
    text = "none" if said is None else json.dumps(said)
    (base / name).write_text(text)
    module, adapter = of_first(load_file(base / "expected.safetensors"), tmp_path)
    allowed: dict[str, Any] = {"max_loss": 1e-9, "allow": frozenset({"loss"})}
    fused(base, adapter, tmp_path / "same", **allowed)
    assert (tmp_path / "same" / name).read_text() == text
    fused(base, adapter, tmp_path / "out", max_growth=9.0, **allowed)
    written = (tmp_path / "out" / name).read_text()
    if said is None:
        assert written == text
    else:
        listed = config(tmp_path / "out")["modules_to_not_convert"]
        assert module in listed
        assert json.loads(written) == {**said, "modules_to_not_convert": listed}


def test_all_layers_are_not_stored_plainly(tmp_path: Path) -> None:
    base = QUANTISED / "ct-int8"
    (module, weight), *none = load_file(base / "expected.safetensors").items()
    assert not none
    sides = torch.ones(1, weight.shape[1]), torch.ones(weight.shape[0], 1)
    adapter = samples.write(tmp_path / "a", {module: sides})
    with pytest.raises(CannotMerge, match="every quantised layer"):
        fused(base, adapter, tmp_path / "out", max_growth=9.0, max_loss=0.0)


def test_every_tensor_is_aligned(nf4: Path, adapter: Path, tmp_path: Path) -> None:
    fused(nf4, adapter, tmp_path / "out", max_growth=9.0)
    path = tmp_path / "out" / "model.safetensors"
    raw = path.read_bytes()
    table = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            assert table[name]["data_offsets"][0] % file.get_tensor(name).element_size() == 0


def test_layouts_that_cannot_mix(plain: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither the base nor the output"):
        fused(plain, adapter, tmp_path / "out", max_growth=0.1)
    with pytest.raises(UsageError, match="from 0% up"):
        fused(plain, adapter, tmp_path / "out", quant="nf4", max_growth=-0.1)
    with pytest.raises(UsageError, match="gptq-int4-g128 quantise all layers or none"):
        fused(plain, adapter, tmp_path / "out", quant="gptq-int4-g128", max_growth=0.1)
    gptq = QUANTISED / "gptq-v1"
    module, weight = next(iter(load_file(gptq / "expected.safetensors").items()))
    sides = {module: (torch.ones(1, weight.shape[1]), torch.ones(weight.shape[0], 1))}
    other = samples.write(tmp_path / "other", sides)
    with pytest.raises(UsageError, match="all layers or none"):
        fused(gptq, other, tmp_path / "out", max_growth=0.1)
