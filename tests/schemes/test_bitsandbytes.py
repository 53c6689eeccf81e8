"""The bitsandbytes schemes, held to bitsandbytes itself on the CPU, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptmerge.errors import UsageError
from adaptmerge.schemes.bitsandbytes import codes as schemes

bnb = pytest.importorskip("bitsandbytes")
oracle = bnb.functional

TABLES = {"nf4": schemes.NF4, "fp4": schemes.FP4}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
kinds = pytest.mark.parametrize("kind", TABLES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def heavy_tailed(*shape: int) -> torch.Tensor:
    return gaussian(*shape) / gaussian(*shape, seed=1).abs().clamp(min=1e-3)


def with_zero_blocks(*shape: int) -> torch.Tensor:
    weight = gaussian(*shape)
    weight[::2] = 0
    return weight


def extreme(*shape: int) -> torch.Tensor:
    """Values of every exponent of float32, up to the largest."""
    weight = gaussian(*shape).sign() * torch.exp2(torch.rand(shape, generator=seeded()) * 277 - 149)
    weight[::3] *= 1e-20
    weight[0, 0] = torch.finfo(torch.float32).max
    return weight


def denormal(*shape: int) -> torch.Tensor:
    return gaussian(*shape) * torch.logspace(-45, -36, shape[0])[:, None]


def ties(*shape: int) -> torch.Tensor:
    """Blocks of absmax 1 or 2^-5 that hold midpoints of both tables and their neighbours."""
    values = torch.cat([middles(table) for table in TABLES.values()])
    values = torch.cat([values, neighbours(values, 1.0), neighbours(values, -1.0)])
    picks = torch.randint(len(values), shape, generator=seeded())
    weight = values[picks]
    weight[:, ::32] = 1
    weight[1::2] *= 2**-5
    return weight


def middles(table: schemes.Table) -> torch.Tensor:
    values = torch.tensor(table).sort().values
    return (values[1:] + values[:-1]) / 2


def neighbours(values: torch.Tensor, towards: float) -> torch.Tensor:
    return torch.nextafter(values, torch.full_like(values, towards))


SAMPLES: list[Callable[..., torch.Tensor]] = [
    gaussian,
    heavy_tailed,
    with_zero_blocks,
    extreme,
    denormal,
    ties,
]
samples = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.__name__)


def quantised(weight: torch.Tensor, kind: str, **options: Any) -> tuple[torch.Tensor, Any]:
    """The oracle's codes, one per entry, and its state."""
    packed, state = oracle.quantize_4bit(weight, quant_type=kind, **options)
    pairs = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1)
    return pairs.view(-1)[: weight.numel()], state


