"""Measured defects of PEFT beyond sums of plain LoRAs, one test each: none of them may be ours.

What add_weighted_adapter, merge_and_unload and convert_to_lora do to other families, to heads and to
tied or copied weights. Issue numbers are those of https://github.com/huggingface/peft. Many families
have these defects excluded by the contract of tests/families already; here is what it does not ask.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.cases import LINEARS, QV, FamilyCase, all_cases
from families.cases_lora import far
from families.test_merging import (
    DORA,
    DORA_QV,
    HRA,
    IA3,
    LOHA,
    LORA,
    OUT_IA3,
    VERA,
    Parts,
    Stage,
    added_by,
    verified,
)
from peft_cases import logits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from samples import (
    CONFIG,
    WEIGHTS,
    adapter,
    config_of,
    deltas,
    distance,
    same_bits,
    size,
    tensors_of,
    weighted_sum,
)
from tiers import repeats, slow
from torch import Tensor

from adaptmerge.algebra.fit import Budget
from adaptmerge.commands.combine import Options, combine
from adaptmerge.commands.verify import FAIL, Questions, verify
from adaptmerge.errors import AdaptmergeError, CannotMerge, InputError
from adaptmerge.formats.inputs import InputSpec, open_input
from adaptmerge.merging.weights import SiteRule

pytest.importorskip("peft")
ALL = Budget(energy=1.0)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


def lora(name: str, model: str = "llama", **options: Any) -> FamilyCase:
    given = {"target_modules": LINEARS, "r": 3, "lora_alpha": 5, **options}
    return FamilyCase(f"d_{name}", "LoraConfig", given, model)


def check_sum(stage: Stage, parts: Parts, out: Path, worst: float = 2e-6, **options: Any) -> None:
    """The merge as PEFT computes it is the base plus the weighted effects; and verify says so."""
    case = parts[0][0]
    stage.combine(parts, out, **{"dtype": "fp32", **options})
    assert stage.error(case, case.truth(out), stage.expected(parts)) < worst
    if case.model != "conv":  # example inputs are text
        verified(stage, parts, out)


def check_read(case: FamilyCase, stage: Stage, out: Path) -> None:
    """Read, it computes what PEFT computes; written back it is the same file."""
    path, base = stage.adapter(case, 1), stage.base(case)
    truth = case.truth(path)
    assert stage.error(case, stage.run(case, path), truth) < case.tolerance
    combine([InputSpec(str(path))], out, Options(base=str(base)))
    assert same_bits(load_file(out / WEIGHTS), load_file(path / WEIGHTS))
    assert stage.error(case, case.truth(out), truth) < 1e-9


# Section 0: what lies in the files


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
def test_3582_a_pattern_that_matches_nothing_is_said(field: str, tmp_path: Path) -> None:
    pattern: dict[str, Any] = {field: {"^q_proj": 7}}
    path = adapter(tmp_path / "a", 1, **pattern)
    found = open_input(InputSpec(str(path))).adapter
    assert any("^q_proj" in note.what for note in found.notes)


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
def test_3582_a_pattern_that_matches_nothing_changes_nothing(field: str, tmp_path: Path) -> None:
    """^q_proj looks as if it matched q_proj; PEFT warns at most."""
    plain = adapter(tmp_path / "plain", 1)
    pattern: dict[str, Any] = {field: {"^q_proj": 7}}
    path = adapter(tmp_path / "a", 1, **pattern)
    combine([InputSpec(str(path))], tmp_path / "out", Options(form="lora"))
    assert same_bits(tensors_of(tmp_path / "out"), tensors_of(plain))
    assert config_of(tmp_path / "out")[field] == {}


def test_the_order_of_targets_means_nothing(tmp_path: Path) -> None:
    """PEFT writes sets as lists, in any order."""
    names = ["q_proj", "up_proj"]
    one = adapter(tmp_path / "one", 1, target_modules=names)
    two = adapter(tmp_path / "two", 1, target_modules=names[::-1])
    outs = [tmp_path / "out1", tmp_path / "out2"]
    for path, out in zip((one, two), outs, strict=True):
        combine([InputSpec(str(path), "a"), InputSpec(str(one), "b")], out, Options())
    assert config_of(outs[0]) == config_of(outs[1])
    assert same_bits(tensors_of(outs[0]), tensors_of(outs[1]))


READ = {
    "a trained module with parts": lora("parts", target_modules=QV, modules_to_save=["mlp"]),
    "rows by module": lora(
        "rows", target_modules=QV, trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [5]}
    ),
    "pissa, rslora and patterns": FamilyCase(
        "d_pissa",
        "LoraConfig",
        {
            "target_modules": LINEARS,
            "r": 4,
            "lora_alpha": 7,
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 6},
            "alpha_pattern": {"v_proj": 3},
        },
        tolerance=1e-5,
        randomise=far,
    ),
    "2018 a tied head": lora("tied_head", "gpt2", target_modules=["lm_head"]),
    "2018 a tied embedding": lora("tied_embedding", "gpt2", target_modules=["wte"]),
    "2777 both tied ones": lora("tied_both", "gpt2", target_modules=["lm_head", "wte"]),
    "2777 a tied embedding that takes the head along": lora(
        "tied_along", "gpt2", target_modules=["wte"], ensure_weight_tying=True
    ),
    "2777 a tied copy": lora(
        "tied_copy",
        "gpt2",
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        modules_to_save=["wte"],
        ensure_weight_tying=True,
    ),
    "2777 tied rows": lora(
        "tied_rows",
        "gpt2",
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        trainable_token_indices=[3, 7],
        ensure_weight_tying=True,
    ),
    "dora on convolutions": lora(
        "dora_conv", "conv", target_modules=["conv", "point", "line"], use_dora=True
    ),
    "dora on an embedding": lora(
        "dora_embedding", target_modules=["embed_tokens", "q_proj"], use_dora=True
    ),
    "dora and rslora": lora("dora_rslora", use_dora=True, use_rslora=True),
    "dora on Conv1D": lora(
        "dora_gpt2", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True
    ),
}


@pytest.mark.parametrize("name", READ)
def test_read_as_peft_reads_it(name: str, stage: Stage, tmp_path: Path) -> None:
    check_read(READ[name], stage, tmp_path / "out")


# Section 2: add_weighted_adapter is for LoRA and IA3 only

REFUSED = (
    *("adalora", "lokr", "loha_conv", "miss", "shira", "hira", "road_2", "glora", "oft", "pvera"),
    *slow("adalora_pruned", "lokr_whole", "miss_bat", "delora", "gralora_hybrid", "c3a", "osf"),
    *slow("supertuning_supra", "peanut", "deft", "frod", "boft", "wave", "unilora"),
)


@pytest.mark.parametrize("name", REFUSED)
def test_1647_two_of_any_family_are_summed(name: str, stage: Stage, tmp_path: Path) -> None:
    """PEFT: TypeError for AdaLoRA, AttributeError for the others."""
    case = all_cases()[name]
    parts: Parts = [(case, 1, 0.6), (case, 2, -0.7)]
    options = {"base": str(stage.base(case)), "form": "lora", "budget": ALL}
    check_sum(stage, parts, tmp_path / "out", worst=2e-5, **options)
    assert config_of(tmp_path / "out")["peft_type"] == "LORA"


IA3_DOWN = FamilyCase(
    "d_ia3_down",
    "IA3Config",
    {"target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]},
)
DORA_RS = lora("dora_rs", r=4, use_dora=True, use_rslora=True)
CONVS: dict[str, Any] = {"target_modules": ["conv", "point", "line", "head"]}
PISSA = READ["pissa, rslora and patterns"]
BIASED = lora("biased", "qwen2", target_modules=QV, lora_bias=True)
ALORA = all_cases()["lora_alora"]
Change = Callable[[Tensor], object]
REPLICATED = all_cases()["lora_replicated"]
SUMS: dict[str, Parts] = {
    "ia3 on some modules each": [(OUT_IA3, 1, 0.5), (IA3_DOWN, 2, 0.5)],
    "ia3 on more modules": [(IA3, 1, 1.0), (OUT_IA3, 2, 1.0)],
    "ia3 less another": [(IA3, 1, 1.0), (IA3, 2, -0.5)],
    "3761 dora less another": [(DORA, 1, 0.6), (DORA, 2, -0.7)],
    "3761 dora and rslora": [(DORA_RS, 1, 0.6), (DORA, 2, 0.7), (LORA, 1, -0.3)],
    "3761 lora biases": [(BIASED, 1, 0.6), (BIASED, 2, 0.9)],
    "2184 pissa": [(PISSA, 1, 0.6), (PISSA, 2, 0.7)],
    "dora on convolutions": [
        (lora("dora_conv", "conv", use_dora=True, **CONVS), 1, 0.6),
        (lora("conv", "conv", **CONVS), 2, 0.7),
    ],
    "dora on embeddings": [
        (READ["dora on an embedding"], 1, 0.6),
        (lora("embedding", target_modules=["embed_tokens", "q_proj"]), 2, 0.7),
    ],
    "dora on Conv1D": [
        (READ["dora on Conv1D"], 1, 0.6),
        (READ["dora on Conv1D"], 2, 0.7),
    ],
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_those_of_the_effects(name: str, stage: Stage, tmp_path: Path) -> None:
    parts = SUMS[name]
    check_sum(stage, parts, tmp_path / "out", base=str(stage.base(parts[0][0])))


def test_2184_two_with_pissa_and_a_dora(stage: Stage, tmp_path: Path) -> None:
    """PEFT: only adapters whose initialisation was converted before, each on the base itself."""
    parts: Parts = [(PISSA, 1, 0.6), (PISSA, 2, 0.7), (DORA, 2, -0.3)]
    base = str(stage.base(PISSA))
    stage.combine(parts, tmp_path / "out", base=base, budget=ALL, dtype="fp32")
    assert stage.error(PISSA, PISSA.truth(tmp_path / "out"), stage.expected(parts)) < 1e-5


def test_psoft_is_summed(stage: Stage, tmp_path: Path) -> None:
    """Its singular vectors are an assumption, which verify never passes."""
    case = all_cases()["psoft"]
    parts: Parts = [(case, 1, 0.6), (case, 2, -0.7)]
    stage.combine(parts, tmp_path / "out", base=str(stage.base(case)), budget=ALL, dtype="fp32")
    assert stage.error(case, case.truth(tmp_path / "out"), stage.expected(parts)) < 1e-5


TIED = ("2018 a tied head", "2018 a tied embedding", "2777 both tied ones")


@pytest.mark.parametrize("name", TIED)
def test_2018_verification_knows_tied_weights(name: str, stage: Stage, tmp_path: Path) -> None:
    parts: Parts = [(READ[name], 1, 0.6), (READ[name], 1, 0.4)]
    stage.combine(parts, tmp_path / "out", base=str(stage.base(READ[name])))
    verified(stage, parts, tmp_path / "out")


def test_2777_a_tied_head_is_a_weight_of_the_base(stage: Stage, tmp_path: Path) -> None:
    case = lora("dora_tied", "gpt2", target_modules=["lm_head"], use_dora=True)
    parts: Parts = [(case, 1, 0.6), (case, 1, 0.4)]
    stage.combine(parts, tmp_path / "out", base=str(stage.base(case)), dtype="fp32")
    truth = case.truth(stage.adapter(case, 1))
    assert stage.error(case, case.truth(tmp_path / "out"), truth) < 2e-6


@pytest.mark.parametrize("name", TIED)
def test_2018_sums_on_tied_weights_touch_what_they_name(
    name: str, stage: Stage, tmp_path: Path
) -> None:
    """PEFT's merge adds what the head learned to the embedding, too; its forward does not."""
    case = READ[name]
    parts: Parts = [(case, 1, 0.6), (case, 1, 0.4)]
    stage.combine(parts, tmp_path / "out", base=str(stage.base(case)), dtype="fp32")
    truth = case.truth(stage.adapter(case, 1))
    assert stage.error(case, case.truth(tmp_path / "out"), truth) < 2e-6
    assert stage.error(case, stage.run(case, tmp_path / "out"), truth) < 2e-6


