"""Files that earlier versions wrote, native adapters and reports, read as they were meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from console import run

from adaptmerge.commands.fuse import is_fused, load_fuse_report
from adaptmerge.formats.inputs import InputSpec, open_input
from adaptmerge.outputs.report import load_report

ROOT = Path(__file__).resolve().parent.parent.parent
EARLIER = ROOT / "fixtures" / "earlier"
CONVERTED = {
    "native-vera": "adapterhub/bert/vera",
    "native-lora_gating": "adapterhub/llama/lora_gating",
    "native-lokr-r4-perl": "tinyllama/lokr-r4-perl",
}
ACTIVATIONS = {"native-seq_bn": ("bottleneck", 2), "native-prefix-8-perl": ("prefix", 1)}


@pytest.mark.parametrize("name", CONVERTED)
def test_a_native_file_computes_what_it_was_made_of(name: str) -> None:
    outcome = run("diff", str(EARLIER / name), str(ROOT / "fixtures" / CONVERTED[name]))
    assert outcome.code == 0, outcome.shown
    assert "compute the same" in outcome.stdout


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_native_file_of_what_flows_is_read(name: str) -> None:
    adapter = open_input(InputSpec(str(EARLIER / name))).adapter
    kind, count = ACTIVATIONS[name]
    assert [edit.kind for edit in adapter.edits] == [kind] * count


def test_the_place_of_a_bottleneck_was_once_beside_its_site() -> None:
    adapter = open_input(InputSpec(str(EARLIER / "native-seq_bn"))).adapter
    assert [str(site) for site in adapter.sites()] == ["model.layers.0:mlp", "model.layers.1:mlp"]
    outcome = run(
        "diff", str(EARLIER / "native-seq_bn"), str(ROOT / "fixtures/adapterhub/llama/seq_bn")
    )
    assert outcome.code == 0, outcome.shown
    assert "over 2 sites" in outcome.stdout


@pytest.mark.parametrize("name", ["merged", "heads", "native-mixed"])
def test_an_output_is_verified_by_its_report(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # sources are relative to it
    outcome = run("verify", str(EARLIER / name), "--base", "fixtures/tinyllama/base")
    assert outcome.code == 0, outcome.shown
    assert outcome.stdout.splitlines()[-1].endswith(": pass")


def test_reports_are_read() -> None:
    assert load_report(EARLIER / "extracted").command == "extract"
    assert is_fused(EARLIER / "fused")
    report = load_fuse_report(EARLIER / "fused")
    assert len(report.sites) == 28
    assert all(loss.gain is not None for loss in report.adapters.values())


@pytest.mark.parametrize("name", ["merged", "heads", "fused", "extracted"])
def test_reports_are_explained(name: str) -> None:
    outcome = run("explain", str(EARLIER / name), "layers.0.self_attn.q_proj")
    assert outcome.code == 0, outcome.shown
    assert "model.layers" in outcome.stdout
