from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from files import hostile

from adaptmerge.errors import InputError
from adaptmerge.files.listing import Listing, sha256_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "adapter"
    (root / "checkpoint-1").mkdir(parents=True)
    (root / "adapter_config.json").write_text('{"r": 8}', encoding="utf-8-sig")
    (root / "adapter_model.safetensors").write_bytes(hostile.one())
    torch.save({"w": torch.ones(1)}, root / "extra.bin")
    (root / "README.md").write_text("grüße", encoding="utf-8")
    return root


def test_a_folder(folder: Path) -> None:
    listing = Listing.of(folder, "my/adapter")
    assert listing.single is None
    assert listing.names == (
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "extra.bin",
    )
    assert listing.folders == ("checkpoint-1",)
    assert listing.has("README.md")
    assert not listing.has("checkpoint-1")
    assert listing.json("adapter_config.json") == {"r": 8}
    assert listing.head("README.md", 2) == b"gr"
    assert list(listing.tensors("adapter_model.safetensors").refs) == ["w"]
    assert listing.tensors("extra.bin") is listing.tensors("extra.bin")


def test_digests(folder: Path) -> None:
    listing = Listing.of(folder, "x")
    expected = hashlib.sha256((folder / "README.md").read_bytes()).hexdigest()
    assert sha256_of(folder / "README.md") == expected
    assert listing.sha256("README.md") == {"README.md": expected}
    assert tuple(listing.sha256()) == listing.names
    with pytest.raises(InputError, match="does not exist"):
        sha256_of(folder / "none")


def test_a_single_file_knows_its_siblings(folder: Path) -> None:
    (folder / "extra.json").write_text("{}")
    listing = Listing.of(folder / "extra.bin", "extra.bin")
    assert (listing.single, listing.names, listing.folders) == ("extra.bin", ("extra.bin",), ())
    assert listing.has("extra.json")
    assert listing.json("adapter_config.json") == {"r": 8}
    assert not listing.has("README.md")
    with pytest.raises(InputError):
        listing.json("README.md")


def test_an_index_is_tensors(folder: Path) -> None:
    index = {"weight_map": {"w": "adapter_model.safetensors"}}
    (folder / "adapter.safetensors.index.json").write_text(json.dumps(index))
    assert "w" in Listing.of(folder, "x").tensors("adapter.safetensors.index.json").refs


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", "", "..", ".", "a\\b", "a\0b"])
def test_names_stay_in_the_folder(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match="directly in the folder"):
        Listing.of(folder, "x").json(name)


def test_missing_things_come_with_a_suggestion(folder: Path) -> None:
    with pytest.raises(InputError, match="did you mean '.*adapter'"):
        Listing.of(folder.parent / "adaptor", "x")
    with pytest.raises(InputError, match="did you mean '.*adapter_config.json'"):
        Listing.of(folder, "x").json("adapter_confg.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{'r': 8}", "not JSON"),
        (b"[1]", "holds a JSON list"),
        (b'{"r": 8, "r": 9}', "'r' appears 2 times"),
        (b'{"a": {"r": 8, "r": 9}}', "'r' appears 2 times"),
        (b'{"r": "\xff"}', "not UTF-8"),
        (b"", "empty"),
        (hostile.LFS_POINTER, "git lfs pull"),
        (hostile.HTML_PAGE, "HTML page"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_config_that_is_not_json(folder: Path, content: bytes, message: str) -> None:
    (folder / "bad.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        Listing.of(folder, "x").json("bad.json")


def test_other_suffixes_hold_no_tensors(folder: Path) -> None:
    with pytest.raises(InputError, match="expected one of .index.json, .safetensors"):
        Listing.of(folder, "x").tensors("README.md")
