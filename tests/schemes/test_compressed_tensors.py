"""Weights that compressed-tensors stores, held to its own recordings and, where installed, to itself."""

from __future__ import annotations

import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from schemes.checkpoints import (
    QUANTISED,
    Tensors,
    assert_holds_any_codes,
    assert_recorded,
    assert_same,
    assert_scales_fit,
    assert_stored_again,
    folder_of,
    packed_of,
    recorded,
    values,
    whole,
)

from adaptmerge.errors import InputError
from adaptmerge.schemes.coded import dequantised
from adaptmerge.schemes.narrow import packed as in_words
from adaptmerge.schemes.narrow import unpacked

METHOD = {"quant_method": "compressed-tensors"}
CASES = sorted(folder.name for folder in QUANTISED.glob("ct-*"))
SHARED = {"ct-fp8", "ct-fp8-block", "ct-mxfp4", "ct-mxfp8"}  # scales of several rows, powers of two
OLD = "ct-int4-act-order"
Q = "model.layers.0.self_attn.q_proj"
cases = pytest.mark.parametrize("case", CASES)


def test_all_formats_are_recorded() -> None:
    assert len(CASES) == 15
    found = {recorded(case)[1]["format"] for case in CASES}
    wanted = {"pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized"}
    assert found >= wanted | {"mixed-precision", "mxfp4-pack-quantized", "mxfp8-quantized"}


@cases
def test_values_are_those_that_the_library_reads(case: str) -> None:
    assert_recorded(QUANTISED / case)


@cases
def test_stored_again(case: str, tmp_path: Path) -> None:
    assert_stored_again(QUANTISED / case)
    assert_holds_any_codes(QUANTISED / case, tmp_path / "again")


@cases
def test_scales(case: str, tmp_path: Path) -> None:
    if case not in SHARED | {"ct-mixed"}:
        assert_scales_fit(QUANTISED / case, tmp_path)
    for packed in packed_of(QUANTISED / case).values():
        scale = whole(packed)[1].scale
        assert (packed.nearest_scales(scale, (0, packed.shape[0])) is None) == (case in SHARED)
        assert hash(packed)


@cases
def test_all_tensors_of_a_module_are_its_own(case: str) -> None:
    tensors, _ = recorded(case)
    for packed in packed_of(QUANTISED / case).values():
        mine = {name for name in tensors if name.startswith(f"{packed.module}.")}
        assert packed.tensors.keys() == mine
        assert next(iter(packed.tensors)).endswith((".weight", ".weight_packed"))


def test_only_what_is_stored_as_codes_counts() -> None:
    assert list(packed_of(QUANTISED / "ct-int4")) == [Q]  # k_proj is ignored
    mixed = packed_of(QUANTISED / "ct-mixed")
    assert {module.rpartition(".")[2] for module in mixed} == {"q_proj", "k_proj"}