def dequantised(weight: torch.Tensor, kind: str, **options: Any) -> torch.Tensor:
    """The oracle's round trip in float32.

    As one row of whole blocks, which its AVX512 kernel reads right: with rows of 80 entries, say, it
    takes the scales of other blocks.
    """
    packed, state = oracle.quantize_4bit(weight, quant_type=kind, **options)
    size = -(-weight.numel() // state.blocksize) * state.blocksize
    row = torch.zeros(size // 2, 1, dtype=torch.uint8)
    row[: len(packed)] = packed
    state.shape, state.dtype = torch.Size((1, size)), torch.float32
    values: torch.Tensor = oracle.dequantize_4bit(row, state)
    return values.view(-1)[: weight.numel()].view(weight.shape)


@kinds
def test_tables(kind: str) -> None:
    assert list(TABLES[kind]) == oracle.get_4bit_type(kind, device="cpu").tolist()


def test_dynamic_map() -> None:
    assert torch.equal(schemes.dynamic_map(), oracle.create_dynamic_map())


@kinds
@dtypes
@samples
def test_four_bits(sample: Callable[..., torch.Tensor], dtype: torch.dtype, kind: str) -> None:
    weight = sample(96, 128).to(dtype).nan_to_num()  # float16 has no room for the extremes
    codes, absmax = schemes.quantise_4bit(weight, TABLES[kind])
    expected, state = quantised(weight, kind)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax, state.absmax)
    values = schemes.dequantise_4bit(codes, absmax, TABLES[kind], tuple(weight.shape))
    assert torch.equal(values, dequantised(weight, kind))


def in_blocks(values: torch.Tensor, size: int, *first: float) -> torch.Tensor:
    """The values in blocks that each begin with `first`, so that they are scaled by 1."""
    room = size - len(first)
    blocks = torch.zeros(-(-len(values) // room), size)
    blocks[:, : len(first)] = torch.tensor(first)
    padded = torch.nn.functional.pad(values, (0, len(blocks) * room - len(values)))
    blocks[:, len(first) :] = padded.view(-1, room)
    return blocks


@kinds
def test_scaled_values_near_midpoints_and_cell_edges(kind: str) -> None:
    """500 floats on both sides of each midpoint, and of each edge of the cells that values fall into."""
    half = schemes.cells(TABLES[kind]).half
    centres = torch.cat([middles(TABLES[kind]).abs(), torch.arange(half + 1) / half])
    bits = centres.view(torch.int32)[:, None] + torch.arange(-500, 500, dtype=torch.int32)
    near = bits.view(torch.float32).nan_to_num().clamp(-1, 1).view(-1)
    weight = in_blocks(torch.cat([near, -near]), 64, 1.0)
    assert torch.equal(schemes.quantise_4bit(weight, TABLES[kind])[0], quantised(weight, kind)[0])


@kinds
def test_values_that_are_not_finite(kind: str) -> None:
    weight = gaussian(8, 64)
    weight[1, 3], weight[2, 5], weight[4, 0] = float("nan"), float("inf"), -float("inf")
    codes, absmax = schemes.quantise_4bit(weight, TABLES[kind])
    expected, state = quantised(weight, kind)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax.nan_to_num(), state.absmax.nan_to_num())


@kinds
@dtypes
@given(data=st.data())
def test_any_shape_and_blocksize(dtype: torch.dtype, kind: str, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 200))
    blocksize = data.draw(st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096]))
    scale = 2.0 ** data.draw(st.integers(-20, 8))
    weight = (gaussian(rows, columns, seed=data.draw(st.integers(0, 99))) * scale).to(dtype)
    codes, absmax = schemes.quantise_4bit(weight, TABLES[kind], blocksize)
    expected, state = quantised(weight, kind, blocksize=blocksize)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax, state.absmax)
    values = schemes.dequantise_4bit(codes, absmax, TABLES[kind], (rows, columns), blocksize)
    assert torch.equal(values, dequantised(weight, kind, blocksize=blocksize))


@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
    kind=st.sampled_from(sorted(TABLES)),
)
def test_any_values(values: list[float], kind: str) -> None:
    for weight in (torch.tensor(values), torch.tensor(values + [0.0] * (-len(values) % 64))):
        codes, absmax = schemes.quantise_4bit(weight, TABLES[kind])
        expected, state = quantised(weight, kind)
        assert torch.equal(codes, expected)
        assert torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("chunk", [64, 1000, 1 << 17])
def test_many_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemes, "CHUNK", chunk)
    weight = gaussian(130, 129)
    codes, absmax = schemes.quantise_4bit(weight, schemes.NF4)
    assert torch.equal(codes, quantised(weight, "nf4")[0])
    values = schemes.dequantise_4bit(codes, absmax, schemes.NF4, (130, 129))
    assert torch.equal(values, dequantised(weight, "nf4"))
    assert torch.equal(schemes.quantise_int8(weight)[0], oracle.int8_vectorwise_quant(weight)[0])


def test_a_weight_that_is_not_contiguous() -> None:
    weight = gaussian(128, 96).T
    codes, _ = schemes.quantise_4bit(weight, schemes.NF4)
    assert torch.equal(codes, quantised(weight.contiguous(), "nf4")[0])


@pytest.mark.parametrize("blocks", [1, 2, 255, 256, 257, 5000])
@pytest.mark.parametrize("spread", [0.0, 1e-6, 0.1, 100.0])
def test_double_quantisation(blocks: int, spread: float) -> None:
    weight = gaussian(blocks, 64) * torch.exp(spread * gaussian(blocks, 1, seed=2).clamp(-0.8, 0.8))
    _, absmax = schemes.quantise_4bit(weight, schemes.NF4)
    _, state = quantised(weight, "nf4", compress_statistics=True)
    codes, nested, offset = schemes.double_quantise(absmax)
    assert torch.equal(codes, state.absmax)
    assert torch.equal(nested, state.state2.absmax)
    assert torch.equal(offset, state.offset)
    values = oracle.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(schemes.double_dequantise(codes, nested, offset), values)


