"""What a review of merging found wrong once: each stays right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families.cases import QV, FamilyCase
from families.test_merging import DORA, IA3, LOHA, LORA, Parts, Stage, verified
from safetensors.torch import load_file, save_file
from samples import WEIGHTS, config_of

from adaptmerge.algebra.fit import Budget
from adaptmerge.bases.open import open_base
from adaptmerge.commands.combine import Options, combine
from adaptmerge.commands.verify import Questions, verify
from adaptmerge.commands.verify.difference import difference
from adaptmerge.errors import AdaptmergeError, CannotMerge
from adaptmerge.formats.inputs import InputSpec, open_input

LOKR = FamilyCase("r_lokr", "LoKrConfig", {"target_modules": QV, "r": 2, "alpha": 3})


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


@pytest.mark.parametrize("budget", [Budget(energy=0.9), Budget(max_error=0.05)], ids=str)
def test_budgets_that_a_norm_would_break_are_refused(
    budget: Budget, stage: Stage, tmp_path: Path
) -> None:
    parts: Parts = [(DORA, 1, 0.4), (DORA, 2, 0.6)]
    with pytest.raises(CannotMerge, match="--as lora"):
        stage.combine(parts, tmp_path / "out", base=str(stage.base(DORA)), budget=budget)


def test_a_file_that_changed_between_two_merges_is_read_again(stage: Stage, tmp_path: Path) -> None:
    base = str(stage.base(DORA))
    shutil.copytree(stage.adapter(DORA, 1), tmp_path / "x")
    for seed in (1, 3):
        shutil.copy(stage.adapter(DORA, seed) / WEIGHTS, tmp_path / "x" / WEIGHTS)
        specs = [InputSpec(str(tmp_path / "x"), "x", 0.5)]
        combine(specs, tmp_path / "out", Options(base=base, dtype="fp32", force=True))
        truth = stage.expected([(DORA, seed, 0.5)])
        assert stage.error(DORA, DORA.truth(tmp_path / "out"), truth) < 2e-6


def test_a_report_excuses_no_damage_to_values(stage: Stage, tmp_path: Path) -> None:
    parts: Parts = [(IA3, 1, 0.6), (IA3, 2, 0.9)]
    out = tmp_path / "out"
    stage.combine(parts, out, dtype="fp32")
    save_file({k: v * 1.5 for k, v in load_file(out / WEIGHTS).items()}, out / WEIGHTS)
    report = json.loads((out / "adaptmerge.json").read_text())
    for line in report["sites"]:
        line["error"] = line["rounding"] = 0.5
    (out / "adaptmerge.json").write_text(json.dumps(report))
    inputs = {f"a{n}": str(stage.adapter(case, seed)) for n, (case, seed, _) in enumerate(parts)}
    assert verify(out, Questions(inputs=inputs)).status == "fail"


def in_dtype(path: Path, copy: Path, dtype: torch.dtype) -> Path:
    shutil.copytree(path, copy)
    save_file({k: v.to(dtype) for k, v in load_file(path / WEIGHTS).items()}, copy / WEIGHTS)
    return copy


@pytest.mark.parametrize("first", ["narrow", "wide"])
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_values_are_stored_wide_enough_or_as_asked(
    first: str, dtype: str | None, stage: Stage, tmp_path: Path
) -> None:
    wide = stage.adapter(IA3, 1)
    narrow = in_dtype(stage.adapter(IA3, 2), tmp_path / "narrow", torch.bfloat16)
    paths = {"wide": wide, "narrow": narrow}
    order = [first, *({"wide", "narrow"} - {first})]
    specs = [InputSpec(str(paths[name]), name, 0.5) for name in order]
    combine(specs, tmp_path / "out", Options(dtype=dtype))
    wanted = torch.bfloat16 if dtype else torch.float32
    assert {v.dtype for v in load_file(tmp_path / "out" / WEIGHTS).values()} == {wanted}
    inputs = {name: str(path) for name, path in paths.items()}
    verdict = verify(tmp_path / "out", Questions(inputs=inputs))
    assert [c.detail for c in verdict.checks if c.status == "fail"] == []


def test_fields_of_the_inputs_families_do_not_reach_a_lora(stage: Stage, tmp_path: Path) -> None:
    stage.combine([(LOHA, 1, 0.5), (LOKR, 1, 0.5)], tmp_path / "out")
    assert not {"alpha", "init_weights", "decompose_both"} & config_of(tmp_path / "out").keys()
    assert open_input(InputSpec(str(tmp_path / "out"))).adapter.notes == ()


RIGHT: dict[str, tuple[Parts, dict[str, Any], bool]] = {
    "approximate": (
        [(DORA, 1, 0.4), (DORA, 2, 0.6)],
        {"allow": frozenset({"approximate"}), "dtype": "fp32"},
        False,
    ),
    "another dtype": ([(DORA, 1, 1.0)], {"dtype": "bf16"}, False),
    "svd": ([(DORA, 1, 0.4), (LORA, 1, 0.6)], {"method": "svd", "dtype": "fp32"}, True),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_merges_of_doras_are_verified(name: str, stage: Stage, tmp_path: Path) -> None:
    parts, options, with_base = RIGHT[name]
    base = {"base": str(stage.base(DORA))} if with_base else {}
    report = stage.combine(parts, tmp_path / "out", **options, **base)
    verified(stage, parts, tmp_path / "out")
    apart = any("apart" in note.what for note in report.notes)
    assert apart is (name == "approximate")


def test_a_difference_in_sides_is_one(stage: Stage, tmp_path: Path) -> None:
    """The same vector scales inputs in one and outputs in the other."""
    one = stage.adapter(IA3, 1)
    shutil.copytree(one, tmp_path / "turned")
    tensors = load_file(one / WEIGHTS)
    square = {k: v.T.contiguous() if "o_proj" in k else v for k, v in tensors.items()}
    save_file(square, tmp_path / "turned" / WEIGHTS)
    left, right = (open_input(InputSpec(str(path))).adapter for path in (one, tmp_path / "turned"))
    found = {site.site: site.relative for site in difference(left, right).sites}
    assert found["model.layers.0.self_attn.o_proj (scale)"] > 1


def test_scales_for_another_base_are_noticed(stage: Stage, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    with pytest.raises(AdaptmergeError, match="scales 64 outputs, but the weight"):
        stage.combine([(IA3, 1, 0.5)], tmp_path / "out", base=str(tmp_path / "small"))
    assert open_base(str(tmp_path / "small")).architecture == "llama"