BIASED_CASES = ("adalora_bias", "delora_bias", "vera_bias", "miss_bias", "hra_bias")
WEIGHTS_OF_TWO = [(0.75, 0.25), (0.6, 0.9)]


@pytest.mark.parametrize("weights", [*slow((0.75, 0.25)), (0.6, 0.9)])
@pytest.mark.parametrize("name", BIASED_CASES)
def test_trained_biases_of_two_adapters_count_from_the_base(
    name: str, weights: tuple[float, float], stage: Stage, tmp_path: Path
) -> None:
    """PEFT: ValueError where two adapters have a bias each."""
    case = all_cases()[name]
    parts: Parts = [(case, seed, w) for seed, w in zip((1, 2), weights, strict=True)]
    options = {"base": str(stage.base(case)), "form": "lora", "budget": ALL}
    check_sum(stage, parts, tmp_path / "out", worst=2e-5, **options)


@pytest.mark.parametrize("weights", WEIGHTS_OF_TWO)
def test_1647_two_vectors_added_to_a_bias(
    weights: tuple[float, float], stage: Stage, tmp_path: Path
) -> None:
    case = all_cases()["beft"]
    parts: Parts = [(case, seed, w) for seed, w in zip((1, 2), weights, strict=True)]
    check_sum(stage, parts, tmp_path / "out", base=str(stage.base(case)))


