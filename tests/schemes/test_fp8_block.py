"""FP8 weights with a scale per block, held to transformers' own dequantisation, bit for bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from schemes.checkpoints import (
    QUANTISED,
    assert_holds_any_codes,
    assert_recorded,
    assert_same,
    assert_stored_again,
    folder_of,
    packed_of,
    recorded,
    values,
    whole,
)

from adaptmerge.errors import InputError
from adaptmerge.schemes.narrow import block_of, e2m1, e4m3

CONFIG = {"quant_method": "fp8", "weight_block_size": [128, 128]}
FP8 = torch.float8_e4m3fn
cases = pytest.mark.parametrize("case", ["fp8-block", "fp8-block-ue8m0"])


def all_bits(*shape: int) -> torch.Tensor:
    """Every byte that is a number, over and over."""
    numbers = torch.tensor([byte for byte in range(256) if byte & 127 != 127], dtype=torch.uint8)
    return numbers.repeat(torch.Size(shape).numel() // 254 + 1)[: torch.Size(shape).numel()].view(
        shape
    )


def fp8_folder(path: Path, weight: torch.Tensor, scale: torch.Tensor, **config: Any) -> Path:
    tensors = {"m.q_proj.weight": weight.view(FP8), "m.q_proj.weight_scale_inv": scale}
    return folder_of(path, tensors, CONFIG | config)


@cases
def test_values_are_those_that_transformers_reads(case: str) -> None:
    assert_recorded(QUANTISED / case)


@cases
def test_stored_again(case: str, tmp_path: Path) -> None:
    assert_stored_again(QUANTISED / case)
    assert_holds_any_codes(QUANTISED / case, tmp_path / "again")


@given(rows=st.integers(1, 300), columns=st.integers(1, 300), data=st.data())
def test_any_shape_and_blocks_as_transformers_has_them(
    rows: int, columns: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    block = [data.draw(st.sampled_from([1, 16, 128])), data.draw(st.sampled_from([32, 128]))]
    weight = all_bits(rows, columns)
    count = -(-rows // block[0]), -(-columns // block[1])
    scale = torch.rand(count, generator=torch.Generator().manual_seed(rows)) + 0.01
    folder = fp8_folder(tmp_path_factory.mktemp("any"), weight, scale, weight_block_size=block)
    (packed,) = packed_of(folder).values()
    expected = _dequantize_fp8_weight(weight.view(FP8), scale, block, torch.float32)
    assert_same(values(packed) + 0.0, expected + 0.0)
    assert_stored_again(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "e8m0", "u8"])
def test_dtypes_of_scales_as_transformers_reads_them(dtype: Any, tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    scale = torch.arange(120, 126, dtype=torch.uint8).view(2, 3)
    scale[0, 0] = 1
    if dtype == "e8m0":
        scale = scale.view(torch.float8_e8m0fnu)
    elif dtype != "u8":
        scale = (scale.float() / 1e4).to(dtype)
    weight = all_bits(256, 384)
    expected = Fp8Dequantize(SimpleNamespace())._dequantize_one(
        weight.view(FP8), scale, torch.float32
    )
    folder = fp8_folder(tmp_path, weight, scale)
    (packed,) = packed_of(folder).values()
    assert_same(values(packed) + 0.0, expected + 0.0)
    assert_stored_again(folder)


def test_one_scale_for_all(tmp_path: Path) -> None:
    folder = fp8_folder(tmp_path, all_bits(40, 50), torch.tensor(0.5), weight_block_size=None)
    (packed,) = packed_of(folder).values()
    assert_same(values(packed), all_bits(40, 50).view(FP8).float() * 0.5 + 0.0)


def test_blocks_of_the_scales_where_the_config_says_others(tmp_path: Path) -> None:
    scale = torch.rand(4, 2)
    folder = fp8_folder(tmp_path, all_bits(256, 256), scale)
    (packed,) = packed_of(folder).values()
    grown = scale.repeat_interleave(64, 0).repeat_interleave(128, 1)
    assert torch.equal(values(packed), all_bits(256, 256).view(FP8).float() * grown)


def test_partial_blocks_are_not_equal_ones() -> None:
    assert block_of((130, 256), (2, 2), [(128, 128)]) == (128, 128)
    assert block_of((576, 7168), (5, 56), [(128, 128)]) == (128, 128)
    assert block_of((130, 256), (2, 2)) == (65, 128)
    assert block_of((130, 256), (3, 2)) is None
    assert block_of((130, 256), (130,)) is None


@pytest.mark.parametrize(("floats", "count"), [(e4m3(), 253), (e2m1(), 15)])
def test_codes_ascend_and_have_one_zero(floats: Any, count: int) -> None:
    assert len(floats.table) == count
    assert bool((floats.table.diff() > 0).all())
    assert torch.equal(floats.codes[floats.bits.int()], torch.arange(count).to(torch.uint8))
    zero = int((floats.table == 0).nonzero())
    assert int(floats.bits[zero]) == 0


def test_signs_of_zeros_are_kept_where_nothing_moves(tmp_path: Path) -> None:
    weight = torch.tensor([[0x00, 0x80, 0x80, 0x01]], dtype=torch.uint8)
    (packed,) = packed_of(fp8_folder(tmp_path, weight, torch.ones(1, 1))).values()
    codes, grid = whole(packed)
    assert codes[0, 0] == codes[0, 1]
    codes[0, 2], codes[0, 3] = codes[0, 3].clone(), codes[0, 0].clone()
    stored = packed.pack(codes, grid)["m.q_proj.weight"].view(torch.uint8)
    assert stored.tolist() == [[0x00, 0x80, 0x01, 0x00]]


def test_scales_are_not_fitted() -> None:
    (packed, _) = packed_of(QUANTISED / "fp8-block").values()
    assert packed.nearest_scales(whole(packed)[1].scale, (0, packed.shape[0])) is None
    assert hash(packed)
    assert list(packed.tensors) == [f"{packed.module}.weight", f"{packed.module}.weight_scale_inv"]


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_nan_in_a_weight(byte: int, tmp_path: Path) -> None:
    weight = all_bits(4, 6)
    weight[2, 3] = byte
    (packed,) = packed_of(fp8_folder(tmp_path, weight, torch.ones(1, 1))).values()
    packed.grid((0, 2))
    with pytest.raises(InputError, match=r"m\.q_proj\.weight holds NaN"):
        packed.grid((2, 4))


def test_nan_in_scales(tmp_path: Path) -> None:
    scale = torch.full((1, 1), 255, dtype=torch.uint8)
    (packed,) = packed_of(fp8_folder(tmp_path, all_bits(4, 6), scale)).values()
    with pytest.raises(
        InputError, match=r"m\.q_proj\.weight_scale_inv holds scales that are not finite"
    ):
        packed.grid((0, 4))


def test_all_problems_at_once(tmp_path: Path) -> None:
    weight = all_bits(130, 130).view(FP8)
    tensors = {
        "a.weight": weight,
        "b.weight_scale_inv": torch.ones(2, 2),
        "c.weight": weight,
        "c.weight_scale_inv": torch.ones(3, 2),
        "d.weight": weight.view(torch.int8),
        "d.weight_scale_inv": torch.ones(2, 2),
        "e.weight": weight,
        "e.weight_scale_inv": torch.ones(2, 2, dtype=torch.int32),
        "f.experts.down_proj": weight[None],
        "f.experts.down_proj_scale_inv": torch.ones(1, 2, 2),
    }
    with pytest.raises(InputError) as caught:
        packed_of(folder_of(tmp_path, tensors, CONFIG))
    text = str(caught.value)
    assert len(caught.value.problems) == 6
    assert "a.weight is f8_e4m3, but a.weight_scale_inv is missing" in text
    assert "b.weight_scale_inv has no b.weight beside it" in text
    assert (
        "c.weight_scale_inv is [3, 2], expected a scale per 128 x 128 block of [130, 130]" in text
    )
    assert "d.weight is i8, expected f8_e4m3" in text
    assert "e.weight_scale_inv is i32, expected one of f32" in text
    assert "f.experts.down_proj [1, 130, 130] is quantised, but only matrices of modules" in text


def test_nothing_is_quantised(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="quantised to fp8, but no weight is"):
        packed_of(folder_of(tmp_path, {"a.weight": torch.ones(2, 2)}, CONFIG))


def test_the_recording_says_what_it_is() -> None:
    tensors, config = recorded("fp8-block-ue8m0")
    assert config["scale_fmt"] == "ue8m0"
    assert tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"].dtype == torch.float8_e8m0fnu
