"""Small quantised checkpoints: written, read as packed weights, and stored again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from adaptmerge.bases.open import open_base
from adaptmerge.schemes.coded import CodedWeight, dequantised
from adaptmerge.schemes.grids import BlockGrid
from adaptmerge.schemes.scheme import scheme_of

QUANTISED = Path(__file__).resolve().parents[2] / "fixtures" / "quantised"
Tensors = dict[str, torch.Tensor]


def folder_of(path: Path, tensors: Tensors, config: Mapping[str, Any]) -> Path:
    """A checkpoint with a quantization_config."""
    path.mkdir(parents=True, exist_ok=True)
    own = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    save_file(own, path / "model.safetensors")
    text = json.dumps({"model_type": "llama", "quantization_config": dict(config)})
    (path / "config.json").write_text(text, encoding="utf-8")
    return path


def recorded(name: str) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and the quantization_config of a recorded checkpoint."""
    config = json.loads((QUANTISED / name / "config.json").read_text("utf-8"))
    return load_file(QUANTISED / name / "model.safetensors"), config["quantization_config"]


def packed_of(folder: Path) -> Mapping[str, CodedWeight]:
    base = open_base(str(folder))
    scheme = scheme_of(base)
    assert scheme is not None
    return scheme.find(base)


def values(packed: CodedWeight) -> torch.Tensor:
    return dequantised(packed, (0, packed.shape[0]))


def whole(packed: CodedWeight) -> tuple[torch.Tensor, BlockGrid]:
    return packed.grid((0, packed.shape[0]))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, which tell zeros and NaN apart."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(bits(found), bits(expected))


def assert_recorded(folder: Path) -> None:
    """All weights stand for the values that the library reads from them, in any rows."""
    expected = load_file(folder / "expected.safetensors")
    found = packed_of(folder)
    assert found.keys() == expected.keys()
    for module, packed in found.items():
        assert_same(values(packed) + 0.0, expected[module] + 0.0)  # codes have one zero
        rows = (packed.shape[0] // 3, packed.shape[0] // 3 + 5)
        assert torch.equal(dequantised(packed, rows), expected[module][slice(*rows)])


def assert_stored_again(folder: Path) -> None:
    """Codes and grids as they are read give the stored bytes; so do values that are rounded again."""
    for packed in packed_of(folder).values():
        codes, grid = whole(packed)
        again = grid.codes(values(packed), slice(0, packed.shape[1]))
        for one in (codes, again):
            stored = packed.pack(one, grid)
            assert stored
            for name, tensor in stored.items():
                assert_same(tensor, packed.tensors[name].read())


def random_codes(packed: CodedWeight, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = whole(packed)[1].count
    return torch.randint(count, packed.shape, generator=generator, dtype=torch.int32).to(
        torch.uint8
    )


def with_packed(folder: Path, path: Path, changes: Tensors) -> Mapping[str, CodedWeight]:
    """The packed weights of a copy of a checkpoint with other tensors; "x[3]" is the fourth part of x."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    for name, tensor in changes.items():
        whole_name, _, part = name.removesuffix("]").partition("[")
        held = tensors[whole_name][int(part)] if part else tensors[name]
        held.copy_(tensor)
    return packed_of(folder_of(path, tensors, config["quantization_config"]))


def assert_holds_any_codes(folder: Path, path: Path, seed: int = 0) -> None:
    """Random codes, stored, are read as they were, beside the same scales."""
    before = packed_of(folder)
    codes = {module: random_codes(packed, seed) for module, packed in before.items()}
    changes: Tensors = {}
    for module, packed in before.items():
        changes |= packed.pack(codes[module], whole(packed)[1])
    for module, packed in with_packed(folder, path, changes).items():
        found, grid = whole(packed)
        assert torch.equal(found, codes[module])
        assert_same(grid.scale, whole(before[module])[1].scale)


def assert_scales_fit(folder: Path, path: Path) -> None:
    """Scales are rounded to what is read again once they are stored, and what is stored to itself."""
    before, wanted = packed_of(folder), {}
    changes: Tensors = {}
    for module, packed in before.items():
        codes, grid = whole(packed)
        scale = grid.scale * torch.linspace(0.6, 1.0, packed.shape[0])[:, None]
        wanted[module] = _rounded(packed, scale)
        assert_same(_rounded(packed, grid.scale), grid.scale)
        assert bool(((wanted[module] - scale).abs() <= scale.abs() / 15).all())
        part = packed.nearest_scales(scale[1:3].double(), (1, 3))
        assert part is not None
        assert torch.equal(part, wanted[module][1:3].double())
        changes |= packed.pack(codes, grid.rescaled(wanted[module]))
    for module, packed in with_packed(folder, path, changes).items():
        found, grid = whole(packed)
        assert torch.equal(found, whole(before[module])[0])
        assert_same(grid.scale, wanted[module])


def _rounded(packed: CodedWeight, scale: torch.Tensor) -> torch.Tensor:
    found = packed.nearest_scales(scale, (0, packed.shape[0]))
    assert found is not None
    return found
