"""The experts of gpt-oss in MXFP4, held to transformers' own reading of them, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from schemes.checkpoints import (
    QUANTISED,
    Tensors,
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

from adaptmerge.bases.open import open_base
from adaptmerge.errors import InputError
from adaptmerge.tensors.refs import Stored

FOLDER = QUANTISED / "mxfp4"
CONFIG = {"quant_method": "mxfp4"}
EXPERTS = "model.layers.0.mlp.experts"


def experts_of(path: Path, blocks: torch.Tensor, powers: torch.Tensor) -> Path:
    tensors = {f"{EXPERTS}.down_proj_blocks": blocks, f"{EXPERTS}.down_proj_scales": powers}
    return folder_of(path, tensors, CONFIG)


def test_values_are_those_that_transformers_reads() -> None:
    assert_recorded(FOLDER)


def test_stored_again(tmp_path: Path) -> None:
    assert_stored_again(FOLDER)
    assert_holds_any_codes(FOLDER, tmp_path)


@given(
    count=st.integers(1, 3),
    rows=st.integers(1, 8),
    groups=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_experts_as_transformers_reads_them(
    count: int, rows: int, groups: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (count, rows, groups, 16), generator=generator, dtype=torch.uint8)
    powers = torch.randint(1, 252, (count, rows, groups), generator=generator, dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, powers, dtype=torch.float32)
    folder = experts_of(tmp_path_factory.mktemp("any"), blocks, powers)
    found = packed_of(folder)
    assert len(found) == count
    for expert in range(count):
        packed = found[f"{EXPERTS}.down_proj[{expert}]"]
        assert packed.shape == (rows, 32 * groups)
        assert_same(values(packed) + 0.0, expected[expert].T.contiguous() + 0.0)
    assert_stored_again(folder)


def test_every_power_of_two(tmp_path: Path) -> None:
    powers = torch.arange(255, dtype=torch.uint8).view(1, 255, 1)
    blocks = torch.full((1, 255, 1, 16), 0x12, dtype=torch.uint8)  # 1 is low, 2 is high
    (packed,) = packed_of(experts_of(tmp_path, blocks, powers)).values()
    expected = torch.exp2(torch.arange(255).double() - 127)[:, None]
    assert torch.equal(whole(packed)[1].scale.double(), expected)
    first = torch.tensor([1.0, 0.5])
    assert torch.equal(values(packed)[:, :2].double(), expected * first)


def test_all_values_in_their_order(tmp_path: Path) -> None:
    """Low nibbles are even columns, as transformers has them, too."""
    row = torch.arange(16, dtype=torch.uint8)
    blocks = (row | (15 - row) << 4).view(1, 1, 1, 16)
    (packed,) = packed_of(experts_of(tmp_path, blocks, torch.full((1, 1, 1), 127).byte())).values()
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table += [-value for value in table]
    assert values(packed)[0, 0::2].tolist() == table
    assert values(packed)[0, 1::2].tolist() == table[::-1]
    codes, grid = whole(packed)
    assert int(codes.max()) == grid.count - 1 == 14


def test_an_expert_is_a_slice() -> None:
    tensors = load_file(FOLDER / "model.safetensors")
    found = packed_of(FOLDER)
    assert len(found) == 4
    packed = found[f"{EXPERTS}.gate_up_proj[1]"]
    assert packed.shape == (24, 64)
    assert list(packed.tensors) == [
        f"{EXPERTS}.gate_up_proj_blocks[1]",
        f"{EXPERTS}.gate_up_proj_scales[1]",
    ]
    blocks, powers = packed.tensors.values()
    assert_same(blocks.read(), tensors[f"{EXPERTS}.gate_up_proj_blocks"][1])
    assert_same(powers.read(), tensors[f"{EXPERTS}.gate_up_proj_scales"][1])
    assert isinstance(blocks.source, Stored)
    assert blocks.source.nbytes == 24 * 32  # and no more is read
    assert hash(packed)


def test_experts_that_are_computed(tmp_path: Path) -> None:
    """Refs with steps are sliced when they are read."""
    from dataclasses import replace

    from adaptmerge.schemes.mxfp4 import SCHEME

    base = open_base(str(FOLDER))
    moved = {name: ref.reshape(1, *ref.shape) for name, ref in base.tensors.items()}
    moved = {name: ref.reshape(*base.tensors[name].shape) for name, ref in moved.items()}
    moved = {name: ref.slice(0, 1, 2).slice(0, 0, 1) for name, ref in moved.items()}
    found = SCHEME.find(replace(base, tensors=moved))
    name = f"{EXPERTS}.down_proj"
    assert_same(values(found[f"{name}[0]"]), values(packed_of(FOLDER)[f"{name}[1]"]))


def test_scales_are_not_fitted() -> None:
    for packed in packed_of(FOLDER).values():
        assert packed.nearest_scales(whole(packed)[1].scale, (0, packed.shape[0])) is None


def test_signs_of_zeros_are_kept_where_nothing_moves(tmp_path: Path) -> None:
    blocks = torch.full((1, 1, 1, 16), 0x80, dtype=torch.uint8)
    (packed,) = packed_of(experts_of(tmp_path, blocks, torch.full((1, 1, 1), 127).byte())).values()
    codes, grid = whole(packed)
    assert int(codes.max()) == int(codes.min())
    codes[0, 1] += 1
    (stored,) = packed.pack(codes, grid).values()
    assert stored.flatten().tolist() == [0x10] + [0x80] * 15


def test_nan_in_scales(tmp_path: Path) -> None:
    blocks, powers = torch.zeros(2, 4, 1, 16).byte(), torch.zeros(2, 4, 1).byte()
    powers[1, 2] = 255
    found = packed_of(experts_of(tmp_path, blocks, powers))
    found[f"{EXPERTS}.down_proj[0]"].grid((0, 4))
    with pytest.raises(InputError, match=r"down_proj_scales\[1\] holds scales that are not finite"):
        found[f"{EXPERTS}.down_proj[1]"].grid((0, 4))


def test_all_problems_at_once(tmp_path: Path) -> None:
    blocks, powers = torch.zeros(2, 4, 1, 16).byte(), torch.zeros(2, 4, 1).byte()
    tensors: Tensors = {
        "a_blocks": blocks,
        "b_scales": powers,
        "c_blocks": blocks,
        "c_scales": powers[:, :3],
        "d_blocks": blocks[0],
        "d_scales": powers[0],
        "e_blocks": blocks.char(),
        "e_scales": powers,
    }
    with pytest.raises(InputError) as caught:
        packed_of(folder_of(tmp_path, tensors, CONFIG))
    assert sorted(caught.value.problems) == [
        "a_scales is missing beside a_blocks",
        "b_blocks is missing beside b_scales",
        "c_scales is [2, 3, 1], expected [2, 4, 1]",
        "d_blocks is [4, 1, 16], expected [experts, out, in / 32, 16]",
        "e_blocks is i8, expected u8",
    ]


def test_nothing_is_quantised(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="quantised to mxfp4, but no expert is"):
        packed_of(folder_of(tmp_path, {"a.weight": torch.ones(2, 2)}, CONFIG))


def test_the_recording_is_of_whole_experts() -> None:
    tensors, _ = recorded("mxfp4")
    assert tensors[f"{EXPERTS}.gate_up_proj_blocks"].shape == (2, 24, 2, 16)