ORDERS: dict[str, Parts] = {
    "dora": [(DORA, 1, 0.6), (DORA_QV, 2, 0.3), (LORA, 1, 0.5)],
    "ia3": [(IA3, 1, 0.6), (OUT_IA3, 2, 0.3)],
    "loha": [(LOHA, 1, 0.6), (LORA, 2, 0.3)],
    "hra": [(HRA, 1, 0.6), (HRA, 2, 0.3)],
}


@pytest.mark.parametrize("name", ORDERS)
def test_1040_the_order_of_inputs_means_nothing(name: str, stage: Stage, tmp_path: Path) -> None:
    """Merged into the base one after the other, the later ones see the earlier."""
    parts = ORDERS[name]
    case, base = parts[0][0], str(stage.base(parts[0][0]))
    stage.combine(parts, tmp_path / "one", base=base, dtype="fp32")
    stage.combine(parts[::-1], tmp_path / "two", base=base, dtype="fp32")
    one, two = (case.truth(tmp_path / out) for out in ("one", "two"))
    assert stage.error(case, one, two) < 1e-5


def test_1040_a_merge_of_a_merge_is_the_whole_sum(stage: Stage, tmp_path: Path) -> None:
    """Every DoRA has the norms of the base itself, whatever was merged before."""
    base = str(stage.base(DORA))
    stage.combine([(DORA, 1, 0.6), (DORA, 2, 0.7)], tmp_path / "doras", base=base, dtype="fp32")
    specs = [
        InputSpec(str(tmp_path / "doras"), "doras", 1.0),
        InputSpec(str(stage.adapter(LORA, 1)), "lora", 0.5),
    ]
    combine(specs, tmp_path / "out", Options(base=base, dtype="fp32"))
    expected = stage.expected([(DORA, 1, 0.6), (DORA, 2, 0.7), (LORA, 1, 0.5)])
    assert stage.error(DORA, DORA.truth(tmp_path / "out"), expected) < 2e-6


