"""Fused models, loaded by `transformers`, compute what PEFT computes with the adapter beside the base."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families.built import Built, BuiltCases
from families.cases import QV, FamilyCase, all_cases, family
from families.cases_moe import BOTH
from families.cases_prompts import OwnModel, t5
from fuse.models import changed, error, fuse, load, outputs, save_in_shards
from peft_cases import CASES, PeftCase, logits, randomise, token_inputs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiers import first_of
from torch import Tensor, nn

from adaptmerge.commands.combine import Options, combine
from adaptmerge.errors import CannotMerge
from adaptmerge.formats.inputs import InputSpec

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT advises the person who trains
TIGHT = 1e-5  # of the adapter's effect, or of what parameters move by
ACTIVATIONS = {
    *("PromptTuningConfig", "PromptEncoderConfig", "CPTConfig", "PrefixTuningConfig"),
    *("CartridgeConfig", "AdaptionPromptConfig"),
}
# Their effect depends on tokens, links groups of a convolution, or adds a bias where the base has none.
UNFUSABLE = {"lora_alora", "lora_alora_bias", "lora_grouped", "lora_grouped_only", "beft_new"}
# PEFT merges into the matrix that the head is tied to; its unmerged forward leaves the head alone.
MERGED_INTO_HEAD = {"hira_gpt2", "embedding_tied"}


def of(case: PeftCase) -> FamilyCase:
    """The same case with the interface of the families."""
    options = {"r": 4, "lora_alpha": 11, **case.options(4)}
    values = partial(randomise, seed=1, dtype=case.dtype)
    return FamilyCase(case.name, "LoraConfig", options, case.family, randomise=values)


def lora(name: str, model: str, **options: Any) -> FamilyCase:
    return FamilyCase(name, "LoraConfig", {"r": 4, "lora_alpha": 7, **options}, model)


TIED = {
    case.name: case
    for case in (
        lora("embedding_tied", "llama_tied", target_modules=["embed_tokens", "q_proj"]),
        lora("head_tied", "llama_tied", target_modules=QV, modules_to_save=["lm_head"]),
        lora("tokens_tied", "llama_tied", target_modules=QV, trainable_token_indices=[3, 7, 11]),
        lora("embedding_head", "llama", target_modules=["embed_tokens", "lm_head"]),
        lora(
            "head_and_embedding_tied",
            "llama_tied",
            target_modules=QV,
            modules_to_save=["embed_tokens", "lm_head"],
            ensure_weight_tying=True,
        ),
    )
}
SEQ2SEQ = OwnModel(
    "lora_t5",
    "LoraConfig",
    {"target_modules": ["q", "v", "wi"], "r": 4, "lora_alpha": 7},
    task="SEQ_2_SEQ_LM",
    make=t5,
)


def foldable() -> list[Any]:
    """The first case of each family on each model; `make test-full` runs the variants, too."""
    cases = all_cases().items()
    names = [n for n, c in cases if c.config not in ACTIVATIONS and n not in UNFUSABLE]
    return first_of(names, family)


def check(found: Built, folder: Path) -> Path:
    """Fuses a case; its outputs are PEFT's, and its parameters what PEFT merges where that is right."""
    case = found.case
    base, out = save_in_shards(case, folder / "base"), folder / "out"
    fuse(base, [found.path], out)
    model = load(out, case.base_model())
    tolerance = max(TIGHT, case.tolerance)
    assert error(logits(model, case.inputs()), found.truth, case.plain()) < tolerance
    if case.merges and case.name not in MERGED_INTO_HEAD:
        before = case.base_model().state_dict()
        assert changed(model.state_dict(), found.merged, before) < tolerance
    return out


