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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from adaptmerge.errors import InputError
from adaptmerge.files import sniff
from adaptmerge.files.strict_json import capped, quoted
from adaptmerge.tensors import refs
from adaptmerge.tensors.dtypes import BF16, F16, F32, F64, U8, DType
from adaptmerge.tensors.refs import Shape, TensorRef

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
FIRST = 24  # bytes before the key-value pairs
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"}
_SCALARS |= {10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST_AXES = 4
_KEPT = 1 << 16  # elements of an array; longer ones (vocabularies) are skipped
FILE_TYPE = "general.file_type"
_FLOATS: dict[int, DType] = {0: F32, 1: F16, 28: F64, 30: BF16}


class Type(NamedTuple):
    """How entries are stored, of which `width` share a block of `nbytes`."""

    name: str
    width: int
    nbytes: int


# ggml.h and ggml-common.h of llama.cpp
TYPES: Mapping[int, Type] = {
    **{number: Type(dtype.name, 1, dtype.bits // 8) for number, dtype in _FLOATS.items()},
    2: Type("Q4_0", 32, 18),
    3: Type("Q4_1", 32, 20),
    6: Type("Q5_0", 32, 22),
    7: Type("Q5_1", 32, 24),
    8: Type("Q8_0", 32, 34),
    9: Type("Q8_1", 32, 40),
    10: Type("Q2_K", 256, 84),
    11: Type("Q3_K", 256, 110),
    12: Type("Q4_K", 256, 144),
    13: Type("Q5_K", 256, 176),
    14: Type("Q6_K", 256, 210),
    15: Type("Q8_K", 256, 292),
    16: Type("IQ2_XXS", 256, 66),
    17: Type("IQ2_XS", 256, 74),
    18: Type("IQ3_XXS", 256, 98),
    19: Type("IQ1_S", 256, 50),
    20: Type("IQ4_NL", 32, 18),
    21: Type("IQ3_S", 256, 110),
    22: Type("IQ2_S", 256, 82),
    23: Type("IQ4_XS", 256, 136),
    24: Type("I8", 1, 1),
    25: Type("I16", 1, 2),
    26: Type("I32", 1, 4),
    27: Type("I64", 1, 8),
    29: Type("IQ1_M", 256, 56),
    34: Type("TQ1_0", 256, 54),
    35: Type("TQ2_0", 256, 66),
    39: Type("MXFP4", 32, 17),
    40: Type("NVFP4", 64, 36),
    41: Type("Q1_0", 128, 18),
}
FILE_TYPES: Mapping[int, int] = {0: 0, 1: 1, 30: 32}  # llama_ftype of files of floats
NUMBERS: Mapping[DType, int] = {dtype: number for number, dtype in _FLOATS.items()}


@dataclass(frozen=True, slots=True)
class Info:
    """What a header says of a tensor: its shape, rows first, and where it starts in the data."""

    name: str
    shape: Shape
    type: int
    offset: int

    @property
    def stored(self) -> Shape | None:
        """The shape of its bytes, in which only the last axis differs; None where the type is unknown or
        a row is not made of whole blocks."""
        kind = TYPES.get(self.type)
        if kind is None or self.shape[-1] % kind.width:
            return None
        return (*self.shape[:-1], self.shape[-1] // kind.width * kind.nbytes)

    @property
    def nbytes(self) -> int:
        return math.prod(self.stored or (0,))

    @property
    def stored_as(self) -> tuple[Shape | None, DType]:
        """The shape and dtype of the ref to it: floats as they are, all else as bytes."""
        dtype = _FLOATS.get(self.type)
        return (self.stored, U8) if dtype is None else (self.shape, dtype)


@dataclass(frozen=True)
class GgufFile:
    """The header of a file: its key-value pairs, tensors of floats as refs, names of other types.

    Arrays longer than a few thousand elements are None in `values`. infos: all tensors in the order of the
    header; pairs: the bytes of the key-value pairs; file_type: where the value of general.file_type lies
    in the file; start: where the data begins.
    """

    path: str
    values: Mapping[str, Any]
    refs: Mapping[str, TensorRef]
    others: Mapping[str, str]
    infos: tuple[Info, ...]
    pairs: tuple[int, int]
    file_type: int | None
    start: int

    @property
    def alignment(self) -> int:
        """Tensors start at multiples of it, counted from the start of the data."""
        return int(self.values.get(ALIGNMENT, 32))

    def raw(self, info: Info) -> TensorRef:
        """The bytes of a tensor (..., bytes of a row). Raises InputError where their number is unknown."""
        if info.stored is None:
            raise InputError(
                f"{quoted(info.name)} is of {type_name(info.type)} and of shape {list(info.shape)}, which "
                "is not known to fit: update adaptmerge, or convert the file again",
                where=self.path,
            )
        return refs.stored(self.path, self.start + info.offset, info.stored, U8, info.name)


def type_name(number: int) -> str:
    """What llama.cpp calls a type."""
    found = TYPES.get(number)
    return f"type {number}" if found is None else found.name


def read_header(path: str | os.PathLike[str]) -> GgufFile:
    """The header of a GGUF file. Raises InputError with every problem that it shows."""
    where, absolute = os.fspath(path), str(Path(path).absolute())
    with sniff.plain_file(where) as file:
        reader = _Reader(file, os.fstat(file.fileno()).st_size, where)
        values, infos, end = reader.read()
    start = end + -end % values.get(ALIGNMENT, 32)
    problems = [*reader.problems, *_data_problems(infos, reader.size - start)]
    if problems:
        raise InputError(capped(problems), where=where)
    found = {
        info.name: refs.stored(absolute, start + info.offset, info.shape, dtype, info.name)
        for info in infos
        if (dtype := _FLOATS.get(info.type)) is not None
    }
    others = {info.name: type_name(info.type) for info in infos if info.name not in found}
    pairs = (FIRST, reader.pairs_end)
    return GgufFile(
        absolute, values, found, others, tuple(infos), pairs, reader.places.get(FILE_TYPE), start
    )


class _Reader:
    """Reads forward through a header, collecting problems that do not stop it."""

    def __init__(self, file: BinaryIO, size: int, where: str) -> None:
        self.file, self.size, self.where = file, size, where
        self.problems: list[str] = []
        self.places: dict[str, int] = {}
        self.pairs_end = FIRST

    def read(self) -> tuple[dict[str, Any], list[Info], int]:
        """Key-value pairs, tensor infos and where they end."""
        self._check_magic()
        tensors, pairs = self._number("<Q"), self._number("<Q")
        values: dict[str, Any] = {}
        for _ in self._counted(pairs, 13, "entries"):
            key = self._text()
            if key in values:
                self.problems.append(f"key {quoted(key)} appears twice")
            kind = self._number("<I")
            self.places[key] = self.file.tell()
            values[key] = self._value(kind)
        self.pairs_end = self.file.tell()
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

    def _info(self) -> Info:
        name, axes = self._text(), self._number("<I")
        if not 1 <= axes <= _MOST_AXES:
            label = f"tensor {quoted(name)}"
            raise self._refusal(f"{label} has {axes} dimensions, GGUF allows 1 to {_MOST_AXES}")
        shape = tuple(self._number("<Q") for _ in range(axes))[::-1]
        return Info(name, shape, self._number("<I"), self._number("<Q"))


def _data_problems(infos: list[Info], room: int) -> list[str]:
    """What is wrong with where the data should lie; `room` bytes follow the header."""
    ordered = sorted((i for i in infos if i.stored), key=lambda info: info.offset)
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


def rewritten(header: GgufFile, infos: Sequence[Info]) -> bytes:
    """The first bytes of a file with the same key-value pairs and these tensors, which follow each other
    in the data; where nothing changes, the file's own."""
    placed, at = [], 0
    for info in infos:
        placed.append(replace(info, offset=at))
        at += info.nbytes + -info.nbytes % header.alignment
    with Path(header.path).open("rb") as file:
        first = bytearray(file.read(header.start))
    if sorted(placed, key=_offset) == sorted(header.infos, key=_offset):
        return bytes(first)
    order = {info.name: number for number, info in enumerate(header.infos)}
    placed.sort(key=lambda info: order.get(info.name, len(order)))
    _say_file_type(first, header, placed)
    struct.pack_into("<Q", first, FIRST - 16, len(placed))
    text = bytes(first[: header.pairs[1]]) + b"".join(map(_encoded, placed))
    return text + bytes(-len(text) % header.alignment)


def _offset(info: Info) -> int:
    return info.offset


def _encoded(info: Info) -> bytes:
    name = info.name.encode()
    axes = info.shape[::-1]
    shape = struct.pack(f"<I{len(axes)}Q", len(axes), *axes)
    return struct.pack("<Q", len(name)) + name + shape + struct.pack("<IQ", info.type, info.offset)


def _say_file_type(first: bytearray, header: GgufFile, infos: Sequence[Info]) -> None:
    """Of a file of floats the type that most entries have, where the file says one at all."""
    counts: Counter[int] = Counter()
    for info in infos:
        counts[info.type] += math.prod(info.shape)
    kind = FILE_TYPES.get(max(counts, key=lambda number: counts[number]))
    if header.file_type is not None and kind is not None:
        struct.pack_into("<I", first, header.file_type, kind)
