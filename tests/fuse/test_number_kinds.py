"""Bases of numbers that are none, or not finite: refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import samples
import torch
from fuse.layers import MODULE, layer
from fuse.models import fuse
from safetensors.torch import load_file, save_file

from adaptmerge.errors import CannotStore, InputError


@pytest.mark.parametrize("quant", ["same", "nf4"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_a_base_of_other_numbers_is_refused(quant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Integers that no scheme reads are codes of one that is not known."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    weights = {f"{module}.weight": torch.ones(12, 9) for module in samples.MODULES}
    weights[f"{samples.MODULES[0]}.weight"] = torch.ones(12, 9).to(dtype)
    save_file(weights, base / "model.safetensors")
    adapter = samples.adapter(tmp_path / "a", 1)
    with pytest.raises((CannotStore, InputError), match="expected (floating-point|real) numbers"):
        fuse(base, [adapter], tmp_path / "out", quant=quant)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quant", ["same", "nf4"])
def test_a_base_without_values_is_refused(quant: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    weights = {f"{module}.weight": torch.ones(12, 9) for module in samples.MODULES}
    weights["model.layers.2.self_attn.q_proj.weight"] = torch.ones(0, 9)
    save_file(weights, base / "model.safetensors")
    adapter = samples.adapter(tmp_path / "a", 1)
    lossy = {"quant": quant, "max_loss": 100.0, "allow": frozenset({"base", "loss"})}
    if quant == "same":  # nothing is done to it
        fuse(base, [adapter], tmp_path / "out", **lossy)
        return
    with pytest.raises(CannotStore, match="q_proj.weight has no values in the base"):
        fuse(base, [adapter], tmp_path / "out", **lossy)


def test_a_vector_where_a_matrix_belongs_is_refused(tmp_path: Path) -> None:
    """GPT-2 stores its matrices as (in, out): they are turned."""
    base, name = tmp_path / "base", "transformer.h.0.attn.c_attn"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    save_file({f"{name}.weight": torch.ones(9)}, base / "model.safetensors")
    biases = {f"{samples.PREFIX}{name}.weight": torch.ones(9)}
    config = {"modules_to_save": ["c_attn"], "tensors": biases}
    adapter = samples.write(tmp_path / "a", {}, **config)  # type: ignore[arg-type]  # of two kinds
    with pytest.raises((CannotStore, InputError), match="expected a matrix"):
        fuse(base, [adapter], tmp_path / "out", allow=frozenset({"base", "loss"}))


@pytest.mark.parametrize("allow", [{"base", "loss"}, {"base", "loss", "nonfinite"}])
def test_codes_hold_only_finite_values(allow: set[str], tmp_path: Path) -> None:
    base = layer(tmp_path / "base", "nf4", 24, 64)
    sides = samples.random_sides(1, modules=[MODULE], shape=(24, 64))
    sides[MODULE][0][0, 0] = torch.nan
    adapter = samples.write(tmp_path / "a", sides)
    expected = f"lora_A.weight' of {MODULE} holds NaN or infinity; codes have no such value"
    with pytest.raises(InputError, match=expected):
        fuse(base, [adapter], tmp_path / "out", allow=frozenset(allow))


@pytest.mark.parametrize("axes", [(), (0, 0)])
def test_packed_codes_lie_along_the_first_axis(axes: tuple[int, ...], tmp_path: Path) -> None:
    base = layer(tmp_path / "base", "nf4", 24, 64)
    tensors = load_file(base / "model.safetensors")
    packed = tensors[f"{MODULE}.weight"].reshape(*(1 for _ in axes), 2, -1)
    save_file({**tensors, f"{MODULE}.weight": packed}, base / "model.safetensors")
    sides = samples.random_sides(1, modules=[MODULE], shape=(24, 64))
    adapter = samples.write(tmp_path / "a", sides)
    with pytest.raises(InputError, match=r"weight has shape .*, expected \[768, 1\]"):
        fuse(base, [adapter], tmp_path / "out", allow=frozenset({"base", "loss"}))
