"""Weights quantised anew, against what GPTQModel packed of the same: fixtures/quantised/gptq-v1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptmerge.errors import CannotStore
from adaptmerge.files.safetensors import read_header
from adaptmerge.schemes.coded import dequantised
from adaptmerge.schemes.gptq_quantiser import quantised
from adaptmerge.schemes.scheme import Kept, quantisers
from adaptmerge.tensors.dtypes import F16

FOLDER = Path(__file__).resolve().parents[2] / "fixtures" / "quantised" / "gptq-v1"
LAYERS = {"model.layers.0.self_attn.q_proj": (64, 128), "model.layers.0.mlp.down_proj": (32, 192)}


def weights() -> dict[str, Tensor]:
    """What fixtures/make_quantised.py quantised."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator) * torch.linspace(0.01, 0.3, shape[0])[:, None]
        for name, shape in LAYERS.items()
    }


def test_tensors_are_those_of_the_library(tmp_path: Path) -> None:
    theirs = load_file(FOLDER / "model.safetensors")
    save_file(weights(), tmp_path / "w.safetensors")
    refs = read_header(str(tmp_path / "w.safetensors")).refs
    expected = load_file(FOLDER / "expected.safetensors")
    for module in LAYERS:
        packed = quantised(module, refs[module], 64)
        found = {name: ref.read() for name, ref in packed.tensors.items()}
        wanted = {name: value for name, value in theirs.items() if name.startswith(module)}
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), name
        for rows in ((0, packed.shape[0]), (3, 17)):
            assert torch.equal(dequantised(packed, rows), expected[module][slice(*rows)])


def test_config_and_shapes_that_do_not_fit(tmp_path: Path) -> None:
    way = quantisers()["gptq-int4-g128"]
    said = json.loads((FOLDER / "config.json").read_text())["quantization_config"]
    assert dict(way.config(Kept(), F16)) == {**said, "group_size": 128}
    tensors = {"narrow": torch.ones(8, 64), "odd": torch.ones(9, 128)}
    save_file(tensors, tmp_path / "w.safetensors")
    refs = read_header(str(tmp_path / "w.safetensors")).refs
    with pytest.raises(CannotStore, match="narrow: 64 inputs"):
        way.quantise("narrow", refs["narrow"], F16)
    with pytest.raises(CannotStore, match="odd: 9 outputs"):
        way.quantise("odd", refs["odd"], F16)