def test_1707_copies_of_layers_are_summed_apart(stage: Stage, tmp_path: Path) -> None:
    """PEFT's merge writes every copy's delta into the one weight that all of them share.

    Nor is PEFT's own sum a truth: loading the second adapter copies the layers of the first again.
    """
    case = REPLICATED
    stage.combine([(case, 1, 0.6), (case, 2, 0.7)], tmp_path / "out", dtype="fp32")
    paths = [stage.adapter(case, seed) for seed in (1, 2)]
    truth = weighted_sum(paths, [0.6, 0.7])
    assert len(truth) == 16
    assert distance(deltas(tmp_path / "out"), truth) < 1e-6 * size(truth)
    theirs = case.truth(tmp_path / "out")
    assert stage.error(case, stage.run(case, tmp_path / "out"), theirs) < 1e-9


def test_1707_verification_knows_copies_of_layers(stage: Stage, tmp_path: Path) -> None:
    parts: Parts = [(REPLICATED, 1, 0.6), (REPLICATED, 2, 0.7)]
    stage.combine(parts, tmp_path / "out")
    verified(stage, parts, tmp_path / "out")


@pytest.mark.parametrize(
    "based",
    [
        True,
        False,
    ],
)
def test_two_aloras_are_summed(*, based: bool, stage: Stage, tmp_path: Path) -> None:
    """PEFT: NotImplementedError on merging."""
    base = str(stage.base(ALORA)) if based else None
    stage.combine([(ALORA, 1, 0.6), (ALORA, 2, 0.7)], tmp_path / "out", base=base, dtype="fp32")
    truth = weighted_sum([stage.adapter(ALORA, seed) for seed in (1, 2)], [0.6, 0.7])
    assert distance(deltas(tmp_path / "out"), truth) < 1e-6 * size(truth)


