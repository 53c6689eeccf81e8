"""Safetensors files: strict reading of headers and indexes without torch; a streaming writer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import RawIOBase
from itertools import cycle
from pathlib import Path
from typing import Any, BinaryIO

from adaptmerge.errors import InputError
from adaptmerge.files import header, sniff
from adaptmerge.files.disk import Flusher, tensor_bytes, writing
from adaptmerge.files.paths import inside
from adaptmerge.files.pickles import read_pickle
from adaptmerge.files.strict_json import capped, parse, quoted
from adaptmerge.files.tensor_file import TensorFile
from adaptmerge.tensors import refs
from adaptmerge.tensors.refs import Reshape, Stored, TensorRef

CHUNK = 1 << 20


def read_header(path: str | os.PathLike[str]) -> TensorFile:
    """The tensors and metadata of a safetensors file, of which only the header is read.

    Raises InputError with every problem of the header when the file is not exactly as it should be.
    """
    where, absolute = os.fspath(path), str(Path(path).absolute())
    sniff.refuse(sniff.head(where), where, "a safetensors file", ("safetensors",))
    with sniff.plain_file(where) as file:
        size = os.fstat(file.fileno()).st_size
        text = _header_text(file, size, where)
    start = 8 + len(text)
    entries, metadata = header.read(text, size - start, where)
    found = {
        entry.name: refs.stored(absolute, start + entry.begin, entry.shape, entry.dtype, entry.name)
        for entry in entries
    }
    return TensorFile(absolute, found, metadata)


def _header_text(file: BinaryIO, size: int, where: str) -> bytes:
    length = int.from_bytes(file.read(8), "little")
    if size < 8:
        raise InputError(
            f"ends after {size} bytes, a safetensors file has at least 10: "
            "copy or download it again",
            where=where,
        )
    if length > header.LIMIT:
        raise InputError(
            f"the header length is {length} bytes, safetensors allows {header.LIMIT}: "
            "this is no safetensors file, or a damaged one; copy or download it again",
            where=where,
        )
    text = file.read(length)
    if len(text) < length:
        raise InputError(
            f"the header is cut off: {length - len(text)} of its {length} bytes are missing; "
            "copy or download the file again",
            where=where,
        )
    return text


def read_index(path: str | os.PathLike[str]) -> TensorFile:
    """The tensors of all shards that an index (*.index.json) names, shard by shard.

    Metadata is that of the shards (the first wins), under that of the index. Raises InputError when
    a shard is missing or outside the folder, or when shards and index do not hold the same keys.
    """
    where = os.fspath(path)
    index = _index_table(where)
    shards = _shards(index["weight_map"], where)
    found: dict[str, TensorRef] = {}
    metadata: dict[str, str] = {}
    problems: list[str] = []
    for name, shard in shards.items():
        tensors = _read_shard(shard)
        problems += _key_problems(name, tensors, index["weight_map"])
        found.update(tensors.refs)
        metadata = {**tensors.metadata, **metadata}
    if problems:
        raise InputError(capped(problems), where=where)
    own = {key: _as_text(value) for key, value in (index.get("metadata") or {}).items()}
    return TensorFile(str(Path(where).absolute()), found, {**metadata, **own})


def _index_table(where: str) -> dict[str, Any]:
    sniff.refuse(sniff.head(where), where, "an index of shards", ())
    try:
        table, problems = parse(sniff.whole(where))
    except ValueError as problem:
        raise InputError(f"is not JSON ({problem}): write the index again", where=where) from None
    if not isinstance(table, dict) or not isinstance(table.get("weight_map"), dict):
        problems.append("has no weight_map, expected an object from tensor names to file names")
    elif not isinstance(table.get("metadata") or {}, dict):
        problems.append(f"metadata is {quoted(table['metadata'])}, expected an object")
    if problems:
        raise InputError(capped(problems), where=where)
    found: dict[str, Any] = table
    return found


def _shards(weight_map: Mapping[str, Any], where: str) -> dict[str, Path]:
    folder, shards, problems = Path(where).parent, {}, []
    for name in sorted(set(map(_as_text, weight_map.values()))):
        shard = inside(folder, name)
        if shard is None:
            problems.append(f"names the shard {quoted(name)}, which lies outside its folder")
        elif not shard.is_file():
            problems.append(f"names the shard {quoted(name)}, which does not exist: copy it beside")
        else:
            shards[name] = shard
    if problems:
        raise InputError(capped(problems), where=where)
    return shards


def _read_shard(shard: Path) -> TensorFile:
    if shard.suffix == ".safetensors":
        return read_header(shard)
    return read_pickle(shard)


def _key_problems(name: str, shard: TensorFile, weight_map: Mapping[str, Any]) -> list[str]:
    wanted = {key for key, value in weight_map.items() if value == name}
    lost = [f"shard {quoted(name)} lacks {quoted(key)}" for key in sorted(wanted - set(shard.refs))]
    return lost + [
        f"shard {quoted(name)} holds {quoted(key)}, which the index does not place there"
        for key in shard.refs
        if key not in wanted
    ]


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, TensorRef],
    metadata: Mapping[str, str],
    progress: Callable[[int], None] | None = None,
) -> str:
    """Write the tensors, one at a time, and return the sha256 of the file in hexadecimal.

    `progress` is told the number of bytes after each piece. The bytes depend on the arguments only.
    Raises OutputError when the disk fails, InputError when a source does; no part of a file stays.
    """
    where = os.fspath(path)
    first, order = header.build(tensors, metadata, where)
    return write_pieces(where, _pieces(first, (tensors[name] for name in order)), progress)


def write_pieces(
    path: str | os.PathLike[str],
    pieces: Iterator[bytes | memoryview],
    progress: Callable[[int], None] | None = None,
) -> str:
    """Write the pieces one after the other and return the sha256 of the file in hexadecimal.

    A piece may be overwritten once the next but one is asked for. Raises OutputError when the disk fails;
    no part of a file stays.
    """
    where = os.fspath(path)
    with (
        writing(where),
        # unbuffered, so that the disk can be set to work while more is computed
        Path(where).open("wb", buffering=0) as file,
        _removed_on_failure(where),
        _Digest() as digest,
        Flusher(file.fileno()) as flusher,
    ):
        for piece in pieces:
            digest.update(piece)
            _write_all(file, memoryview(piece))
            flusher.written(len(piece))
            if progress is not None:
                progress(len(piece))
        return digest.finish()


def _write_all(file: RawIOBase, piece: memoryview) -> None:
    done = 0
    while done < len(piece):
        done += file.write(piece[done:]) or 0


def raw_header(path: str | os.PathLike[str]) -> bytes:
    """The first bytes of a safetensors file, up to its data, as they are."""
    with Path(path).open("rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))


class _Digest:
    """sha256 in a thread of its own, one piece behind: hashing takes longer than copying."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def update(self, piece: bytes | memoryview) -> None:
        """Hash a piece later; every piece before it may be overwritten when this returns."""
        self._wait()
        self._last = self._thread.submit(self._digest.update, piece)

    def finish(self) -> str:
        """The digest in hexadecimal."""
        self._wait()
        return self._digest.hexdigest()

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def __enter__(self) -> _Digest:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()


