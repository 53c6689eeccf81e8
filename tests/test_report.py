"""The report: plain JSON, whatever the numbers, and what reads it back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptmerge import verify
from adaptmerge.errors import InputError
from adaptmerge.inputs import InputSpec, open_input
from adaptmerge.merge import Options, combine
from adaptmerge.report import Totals, load_report, sanity_notes


def poisoned(fixtures: Path, folder: Path) -> Path:
    import shutil

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