def test_convolutions_with_groups_are_refused_by_name(stage: Stage, tmp_path: Path) -> None:
    """PEFT: NotImplementedError without a word about which."""
    case = all_cases()["lora_grouped_only"]
    with pytest.raises(CannotMerge, match="depth: linear has no rule for grouped edits"):
        stage.combine([(case, 1, 0.6), (case, 2, 0.7)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def changed(path: Path, out: Path, leaf: str, change: Change) -> Path:
    """A copy of an adapter with the tensors changed whose names contain `leaf`."""
    out.mkdir(exist_ok=True)
    (out / CONFIG).write_text((path / CONFIG).read_text())
    tensors = load_file(path / WEIGHTS)
    with safe_open(path / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    for key in (key for key in tensors if leaf in key):
        change(tensors[key])
    save_file(tensors, out / WEIGHTS, metadata=metadata)
    return out


@pytest.mark.parametrize("case", [DORA, IA3, LOHA, HRA, VERA], ids=lambda c: c.name)
def test_merges_keep_the_dtype(case: FamilyCase, stage: Stage, tmp_path: Path) -> None:
    """PEFT leaves what it decomposes in float32."""
    specs = []
    for seed in (1, 2):
        path, out = stage.adapter(case, seed), tmp_path / f"a{seed}"
        out.mkdir()
        (out / CONFIG).write_text((path / CONFIG).read_text())
        save_file({k: v.bfloat16() for k, v in load_file(path / WEIGHTS).items()}, out / WEIGHTS)
        specs.append(InputSpec(str(out), f"a{seed}", 0.5))
    combine(specs, tmp_path / "out", Options(base=str(stage.base(case))))
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}


# Merge methods 1.2


def test_vera_of_other_seeds_is_summed_as_lora(stage: Stage, tmp_path: Path) -> None:
    """Vectors of different frozen matrices have no average."""
    other = FamilyCase("d_vera", "VeraConfig", {**VERA.options, "projection_prng_key": 5})
    parts: Parts = [(VERA, 1, 0.6), (other, 2, 0.7)]
    base = str(stage.base(VERA))
    check_sum(stage, parts, tmp_path / "out", worst=1e-5, base=base)
    assert config_of(tmp_path / "out")["r"] == 12
    with pytest.raises(AdaptmergeError, match=r"projection|matrices|share"):
        stage.combine(parts, tmp_path / "vera", base=base, form="vera")


def test_vera_kept_as_vera_is_nearer_than_the_average_of_its_vectors(
    stage: Stage, tmp_path: Path
) -> None:
    parts: Parts = [(VERA, 1, 0.5), (VERA, 2, 0.5)]
    stage.combine(parts, tmp_path / "out", base=str(stage.base(VERA)), form="vera")
    one, two = (load_file(stage.adapter(VERA, seed) / WEIGHTS) for seed in (1, 2))
    average = tmp_path / "average"
    average.mkdir()
    (average / CONFIG).write_text((stage.adapter(VERA, 1) / CONFIG).read_text())
    save_file({k: (one[k] + two[k]) / 2 for k in one}, average / WEIGHTS)
    meant = {k: (v + stage.added(VERA, 2)[k]) / 2 for k, v in stage.added(VERA, 1).items()}

    def apart(path: Path) -> float:
        found = added_by(VERA, path)
        return math.sqrt(sum(float((found[k] - v).square().sum()) for k, v in meant.items()))

    assert apart(tmp_path / "out") < apart(average)


def test_a_product_needs_positive_entries(stage: Stage, tmp_path: Path) -> None:
    path = stage.adapter(IA3, 1)
    key = next(iter(load_file(path / WEIGHTS)))
    negative = changed(path, tmp_path / "negative", key, lambda t: t.view(-1)[0].fill_(-0.5))
    with pytest.raises(InputError, match="not positive, which have no power of 0.5"):
        combine([InputSpec(str(negative), "a", 0.5)], tmp_path / "no", Options(method="product"))
    combine([InputSpec(str(negative), "a", 2.0)], tmp_path / "out", Options(method="product"))
    assert float(tensors_of(tmp_path / "out")[key].view(-1)[0]) == pytest.approx(0.25)


# Rounding D10 to D16, E2

CANCELLED: dict[str, FamilyCase] = {
    "loha": LOHA,
    "lokr": all_cases()["lokr"],
    "dora": DORA,
    "ia3": IA3,
    "hra": HRA,
    "vera": VERA,
}


@pytest.mark.parametrize("name", CANCELLED)
def test_an_adapter_less_itself_is_the_base(name: str, stage: Stage, tmp_path: Path) -> None:
    """No rank is made of the rounding that is left over."""
    case = CANCELLED[name]
    parts: Parts = [(case, 1, 0.7), (case, 1, -0.7)]
    stage.combine(parts, tmp_path / "out", base=str(stage.base(case)))
    plain = case.plain()
    left = (case.truth(tmp_path / "out") - plain).norm()
    assert left < 1e-6 * (case.truth(stage.adapter(case, 1)) - plain).norm()
    config = config_of(tmp_path / "out")
    assert config["peft_type"] != "LORA" or config["r"] == 1


@pytest.mark.parametrize("rank", [3, 8])
def test_the_reported_error_counts_what_bf16_rounds(
    rank: int, stage: Stage, tmp_path: Path
) -> None:
    """It is about what is stored: truncated and rounded, not only truncated."""
    parts: Parts = [(LOHA, 1, 0.6), (LORA, 2, 0.7)]
    report = stage.combine(parts, tmp_path / "out", dtype="bf16", budget=Budget(rank=rank))
    meant = {
        k.removesuffix(".weight"): 0.6 * v + 0.7 * stage.added(LORA, 2)[k]
        for k, v in stage.added(LOHA, 1).items()
    }
    stored = deltas(tmp_path / "out")
    apart = sum(float((stored[k] - meant[k]).square().sum()) for k in stored) ** 0.5
    norm = sum(float(meant[k].square().sum()) for k in stored) ** 0.5
    assert report.totals.error == pytest.approx(apart / norm, rel=1e-3)


def test_more_ranks_than_the_matrix_has(stage: Stage, tmp_path: Path) -> None:
    """Three LoHas of rank 64 each, on matrices of 64 x 64, 32 x 64 and 64 x 96."""
    case = FamilyCase("d_loha", "LoHaConfig", {"target_modules": LINEARS, "r": 8, "alpha": 9})
    parts: Parts = [(case, seed, 0.4) for seed in (1, 2, 3)]
    check_sum(stage, parts, tmp_path / "out", worst=1e-5, budget=ALL)
    assert config_of(tmp_path / "out")["r"] <= 64


def test_a_row_that_is_cancelled_is_in_no_dora(stage: Stage, tmp_path: Path) -> None:
    """Magnitudes of 0 take an output away; in a sum of half and half, of any base, the row is lost."""
    path = stage.adapter(DORA, 1)
    silent = changed(path, tmp_path / "silent", "lora_magnitude_vector", lambda t: t[0].zero_())
    specs = [InputSpec(str(silent), name, 0.5) for name in ("one", "two")]
    options: dict[str, Any] = {"base": str(stage.base(DORA)), "dtype": "fp32"}
    with pytest.raises(CannotMerge, match="cancel a row of the base itself.*pass --as lora"):
        combine(specs, tmp_path / "dora", Options(**options))
    assert not (tmp_path / "dora").exists()
    combine(specs, tmp_path / "out", Options(**options, form="lora", budget=ALL))
    assert stage.error(DORA, DORA.truth(tmp_path / "out"), DORA.truth(silent)) < 1e-5


# Section 3: heads of other families than LoRA

BERTS = {
    "loha": FamilyCase(
        "d_loha_bert", "LoHaConfig", {"target_modules": ["query"], "r": 2, "alpha": 3}, "bert"
    ),
    "ia3": FamilyCase(
        "d_ia3_bert",
        "IA3Config",
        {"target_modules": ["query"], "feedforward_modules": []},
        "bert",
    ),
    "oft": FamilyCase(
        "d_oft_bert",
        "OFTConfig",
        {"target_modules": ["query"], "oft_block_size": 8},
        "bert",
    ),
}


def head_of(path: Path) -> dict[str, Tensor]:
    return {k: v for k, v in tensors_of(path).items() if "classifier" in k}


@pytest.mark.parametrize("name", BERTS)
def test_heads_survive_the_conversion(name: str, stage: Stage, tmp_path: Path) -> None:
    """convert_to_lora writes the heads of all adapters under one key."""
    case = BERTS[name]
    path = stage.adapter(case, 1)
    options = Options(base=str(stage.base(case)), form="lora", budget=ALL, dtype="fp32")
    combine([InputSpec(str(path))], tmp_path / "out", options)
    assert same_bits(head_of(tmp_path / "out"), head_of(path))
    assert head_of(path)
    assert config_of(tmp_path / "out")["modules_to_save"] == ["classifier"]
    assert stage.error(case, case.truth(tmp_path / "out"), case.truth(path)) < 1e-5


@pytest.mark.parametrize("name", BERTS)
def test_1574_heads_of_merged_adapters_stay_apart(name: str, stage: Stage, tmp_path: Path) -> None:
    """PEFT: ValueError for two IA3 with a head each; the others cannot be merged at all."""
    case = BERTS[name]
    parts: Parts = [(case, 1, 0.5), (case, 2, 0.5)]
    with pytest.raises(CannotMerge, match="head differs between a0, a1: pass --heads"):
        stage.combine(parts, tmp_path / "refused")
    stage.combine(parts, tmp_path / "out", heads="separate")
    for n, (_, seed, _) in enumerate(parts):
        kept = head_of(tmp_path / "out" / f"a{n}")
        assert same_bits(kept, head_of(stage.adapter(case, seed)))
        assert bool(torch.isfinite(case.truth(tmp_path / "out" / f"a{n}")).all())
    stage.combine(parts, tmp_path / "average", heads="average", dtype="fp32")
    one, two = (head_of(stage.adapter(case, seed)) for seed in (1, 2))
    for key, value in head_of(tmp_path / "average").items():
        assert torch.allclose(value, (one[key] + two[key]) / 2, atol=1e-7)
    verified(stage, parts, tmp_path / "average")


# Sections 5 and 8: conversion, and what it asks for

NO_BASE = (
    *("adalora", "adalora_gpt2", "loha", "loha_patterns", "lokr", "lokr_both", "lokr_patterns"),
    *("delora", "gralora", "gralora_hybrid", "c3a", "vblora", "lora_bd"),
)


PADDED = ("adalora", "loha_patterns")  # ranks that differ, made one


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        *((name, "per-site") for name in NO_BASE),
        *((name, "uniform") for name in PADDED),
        *(repeats(name, "uniform") for name in NO_BASE if name not in PADDED),
    ],
)
def test_deltas_are_converted_without_the_base(
    name: str, ranks: str, stage: Stage, tmp_path: Path
) -> None:
    """PEFT makes the whole base model for it; and results of several ranks cannot be loaded (3737)."""
    case = all_cases()[name]
    path = stage.adapter(case, 1)
    options = Options(form="lora", budget=ALL, dtype="fp32", ranks=ranks)
    combine([InputSpec(str(path))], tmp_path / "out", options)
    assert config_of(tmp_path / "out")["peft_type"] == "LORA"
    assert stage.error(case, case.truth(tmp_path / "out"), case.truth(path)) < 1e-5


