"""Damaged and hostile files as bytes, for every test that wants to hand one to adaptmerge."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from typing import Any

LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
HTML_PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"


def framed(text: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header text, whatever it is."""
    raw = text.encode() if isinstance(text, str) else text
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: Any, shape: Any, offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file(table: dict[str, Any], data: bytes = b"") -> bytes:
    return framed(json.dumps(table), data)


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), data: int = 8) -> bytes:
    return file({"w": entry(dtype, shape, offsets)}, bytes(data))


def pair(first: tuple[int, int], second: tuple[int, int], data: int) -> bytes:
    """Two U8 tensors at these offsets."""
    spans = {"a": first, "b": second}
    return file({k: entry("U8", [e - b], [b, e]) for k, (b, e) in spans.items()}, bytes(data))


_ENTRY = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'

# what the bytes are -> (the bytes, what the message must say)
SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "zero bytes": (b"", "empty"),
    "three bytes": (b"\x01\x02\x03", "ends after 3 bytes"),
    "lfs pointer": (LFS_POINTER, "git lfs pull"),
    "html page": (HTML_PAGE, "HTML page"),
    "zip": (b"PK\x03\x04" + bytes(60), "zip archive"),
    "pickle": (pickle.dumps({"a": 1}, protocol=4), "is a pickle"),
    "gguf": (b"GGUF" + bytes(60), "GGUF"),
    "header of 2 GB": (framed("{}", length=2**31), "2147483648 bytes.*100000000"),
    "header length -1": (framed("{}", length=2**64 - 1), "header length"),
    "truncated header": (one()[:40], r"cut off: \d+ of its \d+ bytes are missing"),
    "truncated data": (one()[:-3], "3 bytes are missing"),
    "not JSON": (framed('{"a": nope}'), "not JSON"),
    "not UTF-8": (framed(b'{"\xff": 1}'), "not JSON"),
    "deep JSON": (framed('{"a":' + "[" * 200_000), "not JSON"),
    "a list": (framed("[]"), "not an object"),
    "leading space": (framed(" {}"), "not an object"),
    "duplicate tensor": (framed(f'{{"w":{_ENTRY},"w":{_ENTRY}}}', b"1"), "'w' appears 2 times"),
    "duplicate field": (
        framed('{"w":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
        "'dtype' appears 2 times",
    ),
    "unknown dtype": (one(dtype="F7"), "unknown dtype 'F7'"),
    "dtype list": (one(dtype=["F32"]), "unknown dtype"),
    "negative shape": (one(shape=[-2]), r"shape \[-2\]"),
    "fractional shape": (one(shape=[2.0]), "shape"),
    "boolean shape": (one(shape=[True, 2]), "shape"),
    "endless shape": (one(shape=[1] * 1000), "shape"),
    "huge shape": (one(shape=[2**62, 2**62]), "takes"),
    "offsets reversed": (one(offsets=[8, 0]), "offsets"),
    "negative offset": (one(offsets=[-8, 0]), "offsets"),
    "three offsets": (one(offsets=[0, 4, 8]), "offsets"),
    "offset out of range": (one(offsets=[2**40, 2**40 + 8]), "beyond the end of the file"),
    "size mismatch": (one(shape=[3]), "takes 12"),
    "half a byte": (one(dtype="F4", shape=[3], offsets=[0, 2], data=2), "whole bytes"),
    "missing field": (file({"w": {"dtype": "U8"}}), "expected dtype, shape and data_offsets"),
    "extra field": (
        file({"w": {**entry("U8", [0], [0, 0]), "scale": 2}}),
        "expected dtype, shape and data_offsets",
    ),
    "overlap": (pair((0, 6), (4, 8), 8), "overlap by 2 bytes"),
    "hole": (pair((0, 2), (4, 8), 8), "2 bytes before 'b'"),
    "trailing data": (pair((0, 4), (4, 8), 11), "3 bytes after the last tensor"),
    "metadata number": (file({"__metadata__": {"r": 8}}), "__metadata__ entry 'r' is 8"),
    "metadata list": (file({"__metadata__": ["r"]}), "__metadata__ is"),
    "surrogate name": (framed(f'{{"\\ud800":{_ENTRY}}}', b"1"), "not valid Unicode"),
}


class _Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def code_pickle(command: str) -> bytes:
    """A plain pickle that runs a shell command when it is loaded without care."""
    return pickle.dumps({"w": _Runs(command)}, protocol=2)


def code_checkpoint(command: str) -> bytes:
    """The same in the zip format of torch.save."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", code_pickle(command))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return buffer.getvalue()
