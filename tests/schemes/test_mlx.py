"""MLX's affine layout: all its bits, layers of different bits, and the modes that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from schemes.bit_by_bit import (
    MODULE,
    Tensors,
    along_columns,
    assert_stored_again,
    packed_in,
    random_codes,
    random_scales,
    whole,
)

from adaptmerge.errors import InputError
from adaptmerge.schemes.coded import dequantised

ALL_BITS = [1, 2, 3, 4, 5, 6, 8]
OTHER = MODULE.replace("q_proj", "v_proj")


def config(bits: Any = 4, size: Any = 32, **more: Any) -> dict[str, Any]:
    """As mlx-lm writes it down: twice, and without a quant_method."""
    said = {"group_size": size, "bits": bits, **more}
    return {"quantization": said, "quantization_config": said}


def layer(
    bits: int = 4, size: int = 32, dtype: torch.dtype = torch.float16, module: str = MODULE
) -> tuple[Tensors, torch.Tensor]:
    """A layer with scales of both signs and its values (out, in) in float64."""
    codes = random_codes(24, 192, bits)
    scales = random_scales(24, 192 // size, dtype=dtype) - random_scales(1, dtype=dtype)
    biases = random_scales(24, 192 // size, seed=1, dtype=dtype)
    spread = [value.double().repeat_interleave(size, 1) for value in (scales, biases)]
    tensors = {
        f"{module}.weight": along_columns(codes, bits).view(torch.uint32),
        f"{module}.scales": scales,
        f"{module}.biases": biases,
    }
    return tensors, spread[0] * codes + spread[1]


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_and_bytes(tmp_path: Path, bits: int, size: int, dtype: torch.dtype) -> None:
    tensors, values = layer(bits, size, dtype)
    packed = packed_in(tmp_path, tensors, config(bits, size))[MODULE]
    assert torch.equal(dequantised(packed, whole(packed)), values.float())
    assert torch.equal(dequantised(packed, (3, 9)), values[3:9].float())
    assert_stored_again(packed)


def test_layers_of_different_bits(tmp_path: Path) -> None:
    """A layer may have settings of its own; one without scales is not packed."""
    (tensors, values), (other, wide) = layer(), layer(6, 64, module=OTHER)
    plain = {"lm_head.weight": torch.ones(2, 2)}
    own = {OTHER: {"bits": 6, "group_size": 64}, "lm_head": False}
    packed = packed_in(tmp_path, tensors | other | plain, config(**own))
    assert packed.keys() == {MODULE, OTHER}
    for module, expected in ((MODULE, values), (OTHER, wide)):
        found = packed[module]
        assert torch.equal(dequantised(found, whole(found)), expected.float())


def test_a_linear_layer_with_a_bias_of_its_own(tmp_path: Path) -> None:
    tensors, _ = layer()
    bias = {f"{MODULE}.bias": torch.ones(24)}
    assert f"{MODULE}.bias" not in packed_in(tmp_path, tensors | bias, config())[MODULE].tensors


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_other_modes(tmp_path: Path, mode: str, everywhere: bool) -> None:
    said = {"mode": mode} if everywhere else {MODULE: {"mode": mode}}
    with pytest.raises(InputError, match=f"MLX's mode '{mode}', only 'affine' is known"):
        packed_in(tmp_path, layer()[0], config(**said))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 7}, "has 7 bits in groups of 32, which MLX does not know"),
        ({"bits": "four"}, "bits is 'four': expected a whole number"),
        ({"bits": 4.0}, "bits is 4.0: expected a whole number"),
        ({"size": 0}, "in groups of 0"),
        ({"size": None}, "in groups of None"),
        ({"size": 64}, r"scales has the shape \[24, 6\], expected \[24, 3\]"),
        ({"size": 128}, "24 words a row, which are no whole groups"),
        ({"bits": 5}, "24 words a row, which are no whole groups"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        packed_in(tmp_path, layer()[0], config(**changes))


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("weight", None, "weight is missing"),
        ("biases", None, "biases is missing"),
        ("biases", torch.ones(24, 5).half(), r"biases has the shape \[24, 5\]"),
        ("scales", torch.ones(24, 6, dtype=torch.uint8), "scales is stored as u8"),
        ("weight", torch.ones(24, 24, dtype=torch.int64), "weight is stored as i64"),
        (
            "weight",
            torch.ones(2, 24, 24).int().view(torch.uint32),
            "two sides .stacks of experts are not",
        ),
    ],
)
def test_what_does_not_fit(
    tmp_path: Path, part: str, value: torch.Tensor | None, said: str
) -> None:
    tensors, _ = layer()
    del tensors[f"{MODULE}.{part}"]
    tensors |= {} if value is None else {f"{MODULE}.{part}": value}
    with pytest.raises(InputError, match=said):
        packed_in(tmp_path, tensors, config())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_what_mlx_itself_stores(tmp_path: Path, bits: int, size: int) -> None:
    mx = pytest.importorskip("mlx.core")
    weight = torch.randn(80, 384, generator=torch.Generator().manual_seed(0))
    words, *wide = mx.quantize(
        mx.array(weight.numpy()).astype(mx.float16), group_size=size, bits=bits
    )
    wide = [part.astype(mx.float32) for part in wide]
    found = [torch.from_numpy(numpy.array(part)) for part in (words, *wide)]
    tensors = {
        f"{MODULE}.weight": found[0],
        f"{MODULE}.scales": found[1].half(),
        f"{MODULE}.biases": found[2].half(),
    }
    packed = packed_in(tmp_path, tensors, config(bits, size))[MODULE]
    values = mx.dequantize(words, *wide, group_size=size, bits=bits)
    assert torch.equal(dequantised(packed, whole(packed)), torch.from_numpy(numpy.array(values)))
    assert_stored_again(packed)
