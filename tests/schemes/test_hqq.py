"""HQQ's layout: lanes of groups in each entry, groups that straddle rows, settings as tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schemes.bit_by_bit import MODULE, Tensors, assert_stored_again, packed_in, whole

from adaptmerge.errors import InputError
from adaptmerge.schemes.coded import dequantised

CONFIG = {"quantization_config": {"quant_method": "hqq", "skip_modules": ["lm_head"]}}
PACKINGS = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
PER_ENTRY = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


def letters(text: str) -> torch.Tensor:
    return torch.tensor([ord(letter) for letter in text], dtype=torch.uint8)


def numbers(**said: float) -> Tensors:
    """Settings of a layer, as tensors."""
    return {f"{MODULE}.{name}": torch.tensor(value) for name, value in said.items()}


def lanes(codes: list[list[int]], bits: int) -> torch.Tensor:
    """The entries of groups of codes, by HQQ's definition: the first groups are in the highest bits."""
    per = PER_ENTRY[bits]
    height = -(-len(codes) // per)
    found = [[0] * len(codes[0]) for _ in range(height)]
    for group, row in enumerate(codes):
        lane, place = divmod(group, height)
        for column, code in enumerate(row):
            found[place][column] += code << bits * (per - 1 - lane)
    return torch.tensor(found, dtype=torch.int32 if bits == 3 else torch.uint8)


def layer(
    bits: int = 4, shape: tuple[int, int] = (16, 64), size: int = 32, seed: int = 0
) -> tuple[Tensors, torch.Tensor]:
    """A layer and its values (out, in) in float32."""
    generator = torch.Generator().manual_seed(seed)
    groups = shape[0] * shape[1] // size
    codes = torch.randint(0, 1 << bits, (groups, size), generator=generator)
    scale = (0.01 + torch.rand(groups, 1, generator=generator)).half()
    zero = (torch.rand(groups, 1, generator=generator) * (1 << bits)).half()
    tensors = {
        f"{MODULE}.W_q": lanes(codes.tolist(), bits),
        f"{MODULE}.scale": scale,
        f"{MODULE}.zero": zero,
        f"{MODULE}.shape": torch.tensor(shape),
        f"{MODULE}.packing": letters(PACKINGS[bits]),
        **numbers(group_size=size, axis=1, nbits=bits, quant_scale=0, quant_zero=0),
    }
    return tensors, ((codes.float() - zero.float()) * scale.float()).view(shape)


@settings(max_examples=40)
@given(
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    rows=st.integers(1, 3),
    width=st.sampled_from([16, 24, 40]),
    size=st.sampled_from([8, 16, 48]),
    seed=st.integers(0, 2**16),
)
def test_values_and_bytes(
    tmp_path_factory: pytest.TempPathFactory, bits: int, rows: int, width: int, size: int, seed: int
) -> None:
    """Also where groups run over the ends of rows, and where 3 bits leave lanes empty."""
    tensors, values = layer(bits, (48 * rows, width), size, seed)
    packed = packed_in(tmp_path_factory.mktemp("base"), tensors, CONFIG)[MODULE]
    assert torch.equal(dequantised(packed, whole(packed)), values)
    for start, stop in ((0, 1), (7, 30), (47, 48)):
        assert torch.equal(dequantised(packed, (start, stop)), values[start:stop])
    assert_stored_again(packed)


def test_scales_that_straddle_are_left(tmp_path: Path) -> None:
    tensors, _ = layer(4, (16, 24), 16)
    packed = packed_in(tmp_path, tensors, CONFIG)[MODULE]
    codes, grid = packed.grid(whole(packed))
    assert packed.nearest_scales(grid.scale, whole(packed)) is None
    assert packed.pack(codes, grid).keys() == {f"{MODULE}.W_q"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codes_seen_as_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    """HQQ's `view_as_float`; some of these bits are NaN."""
    tensors, values = layer(4)
    tensors[f"{MODULE}.W_q"] = tensors[f"{MODULE}.W_q"].view(dtype)
    packed = packed_in(tmp_path, tensors, CONFIG)[MODULE]
    assert torch.equal(dequantised(packed, whole(packed)), values)
    assert torch.equal(dequantised(packed, (3, 5)), values[3:5])
    assert_stored_again(packed)


@pytest.mark.parametrize(("nbits", "high"), [(1.58, 2), (2, 3)])
def test_three_levels(tmp_path: Path, nbits: float, high: int) -> None:
    tensors, _ = layer(2)
    packed = packed_in(tmp_path, tensors | numbers(nbits=nbits), CONFIG)[MODULE]
    assert packed.grid(whole(packed))[1].high == high


def test_settings_belong_to_the_weight(tmp_path: Path) -> None:
    tensors, _ = layer()
    packed = packed_in(tmp_path, tensors, CONFIG)[MODULE]
    assert packed.tensors.keys() == tensors.keys()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (numbers(axis=0), r"quantised along its outputs \(axis 0\), only axis 1 is known"),
        (numbers(quant_scale=1), "scales or zeros that are quantised themselves"),
        (numbers(nbits=5), "has 5 bits, packed as '4bit_u8'"),
        (numbers(group_size=0), r"groups of 0, which \[16, 64\] is not made of"),
        ({f"{MODULE}.shape": torch.tensor([-16, -64])}, "groups of 32, which"),
        (numbers(group_size=32.0), "group_size is stored as f32, expected i32 or i64"),
        (numbers(nbits=float("nan")), "has nan bits"),
        ({f"{MODULE}.packing": -letters("a").char()}, "packing is stored as i8"),
        (numbers(group_size=48), "groups of 48, which"),
        (numbers(group_size=16), r"scale has the shape \[32, 1\], expected \[64, 1\]"),
        ({f"{MODULE}.packing": letters("4bit_u32")}, "packed as '4bit_u32', expected one of"),
        ({f"{MODULE}.packing": letters("2bit_u8")}, "has 4 bits, packed as '2bit_u8'"),
        ({f"{MODULE}.packing": letters("8bit_u8")}, r"W_q has the shape \[16, 32\]"),
        ({f"{MODULE}.shape": torch.tensor([16])}, "shape holds 1 numbers"),
        ({f"{MODULE}.scale": torch.zeros(32, 1, dtype=torch.uint8)}, "scale is stored as u8"),
        ({f"{MODULE}.zero": torch.zeros(32).half()}, r"zero has the shape \[32\]"),
        ({f"{MODULE}.W_q": torch.zeros(512, dtype=torch.uint8)}, r"W_q has the shape \[512\]"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: Tensors, said: str) -> None:
    with pytest.raises(InputError, match=said):
        packed_in(tmp_path, layer()[0] | changes, CONFIG)


def test_all_that_is_missing_is_named(tmp_path: Path) -> None:
    tensors, _ = layer()
    gone = {f"{MODULE}.{part}" for part in ("zero", "axis", "packing")}
    left = {name: value for name, value in tensors.items() if name not in gone}
    with pytest.raises(InputError) as caught:
        packed_in(tmp_path, left, CONFIG)
    assert set(caught.value.problems) == {f"{name} is missing" for name in gone}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nbits", [8, 6, 5, 4, 3, 2, 1.58, 1])
@pytest.mark.parametrize("size", [32, 64, None])
def test_what_hqq_itself_saves(tmp_path: Path, nbits: float, size: int | None) -> None:
    quantize = pytest.importorskip("hqq.core.quantize")
    options: dict[str, Any] = {"nbits": nbits, "group_size": size, "axis": 1}
    config = quantize.BaseQuantizeConfig(**options)
    weight = torch.randn(80, 128, generator=torch.Generator().manual_seed(0))
    layer = quantize.HQQLinear.from_weights(weight, None, config, torch.float32, device="cpu")
    tensors = {f"{MODULE}.{name}": value for name, value in layer.state_dict().items()}
    packed = packed_in(tmp_path, tensors, CONFIG)[MODULE]
    assert torch.equal(dequantised(packed, whole(packed)), layer.dequantize())
    assert_stored_again(packed)
