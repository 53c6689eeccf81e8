"""Tensors that hold no real numbers are refused by name; values count however small or large they are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft_cases import CASES
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adaptmerge.algebra.linalg import gram, product_norm
from adaptmerge.commands.combine import Options, combine
from adaptmerge.commands.inspect import summarise
from adaptmerge.errors import InputError
from adaptmerge.formats.inputs import InputSpec, open_input

TYPES = [torch.int8, torch.int64, torch.bool, torch.complex64]


def retyped(path: Path, word: str, dtype: torch.dtype) -> str:
    """Writes the first tensor with a word in its name as another type; returns that name."""
    with safe_open(path, "pt") as file:
        said = file.metadata()
    tensors = load_file(path)
    key = next(name for name in sorted(tensors) if word in name)
    save_file({**tensors, key: tensors[key].to(dtype)}, path, said)
    return key


def refused(source: Path, key: str, dtype: torch.dtype) -> None:
    short = {torch.complex64: "c64", torch.bool: "bool", torch.int8: "i8", torch.int64: "i64"}[
        dtype
    ]
    said = rf"(holds {short} values|has values of {short}): expected"
    with pytest.raises(InputError, match=said) as found:
        open_input(InputSpec(str(source)))
    assert all(part in str(found.value) for part in parts(key))


def parts(key: str) -> list[str]:
    """The module and the tensor in it that a key names."""
    module, _, leaf = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
    return [module, leaf]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("word", ["lora_A", "lora_B"])
def test_low_rank_factors(word: str, dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = CASES["plain"].build(tmp_path / "a", 1)
    key = retyped(adapter / "adapter_model.safetensors", word, dtype)
    refused(adapter, key, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_stored_whole(dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = CASES["plain"].build(tmp_path / "a", 1, modules_to_save=["lm_head"])
    key = retyped(adapter / "adapter_model.safetensors", "lm_head", dtype)
    refused(adapter, key, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_native_adapters(dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = CASES["plain"].build(tmp_path / "a", 1)
    combine([InputSpec(str(adapter))], tmp_path / "native", Options(target="native"))
    (file,) = (tmp_path / "native").glob("*.safetensors")
    refused(tmp_path / "native", retyped(file, "", dtype), dtype)


def test_all_of_them_are_named(tmp_path: Path) -> None:
    adapter = CASES["plain"].build(tmp_path / "a", 1)
    file = adapter / "adapter_model.safetensors"
    keys = [retyped(file, f"layers.{i}.self_attn.q_proj.lora_A", torch.int8) for i in (0, 1)]
    with pytest.raises(InputError) as found:
        open_input(InputSpec(str(adapter)))
    assert all(part in str(found.value) for key in keys for part in parts(key))


# Squares of small and large values


def scaled(adapter: Path, factor: float) -> None:
    """Multiplies both factors of every site, in float32."""
    file = adapter / "adapter_model.safetensors"
    tensors = {key: value.float() * factor for key, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("factor", [1e-40, 1e-30, 1e-12, 1e9])
def test_cosines_do_not_depend_on_scale(factor: float, tmp_path: Path) -> None:
    adapters = [CASES["plain"].build(tmp_path / f"{seed}", seed) for seed in (1, 2)]
    twice = [InputSpec(str(adapters[0]), "again", weight=0.5)]
    specs = [InputSpec(str(path), f"in{i}", weight=0.5) for i, path in enumerate(adapters)]
    before = combine([*specs, *twice], tmp_path / "before", Options(dtype="fp32")).totals
    for path in adapters:
        scaled(path, factor)
    after = combine([*specs, *twice], tmp_path / "after", Options(dtype="fp32")).totals
    coarse = factor < 1e-38  # of which float32 holds a few bits
    assert after.cosines["in0 again"] == pytest.approx(1.0, abs=1e-12)
    for pair, value in after.cosines.items():
        assert -1 <= value <= 1
        assert value == pytest.approx(before.cosines[pair], abs=1e-2 if coarse else 1e-6)
    for name, norm in after.input_norms.items():
        share = norm / (before.input_norms[name] * factor * factor)
        assert share == pytest.approx(1, rel=1e-2 if coarse else 1e-6)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (1e-42, torch.float32),
        (1e-25, torch.float32),
        (1e25, torch.float32),
        (1e-140, torch.float64),
        (1e120, torch.float64),
    ],
)
def test_products_of_matrices_of_any_size(scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    up = (torch.randn(20, 6, generator=generator, dtype=torch.float64) * scale).to(dtype)
    down = (torch.randn(6, 30, generator=generator, dtype=torch.float64) * scale).to(dtype)
    owners = torch.tensor(
        [[1.0] * 3 + [0.0] * 3, [0.0] * 3 + [0.5] * 3, [0.0] * 6], dtype=torch.float64
    )
    plain = [(up.double() / scale) @ torch.diag(row) @ (down.double() / scale) for row in owners]
    wanted = torch.stack(plain).flatten(1) @ torch.stack(plain).flatten(1).T
    found = gram(up, down, owners)
    shares = found.scales / scale / scale
    assert torch.allclose(found.products * shares[:, None] * shares, wanted, rtol=1e-6, atol=1e-9)
    whole = (up.double() / scale) @ (down.double() / scale)
    assert product_norm(up, down) / scale / scale == pytest.approx(float(whole.norm()), rel=1e-6)


def test_norms_of_small_adapters_are_not_zero(tmp_path: Path) -> None:
    adapter = CASES["plain"].build(tmp_path / "a", 1)
    scaled(adapter, 1e-30)
    found = summarise(open_input(InputSpec(str(adapter))), values=True)
    norms = [family.norm for family in found.families]
    assert all(norm is not None and 0 < norm < 1e-50 and math.isfinite(norm) for norm in norms)
    assert not [note for note in found.notes if "zero" in note.what]