def test_codes_of_four_bits_stay_in_them() -> None:
    for packed in packed_of(QUANTISED / "ct-w4a8").values():
        assert whole(packed)[1].count == 16


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 70), bits=st.sampled_from([4, 8]), data=st.data()
)
def test_words(rows: int, columns: int, bits: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    fields = torch.randint(1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    words = in_words(fields, bits)
    assert words.shape == (rows, -(-columns * bits // 32))
    assert torch.equal(unpacked(words, bits)[:, :columns], fields)


def test_the_first_field_is_the_lowest() -> None:
    levels = torch.tensor([[-8, -1, 4, -5, -3, 5, 2, -3]])
    assert in_words((levels + 8).to(torch.uint8), 4).tolist() == [[0x5AD53C70]]


def test_an_order_that_was_never_set(tmp_path: Path) -> None:
    tensors, config = recorded("ct-int4")
    tensors[f"{Q}.weight_g_idx"] = torch.full((128,), -1, dtype=torch.int32)
    (packed,) = packed_of(folder_of(tmp_path, tensors, config)).values()
    (plain,) = packed_of(QUANTISED / "ct-int4").values()
    assert torch.equal(values(packed), values(plain))


def test_zeros_that_are_not_packed(tmp_path: Path) -> None:
    """Versions before 0.10 stored them as they are."""
    tensors, config = recorded("ct-int4-asymmetric")
    (plain,) = packed_of(QUANTISED / "ct-int4-asymmetric").values()
    zero = whole(plain)[1].zero
    assert zero is not None
    tensors[f"{Q}.weight_zero_point"] = zero.to(torch.int8)
    (packed,) = packed_of(folder_of(tmp_path, tensors, config)).values()
    assert torch.equal(values(packed), values(plain))


@pytest.mark.parametrize("case", ["ct-int4-asymmetric", "ct-int8-asymmetric"])
def test_any_rows_have_their_own_zeros(case: str) -> None:
    (packed,) = packed_of(QUANTISED / case).values()
    everything = values(packed)
    for start in range(packed.shape[0]):
        for stop in range(start + 1, packed.shape[0] + 1):
            assert torch.equal(dequantised(packed, (start, stop)), everything[start:stop])


def test_scales_beyond_their_dtype_are_the_largest() -> None:
    (packed, _) = packed_of(QUANTISED / "ct-nvfp4").values()
    grid = whole(packed)[1]
    most = packed.nearest_scales(grid.scale * 1e9, (0, packed.shape[0]))
    assert most is not None
    assert float(most.max()) == float(most.min()) == float(grid.scale.max())


Change = Callable[[Tensors], None]


def without(name: str) -> Change:
    return lambda tensors: tensors.__delitem__(f"{Q}.{name}")


def instead(name: str, tensor: torch.Tensor) -> Change:
    return lambda tensors: tensors.update({f"{Q}.{name}": tensor})


I32 = torch.int32
BAD: dict[str, tuple[str, Change, str]] = {
    "no scale": (
        "ct-int4",
        without("weight_scale"),
        "weight_scale is missing beside .*weight_packed",
    ),
    "no codes": ("ct-w8a8", without("weight"), "weight_packed is missing beside .*weight_scale"),
    "no shape": (
        "ct-int4",
        without("weight_shape"),
        r"weight_shape is missing, expected \[36, in\]",
    ),
    "no over": ("ct-nvfp4", without("weight_global_scale"), "weight_global_scale is missing"),
    "over": (
        "ct-mxfp4",
        instead("weight_global_scale", torch.ones(1)),
        "global_scale is not expected",
    ),
    "overs": ("ct-nvfp4", instead("weight_global_scale", torch.ones(2)), "expected one f32"),
    "shape": (
        "ct-int4",
        instead("weight_shape", torch.tensor([36, 64])),
        "has 8 bits for each of 64",
    ),
    "rows": (
        "ct-int4",
        instead("weight_shape", torch.tensor([35, 128])),
        r"is \[35, 128\], expected",
    ),
    "bits": (
        "ct-int4",
        instead("weight_shape", torch.tensor([36, 256])),
        "has 2 bits for each of 256",
    ),
    "scale": (
        "ct-int4",
        instead("weight_scale", torch.ones(36, 3)),
        r"is \[36, 3\], expected one per",
    ),
    "scale rows": (
        "ct-int4",
        instead("weight_scale", torch.ones(35, 4)),
        r"is \[35, 4\], expected",
    ),
    "scale dtype": (
        "ct-int4",
        instead("weight_scale", torch.ones(36, 4).int()),
        "is i32, expected one",
    ),
    "fp4 groups": (
        "ct-mxfp4",
        instead("weight_scale", torch.ones(36, 1).byte()),
        "groups of 16 or 32",
    ),
    "zeros": (
        "ct-int4-asymmetric",
        instead("weight_zero_point", torch.ones(4, 4).int()),
        "point is i32",
    ),
    "zero": (
        "ct-w8a8-asymmetric",
        instead("weight_zero_point", torch.ones(3, 1).char()),
        "point is i8",
    ),
    "order": (
        "ct-int4",
        instead("weight_g_idx", torch.ones(64, dtype=I32)),
        r"g_idx is i32 \[64\]",
    ),
    "e5m2": ("ct-fp8", instead("weight", torch.ones(36, 128).to(torch.float8_e5m2)), "is f8_e5m2"),
    "stack": ("ct-w8a8", instead("weight", torch.ones(2, 36, 128).char()), "expected a matrix"),
    "codes": (
        "ct-int4",
        instead("weight_packed", torch.ones(36, 16).short()),
        "is i16, which cannot",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_does_not_fit(bad: str, tmp_path: Path) -> None:
    case, change, message = BAD[bad]
    tensors, config = recorded(case)
    change(tensors)
    with pytest.raises(InputError, match=message) as caught:
        packed_of(folder_of(tmp_path, tensors, config))
    assert Q in str(caught.value)


def test_all_problems_at_once(tmp_path: Path) -> None:
    tensors, config = recorded("ct-w8a8")
    for one in "qk":
        tensors[f"model.layers.0.self_attn.{one}_proj.weight_scale"] = torch.ones(5, 7)
    with pytest.raises(InputError) as caught:
        packed_of(folder_of(tmp_path, tensors, config))
    assert len(caught.value.problems) == 2


READ: dict[str, tuple[str, Change, str]] = {
    "groups": ("ct-int4", instead("weight_g_idx", torch.full((128,), 4, dtype=I32)), "more than 4"),
    "nan": (
        "ct-fp8",
        instead("weight", torch.full((36, 128), torch.nan).to(torch.float8_e4m3fn)),
        "NaN",
    ),
    "scale": ("ct-int4", instead("weight_scale", torch.full((36, 4), torch.inf)), "not finite"),
    "power": ("ct-mxfp4", instead("weight_scale", torch.full((36, 4), 255).byte()), "not finite"),
    "over": ("ct-nvfp4", instead("weight_global_scale", torch.zeros(1)), "not finite"),
    "bits": ("ct-w4a8", instead("weight", torch.full((36, 128), 8).char()), "more than 4 bits"),
}


@pytest.mark.parametrize("bad", READ)
def test_what_cannot_be_read(bad: str, tmp_path: Path) -> None:
    case, change, message = READ[bad]
    tensors, config = recorded(case)
    change(tensors)
    packed = packed_of(folder_of(tmp_path, tensors, config))[Q]
    with pytest.raises(InputError, match=f"{Q}.*{message}"):
        packed.grid((0, 36))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rotated": ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "QuaRot"),
    "sparse": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    "marlin": ({"format": "marlin-24"}, "has the format marlin-24, which cannot be read"),
    "fp6": ({"config_groups": {"g": {"format": "mxfp6-pack-quantized"}}}, "mxfp6-pack-quantized"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str, tmp_path: Path) -> None:
    tensors, config = recorded("ct-int4")
    said, message = REFUSED[what]
    with pytest.raises(InputError, match=message):
        packed_of(folder_of(tmp_path, tensors, config | said))


def test_empty_transforms_and_sparsity_are_none(tmp_path: Path) -> None:
    tensors, config = recorded("ct-int4")
    said = {"transform_config": {"config_groups": {}}, "sparsity_config": {"format": "dense"}}
    assert packed_of(folder_of(tmp_path, tensors, config | said))


def test_nothing_is_quantised(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="but no weight is stored as codes"):
        packed_of(folder_of(tmp_path, {f"{Q}.weight": torch.ones(2, 2)}, METHOD))


def installed(case: str) -> Any:
    """The library, of the version that a case is recorded with."""
    library = pytest.importorskip("compressed_tensors")
    if library.__version__ != ("0.11.0" if case == OLD else "0.20.0"):
        pytest.skip("recorded with another version")
    return library


@cases
@pytest.mark.filterwarnings("ignore")
def test_the_recording_is_what_the_library_makes(case: str) -> None:
    installed(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = runpy.run_path(str(QUANTISED.parent / "make_quantised_ct.py"))
        tensors, config, _ = script["CASES"][case]()
    held, said = recorded(case)
    assert tensors.keys() == held.keys()
    assert config == said
    for name, tensor in tensors.items():
        assert_same(tensor, held[name])


@pytest.mark.parametrize("case", [case for case in CASES if case != OLD])
@pytest.mark.filterwarnings("ignore")
def test_in_the_dtype_of_scales_the_library_rounds_the_values(case: str) -> None:
    installed(case)
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    tensors, config = recorded(case)
    groups = list(config["config_groups"].values())
    for module, packed in packed_of(QUANTISED / case).items():
        group = groups[module.endswith("k_proj")] if len(groups) > 1 else groups[0]
        scheme = quantization.QuantizationScheme.model_validate(group)
        compressor = compressors.BaseCompressor.get_value_from_registry(group["format"])
        own = {name.rpartition(".")[2]: tensors[name] for name in packed.tensors}
        found = compressor.decompress(own, scheme)["weight"]
        assert found.dtype == torch.bfloat16
        assert torch.equal(values(packed).bfloat16(), found)
