"""torchao's int8 weights as `transformers` saves them, and the kinds that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from schemes.bit_by_bit import (
    MODULE,
    Tensors,
    assert_stored_again,
    packed_in,
    random_codes,
    random_scales,
    whole,
)

from adaptmerge.errors import InputError
from adaptmerge.schemes.coded import dequantised

KIND = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"group_size": None}}
QDATA, SCALE, ZERO = (f"{MODULE}._weight_{part}" for part in ("qdata", "scale", "zero_point"))


def config(kind: Any = KIND) -> dict[str, Any]:
    said = {"quant_method": "torchao", "quant_type": {"default": kind}}
    return {"quantization_config": said}


def layer(groups: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensors, torch.Tensor]:
    """A layer with zeros of its own and its values (out, in) in float64."""
    codes = random_codes(24, 60, 8) - 128
    zeros = random_codes(24, groups, 8, seed=1) - 128
    scales = random_scales(24, groups, dtype=dtype)
    spread = [value.double().repeat_interleave(60 // groups, 1) for value in (zeros, scales)]
    tensors = {QDATA: codes.to(torch.int8), SCALE: scales, ZERO: zeros.to(torch.int8)}
    return tensors, (codes - spread[0]) * spread[1]


@pytest.mark.parametrize("groups", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_bytes(tmp_path: Path, groups: int, dtype: torch.dtype) -> None:
    tensors, values = layer(groups, dtype)
    packed = packed_in(tmp_path, tensors, config())[MODULE]
    assert torch.equal(dequantised(packed, whole(packed)), values.float())
    assert torch.equal(dequantised(packed, (4, 9)), values[4:9].float())
    assert_stored_again(packed)


def test_without_zeros(tmp_path: Path) -> None:
    tensors, _ = layer()
    del tensors[ZERO]
    packed = packed_in(tmp_path, tensors, config())[MODULE]
    expected = tensors[QDATA].double() * tensors[SCALE]
    assert torch.equal(dequantised(packed, whole(packed)), expected.float())
    assert packed.tensors.keys() == {QDATA, SCALE}
    assert_stored_again(packed)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ({"_type": "Int4WeightOnlyConfig"}, "Int4WeightOnlyConfig, only Int8WeightOnlyConfig"),
        ({"_type": "Int8DynamicActivationInt8WeightConfig"}, "DynamicActivation"),
        ({"_type": "FqnToConfig"}, "FqnToConfig"),
        ("int4_weight_only", "torchao's int4_weight_only"),
        (None, "torchao's None"),
    ],
)
def test_other_kinds(tmp_path: Path, kind: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        packed_in(tmp_path, layer()[0], config(kind))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({SCALE: torch.ones(1, 1)}, r"_weight_scale has the shape \[1, 1\], expected \[24, 1\]"),
        ({SCALE: torch.ones(24)}, r"_weight_scale has the shape \[24\], expected two sides"),
        ({SCALE: torch.ones(24, 7), ZERO: torch.ones(24, 7).char()}, "7 groups, which 60 inputs"),
        ({ZERO: torch.ones(24, 2).char()}, r"zero_point has the shape \[24, 2\]"),
        ({ZERO: torch.ones(24, 1)}, "zero_point is stored as f32"),
        ({QDATA: torch.ones(24, 60).byte()}, "qdata is stored as u8, expected i8"),
        ({f"{MODULE}._weight_act_pre_scale": torch.ones(1)}, "a kind of weight that is not known"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, changes: Tensors, said: str) -> None:
    with pytest.raises(InputError, match=said):
        packed_in(tmp_path, layer()[0] | changes, config())


def test_what_is_missing(tmp_path: Path) -> None:
    tensors, _ = layer()
    del tensors[SCALE]
    with pytest.raises(InputError, match="_weight_scale is missing"):
        packed_in(tmp_path, tensors, config())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [None, 32, 64])
def test_what_torchao_itself_saves(tmp_path: Path, dtype: torch.dtype, size: int | None) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    flatten = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    options = {} if size is None else {"granularity": torchao.PerGroup(size)}
    layers = torch.nn.Sequential(torch.nn.Linear(192, 80, dtype=dtype))
    torchao.quantize_(layers, torchao.Int8WeightOnlyConfig(**options))
    tensors, _ = flatten.flatten_tensor_state_dict(layers.state_dict())
    packed = packed_in(tmp_path, tensors, config())["0"]
    weight: Any = layers[0].weight
    assert torch.equal(dequantised(packed, whole(packed)), weight.dequantize(torch.float32))
    assert_stored_again(packed)
