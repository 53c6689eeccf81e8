"""Changes of files of any kind, and of what lies where a file should be.

The old file is never written into: it may be a hard link to one that others begin with.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fuzz import json_changes, tensor_changes

ENDLESS = Path("/dev/zero")
WORDS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
HEADER = 4096  # bytes at the beginning, of which most decide


def replace(path: Path, content: bytes) -> None:
    """Another file in its place."""
    path.unlink()
    path.write_bytes(content)


def change_bytes(path: Path, random: Random) -> str:
    """Some bytes are others, more or fewer."""
    content = path.read_bytes()
    size = len(content)
    near = random.random() < 0.7
    at = random.randrange(max(1, min(size, HEADER) if near else size))
    span = random.choice((1, 2, 8, 64, 1000))
    word = random.choice(WORDS).to_bytes(8, "little")
    found: dict[str, bytes] = {
        "is cut off": content[:at],
        "has a bit turned": content[:at] + bytes([_byte(content, at) ^ 1 << random.randrange(8)]),
        "has other bytes": content[:at] + random.randbytes(min(span, size - at)),
        "has another word": content[:at] + word[: size - at],
        "has zeros": content[:at] + bytes(min(span, size - at)),
        "has more bytes": content[:at] + random.randbytes(span) + content[at:],
        "has fewer bytes": content[:at] + content[at + span :],
        "goes on": content + random.randbytes(span),
        "lacks its end": content[: -min(span, size)] if size else b"",
    }
    how = random.choice(sorted(found))
    whole = found[how]
    if how.startswith(("has a ", "has o", "has an", "has z")):
        whole += content[len(whole) :]
    replace(path, whole)
    return f"{how} at byte {at}"


def _byte(content: bytes, at: int) -> int:
    return content[at] if at < len(content) else 0


def change_json(path: Path, random: Random) -> str:
    """One value of a text or of the header of tensors."""
    content = path.read_bytes()
    parts = tensor_changes.unframed(content)
    try:
        value = parts[0] if parts else json.loads(content)
    except (ValueError, RecursionError):
        return change_bytes(path, random)
    if random.random() < 0.05:
        text, said = json_changes.twice(json.dumps(value), random), "a name is there twice"
    else:
        other, said = json_changes.changed(value, random)
        text = json_changes.text(other)
    whole = tensor_changes.framed(text, parts[1]) if parts else text.encode()
    replace(path, whole)
    return f"header: {said}" if parts else said


def change_tensors(path: Path, random: Random) -> str:
    """One tensor."""
    if path.suffix == ".bin":
        return change_pickle(path, random)
    content = path.read_bytes()
    if tensor_changes.unframed(content) is None:
        return change_json(path, random)
    whole, said = tensor_changes.changed(content, random)
    replace(path, whole)
    return said


def change_pickle(path: Path, random: Random) -> str:
    """One entry of a pickle is something else."""
    import torch

    try:
        table = torch.load(path, weights_only=True)
        name = random.choice(sorted(table))
    except Exception:  # it has been changed before
        return change_bytes(path, random)
    table[name] = _pickled(table, name, random)
    stream = io.BytesIO()
    torch.save(table, stream)
    replace(path, stream.getvalue())
    return f"{name!r} is {type(table[name]).__name__}"


def _pickled(table: dict[Any, Any], name: str, random: Random) -> Any:
    import torch

    value = table[name]
    loop: list[Any] = []
    loop.append(loop)
    made: list[Callable[[], Any]] = [
        *(lambda: loop, lambda: table, lambda: {"state_dict": table}, lambda: {1: 2}),
        lambda: json_changes.odd(random),
    ]
    if isinstance(value, torch.Tensor):
        value = torch.atleast_1d(value)
        made += [
            *(lambda: value.to(torch.complex64), lambda: value.to(torch.int64), lambda: value > 0),
            *(lambda: value[:0], lambda: value.flatten(), lambda: torch.nn.Parameter(value, False)),
            *(lambda: torch.full(value.shape, float("nan")), lambda: [value], value.to_sparse),
            *(
                lambda: value.expand(2, *value.shape),
                lambda: value.reshape(-1)[0],
                lambda: value.reshape(-1, 1),
            ),
        ]
    return random.choice(made)()


def change_kind(path: Path, random: Random) -> str:
    """Something that is not this file."""
    how = random.choice(sorted(_KINDS))
    content = path.read_bytes()
    path.unlink()
    _KINDS[how](path, content, random)
    return how


def _folder(path: Path, content: bytes, random: Random) -> None:
    path.mkdir()
    if random.random() < 0.5:
        (path / path.name).write_bytes(content)


def _loop(path: Path, content: bytes, random: Random) -> None:
    path.symlink_to(path.name)


def _folder_loop(path: Path, content: bytes, random: Random) -> None:
    path.symlink_to(path.parent, target_is_directory=True)


def _other_file(path: Path, content: bytes, random: Random) -> None:
    others = sorted(p for p in path.parent.parent.rglob("*") if p.is_file() and not p.is_symlink())
    shutil.copyfile(random.choice(others), path) if others else path.write_bytes(b"")


def _foreign(path: Path, content: bytes, random: Random) -> None:
    from files import hostile

    known = [content for content, _ in hostile.SAFETENSORS.values()]
    path.write_bytes(
        random.choice([*known, hostile.code_pickle("false"), b"\x80\x04N.", b"PK\x05\x06"])
    )


def _moved(path: Path, content: bytes, random: Random) -> None:
    names = [
        *("model.safetensors", "adapter_model.bin", "x.gguf", "adaptmerge.json", "graph.json"),
        *("config.json", "adapter_config.json", "model.safetensors.index.json", "a.json"),
    ]
    target = path.with_name(random.choice(names))
    if not target.exists():
        target.write_bytes(content)


def _misnamed(path: Path, content: bytes, random: Random) -> None:
    target = Path(
        os.fsdecode(os.fsencode(path.parent / path.stem) + b"\xff" + path.suffix.encode())
    )
    target.write_bytes(content)


_KINDS: dict[str, Callable[[Path, bytes, Random], object]] = {
    "is gone": lambda path, content, random: None,
    "is empty": lambda path, content, random: path.write_bytes(b""),
    "is a folder": _folder,
    "is a pipe": lambda path, content, random: os.mkfifo(path),
    "is a link to itself": _loop,
    "is a link to its folder": _folder_loop,
    "is a link to nothing": lambda path, content, random: path.symlink_to("nothing"),
    "is a device": lambda path, content, random: path.symlink_to(ENDLESS),
    "is another file": _other_file,
    "is foreign": _foreign,
    "is misplaced": _moved,
    "has a name that is no Unicode": _misnamed,
}
CHANGES: dict[str, Callable[[Path, Random], str]] = {
    "bytes": change_bytes,
    "json": change_json,
    "tensors": change_tensors,
    "kind": change_kind,
}
