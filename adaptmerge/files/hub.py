"""Where an input is: a local path, or a model on the Hugging Face Hub, through its cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from adaptmerge.errors import InputError
from adaptmerge.files.paths import exists, inside, missing
from adaptmerge.lazy import without_logs

_NAME = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"({_NAME}/{_NAME})(?:@([^\s@:]+?))?(?://(.*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json", ".yaml", ".yml")
_WANTED = ("json", "safetensors", "bin", "pt", "pth", "txt", "md", "model", "gguf", "jinja")
_UNWANTED = ("checkpoint-*", "*/checkpoint-*", "optimizer.*", "*/optimizer.*")


_PLACE = rf"(?P<name>{_NAME}/{_NAME})"
_REVISION = r"(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+)"
_SCHEME = re.compile(rf"hf://(?:models/)?{_PLACE}(?:@{_REVISION})?(?:/+(?P<inner>.*))?", re.ASCII)
_HOSTS = r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/"
_PAGE = re.compile(
    rf"{_HOSTS}{_PLACE}(?:/(?:tree|blob|resolve|raw|blame)/{_REVISION}(?:/(?P<inner>.*))?)?/?",
    re.ASCII,
)
_OTHERS = re.compile(rf"(?:hf://|{_HOSTS})(?P<kind>dataset|space|bucket)s/")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(?=.)")


def is_address(source: str) -> bool:
    """Whether a source is an address, and no file or folder of such a name."""
    return _URL.match(source) is not None and not exists(source)


def as_id(source: str) -> str:
    """The name `org/name[@revision][//subfolder]` of what an address of the Hub leads to; any other source
    as it is."""
    if not is_address(source):
        return source
    plain = unquote(source.partition("#")[0].partition("?")[0])
    found = _SCHEME.fullmatch(plain) or _PAGE.fullmatch(plain)
    if found is None or _OTHERS.match(source):
        return source
    inner = (found["inner"] or "").strip("/")
    revision = "" if found["revision"] in (None, "main") else f"@{found['revision']}"
    return f"{found['name']}{revision}" + (f"//{inner}" if inner else "")


def _no_model(source: str) -> InputError:
    """Why an address is not read."""
    other = _OTHERS.match(source)
    if other:
        return InputError(f"is a {other['kind']} of the Hub: give a model", where=source)
    return InputError(
        "is an address that is not read: download it and give the file, or give a model of the Hub "
        "(org/name, hf://org/name, https://huggingface.co/org/name)",
        where=source,
    )


def resolve(source: str) -> tuple[Path, str | None]:
    """The local path of an input, and its commit when it came from the Hub.

    `source` is a path, `org/name[@revision][//subfolder]` or an address of the Hub. Raises InputError
    when it is none of these, when the Hub cannot be reached and its cache does not have it, or when it
    is private.
    """
    source = as_id(source)
    path = Path(source)
    if exists(path):
        return path, None
    if is_address(source):
        raise _no_model(source)
    match = _ID.fullmatch(source)
    if match is None or not is_id(source):
        raise missing(path)
    repository, revision, subfolder = match[1], match[2], (match[3] or "").strip("/")
    if subfolder and inside(Path(), subfolder) is None:
        raise InputError(
            f"the subfolder {subfolder!r} leaves the repository: name one inside it", where=source
        )
    snapshot = _snapshot(source, repository, revision, subfolder)
    return _inner(snapshot, subfolder, source), _commit(snapshot)


def is_id(source: str) -> bool:
    """Whether a source that is no local path can be meant as one of the Hub."""
    names_a_file = source.endswith(_FILES) and "//" not in source
    plain_path = "@" not in source and "//" not in source
    in_a_folder = plain_path and exists(Path(source.partition("/")[0]))
    return _ID.fullmatch(source) is not None and not (names_a_file or in_a_folder)


def _commit(snapshot: Path) -> str | None:
    return snapshot.name if snapshot.parent.name == "snapshots" else None


def _inner(snapshot: Path, subfolder: str, source: str) -> Path:
    found = inside(snapshot, subfolder) if subfolder else snapshot
    if found is None or not found.exists():
        sentence = f"the repository has no folder {subfolder!r}: check its name"
        raise InputError(sentence, where=source)
    return found


def _snapshot(source: str, repository: str, revision: str | None, subfolder: str) -> Path:
    with without_logs():
        return _fetched(source, repository, revision, subfolder)


def _fetched(source: str, repository: str, revision: str | None, subfolder: str) -> Path:
    import huggingface_hub

    options = {"revision": revision, **_patterns(subfolder)}
    offline = huggingface_hub.is_offline_mode()
    pinned = revision is not None and _COMMIT.fullmatch(revision) is not None
    tries = [True] if offline else [True, False] if pinned else [False]
    for local in tries:
        try:
            found = huggingface_hub.snapshot_download(repository, local_files_only=local, **options)
            return Path(found)
        except (OSError, ValueError) as problem:
            last = problem
    raise InputError(_sentence(last, repository, revision, offline), where=source) from last


def _patterns(subfolder: str) -> dict[str, Any]:
    if not subfolder:
        wanted = [*(f"*.{suffix}" for suffix in _WANTED), "LICENSE*"]
        return {"allow_patterns": wanted, "ignore_patterns": list(_UNWANTED)}
    # a subfolder may also name one file; a checkpoint asked for by name is wanted
    return {
        "allow_patterns": [subfolder, *(f"{subfolder}/*.{suffix}" for suffix in _WANTED)],
        "ignore_patterns": [f"{subfolder}/{pattern}" for pattern in _UNWANTED],
    }


def _sentence(problem: Exception, repository: str, revision: str | None, offline: bool) -> str:
    from huggingface_hub import errors

    if isinstance(problem, errors.GatedRepoError):
        return "is gated: accept its terms on its page, then run `hf auth login`"
    if isinstance(problem, errors.RepositoryNotFoundError):
        return (
            "is neither a local path nor a model on the Hub that you may see: check the name, "
            "or run `hf auth login` if it is private"
        )
    if isinstance(problem, errors.RevisionNotFoundError):
        return f"the Hub model has no revision {revision!r}: name a branch, tag or commit of it"
    if isinstance(problem, ValueError):
        return "is neither a local path nor a name that the Hub allows: check the spelling"
    fetch = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
    if offline:
        return (
            "is neither a local path nor wholly in the Hub cache, and HF_HUB_OFFLINE is set: "
            f"unset it or run `{fetch}` where there is a network"
        )
    return (
        f"is no local path, and the Hub cannot be reached ({type(problem).__name__}): check the "
        f"network, or run `{fetch}` where there is one and set HF_HUB_OFFLINE=1"
    )