@contextmanager
def _removed_on_failure(path: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(OSError):
            Path(path).unlink()
        raise


def _pieces(first: bytes, tensors: Iterator[TensorRef]) -> Iterator[bytes | memoryview]:
    yield first
    # two, because a piece is still being hashed while the next is read
    buffers = cycle([memoryview(bytearray(CHUNK)), memoryview(bytearray(CHUNK))])
    for ref in tensors:
        if isinstance(ref.source, Stored) and all(isinstance(s, Reshape) for s in ref.steps):
            yield from _span(ref.source, buffers)
        else:
            yield _value(ref)


def _span(source: Stored, buffers: Iterator[memoryview]) -> Iterator[memoryview]:
    """The bytes of a stored tensor in chunks; each is valid until its buffer comes round again."""
    left = source.nbytes
    try:
        with Path(source.path).open("rb", buffering=0) as file:
            file.seek(source.offset)
            while left and (step := file.readinto((view := next(buffers))[:left])):
                left -= step
                yield view[:step]
    except OSError as problem:
        raise InputError(f"cannot be read: {problem.strerror}", where=source.path) from None
    if left:
        sentence = f"ends {left} bytes early: it was shortened while in use"
        raise InputError(sentence, where=source.path)


def _value(ref: TensorRef) -> memoryview:
    try:
        data = tensor_bytes(ref.read())
    except OSError as problem:
        raise InputError(f"tensor {ref.name!r} cannot be read: {problem.strerror}") from None
    if len(data) != ref.nbytes:
        raise InputError(
            f"tensor {ref.name!r} has {len(data)} bytes, {ref.nbytes} were announced: "
            "its file was changed while in use"
        )
    return data