def test_double_quantisation_of_equal_scales() -> None:
    weight = gaussian(300, 64)
    weight[:, 0] = 8
    _, state = quantised(weight, "nf4", compress_statistics=True)
    codes, nested, _ = schemes.double_quantise(schemes.quantise_4bit(weight, schemes.NF4)[1])
    assert not nested.any()
    assert torch.equal(codes, state.absmax)


@pytest.mark.parametrize("size", [1e-36, 1e-38, 1e-39])
def test_double_quantisation_of_tiny_scales(size: float) -> None:
    absmax = torch.tensor([0.0, 2 * size]).repeat(300)
    codes, nested, _ = schemes.double_quantise(absmax)
    expected, state = oracle.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert torch.equal(codes, expected)
    assert torch.equal(nested, state.absmax)


def test_every_position_of_the_nested_code() -> None:
    """The 65536 places that a scaled value is rounded to, the halves between them, and their neighbours."""
    places = (torch.arange(2 * 65535 + 1).double() / 65535 - 1).float()
    values = torch.cat([places, middles(tuple(oracle.create_dynamic_map().tolist()))])
    values = torch.cat([values, neighbours(values, 1.0), neighbours(values, -1.0)])
    blocks = in_blocks(values, 256, 1.0, -1.0)
    absmax = torch.cat([blocks, -blocks]).view(-1)  # the mean is 0 up to rounding
    codes, nested, offset = schemes.double_quantise(absmax)
    expected, state = oracle.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert abs(float(offset)) < 1e-7
    assert torch.equal(codes, expected)
    assert torch.equal(nested, state.absmax)


@dtypes
@samples
def test_int8(sample: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    weight = sample(96, 128).to(dtype).nan_to_num()
    codes, absmax = schemes.quantise_int8(weight)
    expected, scales, _ = oracle.int8_vectorwise_quant(weight)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax, scales)
    values = oracle.int8_vectorwise_dequant(expected, scales)
    assert torch.equal(schemes.dequantise_int8(codes, absmax), values)


def test_parameters_are_quantised_too() -> None:
    weight = gaussian(4, 100)
    for trained_on in [*schemes.ROUND_TRIPS, "int8"]:
        found = schemes.round_trip(torch.nn.Parameter(weight), trained_on)
        assert torch.equal(found, schemes.round_trip(weight, trained_on))
        assert not found.requires_grad


def test_int8_ties() -> None:
    weight = (torch.arange(-254, 255) / 2)[None]
    assert torch.equal(schemes.quantise_int8(weight)[0], oracle.int8_vectorwise_quant(weight)[0])


@kinds
@dtypes
@pytest.mark.parametrize("double", [False, True])
def test_round_trip(dtype: torch.dtype, kind: str, double: bool) -> None:
    weight = heavy_tailed(96, 208).to(dtype)
    found = schemes.round_trip(weight, f"{kind},double" if double else kind)
    assert found.dtype == torch.float32
    assert torch.equal(found, dequantised(weight, kind, compress_statistics=double))


@kinds
@pytest.mark.parametrize("double", [False, True])
def test_round_trip_is_what_a_layer_holds(kind: str, double: bool) -> None:
    weight = gaussian(128, 192) / 30
    layer = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type=kind, compress_statistics=double
    )
    layer = layer.to("cpu")
    held = oracle.dequantize_4bit(layer.data, layer.quant_state)
    assert torch.equal(schemes.round_trip(weight, f"{kind},double" if double else kind), held)


@dtypes
def test_round_trip_of_int8_is_what_a_layer_holds(dtype: torch.dtype) -> None:
    weight = gaussian(96, 200).to(dtype)
    layer = bnb.nn.Int8Params(weight, requires_grad=False).to("cpu")
    held = oracle.int8_vectorwise_dequant(layer.CB, layer.SCB)
    assert torch.equal(schemes.round_trip(weight, "int8"), held)


def test_what_is_not_known() -> None:
    with pytest.raises(UsageError, match="'nf5' is not known; expected one of: nf4, nf4,double"):
        schemes.round_trip(gaussian(2, 64), "nf5")


def test_bitsandbytes_is_not_imported() -> None:
    code = (
        "import sys, torch, adaptmerge.schemes.bitsandbytes.codes as schemes\n"
        "schemes.round_trip(torch.ones(2, 64), 'nf4,double')\n"
        "assert 'bitsandbytes' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
