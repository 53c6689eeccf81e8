"""Layouts of quantised weights written out with Python's integers, sharing nothing with the schemes, and
small checkpoints made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adaptmerge.bases.open import open_base
from adaptmerge.schemes.coded import CodedWeight
from adaptmerge.schemes.scheme import scheme_of

Tensors = dict[str, torch.Tensor]
MODULE = "model.layers.0.self_attn.q_proj"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words_of(codes: Sequence[int], bits: int) -> list[int]:
    """Signed 32-bit words of codes that follow one another from the lowest bit up; the last is filled."""
    stream = 0
    for place, code in enumerate(codes):
        stream |= int(code) << (bits * place)
    count = -(-len(codes) * bits // 32)
    words = [stream >> (32 * word) & 0xFFFFFFFF for word in range(count)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def along_columns(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Words (rows, n bits / 32), i32, of codes (rows, n)."""
    return torch.tensor([words_of(row, bits) for row in codes.tolist()], dtype=torch.int32)


def along_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Words (n bits / 32, columns), i32, of codes (n, columns)."""
    columns = [words_of([row[i] for row in codes.tolist()], bits) for i in range(codes.shape[1])]
    return torch.tensor(columns, dtype=torch.int32).T.contiguous()


def interleaved(codes: torch.Tensor) -> torch.Tensor:
    """Words (rows, n / 8), i32, of 4-bit codes (rows, n) in AWQ's order."""
    return along_columns(
        torch.tensor(
            [
                [row[start + place] for start in range(0, len(row), 8) for place in AWQ_ORDER]
                for row in codes.tolist()
            ]
        ),
        4,
    )


def less_one(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Words (any shape) less 1 in each of their codes, borrowing from the next one."""
    ones = sum(1 << place for place in range(0, 32, bits))
    flat = [(word - ones) & 0xFFFFFFFF for word in words.flatten().tolist()]
    signed = [word - (1 << 32) if word >> 31 else word for word in flat]
    return torch.tensor(signed, dtype=torch.int32).view(words.shape)


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    """Codes (rows, columns), int64; the first row is all ones and the second all zeros."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    found[:1], found[1:2] = (1 << bits) - 1, 0
    return found


def random_scales(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.01 + torch.rand(shape, generator=generator)).to(dtype)


def packed_in(
    folder: Path, tensors: Tensors, config: Mapping[str, Any]
) -> Mapping[str, CodedWeight]:
    """The packed weights of a checkpoint, which is written into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {name: value.contiguous() for name, value in tensors.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    text = json.dumps({"model_type": "llama", **config})
    (folder / "config.json").write_text(text, encoding="utf-8")
    base = open_base(str(folder))
    scheme = scheme_of(base)
    assert scheme is not None
    return scheme.find(base)


def whole(packed: CodedWeight) -> tuple[int, int]:
    return 0, packed.shape[0]


def assert_stored_again(packed: CodedWeight) -> None:
    """Codes and grid as they were read give the stored bytes."""
    for name, found in packed.pack(*packed.grid(whole(packed))).items():
        stored = packed.tensors[name].read()
        assert found.dtype == stored.dtype
        assert torch.equal(found.view(torch.uint8), stored.view(torch.uint8)), name
