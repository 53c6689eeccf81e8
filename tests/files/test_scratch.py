from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from adaptmerge.errors import OutputError
from adaptmerge.files.safetensors import write_safetensors
from adaptmerge.files.scratch import Scratch


def test_tensors_can_be_read_at_once_and_later(tmp_path: Path) -> None:
    values = [
        torch.arange(3, dtype=torch.uint8),
        torch.arange(6.0).reshape(2, 3).T,
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.ones(0, 4),
        torch.ones(2, dtype=torch.float8_e4m3fn),
    ]
    with Scratch(tmp_path / "heap") as scratch:
        refs = []
        for value in values:
            refs.append(scratch.put(value, "w"))
            assert torch.equal(refs[-1].read().float(), value.float())
    for ref, value in zip(refs, values, strict=True):
        assert ref.source.offset % 8 == 0  # type: ignore[attr-defined]
        assert (ref.shape, ref.dtype.torch, ref.name) == (tuple(value.shape), value.dtype, "w")
        assert torch.equal(ref.read().float(), value.float())
    write_safetensors(tmp_path / "x", {str(n): ref for n, ref in enumerate(refs)}, {})


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Scratch(tmp_path / "heap") as scratch:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            with pytest.raises(OutputError, match="larger than"):
                scratch.put(torch.ones(10_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(OutputError, match="cannot be written"):
        Scratch(tmp_path / "none" / "heap")
