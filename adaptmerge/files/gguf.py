"""GGUF files: a strict reader of headers that needs no other package and reads no tensor data.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts,
key-value pairs, tensor infos, padding to the alignment, data. Counts and lengths in the file are
not trusted: each step is checked against the bytes that are left.
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from adaptmerge.errors import InputError
from adaptmerge.files import refs
from adaptmerge.files.dtypes import BF16, F16, F32, F64, DType
from adaptmerge.files.refs import Shape, TensorRef
from adaptmerge.files.strict_json import capped, quoted

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"}
_SCALARS |= {10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST_AXES = 4
_KEPT = 1 << 16  # elements of an array; longer ones (vocabularies) are skipped
_FLOATS: dict[int, DType] = {0: F32, 1: F16, 28: F64, 30: BF16}
_OTHERS = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K"}
_OTHERS |= {
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
}


@dataclass(frozen=True)
class GgufFile:
    """The header of a file: its key-value pairs, tensors of floats as refs, names of other types.

    Arrays longer than a few thousand elements are None in `values`.
    """

    path: str
    values: Mapping[str, Any]
    refs: Mapping[str, TensorRef]
    others: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Info:
    name: str
    shape: Shape
    type: int
    offset: int

    @property
    def nbytes(self) -> int:
        dtype = _FLOATS.get(self.type)
        return dtype.nbytes(math.prod(self.shape)) if dtype else 0


def read_header(path: str | os.PathLike[str]) -> GgufFile:
    """The header of a GGUF file. Raises InputError with every problem that it shows."""
    where, absolute = os.fspath(path), str(Path(path).absolute())
    try:
        with Path(where).open("rb") as file:
            reader = _Reader(file, os.fstat(file.fileno()).st_size, where)
            values, infos, end = reader.read()
    except OSError as problem:
        raise InputError(f"cannot be read: {problem.strerror}", where=where) from None
    start = end + -end % values.get(ALIGNMENT, 32)
    problems = [*reader.problems, *_data_problems(infos, reader.size - start)]
    if problems:
        raise InputError(capped(problems), where=where)
    found = {
        info.name: refs.stored(absolute, start + info.offset, info.shape, dtype, info.name)
        for info in infos
        if (dtype := _FLOATS.get(info.type)) is not None
    }
    others = {i.name: _OTHERS.get(i.type, f"type {i.type}") for i in infos if i.name not in found}
    return GgufFile(absolute, values, found, others)


class _Reader:
    """Reads forward through a header, collecting problems that do not stop it."""

    def __init__(self, file: BinaryIO, size: int, where: str) -> None:
        self.file, self.size, self.where = file, size, where
        self.problems: list[str] = []

    def read(self) -> tuple[dict[str, Any], list[_Info], int]:
        """Key-value pairs, tensor infos and where they end."""
        self._check_magic()
        tensors, pairs = self._number("<Q"), self._number("<Q")
        values: dict[str, Any] = {}
        for _ in self._counted(pairs, 13, "entries"):
            key = self._text()
            if key in values:
                self.problems.append(f"key {quoted(key)} appears twice")
            values[key] = self._value(self._number("<I"))
        infos = [self._info() for _ in self._counted(tensors, 32, "tensors")]
        counts = Counter(info.name for info in infos)
        twice = [name for name, count in counts.items() if count > 1]
        self.problems += [f"tensor {quoted(name)} appears twice" for name in twice]
        self._check_alignment(values)
        return values, infos, self.file.tell()

    def _check_magic(self) -> None:
        magic = self._take(4)
        if magic != MAGIC:
            raise self._refusal(f"starts with {magic!r}, expected GGUF")
        version = self._number("<I")
        if version and not version & 0xFFFF:
            raise InputError(
                "is a big-endian GGUF file: convert it to little-endian", where=self.where
            )
        if version not in VERSIONS:
            expected = " or ".join(map(str, VERSIONS))
            raise self._refusal(f"is GGUF version {version}, expected {expected}: convert it again")

    def _check_alignment(self, values: dict[str, Any]) -> None:
        found = values.get(ALIGNMENT, 32)
        if not isinstance(found, int) or found <= 0 or found & (found - 1):
            raise self._refusal(f"{ALIGNMENT} is {found!r}: expected a power of two")

    def _counted(self, count: int, least: int, what: str) -> Iterator[int]:
        """0..count, after a check that so many things of `least` bytes fit into the file."""
        if count * least > self._left:
            raise self._refusal(
                f"announces {count} {what}, more than its {self.size} bytes can hold: it is cut "
                "off or damaged; copy or download it again"
            )
        return iter(range(count))

    def _refusal(self, sentence: str) -> InputError:
        return InputError(sentence, where=self.where)

    @property
    def _left(self) -> int:
        return self.size - self.file.tell()

    def _take(self, count: int) -> bytes:
        found = self.file.read(count) if count <= self._left else b""
        if len(found) < count:
            raise InputError(
                "the header is cut off or damaged: copy or download the file again",
                where=self.where,
            )
        return found

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _text(self) -> str:
        raw = self._take(self._number("<Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.problems.append(f"the text {quoted(raw)} is not UTF-8")
            return raw.decode(errors="backslashreplace")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            return self._array(self._number("<I"), self._number("<Q"))
        raise InputError(
            f"holds a value of the unknown type {kind}: it is damaged", where=self.where
        )

    def _array(self, kind: int, count: int) -> list[Any] | None:
        if kind not in _SCALARS and kind != _STRING:
            raise self._refusal(f"holds an array of the unknown type {kind}: it is damaged")
        least = 8 if kind == _STRING else struct.calcsize(_SCALARS[kind])
        items = self._counted(count, least, "array elements")
        if count <= _KEPT:
            return [self._value(kind) for _ in items]
        if kind == _STRING:
            for _ in items:
                self._skip(self._number("<Q"))
        else:
            self._skip(count * least)
        return None

    def _skip(self, count: int) -> None:
        if count > self._left:
            self._take(count)
        self.file.seek(count, os.SEEK_CUR)

    def _info(self) -> _Info:
        name, axes = self._text(), self._number("<I")
        if not 1 <= axes <= _MOST_AXES:
            label = f"tensor {quoted(name)}"
            raise self._refusal(f"{label} has {axes} dimensions, GGUF allows 1 to {_MOST_AXES}")
        shape = tuple(self._number("<Q") for _ in range(axes))[::-1]
        return _Info(name, shape, self._number("<I"), self._number("<Q"))


def _data_problems(infos: list[_Info], room: int) -> list[str]:
    """What is wrong with where the data should lie; `room` bytes follow the header."""
    ordered = sorted((i for i in infos if i.type in _FLOATS), key=lambda info: info.offset)
    problems = [
        f"tensors {quoted(one.name)} and {quoted(two.name)} overlap"
        for one, two in pairwise(ordered)
        if one.offset + one.nbytes > two.offset
    ]
    beyond = [info for info in ordered if info.offset + info.nbytes > room]
    if beyond:
        lost = max(info.offset + info.nbytes for info in beyond) - room
        problems.append(
            f"{lost} bytes are missing: {quoted(beyond[0].name)} reaches beyond the end of the "
            "file, which was cut off; copy or download it again"
        )
    return problems
