"""The report: plain JSON, whatever the numbers, and what reads it back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from fuse.tiny import Tiny
from safetensors.torch import load_file, save_file

from adaptmerge.algebra.fit import Budget
from adaptmerge.commands import verify
from adaptmerge.commands.combine import Options, combine
from adaptmerge.commands.fuse.report import percent
from adaptmerge.commands.verify.difference import difference
from adaptmerge.errors import AdaptmergeError, InputError
from adaptmerge.formats.inputs import InputSpec, open_input
from adaptmerge.outputs.report import Totals, load_report, sanity_notes


def poisoned(fixtures: Path, folder: Path) -> Path:

    shutil.copytree(fixtures / "tinyllama" / "lora-r8-perl", folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[key][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def no_constants(text: str) -> float:
    raise AssertionError(f"{text} is not JSON")


def test_a_report_on_nan_is_still_json(fixtures: Path, tmp_path: Path) -> None:
    source = poisoned(fixtures, tmp_path / "in")
    other = str(fixtures / "tinyllama" / "lora-r8-cheaders")
    options = Options(allow=frozenset({"nonfinite"}))
    combine([InputSpec(str(source)), InputSpec(other)], tmp_path / "out", options)
    json.loads((tmp_path / "out" / "adaptmerge.json").read_text(), parse_constant=no_constants)
    lines = load_report(tmp_path / "out").sites
    assert any(line.norm != line.norm for line in lines)
    questions = verify.Questions(inputs={"in": str(source), "lora-r8-cheaders": other})
    assert verify.verify(tmp_path / "out", questions).status == verify.FAIL


@pytest.mark.parametrize("name", ["ia3-shakespeare", "vera-r64-shakespeare"])
def test_alpha_is_refused_where_there_is_none(fixtures: Path, name: str) -> None:
    with pytest.raises(InputError, match="no alpha"):
        open_input(InputSpec(str(fixtures / "tinyllama" / name), alpha=16.0))


def test_alpha_is_refused_where_the_file_says_it(fixtures: Path) -> None:
    with pytest.raises(InputError, match="leave it out"):
        open_input(InputSpec(str(fixtures / "adapterhub" / "llama" / "seq_bn"), alpha=16.0))
    with pytest.raises(InputError, match="contradicts"):
        open_input(InputSpec(str(fixtures / "tinyllama" / "lora-r8-perl"), alpha=64.0))


def totals(norm: float, kept: float, largest: float = 1.0) -> Totals:
    return Totals(norm, 0.0, 0.0, 0.0, {"a": largest, "b": 0.5}, {"a b": 0.0}, kept)


def test_sanity_notes_speak_of_opposition_and_overshoot() -> None:
    (note,) = sanity_notes(totals(norm=0.6, kept=0.62))
    assert note.what == "38 % of the norm is lost: inputs oppose each other"
    (note,) = sanity_notes(totals(norm=2.1, kept=1.1))
    assert "overshoot" in note.what
    assert "2.1 x" in note.what
    assert sanity_notes(totals(norm=1.0, kept=1.0)) == []


def test_a_rank_cap_that_breaks_the_error_budget_is_said(fixtures: Path, tmp_path: Path) -> None:
    names = ("lora-r8-perl", "lora-r8-cheaders")
    specs = [InputSpec(str(fixtures / "tinyllama" / name)) for name in names]
    report = combine(specs, tmp_path / "a", Options(budget=Budget(rank=3, max_error=0.05)))
    assert any(n.kind == "approximated" and "--rank 3" in n.what for n in report.notes)
    report = combine(specs, tmp_path / "b", Options(budget=Budget(rank=16, max_error=0.05)))
    assert not any(n.kind == "approximated" for n in report.notes)
    with pytest.raises(AdaptmergeError, match="--rank 3"):
        combine(specs, tmp_path / "c", Options(budget=Budget(rank=3, max_error=0.05), strict=True))
    assert not (tmp_path / "c").exists()


def test_peft_linear_is_labelled(fixtures: Path, tmp_path: Path) -> None:
    names = ("lora-r8-perl", "lora-r8-cheaders")
    specs = [InputSpec(str(fixtures / "tinyllama" / name)) for name in names]
    report = combine(specs, tmp_path / "a", Options(method="peft-linear"))
    assert any("not the sum of the deltas" in note.what for note in report.notes)


def test_force_leaves_no_file_of_another_format(fixtures: Path, tmp_path: Path) -> None:
    spec, out = InputSpec(str(fixtures / "tinyllama" / "lora-r8-perl")), tmp_path / "out"
    combine([spec], out, Options(target="native"))
    (out / "mine.txt").write_text("keep")
    combine([spec], out, Options(target="peft", force=True))
    names = {file.name for file in out.iterdir()}
    assert not names & {"graph.json", "tensors.safetensors"}
    assert {"mine.txt", "adapter_config.json"} <= names
    assert open_input(InputSpec(str(out))).format.name == "peft"


def test_a_base_gives_its_own_names(tiny: Tiny, tmp_path: Path) -> None:
    """A site under a wrapper that the base does not have is named as the base names it."""
    source, other, base = tmp_path / "in", str(tiny("lora-r8-cheaders")), str(tiny("base"))
    shutil.copytree(tiny("lora-r8-perl"), source)
    file = source / "adapter_model.safetensors"
    tensors = load_file(file)
    longer = {
        k.replace("base_model.model.", "base_model.model.language_model."): v
        for k, v in tensors.items()
    }
    save_file(longer, file, metadata={"format": "pt"})
    report = combine(
        [InputSpec(str(source)), InputSpec(other)], tmp_path / "out", Options(base=base)
    )
    assert {line.module.split(".")[0] for line in report.sites} == {"model"}
    assert any("named as in the base" in note.what for note in report.notes)
    inputs = {"in": str(source), "lora-r8-cheaders": other}
    verdict = verify.verify(tmp_path / "out", verify.Questions(base, inputs, "cpu"))
    found = {check.name: check.status for check in verdict.checks}
    assert found["weights"] == found["forward"] == found["forward in peft"] == verify.PASS


def test_a_folder_without_a_config_is_read_with_alpha(fixtures: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(fixtures / "tinyllama" / "lora-r8-perl" / "adapter_model.safetensors", source)
    told = open_input(InputSpec(str(source), alpha=16.0)).adapter
    right = open_input(InputSpec(str(fixtures / "tinyllama" / "lora-r8-perl"))).adapter
    assert difference(told, right).relative == 0.0
    guessed = open_input(InputSpec(str(source))).adapter
    assert any(note.kind == "assumed" and "alpha" in note.what for note in guessed.notes)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), "16", None, True])
def test_an_alpha_that_is_no_number_is_refused(
    fixtures: Path, tmp_path: Path, alpha: object
) -> None:
    source = tmp_path / "in"
    shutil.copytree(fixtures / "tinyllama" / "lora-r8-perl", source)
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": alpha}))
    with pytest.raises(InputError, match="lora_alpha"):
        open_input(InputSpec(str(source)))


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (1.0, "100 %"),
        (0.9997, "99.97 %"),
        (0.99999, "100 %"),
        (1.002, "100.2 %"),
        (12.2, "1220 %"),
        (0.00109, "0.11 %"),
        (3e-06, "< 0.01 %"),
        (0.0, "0 %"),
        (-1e-9, "0 %"),
        (-1.0, "-100 %"),
        (None, "-"),
    ],
)
def test_shares_are_shown_in_percent(share: float | None, shown: str) -> None:
    assert percent(share) == shown
