"""Measured defects of PEFT's add_weighted_adapter, one test each: none of them may be ours.

Issue numbers are those of https://github.com/huggingface/peft.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import CASES, PeftCase, logits, peft_forward
from safetensors.torch import save_file
from samples import (
    MODULES,
    PREFIX,
    adapter,
    config_of,
    deltas,
    distance,
    random_sides,
    same_bits,
    size,
    tensors_of,
    tree,
    weighted_sum,
    write,
)

from adaptmerge.algebra.fit import Budget
from adaptmerge.commands.combine import Options, combine
from adaptmerge.errors import CannotMerge, InputError, OutputError, UsageError
from adaptmerge.formats.inputs import InputSpec

BASE_COPIES = ".base_layer."
HEADS = {"head_llama": "lm_head", "head_bert": "classifier"}


def merge(
    paths: Sequence[Path], weights: Sequence[float] | None = None, name: str = "out", **options: Any
) -> Path:
    given = [None] * len(paths) if weights is None else list(weights)
    specs = [InputSpec(str(p), p.name, w) for p, w in zip(paths, given, strict=True)]
    output = paths[0].parent / name
    combine(specs, output, Options(**options))
    return output


def pair(case: PeftCase, folder: Path, **overrides: Any) -> list[Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [case.build(folder / f"a{seed}", seed, **overrides) for seed in (1, 2)]


def effect_error(case: PeftCase, found: Path, expected: Path) -> float:
    y_base = logits(case.make_model(), case.example_inputs())
    y = peft_forward(case, expected)
    return float((peft_forward(case, found) - y).norm() / (y - y_base).norm())


def head_of(path: Path) -> dict[str, torch.Tensor]:
    tensors = tensors_of(path).items()
    return {k: v for k, v in tensors if any(f".{head}." in k for head in HEADS.values())}


# Section 2: add_weighted_adapter


def test_svd_applies_the_scale_once(tmp_path: Path) -> None:
    """0.20: svd types multiplied by the scale twice."""
    paths = [adapter(tmp_path / f"a{seed}", seed, lora_alpha=12) for seed in (1, 2)]
    truth = weighted_sum(paths, [0.7, 0.3])
    output = merge(paths, [0.7, 0.3], method="svd", budget=Budget(rank=6))
    kept = {m: torch.linalg.svdvals(delta) for m, delta in truth.items()}
    best = sum(float(s[3:].square().sum()) for s in kept.values()) ** 0.5
    assert distance(deltas(output), truth) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("name", ["rslora", "dora", "lora_bias", "plain"])
def test_3761_one_adapter_at_weight_one_is_itself(name: str, tmp_path: Path) -> None:
    """PEFT's output error: 2.2 with use_rslora, 0.83 with use_dora, 0.75 with lora_bias."""
    case = CASES[name]
    path = case.build(tmp_path / "a", seed=1)
    assert effect_error(case, merge([path], [1.0]), path) < 1e-5


def test_3761_rslora_does_not_leak_into_the_result(tmp_path: Path) -> None:
    """The scale is folded, so the result must not say use_rslora and scale again."""
    paths = [write(tmp_path / f"a{i}", random_sides(i), use_rslora=True) for i in (1, 2)]
    output = merge(paths)
    assert config_of(output)["use_rslora"] is False
    truth = weighted_sum(paths, [0.5, 0.5])
    assert distance(deltas(output), truth) <= 1e-6 * size(truth)


def test_3761_dora_is_never_summed_as_lora(tmp_path: Path) -> None:
    with pytest.raises(CannotMerge, match="dora edits.* on the base: pass --base"):
        merge(pair(CASES["dora"], tmp_path))


def test_3761_dora_beside_lora_is_refused(tmp_path: Path) -> None:
    magnitudes = {f"{PREFIX}{m}.lora_magnitude_vector": torch.ones(12) for m in MODULES}
    dora = write(tmp_path / "dora", random_sides(1), tensors=magnitudes, use_dora=True)
    with pytest.raises(CannotMerge, match="add and dora edits meet.* pass --base"):
        merge([dora, adapter(tmp_path / "lora", 2)])


def test_3761_lora_bias_is_kept(tmp_path: Path) -> None:
    output = merge(pair(CASES["lora_bias"], tmp_path))
    biases = [k for k in tensors_of(output) if k.endswith("lora_B.bias")]
    assert len(biases) == 4
    assert config_of(output)["lora_bias"] is True


