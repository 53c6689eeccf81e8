"""Defects found by an adversarial review, each held by the smallest case that shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptmerge.algebra.fit import Budget
from adaptmerge.commands import verify as library
from adaptmerge.commands.combine import Options, combine
from adaptmerge.errors import AdaptmergeError, CannotStore, InputError
from adaptmerge.formats.inputs import InputSpec, open_input
from adaptmerge.merging.weights import parse_rule

WEIGHTS, CONFIG, REPORT = "adapter_model.safetensors", "adapter_config.json", "adaptmerge.json"
PREFIX = "base_model.model."
SITES = [f"model.layers.{i}.self_attn.{m}" for i in range(2) for m in ("q_proj", "v_proj")]
Q0 = SITES[0]


def sides(seed: int, width: int = 16, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for site in SITES:
        found[f"{PREFIX}{site}.lora_A.weight"] = torch.randn(4, width, generator=generator)
        found[f"{PREFIX}{site}.lora_B.weight"] = torch.randn(16, 4, generator=generator)
    return {key: value.to(dtype) for key, value in found.items()}


def rows(name: str, seed: int = 9) -> dict[str, Tensor]:
    """One vector per site: magnitudes or biases."""
    generator = torch.Generator().manual_seed(seed)
    return {f"{PREFIX}{site}.{name}": torch.rand(16, generator=generator) + 0.5 for site in SITES}


def save(folder: Path, tensors: dict[str, Tensor], **more: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (folder / CONFIG).write_text(json.dumps({**config, **more}), encoding="utf-8")
    return folder


def merge(out: Path, one: Path, two: Path, weights: tuple[float, float], **options: Any) -> Path:
    specs = [InputSpec(str(p), weight=w) for p, w in zip((one, two), weights, strict=True)]
    combine(specs, out, Options(**options))
    return out


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return save(tmp_path / "a", sides(1)), save(tmp_path / "b", sides(2))


def edit_tensors(out: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(out / WEIGHTS)
    change(tensors)
    save_file(tensors, out / WEIGHTS, {"format": "pt"})


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    table = json.loads(path.read_text(encoding="utf-8"))
    change(table)
    path.write_text(json.dumps(table), encoding="utf-8")


def status(out: Path) -> str:
    return library.verify(out).status


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "_fsdp_wrapped_module."])
def test_wrappers_around_the_whole_peft_model_are_removed(tmp_path: Path, wrapper: str) -> None:
    wrapped = save(tmp_path / "a", {wrapper + key: value for key, value in sides(1).items()})
    adapter = open_input(InputSpec(str(wrapped))).adapter
    assert sorted({edit.site.module for edit in adapter.edits}) == SITES


def test_a_linear_layer_of_one_input_is_no_vector(tmp_path: Path) -> None:
    one, two = save(tmp_path / "a", sides(1, 1)), save(tmp_path / "b", sides(2, 1))
    assert status(merge(tmp_path / "out", one, two, (0.7, 0.3))) == library.PASS


def test_a_magnitude_outlives_a_delta_of_rank_0(tmp_path: Path) -> None:
    tensors = {**sides(1), **rows("lora_magnitude_vector")}
    tensors[f"{PREFIX}{Q0}.lora_B.weight"].zero_()
    pattern = {"layers.0.self_attn.q_proj": 3}
    dora = save(tmp_path / "a", tensors, use_dora=True, alpha_pattern=pattern)
    combine([InputSpec(str(dora))], tmp_path / "out")
    assert f"{PREFIX}{Q0}.lora_magnitude_vector" in load_file(tmp_path / "out" / WEIGHTS)
    assert status(tmp_path / "out") == library.PASS


def test_a_bias_outlives_a_weight_that_cancels(tmp_path: Path) -> None:
    first = {**sides(1), **rows("lora_B.bias", 3)}
    second = {**sides(2), **rows("lora_B.bias", 4)}
    second |= {
        key: value for key, value in first.items() if f"{Q0}.lora_" in key and "bias" not in key
    }
    one = save(tmp_path / "a", first, lora_bias=True)
    two = save(tmp_path / "b", second, lora_bias=True)
    out = merge(tmp_path / "out", one, two, (1.0, -1.0))
    assert f"{PREFIX}{Q0}.lora_A.weight" in load_file(out / WEIGHTS)
    assert status(out) == library.PASS


def test_a_bias_alone_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tensors = {**sides(1), **rows("lora_B.bias")}
    one = save(tmp_path / "a", tensors, lora_bias=True)
    rules = (parse_rule("layers.0.self_attn.q_proj.weight:a=0"),)
    with pytest.raises(CannotStore, match="bias"):
        combine([InputSpec(str(one))], tmp_path / "out", Options(rules=rules))
    assert not (tmp_path / "out").exists()


def test_inputs_that_cancel_in_other_gauges_pass(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, turn = sides(3), torch.randn(4, 4)
    second = {
        key: torch.linalg.inv(turn) @ value if "lora_A" in key else value @ turn
        for key, value in first.items()
    }
    one, two = save(tmp_path / "a", first), save(tmp_path / "b", second)
    out = merge(tmp_path / "out", one, two, (1.0, -1.0), budget=Budget(rank=4))
    assert status(out) == library.PASS


@pytest.mark.parametrize("apart", [1e-3, 1e-4])
@pytest.mark.parametrize("options", [{"budget": Budget(rank=2)}, {"dtype": "bf16"}], ids=str)
def test_the_error_of_inputs_that_nearly_cancel_is_right(
    tmp_path: Path, apart: float, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    first = sides(3)
    second = {key: value + apart * torch.randn_like(value) for key, value in first.items()}
    one, two = save(tmp_path / "a", first), save(tmp_path / "b", second)
    assert status(merge(tmp_path / "out", one, two, (1.0, -1.0), **options)) == library.PASS


@pytest.mark.parametrize("options", [{}, {"dtype": "fp32"}, {"budget": Budget(rank=2)}], ids=str)
def test_peft_linear_reports_what_it_rounds(tmp_path: Path, options: dict[str, Any]) -> None:
    one = save(tmp_path / "a", sides(1, dtype=torch.bfloat16))
    two = save(tmp_path / "b", sides(2, dtype=torch.bfloat16))
    out = merge(tmp_path / "out", one, two, (0.7, -0.4), method="peft-linear", **options)
    assert status(out) == library.PASS


def test_what_peft_would_ignore_is_said(tmp_path: Path) -> None:
    tensors = {**sides(1), **rows("lora_B.bias")}
    adapter = open_input(InputSpec(str(save(tmp_path / "a", tensors, target_modules=["q_proj"]))))
    said = " ".join(note.what for note in adapter.adapter.notes if note.kind == "assumed")
    assert "target_modules" in said
    assert "lora_bias" in said


def lose(out: Path) -> None:
    edit_tensors(out, lambda tensors: tensors[f"{PREFIX}{Q0}.lora_B.weight"].zero_())


def excuse(out: Path) -> None:
    """The site is lost, and the report calls it truncation."""
    lose(out)

    def change(report: dict[str, Any]) -> None:
        line = next(line for line in report["sites"] if line["site"] == Q0)
        line.update(error=1.0, truncation=line["norm"])

    edit_json(out / REPORT, change)


def forget(out: Path) -> None:
    """The site is in neither the output nor the report."""
    edit_tensors(out, lambda t: [t.pop(f"{PREFIX}{Q0}.lora_{side}.weight") for side in "AB"])
    edit_json(out / REPORT, lambda r: r.update(sites=[s for s in r["sites"] if s["site"] != Q0]))


def call_it_rank_0(out: Path) -> None:
    edit_tensors(out, lambda t: [t.pop(f"{PREFIX}{Q0}.lora_{side}.weight") for side in "AB"])

    def change(report: dict[str, Any]) -> None:
        next(s for s in report["sites"] if s["site"] == Q0).update(rank=0, truncation=1e-9)

    edit_json(out / REPORT, change)


def other_weights(out: Path) -> None:
    edit_json(out / REPORT, lambda r: [s["weights"].update(a=0.4, b=0.7) for s in r["sites"]])


def claim_bf16(out: Path) -> None:
    edit_json(out / REPORT, lambda r: r["output"].update(dtype="bf16"))


def no_hashes(out: Path) -> None:
    edit_json(out / REPORT, lambda r: [i.update(sha256={}) for i in r["inputs"]])


def fewer_targets(out: Path) -> None:
    edit_json(out / CONFIG, lambda c: c.update(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    "damage",
    [excuse, forget, call_it_rank_0, other_weights, claim_bf16, no_hashes, fewer_targets],
)
@pytest.mark.parametrize("budget", [Budget(), Budget(rank=3), Budget(energy=0.9)], ids=str)
def test_a_report_cannot_excuse_damage(
    pair: tuple[Path, Path], tmp_path: Path, damage: Callable[[Path], None], budget: Budget
) -> None:
    out = merge(tmp_path / "out", *pair, (0.7, 0.4), budget=budget)
    assert status(out) == library.PASS
    damage(out)
    assert status(out) == library.FAIL


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(options=None),
        lambda r: r["options"].pop("rules"),
        lambda r: r["inputs"][0].pop("name"),
        lambda r: r.update(inputs=[]),
        lambda r: r["sites"][0].update(error="x"),
        lambda r: r["sites"][0].update(error=float("inf")),
        lambda r: r["output"].update(dtype="x"),
        lambda r: r.update(method="x"),
    ],
)
def test_a_damaged_report_is_one_sentence(
    pair: tuple[Path, Path], tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    out = merge(tmp_path / "out", *pair, (0.7, 0.4))
    edit_json(out / REPORT, change)
    with pytest.raises(AdaptmergeError):
        library.verify(out)


TOKENS = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD = f"{PREFIX}lm_head.weight"


@pytest.mark.parametrize(
    ("more", "config", "changed"),
    [
        (
            {TOKENS: torch.ones(2, 16)},
            {"trainable_token_indices": {"embed_tokens": [3, 7]}},
            {"trainable_token_indices": {"model.embed_tokens": [3, 8]}},
        ),
        ({HEAD: torch.ones(8, 16)}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": None}),
        (rows("lora_magnitude_vector"), {"use_dora": True}, {"use_dora": False}),
        (rows("lora_B.bias"), {"lora_bias": True}, {"lora_bias": False}),
    ],
    ids=["tokens", "head", "dora", "bias"],
)
def test_what_only_the_config_says_is_verified(
    tmp_path: Path, more: dict[str, Tensor], config: dict[str, Any], changed: dict[str, Any]
) -> None:
    one = save(tmp_path / "a", {**sides(1), **more}, **config)
    combine([InputSpec(str(one))], tmp_path / "out")
    assert status(tmp_path / "out") == library.PASS
    edit_json(tmp_path / "out" / CONFIG, lambda c: c.update(changed))
    assert status(tmp_path / "out") == library.FAIL


def test_merged_biases_of_the_base_ask_for_it(tmp_path: Path) -> None:
    one = save(tmp_path / "a", {**sides(1), **rows("base_layer.bias", 3)}, bias="lora_only")
    two = save(tmp_path / "b", {**sides(2), **rows("base_layer.bias", 4)}, bias="lora_only")
    out = merge(tmp_path / "out", one, two, (0.5, 0.5))
    assert status(out) == library.PASS

    def change(report: dict[str, Any]) -> None:
        report["options"]["weights"].update(a=1.0, b=1.0)
        for line in report["sites"]:
            line["weights"].update(a=1.0, b=1.0)

    edit_json(out / REPORT, change)
    with pytest.raises(InputError, match=re.escape("--base")):
        library.verify(out)
