"""GPTQ's layouts: both versions of zeros, all bits, any order of inputs, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schemes.bit_by_bit import (
    MODULE,
    Tensors,
    along_columns,
    along_rows,
    assert_stored_again,
    less_one,
    packed_in,
    random_codes,
    random_scales,
    whole,
)

from adaptmerge.errors import InputError
from adaptmerge.schemes import affine
from adaptmerge.schemes.coded import dequantised

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}


def layer(
    bits: int = 4,
    outputs: int = 32,
    inputs: int = 96,
    groups: int = 3,
    order: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensors, torch.Tensor]:
    """A layer of the second version and its values (out, in) in float64."""
    codes = random_codes(outputs, inputs, bits)
    zeros = random_codes(groups, outputs, bits, seed=1)
    scales = random_scales(groups, outputs, dtype=dtype)
    group = torch.arange(inputs) // (-(-inputs // groups)) if order is None else order
    tensors = {
        f"{MODULE}.qweight": along_rows(codes.T, bits),
        f"{MODULE}.qzeros": along_columns(zeros, bits),
        f"{MODULE}.scales": scales,
    }
    if order is not None:
        tensors[f"{MODULE}.g_idx"] = order.int()
    return tensors, (codes - zeros[group].T) * scales.double()[group].T


def config(**changes: Any) -> dict[str, Any]:
    return {"quantization_config": {**CONFIG, **changes}}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_all_bits(tmp_path: Path, bits: int, dtype: torch.dtype) -> None:
    tensors, values = layer(bits, dtype=dtype)
    packed = packed_in(tmp_path, tensors, config(bits=bits))[MODULE]
    assert packed.shape == (32, 96)
    assert torch.equal(dequantised(packed, whole(packed)), values.float())
    assert torch.equal(dequantised(packed, (5, 9)), values[5:9].float())
    assert_stored_again(packed)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("said", [{"checkpoint_format": "gptq"}, {"checkpoint_format": None}])
def test_the_first_version_stores_zeros_less_one(
    tmp_path: Path, bits: int, said: dict[str, Any]
) -> None:
    """Also a zero of 0, which borrows from its neighbour."""
    tensors, values = layer(bits)
    tensors[f"{MODULE}.qzeros"] = less_one(tensors[f"{MODULE}.qzeros"], bits)
    packed = packed_in(tmp_path, tensors, config(bits=bits, **said))[MODULE]
    assert torch.equal(dequantised(packed, whole(packed)), values.float())
    assert_stored_again(packed)


@pytest.mark.parametrize("outputs", [8, 16])
@pytest.mark.parametrize("inputs", [8, 16])
def test_the_least_that_there_is(tmp_path: Path, outputs: int, inputs: int) -> None:
    tensors, values = layer(4, outputs, inputs, 1)
    packed = packed_in(tmp_path, tensors, config(group_size=-1))[MODULE]
    assert torch.equal(dequantised(packed, whole(packed)), values.float())
    assert torch.equal(dequantised(packed, (1, 2)), values[1:2].float())
    assert_stored_again(packed)


def test_the_versions_are_not_mixed_up(tmp_path: Path) -> None:
    tensors, values = layer()
    packed = packed_in(tmp_path, tensors, config(checkpoint_format="gptq"))[MODULE]
    assert not torch.equal(dequantised(packed, whole(packed)), values.float())


@settings(max_examples=20)
@given(seed=st.integers(0, 2**16), groups=st.integers(1, 7))
def test_any_order_of_inputs(
    tmp_path_factory: pytest.TempPathFactory, seed: int, groups: int
) -> None:
    """Groups of unequal size, and some of no input at all."""
    order = torch.randint(0, groups, (64,), generator=torch.Generator().manual_seed(seed))
    tensors, values = layer(4, 8, 64, groups, order)
    folder = tmp_path_factory.mktemp("base")
    packed = packed_in(folder, tensors, config(group_size=16, desc_act=True))[MODULE]
    assert torch.equal(dequantised(packed, whole(packed)), values.float())
    assert torch.equal(packed.grid((0, 8))[1].groups, order)
    assert_stored_again(packed)


@pytest.mark.parametrize(("size", "groups"), [(-1, 1), (96, 1), (64, 2), (32, 3), (48, 2)])
def test_groups_in_order(tmp_path: Path, size: int, groups: int) -> None:
    """The last group may be short."""
    tensors, _ = layer(groups=groups)
    packed = packed_in(tmp_path, tensors, config(group_size=size))[MODULE]
    expected = torch.arange(96) // (96 if size < 0 else size)
    assert torch.equal(packed.grid((0, 1))[1].groups, expected)
    assert_stored_again(packed)


def test_layers_of_different_bits(tmp_path: Path) -> None:
    """A checkpoint whose config has rules for some layers (`dynamic`)."""
    tensors, values = layer()
    other, wide = layer(bits=8, groups=6)
    tensors |= {name.replace("q_proj", "v_proj"): value for name, value in other.items()}
    rules = {"+:.*v_proj": {"bits": 8, "group_size": 16}}
    packed = packed_in(tmp_path, tensors, config(dynamic=rules))
    for module, expected in ((MODULE, values), (MODULE.replace("q_proj", "v_proj"), wide)):
        found = packed[module]
        assert torch.equal(dequantised(found, whole(found)), expected.float())
        assert_stored_again(found)


def test_scales_are_rounded_to_their_dtype(tmp_path: Path) -> None:
    tensors, _ = layer()
    packed = packed_in(tmp_path, tensors, config())[MODULE]
    scale = torch.tensor([[1 / 3, 1e6, -1e6]]).expand(32, 3)
    found = packed.nearest_scales(scale, (0, 32))
    assert found is not None
    assert torch.equal(found[:, 0], torch.full((32,), 1 / 3).half().float())
    assert found[0, 1:].tolist() == [65504.0, -65504.0]
    codes, grid = packed.grid((0, 32))
    stored = packed.pack(codes, grid.rescaled(found))[f"{MODULE}.scales"]
    assert torch.equal(stored.float().T, found)


def without(tensors: Tensors, *parts: str) -> Tensors:
    return {name: value for name, value in tensors.items() if name.split(".")[-1] not in parts}


def test_all_that_is_missing_is_named(tmp_path: Path) -> None:
    tensors, _ = layer()
    other = {name.replace("q_proj", "v_proj"): value for name, value in layer()[0].items()}
    broken = without(tensors, "qzeros", "scales") | without(other, "qzeros")
    with pytest.raises(InputError) as caught:
        packed_in(tmp_path, broken, config())
    other_module = MODULE.replace("q_proj", "v_proj")
    assert set(caught.value.problems) == {
        f"{MODULE}.qzeros is missing",
        f"{MODULE}.scales is missing",
        f"{other_module}.qzeros is missing",
    }


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("qzeros", torch.zeros(3, 5, dtype=torch.int32), r"qzeros has the shape \[3, 5\]"),
        (
            "qzeros",
            torch.zeros(0, dtype=torch.int32),
            r"qzeros has the shape \[0\], expected two sides",
        ),
        ("qweight", torch.zeros(12, 31, dtype=torch.int32), r"qweight has the shape \[12, 31\]"),
        ("qweight", torch.zeros(0, 32, dtype=torch.int32), r"qweight has the shape \[0, 32\]"),
        ("qweight", torch.zeros(12, 32), "qweight is stored as f32, expected i32 or u32"),
        ("scales", torch.zeros(4, 32).half(), r"scales has the shape \[4, 32\]"),
        ("scales", torch.zeros(3, 32, dtype=torch.int8), "scales is stored as i8"),
        ("g_idx", torch.zeros(95, dtype=torch.int32), r"g_idx has the shape \[95\]"),
        ("g_idx", torch.full((96,), 3, dtype=torch.int32), "names the groups 3 to 3, expected 0"),
        ("g_idx", torch.full((96,), -1, dtype=torch.int32), "names the groups -1 to -1"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, part: str, value: torch.Tensor, said: str) -> None:
    tensors, _ = layer()
    tensors[f"{MODULE}.{part}"] = value
    with pytest.raises(InputError, match=said):
        packed_in(tmp_path, tensors, config())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"checkpoint_format": "marlin"}, "GPTQ's format 'marlin', which is not known"),
        ({"checkpoint_format": "gptq_p"}, "format 'gptq_p'"),
        ({"is_marlin_format": True}, "laid out for one kernel"),
        ({"rotation": "hadamard"}, r"was rotated \(hadamard\)"),
        ({"meta": {"rotation": "random"}}, r"was rotated \(random\)"),
        ({"bits": 5}, "says 5 bits, expected one of: 2, 3, 4, 8"),
        ({"bits": "four"}, "bits is 'four': expected a whole number"),
        ({"bits": None}, "says None bits"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        packed_in(tmp_path, layer()[0], config(**changes))


@settings(max_examples=40)
@given(bits=st.sampled_from([1, 2, 3, 4, 5, 6, 8]), words=st.integers(0, 30), seed=st.integers(0))
def test_codes_follow_one_another(bits: int, words: int, seed: int) -> None:
    codes = random_codes(4, words * 32, bits, seed % 2**31)
    raw = affine.packed(codes.to(torch.uint8), bits)
    assert torch.equal(affine.unpacked(raw, bits).long(), codes)
    if words:
        assert torch.equal(raw.view(torch.int32), along_columns(codes, bits))
