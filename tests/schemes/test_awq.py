"""AWQ's layout, the order of outputs within a word, and what is refused."""

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
    assert_stored_again,
    interleaved,
    packed_in,
    random_codes,
    random_scales,
    whole,
)

from adaptmerge.errors import InputError
from adaptmerge.schemes.coded import dequantised

CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}


def layer(
    outputs: int = 24, inputs: int = 96, size: int = 32, seed: int = 0
) -> tuple[Tensors, torch.Tensor]:
    """A layer and its values (out, in) in float64."""
    groups = inputs // size
    codes = random_codes(outputs, inputs, 4, seed)
    zeros = random_codes(groups + 2, outputs, 4, seed + 1)[2:]
    scales = random_scales(groups, outputs, seed=seed)
    group = torch.arange(inputs) // size
    tensors = {
        f"{MODULE}.qweight": interleaved(codes.T),
        f"{MODULE}.qzeros": interleaved(zeros),
        f"{MODULE}.scales": scales,
    }
    return tensors, (codes - zeros[group].T) * scales.double()[group].T


def config(**changes: Any) -> dict[str, Any]:
    return {"quantization_config": {**CONFIG, **changes}}


@settings(max_examples=20)
@given(
    words=st.integers(1, 5),
    groups=st.integers(1, 7),
    size=st.sampled_from([1, 8, 40]),
    seed=st.integers(0, 2**16),
)
def test_values_and_bytes(
    tmp_path_factory: pytest.TempPathFactory, words: int, groups: int, size: int, seed: int
) -> None:
    tensors, values = layer(8 * words, groups * size, size, seed)
    packed = packed_in(tmp_path_factory.mktemp("base"), tensors, config(group_size=size))[MODULE]
    assert packed.shape == tuple(values.shape)
    assert torch.equal(dequantised(packed, whole(packed)), values.float())
    assert_stored_again(packed)


def test_rows_that_share_a_word(tmp_path: Path) -> None:
    tensors, values = layer()
    packed = packed_in(tmp_path, tensors, config())[MODULE]
    for rows in ((0, 1), (7, 9), (3, 5), (8, 16), (23, 24)):
        assert torch.equal(dequantised(packed, rows), values[slice(*rows)].float())


def test_one_group(tmp_path: Path) -> None:
    tensors, values = layer(size=96)
    packed = packed_in(tmp_path, tensors, config(group_size=-1))[MODULE]
    assert torch.equal(dequantised(packed, whole(packed)), values.float())


@pytest.mark.parametrize("said", [{"version": "GEMM"}, {"version": None, "format": "gemm"}, {}])
def test_how_the_version_is_spelt(tmp_path: Path, said: dict[str, Any]) -> None:
    assert packed_in(tmp_path, layer()[0], config(**said)).keys() == {MODULE}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": "gemv"}, "AWQ's version 'gemv', only 'gemm' is known"),
        ({"version": "GEMV_FAST"}, "version 'gemv_fast'"),
        ({"version": None, "format": "exllama"}, "version 'exllama'"),
        ({"backend": "llm-awq"}, "version 'llm-awq'"),
        ({"bits": 8}, "says 8 bits, expected 4"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        packed_in(tmp_path, layer()[0], config(**changes))


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("qzeros", None, "qzeros is missing"),
        ("scales", None, "scales is missing"),
        ("qzeros", torch.zeros(2, 3, dtype=torch.int32), r"qzeros has the shape \[2, 3\]"),
        ("scales", torch.zeros(3, 23).half(), r"scales has the shape \[3, 23\]"),
        ("scales", torch.zeros(3, 24, dtype=torch.uint8), "scales is stored as u8"),
        (
            "qweight",
            torch.zeros(96, dtype=torch.int32),
            r"qweight has the shape \[96\], expected two sides",
        ),
        ("qweight", torch.zeros(96, 3), "qweight is stored as f32"),
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
