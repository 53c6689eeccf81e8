from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from files import hostile

from adaptmerge.errors import InputError
from adaptmerge.files.pickles import load, read_pickle
from adaptmerge.files.safetensors import write_safetensors


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_tensors_and_values_of_a_checkpoint(tmp_path: Path, new: bool) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    table = {"w": base.T, "shared": base[0], "half": base.bfloat16(), "epoch": 3, "kind": "lora"}
    path = saved(tmp_path / "x.bin", table, _use_new_zipfile_serialization=new)
    read = read_pickle(path)
    assert read.metadata == {"epoch": "3", "kind": '"lora"'}
    assert list(read.refs) == ["w", "shared", "half"]
    assert read.refs["w"].shape == (3, 2)
    assert torch.equal(read.refs["w"].read(), base.T)
    assert torch.equal(read.refs["shared"].read(), base[0])
    assert str(read.refs["half"].dtype) == "bf16"
    write_safetensors(tmp_path / "y", read.refs, {})


def test_wrapping_dictionaries_leave_no_trace(tmp_path: Path) -> None:
    one = torch.ones(1)
    table = {"state_dict": {"w": one}, "ema": {"w": one * 2}, "config": {"r": 8}, "step": 1}
    read = read_pickle(saved(tmp_path / "x.ckpt", table))
    assert {name: ref.read().item() for name, ref in read.refs.items()} == {"w": 1, "ema.w": 2}
    assert read.metadata == {"config": '{"r": 8}', "step": "1"}
    twice = saved(tmp_path / "y.ckpt", {"model": {"state_dict": {"a.b": one}}})
    assert list(read_pickle(twice).refs) == ["a.b"]


def test_parameters_and_scalars(tmp_path: Path) -> None:
    table = {"p": torch.nn.Parameter(torch.ones(2)), "s": torch.tensor(1.5), "e": torch.ones(0, 2)}
    read = read_pickle(saved(tmp_path / "x.pt", table))
    assert not read.refs["p"].read().requires_grad
    assert read.refs["s"].read().item() == 1.5
    assert read.refs["e"].shape == (0, 2)


def test_a_bare_tensor_is_called_by_its_file(tmp_path: Path) -> None:
    read = read_pickle(saved(tmp_path / "decoder.pt", torch.ones(2, 3)))
    assert read.refs["decoder"].read().shape == (2, 3)
    with pytest.raises(InputError, match="sparse"):
        read_pickle(saved(tmp_path / "x.pt", torch.ones(2).to_sparse()))


@pytest.mark.parametrize("make", [hostile.code_pickle, hostile.code_checkpoint])
def test_a_pickle_that_would_run_code_does_not(tmp_path: Path, make: Any) -> None:
    (tmp_path / "x.bin").write_bytes(make(f"touch {tmp_path}/ran"))
    with pytest.raises(InputError, match="would run code when loaded .*trust"):
        load(tmp_path / "x.bin")
    assert not (tmp_path / "ran").exists()


def test_objects_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin", {"args": argparse.Namespace(r=8)})
    with pytest.raises(InputError, match="asks for argparse.Namespace"):
        read_pickle(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (hostile.LFS_POINTER, "git lfs pull"),
        (hostile.HTML_PAGE, "HTML page"),
        (hostile.one(), "is a safetensors file"),
        (b"some text", "not a torch checkpoint"),
        (b"\x80\x02}q\x00.", "not a torch checkpoint"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_pickle(tmp_path / "x.bin")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_truncated(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "x.bin"
    saved(path, {"w": torch.ones(100)}, _use_new_zipfile_serialization=new)
    whole = path.read_bytes()
    for size in (3, 40, len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="cut off"):
            read_pickle(path)


def test_a_compressed_archive_is_read_without_mapping(tmp_path: Path) -> None:
    plain = saved(tmp_path / "x.bin", {"w": torch.zeros(1000)})
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(tmp_path / "y.bin", "w") as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item), zipfile.ZIP_DEFLATED)
    assert read_pickle(tmp_path / "y.bin").refs["w"].read().sum() == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.ones(2)], "expected a dictionary of tensors"),
        ({"opt": {0: torch.ones(1)}}, "'opt' hides tensors"),
        ({"list": [torch.ones(1)]}, "'list' hides tensors"),
        ({3: torch.ones(1)}, "not a string"),
        ({"w": torch.ones(1), "model": {"w": torch.ones(1)}}, "two of its dictionaries"),
        ({"w": torch.ones(2, 2).to_sparse()}, "sparse"),
        ({"w": torch.ones(2, device="meta")}, "meta"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, "complex128"),
    ],
)
def test_what_cannot_be_described_is_refused(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_pickle(saved(tmp_path / "x.pt", value))