def test_a_dora_as_lora_keeps_its_magnitude(stage: Stage, tmp_path: Path) -> None:
    """convert_to_lora says that it can, and leaves it out: an error of 55 %."""
    path, base = stage.adapter(DORA, 1), str(stage.base(DORA))
    with pytest.raises(AdaptmergeError, match="--base"):
        combine([InputSpec(str(path))], tmp_path / "no", Options(form="lora"))
    options = Options(form="lora", budget=ALL, dtype="fp32", base=base)
    combine([InputSpec(str(path))], tmp_path / "out", options)
    assert config_of(tmp_path / "out")["use_dora"] is False
    assert stage.error(DORA, DORA.truth(tmp_path / "out"), DORA.truth(path)) < 1e-5


SCRIPT = """
import sys
from pathlib import Path
from adaptmerge.formats.inputs import InputSpec
from adaptmerge.commands.combine import Options, combine
base, out, *paths = sys.argv[1:]
combine([InputSpec(path, weight=0.5) for path in paths], Path(out), Options(base=base))
print(sorted({"peft", "transformers", "accelerate"} & sys.modules.keys()))
"""


def test_no_merge_makes_the_base_model(stage: Stage, tmp_path: Path) -> None:
    """PEFT needs the model in memory, and each of the adapters on it."""
    paths = [stage.adapter(DORA, 1), stage.adapter(LORA, 1), stage.adapter(OUT_IA3, 1)]
    given = map(str, (stage.base(DORA), tmp_path / "out", *paths))
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, *given],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert found.stdout.splitlines()[-1:] == ["[]"], found.stderr