@pytest.mark.parametrize("field", ["kasa_config", "layer_replication"])
def test_3761_1707_variants_are_never_summed_as_lora(field: str, tmp_path: Path) -> None:
    """PEFT merges these silently wrong."""
    config: dict[str, Any] = {"kasa_config": {}, "layer_replication": [[0, 2]]}
    values = {f"{PREFIX}{m}.lora_diag": torch.ones(3) for m in MODULES}
    tensors = values if field == "kasa_config" else {}
    one = write(tmp_path / "a", random_sides(1), tensors=tensors, **{field: config[field]})
    with pytest.raises(CannotMerge, match="base"):
        merge([one, adapter(tmp_path / "b", 2)])


def test_inits_that_changed_the_base_are_refused(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", 1, init_lora_weights="pissa_niter_4")
    with pytest.raises(InputError, match="init_lora_weights is 'pissa_niter_4'"):
        merge([path])


@pytest.mark.parametrize("ranks", ["uniform", "per-site"])
@pytest.mark.parametrize("method", ["linear", "svd", "cat"])
def test_3737_results_with_rank_patterns_can_be_loaded(
    method: str, ranks: str, tmp_path: Path
) -> None:
    """PEFT: size mismatch on loading."""
    case = CASES["patterns"]
    paths = pair(case, tmp_path)
    output = merge(paths, method=method, ranks=ranks)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        y = peft_forward(case, output)
    assert bool(torch.isfinite(y).all())
    truth = weighted_sum(paths, [0.5, 0.5])
    if method != "svd":
        assert distance(deltas(output), truth) <= 1e-6 * size(truth)
    assert bool(config_of(output)["rank_pattern"]) == (ranks == "per-site")


def test_3744_modules_may_have_different_ranks(tmp_path: Path) -> None:
    """PEFT: 'stack expects each tensor to be equal size'."""
    one, two = random_sides(1, 3), random_sides(2, 3)
    one[MODULES[0]], two[MODULES[1]] = (
        random_sides(3, 5)[MODULES[0]],
        random_sides(4, 5)[MODULES[1]],
    )
    leaves = [module.rpartition(".")[2] for module in MODULES]
    paths = [
        write(tmp_path / "a", one, r=3, rank_pattern={leaves[0]: 5}),
        write(tmp_path / "b", two, r=3, rank_pattern={leaves[1]: 5}),
    ]
    truth = weighted_sum(paths, [0.5, 0.5])
    assert distance(deltas(merge(paths)), truth) <= 1e-6 * size(truth)


def test_patterns_match_whole_components_in_order(tmp_path: Path) -> None:
    """First hit wins; a pattern for q_proj is none for seq_proj."""
    modules = ("l.0.q_proj", "l.1.q_proj", "l.0.seq_proj")
    sides = random_sides(1, 3, modules)
    path = write(tmp_path / "a", sides, alpha_pattern={r"0\.q_proj": 30, "q_proj": 9}, lora_alpha=3)
    found = deltas(merge([path], [1.0]))
    for module, scale in zip(modules, (10, 3, 1), strict=True):
        a, b = sides[module]
        assert torch.allclose(found[module], scale * (b.double() @ a.double()), rtol=1e-5)


def test_svd_rank_may_exceed_the_matrix(tmp_path: Path) -> None:
    """PEFT: mat1 and mat2 shapes cannot be multiplied."""
    paths = [adapter(tmp_path / f"a{seed}", seed, rank=8) for seed in (1, 2)]
    output = merge(paths, method="svd", budget=Budget(rank=64))
    truth = weighted_sum(paths, [0.5, 0.5])
    assert config_of(output)["r"] <= 9
    for module, delta in truth.items():
        best = float(torch.linalg.svdvals(delta)[8:].norm())
        assert float((deltas(output)[module] - delta).norm()) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("method", ["linear", "svd", "cat", "peft-linear"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_svd_keeps_the_dtype(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT leaves an svd in float32."""
    paths = [write(tmp_path / f"a{i}", random_sides(i, dtype=dtype)) for i in (1, 2)]
    assert {t.dtype for t in tensors_of(merge(paths, method=method)).values()} == {dtype}


def test_mixed_dtypes_become_float32_and_dtype_decides(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a", random_sides(1, dtype=torch.bfloat16)),
        write(tmp_path / "b", random_sides(2, dtype=torch.float16)),
    ]
    assert {t.dtype for t in tensors_of(merge(paths)).values()} == {torch.float32}
    cast = tensors_of(merge(paths, name="cast", dtype="bf16"))
    assert {t.dtype for t in cast.values()} == {torch.bfloat16}


def test_a_short_list_of_weights_is_refused(tmp_path: Path) -> None:
    """PEFT zips: the last adapter is left out without a word."""
    paths = [adapter(tmp_path / f"a{seed}", seed) for seed in (1, 2)]
    with pytest.raises(UsageError, match="--weights has 1 number for 2 inputs"):
        combine([InputSpec(str(p)) for p in paths], tmp_path / "out", Options(weights="0.7"))


def test_an_existing_output_is_not_passed_over(tmp_path: Path) -> None:
    """PEFT returns None and does nothing when the adapter name is taken."""
    path = adapter(tmp_path / "a", 1)
    merge([path])
    with pytest.raises(OutputError, match="out exists: choose another -o or pass --force"):
        merge([path])


def test_a_single_adapter_keeps_its_method(tmp_path: Path) -> None:
    """PEFT turns every type into linear for one adapter, so svd_rank is ignored."""
    path = adapter(tmp_path / "a", 1, rank=5)
    output = merge([path], [1.0], method="svd", budget=Budget(rank=2))
    assert config_of(output)["r"] == 2


def test_regex_and_list_targets_mix(tmp_path: Path) -> None:
    """PEFT: ValueError."""
    paths = [CASES["regex"].build(tmp_path / "a", 1), CASES["plain"].build(tmp_path / "b", 2)]
    output = merge(paths)
    truth = weighted_sum(paths, [0.5, 0.5])
    assert distance(deltas(output), truth) <= 1e-6 * size(truth)
    model_targets = peft_forward(CASES["plain"], output)
    assert bool(torch.isfinite(model_targets).all())


@pytest.mark.parametrize("name", ["bias_lora_only", "bias_all"])
def test_stored_biases_of_two_adapters_are_averaged(name: str, tmp_path: Path) -> None:
    """PEFT: ValueError. Weights that sum to 1 need no base."""
    paths = pair(CASES[name], tmp_path)
    output = tensors_of(merge(paths, [0.75, 0.25]))
    one, two = (tensors_of(path) for path in paths)
    biases = [key for key in one if key.endswith(".bias")]
    assert biases
    for key in biases:
        assert torch.allclose(output[key], 0.75 * one[key] + 0.25 * two[key], atol=1e-7)


def test_2275_the_config_has_no_field_that_names_a_training_trick(tmp_path: Path) -> None:
    path = adapter(
        tmp_path / "a",
        1,
        init_lora_weights="orthogonal",
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        eva_config={},
    )
    stale = {"init_lora_weights", "layers_to_transform", "layers_pattern", "eva_config"}
    assert not stale & config_of(merge([path])).keys()


def test_layers_to_transform_still_selects_only_those_layers(tmp_path: Path) -> None:
    """The merge of layer 1 only must not touch layer 0 when it is loaded."""
    case = CASES["layer_subset"]
    output = merge(pair(case, tmp_path))
    targets = config_of(output)["target_modules"]
    assert all("1." in target for target in targets)


def test_the_svd_of_thin_factors_is_fast(tmp_path: Path) -> None:
    """PEFT takes the SVD of the dense matrix: about 150 s for 4096 x 4096."""
    sides = [random_sides(i, 8, ["m.layers.0.q_proj"], (4096, 4096)) for i in (1, 2)]
    paths = [write(tmp_path / f"a{i}", found) for i, found in enumerate(sides)]
    start = time.perf_counter()
    merge(paths, method="svd")
    assert time.perf_counter() - start < 5


# Section 3: modules_to_save


@pytest.mark.parametrize("name", ["head_llama", "head_bert"])
def test_1574_two_trained_heads_are_refused_by_name(name: str, tmp_path: Path) -> None:
    paths = pair(CASES[name], tmp_path)
    before = tree(tmp_path)
    with pytest.raises(CannotMerge, match="head differs between a1, a2: pass --heads NAME"):
        merge(paths)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["head_llama", "head_bert"])
@pytest.mark.parametrize("chosen", ["a1", "a2"])
def test_the_head_is_the_chosen_adapters(name: str, chosen: str, tmp_path: Path) -> None:
    """merge_and_unload(adapter_names=["b"]) keeps the head of the active adapter instead."""
    case = CASES[name]
    output = merge(pair(case, tmp_path), heads=chosen)
    assert same_bits(head_of(output), head_of(tmp_path / chosen))
    assert config_of(output)["modules_to_save"] == [HEADS[name]]
    assert bool(torch.isfinite(peft_forward(case, output)).all())


@pytest.mark.parametrize("first", [True, False])
def test_a_head_that_one_adapter_has_is_never_lost(first: bool, tmp_path: Path) -> None:
    """PEFT: an untrained copy when the holder comes first, none at all when it does not."""
    holder = CASES["head_llama"].build(tmp_path / "holder", 1)
    other = CASES["head_llama"].build(tmp_path / "other", 2, modules_to_save=None)
    output = merge([holder, other] if first else [other, holder])
    assert same_bits(head_of(output), head_of(holder))
    report = json.loads((output / "adaptmerge.json").read_text())
    assert any("kept from holder" in note["what"] for note in report["notes"])


def test_a_head_that_is_left_out_is_a_note(tmp_path: Path) -> None:
    holder = CASES["head_llama"].build(tmp_path / "holder", 1)
    other = CASES["head_llama"].build(tmp_path / "other", 2, modules_to_save=None)
    output = merge([holder, other], heads="other")
    assert head_of(output) == {}
    report = json.loads((output / "adaptmerge.json").read_text())
    dropped = [note for note in report["notes"] if note["kind"] == "dropped"]
    assert ["head of holder left out" in note["what"] for note in dropped] == [True]


def test_equal_heads_are_one(tmp_path: Path) -> None:
    paths = pair(CASES["head_llama"], tmp_path)
    key = next(iter(head_of(paths[0])))
    sides = {k: v for k, v in tensors_of(paths[1]).items() if k != key}
    save_file({**sides, **head_of(paths[0])}, paths[1] / "adapter_model.safetensors")
    assert same_bits(head_of(merge(paths)), head_of(paths[0]))


def test_two_classifiers_are_merged_with_their_heads(tmp_path: Path) -> None:
    """PEFT adds the head to modules_to_save itself, and then cannot merge two adapters that have one."""
    case = CASES["head_bert"]
    paths = pair(case, tmp_path)
    one, two = map(head_of, paths)
    output = merge(paths, [0.75, 0.25], heads="average")
    for key, value in head_of(output).items():
        assert torch.allclose(value, 0.75 * one[key] + 0.25 * two[key], atol=1e-7)
    assert bool(torch.isfinite(peft_forward(case, output)).all())
    stacked = head_of(merge(paths, heads="concat", name="stacked"))
    for key, value in stacked.items():
        assert torch.equal(value, torch.cat([one[key], two[key]]))


@pytest.mark.parametrize("name", ["head_llama", "head_bert"])
def test_no_head_is_written_over_another(name: str, tmp_path: Path) -> None:
    """convert_to_lora writes the heads of all adapters under one key: the last one is left."""
    paths = pair(CASES[name], tmp_path)
    output = merge(paths, heads="separate")
    for path in paths:
        assert same_bits(head_of(output / path.name), head_of(path))
        assert config_of(output / path.name)["modules_to_save"] == [HEADS[name]]
        assert bool(torch.isfinite(peft_forward(CASES[name], output / path.name)).all())


def test_tied_copies_stay_tied(tmp_path: Path) -> None:
    """ensure_weight_tying saves the one matrix twice; two merges of it must not differ."""
    saved = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    paths = pair(CASES["head_llama"], tmp_path, **saved)
    for path in paths:
        tensors = tensors_of(path)
        tied = tensors[f"{PREFIX}model.embed_tokens.weight"].clone()
        save_file({**tensors, f"{PREFIX}lm_head.weight": tied}, path / "adapter_model.safetensors")
        config = {**config_of(path), "modules_to_save": ["embed_tokens", "lm_head"]}
        (path / "adapter_config.json").write_text(json.dumps(config))
    output = tensors_of(merge(paths, [0.75, 0.25], heads="average"))
    assert torch.equal(
        output[f"{PREFIX}model.embed_tokens.weight"], output[f"{PREFIX}lm_head.weight"]
    )


def test_trainable_tokens_that_differ_are_summed_or_refused_by_name(tmp_path: Path) -> None:
    paths = pair(CASES["tokens"], tmp_path)
    with pytest.raises(CannotMerge, match="token 3 differs between a1, a2, whose weights sum to 2"):
        merge(paths, [1.0, 1.0])
    output = tensors_of(merge(paths, heads="a2"))
    rows: Mapping[str, torch.Tensor] = {k: v for k, v in output.items() if "token_adapter" in k}
    assert same_bits(rows, {k: tensors_of(paths[1])[k] for k in rows})
    assert rows


def test_copies_of_the_base_are_no_adapter(tmp_path: Path) -> None:
    """save_embedding_layers keeps the whole base matrix beside the LoRA; it is not averaged."""
    paths = pair(CASES["embedding"], tmp_path)
    output = tensors_of(merge(paths, [1.0, 1.0]))
    kept = {k: v for k, v in output.items() if BASE_COPIES in k}
    assert kept
    assert same_bits(kept, {k: tensors_of(paths[0])[k] for k in kept})
