"""The blocks of ggml: values as gguf-py reads them, bytes as llama.cpp writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from adaptmerge.files.gguf import TYPES
from adaptmerge.schemes.gguf.blocks import Codec
from adaptmerge.schemes.gguf.codecs import CODECS
from adaptmerge.schemes.grids import BlockGrid

gguf = pytest.importorskip("gguf")
RECORDED = load_file(Path(__file__).parents[2] / "fixtures" / "gguf" / "blocks.safetensors")
codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)


def values(codes: Tensor, grid: BlockGrid) -> Tensor:
    return grid.values(codes, slice(0, codes.shape[1]), torch.empty(codes.shape))


def random_bytes(codec: Codec, seed: int, blocks: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (4, blocks * TYPES[codec.type].nbytes)
    found = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    found[0, :2] = 0  # a scale of 0, where the scale comes first
    return found


def test_sizes_are_those_of_gguf_py() -> None:
    for number, kind in TYPES.items():
        expected = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
        assert (kind.width, kind.nbytes) == expected
        assert kind.name == gguf.GGMLQuantizationType(number).name


@codecs
def test_values_of_what_llama_cpp_wrote(codec: Codec) -> None:
    codes, grid = codec.grid(RECORDED[f"{codec.name}.bytes"])
    assert torch.equal(values(codes, grid), RECORDED[f"{codec.name}.values"])


@codecs
@given(seed=st.integers(0, 10_000))
def test_values_of_any_bytes(codec: Codec, seed: int) -> None:
    raw = random_bytes(codec, seed)
    if codec.name == "MXFP4":  # gguf-py has no NaN there
        raw.view(4, -1, 17)[..., 0].clamp_(2, 250)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType(codec.type))
    found = values(*codec.grid(raw)).numpy()
    finite = np.isfinite(expected)
    assert finite.mean() > 0.2
    assert np.array_equal(found[finite], expected[finite])


@codecs
@given(seed=st.integers(0, 10_000))
def test_bytes_come_back_and_hold_any_codes(codec: Codec, seed: int) -> None:
    raw = random_bytes(codec, seed)
    codes, grid = codec.grid(raw)
    assert torch.equal(codec.pack(raw, codes, grid), raw)
    generator = torch.Generator().manual_seed(seed)
    others = torch.randint(0, grid.count, codes.shape, generator=generator, dtype=torch.uint8)
    stored = codec.pack(raw, others, grid)
    found, again = codec.grid(stored)
    assert torch.equal(found, others)
    assert torch.equal(again.scale.nan_to_num(), grid.scale.nan_to_num())
    assert torch.equal(codec.pack(raw, codes, grid), raw)  # and `raw` was left alone


@codecs
def test_values_on_the_grid_stay_where_they_are(codec: Codec) -> None:
    """Also with negative scales: Q4_0 has them wherever the largest entry is positive."""
    codes, grid = codec.grid(RECORDED[f"{codec.name}.bytes"])
    before = values(codes, grid)
    again = grid.codes(before, slice(0, codes.shape[1]))
    assert torch.equal(values(again, grid), before)


@codecs
def test_scales_that_can_be_chosen_are_stored(codec: Codec) -> None:
    raw = RECORDED[f"{codec.name}.bytes"]
    codes, grid = codec.grid(raw)
    wanted = grid.scale * torch.linspace(0.9, 1.1, grid.blocks)
    nearest = codec.nearest_scales(raw, wanted)
    assert (nearest is None) == (codec.scale_at is None)
    if nearest is not None:
        assert torch.allclose(nearest, wanted, rtol=1e-3)
        stored = codec.pack(raw, codes, grid.rescaled(nearest))
        expected = gguf.quants.dequantize(stored.numpy(), gguf.GGMLQuantizationType(codec.type))
        assert np.array_equal(values(codes, grid.rescaled(nearest)).numpy(), expected)
        assert not torch.equal(stored, raw)