def test_weights_may_differ_between_modules(stage: Stage, tmp_path: Path) -> None:
    """PEFT has one number per adapter."""
    parts: Parts = [(DORA, 1, 1.0), (IA3, 2, 1.0)]
    rules = (SiteRule("o_proj", {"a0": 0.25}), SiteRule("down_proj", {"a1": 0.0}))
    options: dict[str, Any] = {"base": str(stage.base(DORA)), "dtype": "fp32", "rules": rules}
    stage.combine(parts, tmp_path / "out", **options)
    state = DORA.base_model().double().state_dict()
    one, two = stage.added(DORA, 1), stage.added(IA3, 2)
    moved = {
        k: v + (0.25 if "o_proj" in k else 1) * one[k] + (0 if "down_proj" in k else 1) * two[k]
        for k, v in state.items()
    }
    model = DORA.base_model().double()
    model.load_state_dict(moved)
    assert stage.error(DORA, DORA.truth(tmp_path / "out"), logits(model, DORA.inputs())) < 2e-6


DAMAGE: dict[str, tuple[Parts, dict[str, Any], str, Change]] = {
    "a magnitude": (
        [(DORA, 1, 0.6), (LORA, 2, 0.7)],
        {"base": True},
        "lora_magnitude_vector",
        lambda t: t.mul_(1.05),
    ),
    "a vector of ia3": ([(IA3, 1, 0.6), (IA3, 2, 0.7)], {}, "ia3_l", lambda t: t.add_(0.05)),
    "a reflection": ([(HRA, 1, 0.5), (HRA, 2, 0.5)], {}, "hra_u", lambda t: t[0].neg_()),
    "a vector of vera": (
        [(VERA, 1, 0.5)],
        {"base": True, "form": "vera"},
        "vera_lambda_b",
        lambda t: t.mul_(1.1),
    ),
    "a delta of loha": ([(LOHA, 1, 0.5), (LOHA, 2, 0.5)], {}, "lora_A.weight", lambda t: t.neg_()),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_verification_sees_more_than_nan(name: str, stage: Stage, tmp_path: Path) -> None:
    """safe_merge looks for values that are not finite, and for nothing else."""
    parts, options, leaf, change = DAMAGE[name]
    base, out = str(stage.base(parts[0][0])), tmp_path / "out"
    stage.combine(parts, out, **{**options, "base": base if options else None})
    verified(stage, parts, out)
    changed(out, out, leaf, change)
    inputs = {f"a{n}": str(stage.adapter(case, seed)) for n, (case, seed, _) in enumerate(parts)}
    verdict = verify(out, Questions(base=base, inputs=inputs))
    failed = {check.name for check in verdict.checks if check.status == FAIL}
    nearest = options.get("form") == "vera"  # its own reference in a forward, which says so
    assert {"weights"} | (set() if nearest else {"forward"}) <= failed
    doubts = [c.detail for c in verdict.checks if "judged by their weights alone" in c.detail]
    assert bool(doubts) is nearest


RIGHT = (
    *("adalora", "beft", "boft", "fourier", "glora", "hira", "ln_tuning", "miss_bat", "oft"),
    *("pvera", "randlora", "road_2", "shira", "vblora", "lora_bias", "lora_embedding"),
    *("lora_pissa", "lora_alora", "prompt_llama", "prefix_qwen2", "prefix_bert"),
    *slow("c3a", "deft", "delora", "frod", "gralora", "hra", "lokr", "osf", "peanut_2_gelu"),
    *slow("supertuning", "tinylora", "unilora", "wave", "lora_kasa", "lora_bd", "lora_mica"),
    *slow("lora_olora", "prompt_gpt2"),
)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PEFT's own tensors
@pytest.mark.parametrize("name", RIGHT)
def test_verification_passes_what_is_right(name: str, stage: Stage, tmp_path: Path) -> None:
    case = all_cases()[name]
    parts: Parts = [(case, 1, 1.0)]
    stage.combine(parts, tmp_path / "out", base=str(stage.base(case)))
    verified(stage, parts, tmp_path / "out")