@pytest.mark.parametrize("name", foldable())
def test_every_family(name: str, built: BuiltCases, tmp_path: Path) -> None:
    check(built(name), tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_every_way_to_configure_lora(name: str, tmp_path: Path) -> None:
    check(Built(of(CASES[name]), tmp_path / "built"), tmp_path)


@pytest.mark.parametrize("name", TIED)
def test_tied_and_trained_vocabularies(name: str, tmp_path: Path) -> None:
    check(Built(TIED[name], tmp_path / "built"), tmp_path)


def test_an_encoder_and_decoder(tmp_path: Path) -> None:
    check(Built(SEQ2SEQ, tmp_path / "built"), tmp_path)


@pytest.mark.parametrize("name", sorted(UNFUSABLE))
def test_what_no_weight_can_hold_is_refused(name: str, tmp_path: Path) -> None:
    case = all_cases()[name]
    base, path = case.save_base(tmp_path / "base"), case.build(tmp_path / "adapter")
    with pytest.raises(CannotMerge, match="no weights|no such parameter"):
        fuse(base, [path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Several adapters


SECOND = {
    "dora": all_cases()["lora_dora"],
    "ia3": all_cases()["ia3"],
    "rslora": all_cases()["lora_rslora"],
    "loha": all_cases()["loha"],
}


@pytest.mark.parametrize("name", SECOND)
def test_a_weighted_sum_of_two_kinds(name: str, tmp_path: Path) -> None:
    """W + sum of w (W' - W), each W' what PEFT merges of one adapter."""
    first, second = all_cases()["lora_plain"], SECOND[name]
    paths = {
        first.build(tmp_path / "first", 1): 0.7,
        second.build(tmp_path / "second", 2): 0.3,
    }
    base = save_in_shards(first, tmp_path / "base")
    fuse(base, paths, tmp_path / "out")
    state = first.base_model().double().state_dict()
    total = {key: value.clone() for key, value in state.items()}
    for (path, weight), case in zip(paths.items(), (first, second), strict=True):
        for key, value in case.merged(path).items():
            total[key] += weight * (value - state[key])
    model = load(tmp_path / "out", first.base_model())
    assert changed(model.state_dict(), total, state) < TIGHT
    wanted = first.base_model().double()
    wanted.load_state_dict(total)
    truth = logits(wanted, first.inputs())
    assert error(logits(model, first.inputs()), truth, first.plain()) < TIGHT


def test_added_and_taken_out_again_it_is_the_base(tmp_path: Path) -> None:
    case = all_cases()["lora_plain"]
    base, path = save_in_shards(case, tmp_path / "base"), case.build(tmp_path / "adapter")
    fuse(base, [path], tmp_path / "with")
    fuse(tmp_path / "with", {path: -1.0}, tmp_path / "without")
    with_it, without = (outputs(tmp_path / name, case) for name in ("with", "without"))
    assert error(without, case.plain(), with_it) < TIGHT


# Layers and tokens that the base has not


def test_copies_of_layers_are_stored_apart(tmp_path: Path) -> None:
    out = check(Built(all_cases()["lora_replicated"], tmp_path / "built"), tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    layers = {name.split(".")[2] for name in index if ".layers." in name}
    assert layers == {"0", "1", "2", "3"}
    name = "model.layers.{}.self_attn.q_proj.weight"
    one, copy = (tensor(out, name.format(layer)) for layer in (0, 2))
    assert not torch.equal(one, copy)
    same = "model.layers.{}.input_layernorm.weight"
    assert torch.equal(tensor(out, same.format(0)), tensor(out, same.format(2)))


def tensor(folder: Path, name: str) -> Tensor:
    """One tensor of a sharded checkpoint."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(folder / index[name], "pt") as file:
        found: Tensor = file.get_tensor(name)
    return found


class Resized(FamilyCase):
    """A base whose vocabulary is made larger before the adapter is put on it."""

    def base_model(self) -> nn.Module:
        model: Any = super().base_model()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model.resize_token_embeddings(133, mean_resizing=False)
        resized: nn.Module = model
        return resized

    def inputs(self) -> dict[str, Tensor]:
        found = token_inputs()
        found["input_ids"][:, -2:] = torch.tensor([131, 132])
        return found


@pytest.mark.parametrize("model", ["llama", "llama_tied"])
def test_a_resized_vocabulary(model: str, tmp_path: Path) -> None:
    saved = ["embed_tokens", "lm_head"]
    options = {"target_modules": QV, "r": 4, "lora_alpha": 7, "modules_to_save": saved}
    case = Resized("resized", "LoraConfig", options, model)
    small = replace(all_cases()["lora_plain"], model=model)
    base, path = save_in_shards(small, tmp_path / "base"), case.build(tmp_path / "adapter")
    report = fuse(base, [path], tmp_path / "out")
    assert report.config["vocab_size"] == 133
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 133
    found = outputs(tmp_path / "out", case)
    assert found.shape[-1] == 133
    assert error(found, case.truth(path), case.plain()) < TIGHT


# Heads


def test_a_head_that_the_base_has_not(tmp_path: Path) -> None:
    """A bare encoder becomes a classifier."""
    case = of(CASES["head_bert"])
    path = case.build(tmp_path / "adapter")
    model: Any = case.base_model()
    model.bert.save_pretrained(tmp_path / "base")
    assert "classifier.weight" not in load_file(tmp_path / "base" / "model.safetensors")
    report = fuse(tmp_path / "base", [path], tmp_path / "out")
    assert report.config["architectures"] == ["BertForSequenceClassification"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert len(config["id2label"]) == 3
    found = outputs(tmp_path / "out", case)
    assert error(found, case.truth(path), case.plain()) < TIGHT


# Experts


def moe_base(case: FamilyCase, folder: Path, layout: str) -> Path:
    """As `transformers` saves it, or with the tensors that the loaded model has."""
    model: Any = case.base_model()
    if layout == "as saved":
        return save_in_shards(case, folder)
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    state = {name: value.detach().clone() for name, value in model.named_parameters()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("model", ["mixtral", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("layout", ["as saved", "stacked"])
def test_experts_in_both_layouts(model: str, layout: str, tmp_path: Path) -> None:
    """Mixtral and Qwen2-MoE are saved one matrix per expert, gpt-oss stacked and transposed."""
    options = {"target_modules": ["q_proj"], **BOTH}
    case = FamilyCase("experts", "LoraConfig", options, model, task="CAUSAL_LM")
    base, path = moe_base(case, tmp_path / "base", layout), case.build(tmp_path / "adapter")
    fuse(base, [path], tmp_path / "out")
    found = outputs(tmp_path / "out", case)
    assert error(found, case.truth(path), case.plain()) < TIGHT


@pytest.mark.parametrize("layout", ["as saved", "stacked"])
def test_adapters_of_single_experts_in_both_layouts(layout: str, tmp_path: Path) -> None:
    """As adapters were saved for transformers 4: one pair for each matrix of each expert."""
    options = {"target_modules": [], **BOTH}
    case = FamilyCase("experts", "LoraConfig", options, "mixtral", task="CAUSAL_LM")
    base, path = moe_base(case, tmp_path / "base", layout), case.build(tmp_path / "adapter")
    single = tmp_path / "single"
    combine([InputSpec(str(path))], single, Options(base=str(base), experts="per-expert"))
    assert not [
        key for key in load_file(single / "adapter_model.safetensors") if "base_layer" in key
    ]
    fuse(base, [single], tmp_path / "out")
    found = outputs(tmp_path / "out", case)
    assert error(found, case.truth(path), case.plain()) < TIGHT
