from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from adaptmerge.errors import InputError
from adaptmerge.files.hub import as_id, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with org/name, offline, and an empty working folder."""
    root = tmp_path / "cache"
    repository = root / "models--org--name"
    snapshot = repository / "snapshots" / COMMIT
    (snapshot / "sub" / "deep").mkdir(parents=True)
    (snapshot / "adapter_config.json").write_text("{}")
    (repository / "refs" / "refs" / "pr").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "refs" / "refs" / "pr" / "1").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_local_paths_come_first(cache: Path) -> None:
    Path("org/name").mkdir(parents=True)
    assert resolve("org/name") == (Path("org/name"), None)


@pytest.mark.parametrize(
    ("source", "inner"),
    [
        ("org/name", ""),
        ("org/name@main", ""),
        (f"org/name@{COMMIT}", ""),
        ("org/name@refs/pr/1//sub", "sub"),
        ("org/name//sub/deep/", "sub/deep"),
        ("org/name//adapter_config.json", "adapter_config.json"),
    ],
)
def test_cached_models(cache: Path, source: str, inner: str) -> None:
    assert resolve(source) == (cache / inner, COMMIT)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("hf://org/name", "org/name"),
        ("hf://models/org/name/", "org/name"),
        ("hf://org/name@v1", "org/name@v1"),
        ("hf://org/name/sub/deep", "org/name//sub/deep"),
        ("hf://org/name@refs/pr/1/sub", "org/name@refs/pr/1//sub"),
        ("https://huggingface.co/org/name", "org/name"),
        ("http://www.huggingface.co/org/name/", "org/name"),
        ("https://hf.co/org/name?library=peft#files", "org/name"),
        ("https://huggingface.co/org/name/tree/main", "org/name"),
        ("https://huggingface.co/org/name/tree/main/sub/deep/", "org/name//sub/deep"),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F1/sub", "org/name@refs/pr/1//sub"),
        ("https://huggingface.co/org/name/blob/v1/x.safetensors", "org/name@v1//x.safetensors"),
        ("https://huggingface.co/org/name/resolve/main/x.bin?download=true", "org/name//x.bin"),
    ],
)
def test_addresses_of_the_hub_are_names(address: str, name: str) -> None:
    assert as_id(address) == name


def test_an_address_is_read_from_the_cache(cache: Path) -> None:
    file = "https://huggingface.co/org/name/blob/main/adapter_config.json"
    assert resolve(file) == (cache / "adapter_config.json", COMMIT)
    assert resolve("hf://org/name@refs/pr/1/sub") == (cache / "sub", COMMIT)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://huggingface.co/datasets/org/name", "is a dataset of the Hub: give a model"),
        ("hf://spaces/org/name", "is a space of the Hub: give a model"),
        ("https://example.org/x.safetensors", "download it and give the file"),
        ("s3://bucket/x.safetensors", "download it and give the file"),
        ("https://huggingface.co/name", "download it and give the file"),
    ],
)
def test_other_addresses_are_refused(cache: Path, address: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(address)


@pytest.mark.parametrize("inner", ["../x", "sub/../../x", "a\\b", "/etc"])
def test_subfolders_stay_inside(cache: Path, inner: str) -> None:
    with pytest.raises(InputError, match="leaves the repository|no folder"):
        resolve(f"org/name//{inner}")


def test_a_subfolder_must_exist(cache: Path) -> None:
    with pytest.raises(InputError, match="no folder 'nope'"):
        resolve("org/name//nope")


def test_offline_and_not_cached(cache: Path) -> None:
    with pytest.raises(InputError, match="HF_HUB_OFFLINE.*`hf download org/other --revision v1`"):
        resolve("org/other@v1")


@pytest.mark.parametrize(
    "source", ["plain", "a/b/c", "out/model.safetensors", "~/x y", "org/..a", "x" * 5000]
)
def test_what_is_no_hub_name_is_a_missing_path(cache: Path, source: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        resolve(source)


def refusal(kind: Any) -> Exception:
    problem: Exception = kind.__new__(kind)
    return problem


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (refusal(errors.GatedRepoError), "accept its terms"),
        (refusal(errors.RepositoryNotFoundError), "nor a model on the Hub"),
        (refusal(errors.RevisionNotFoundError), "no revision 'v1'"),
        (errors.HFValidationError("x"), "check the spelling"),
        (ConnectionError("x"), "cannot be reached"),
    ],
)
def test_refusals_are_one_sentence(
    cache: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception, message: str
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise problem

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=message):
        resolve("org/name@v1")


def test_a_pinned_revision_is_looked_up_in_the_cache_first(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def download(repository: str, **options: Any) -> str:
        asked.append(options)
        if options["local_files_only"]:
            raise errors.LocalEntryNotFoundError("x")
        return str(cache)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve(f"org/name@{COMMIT}//sub")
    assert [options["local_files_only"] for options in asked] == [True, False]
    assert "sub/*.safetensors" in asked[0]["allow_patterns"]
