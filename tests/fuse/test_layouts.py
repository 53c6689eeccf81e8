"""A LoRA fused into every layout of quantised weights, against the values of the layouts' own libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
import samples
import torch
from safetensors.torch import load_file

from adaptmerge.bases.open import open_base
from adaptmerge.commands.fuse import FuseOptions, fuse
from adaptmerge.formats.inputs import InputSpec
from adaptmerge.schemes.coded import dequantised
from adaptmerge.schemes.view import view_of

FOLDER = Path(__file__).parents[2] / "fixtures" / "quantised"
# stacked experts have tests of their own; two values a weight, with scales that stay, leave no room
LEFT_OUT = {"mxfp4", "hqq-1bit-straddling"}
LAYOUTS = sorted(p.name for p in FOLDER.iterdir() if p.name not in LEFT_OUT)
RANK, RATIO = 2, 0.05
COARSE = 0.6  # sub of layers so narrow: feedback has few columns, scales have few blocks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lora_arrives_in_every_layout(layout: str, tmp_path: Path) -> None:
    expected = load_file(FOLDER / layout / "expected.safetensors")
    sides = {}
    for number, (module, weight) in enumerate(expected.items()):
        generator = torch.Generator().manual_seed(number)
        down = torch.randn(RANK, weight.shape[1], generator=generator)
        up = torch.randn(weight.shape[0], RANK, generator=generator)
        size = float((up @ down).norm()) * 2  # alpha / r of the config that `samples` writes
        sides[module] = (down, up * (RATIO * float(weight.norm()) / size))
    adapter = samples.write(tmp_path / "adapter", sides)
    options = FuseOptions(allow=frozenset({"loss", "base"}))
    fuse(str(FOLDER / layout), [InputSpec(str(adapter), "a")], tmp_path / "out", options)
    after = view_of(open_base(str(tmp_path / "out"))).coded
    inner = squared = inside = 0.0
    for module, delta in samples.deltas(adapter).items():
        stored = dequantised(after[f"{module}.weight"], (0, delta.shape[0])).double()
        moved = stored - expected[module].double()
        basis = torch.linalg.qr(sides[module][0].double().T).Q
        inner += float((moved * delta).sum())
        squared += float(delta.square().sum())
        inside += float(((moved - delta) @ basis).square().sum())
    assert squared > 0
    assert inner / squared == pytest.approx(1, abs=0.1)
    assert (inside / squared) ** 0.5 < COARSE
