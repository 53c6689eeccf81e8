"""What every scheme keeps to, on checkpoints that its own package made: fixtures/quantised/*/.

Each folder holds a checkpoint (model.safetensors or shards, and config.json) and expected.safetensors, the
values that the package itself computes from it in float32, by module.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptmerge.bases.base import Base
from adaptmerge.bases.open import open_base
from adaptmerge.errors import InputError
from adaptmerge.schemes.coded import CodedWeight, dequantised
from adaptmerge.schemes.scheme import scheme_of, schemes
from adaptmerge.tensors.dtypes import of_torch

QUANTISED = Path(__file__).resolve().parents[2] / "fixtures" / "quantised"
FOLDERS = sorted(path.parent for path in QUANTISED.glob("**/expected.safetensors"))
cases = pytest.mark.parametrize(
    "folder", FOLDERS, ids=[folder.relative_to(QUANTISED).as_posix() for folder in FOLDERS]
)


def packed_in(folder: Path) -> dict[str, CodedWeight]:
    base = open_base(str(folder))
    scheme = scheme_of(base)
    assert scheme is not None
    return dict(scheme.find(base))


def whole(packed: CodedWeight) -> tuple[int, int]:
    return 0, packed.shape[0]


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same_bytes(found: torch.Tensor, stored: torch.Tensor) -> bool:
    alike = found.dtype == stored.dtype and found.shape == stored.shape
    return alike and torch.equal(bits_of(found), bits_of(stored))


@cases
def test_one_scheme_claims_a_checkpoint(folder: Path) -> None:
    base = open_base(str(folder))
    assert len([name for name, scheme in schemes().items() if scheme.detect(base)]) == 1


@cases
def test_a_checkpoint_in_full_precision_is_not_claimed(folder: Path) -> None:
    base = open_base(str(folder))
    plain = Base(base.path, {"model_type": "llama"}, base.tensors)
    assert not [name for name, scheme in schemes().items() if scheme.detect(plain)]


@cases
def test_values_are_those_of_the_package(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    found = packed_in(folder)
    assert found.keys() == expected.keys()
    for module, packed in found.items():
        assert (packed.module, packed.shape) == (module, tuple(expected[module].shape))
        assert torch.equal(dequantised(packed, whole(packed)), expected[module].float()), module


@cases
def test_rows_are_rows_of_the_whole(folder: Path) -> None:
    for packed in packed_in(folder).values():
        values = dequantised(packed, whole(packed))
        rows = packed.shape[0]
        for start, stop in ((0, 1), (rows - 1, rows), (3, min(rows, 16)), (5, 6), (1, rows)):
            assert torch.equal(dequantised(packed, (start, stop)), values[start:stop])


@cases
def test_what_is_read_is_stored_again(folder: Path) -> None:
    for packed in packed_in(folder).values():
        stored = {name: ref.read() for name, ref in packed.tensors.items()}
        found = packed.pack(*packed.grid(whole(packed)))
        assert next(iter(stored)) in found, "the codes come first"
        assert found.keys() <= stored.keys()
        assert not [name for name in found if not same_bytes(found[name], stored[name])]


@cases
def test_codes_are_found_again_from_their_values(folder: Path) -> None:
    for packed in packed_in(folder).values():
        codes, grid = packed.grid(whole(packed))
        columns = slice(0, packed.shape[1])
        assert codes.dtype == torch.uint8
        assert int(codes.max()) < grid.count
        values = grid.values(codes, columns, torch.empty(codes.shape))
        again = grid.values(grid.codes(values, columns), columns, torch.empty(codes.shape))
        assert torch.equal(again, values)


def some_scales(scale: torch.Tensor) -> torch.Tensor:
    """Other scales, near these."""
    generator = torch.Generator().manual_seed(7)
    return scale * (1 + 0.1 * torch.randn(scale.shape, generator=generator))


@cases
def test_nearest_scales_are_storable(folder: Path) -> None:
    for packed in packed_in(folder).values():
        scale = packed.grid(whole(packed))[1].scale
        stored = packed.nearest_scales(scale, whole(packed))
        if stored is None:
            continue
        assert torch.equal(stored, scale)
        nearest = packed.nearest_scales(some_scales(scale), whole(packed))
        assert nearest is not None
        assert nearest.dtype == scale.dtype
        again = packed.nearest_scales(nearest, whole(packed))
        assert again is not None
        assert torch.equal(again, nearest)
        rows = (2, packed.shape[0] - 1)
        part = packed.nearest_scales(some_scales(scale)[slice(*rows)], rows)
        assert part is not None
        assert torch.equal(part, nearest[slice(*rows)])


@cases
def test_other_codes_and_scales_come_back(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    wanted = {}
    for module, packed in packed_in(folder).items():
        codes, grid = packed.grid(whole(packed))
        generator = torch.Generator().manual_seed(len(module))
        codes = codes[torch.randperm(len(codes), generator=generator)].flip(1)
        nearest = packed.nearest_scales(some_scales(grid.scale), whole(packed))
        grid = grid if nearest is None else grid.rescaled(nearest)
        wanted[module] = codes, grid.scale
        for name, value in packed.pack(codes, grid).items():
            stack, _, part = name.removesuffix("]").partition("[")
            tensors |= {} if part else {name: value.contiguous()}
            if part:
                tensors[stack][int(part)] = value
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(folder / "config.json", tmp_path)
    for module, packed in packed_in(tmp_path).items():
        codes, grid = packed.grid(whole(packed))
        assert torch.equal(codes, wanted[module][0])
        assert torch.equal(grid.scale, wanted[module][1])


@cases
def test_tensors_may_lie_in_different_shards(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    places = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        part = {name: tensors[name] for name in tensors if places[name] == file}
        save_file(part, tmp_path / file, {"format": "pt"})
    index = json.dumps({"metadata": {}, "weight_map": places})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    shutil.copy(folder / "config.json", tmp_path)
    for module, packed in packed_in(tmp_path).items():
        original = packed_in(folder)[module]
        assert torch.equal(
            dequantised(packed, whole(packed)), dequantised(original, whole(original))
        )


@cases
def test_packed_weights_are_data(folder: Path) -> None:
    once, twice = packed_in(folder), packed_in(folder)
    for module, packed in once.items():
        assert hash(packed) == hash(twice[module])
        assert packed == twice[module]
        for ref in packed.tensors.values():
            assert ref.dtype == of_torch(ref.read().dtype)


@cases
def test_a_checkpoint_without_packed_weights_is_refused(folder: Path) -> None:
    base = open_base(str(folder))
    scheme = scheme_of(base)
    assert scheme is not None
    with pytest.raises(InputError):
        scheme.find(Base(base.path, base.config, {}))
