"""Writing GGUF adapters: scales folded, q and k in llama.cpp's order of rows, streamed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from adaptmerge.adapters.graph import Adapter, BaseReference, Bundle, Edit
from adaptmerge.adapters.weight_edits import factor_of
from adaptmerge.algebra.low_rank import as_low_rank
from adaptmerge.bases.llama_cpp import EMBEDDING, HEAD, Names, library, rows_problem
from adaptmerge.bases.stored_as import interleaved
from adaptmerge.errors import CannotStore
from adaptmerge.files.disk import tensor_bytes, writing
from adaptmerge.files.strict_json import capped
from adaptmerge.formats.format import Output, Stores, WriteOptions
from adaptmerge.lazy import numpy
from adaptmerge.tensors.refs import TensorRef

FILE = "adapter.gguf"
KEPT = ("general.name", "adapter.lora.task_name", "adapter.lora.prompt_prefix")
HUB = "https://huggingface.co/"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DTYPES = frozenset({"F32", "F16", "BF16"})

Tensors = dict[str, TensorRef]


def stores(options: WriteOptions) -> Stores:
    """Low-rank deltas of weights; ranks may differ, scales are folded into B."""
    return Stores(
        kinds=frozenset({"add"}),
        layers=frozenset({"linear", "embedding"}),
        params=frozenset({"weight"}),
        dtypes=DTYPES,
        base=True,
    )


def refuses(edits: Sequence[Edit], options: WriteOptions) -> list[str]:
    """Why sites have no tensor in GGUF, by their names alone."""
    assert options.base is not None, "asked for by `stores`"
    names = Names.of(options.base, lambda problem: _refusal([problem]))
    found = [(edit, names.tensor(edit.site.module)) for edit in edits]
    return capped([problem for edit, name in found for problem in _homeless(edit, name, names)])


def write(bundle: Bundle, output: Output, options: WriteOptions) -> str:
    """Writes the adapter, lowered for `stores`; returns the file's name. Raises CannotStore."""
    assert options.base is not None, "asked for by `stores`"
    adapter = bundle.single
    names = Names.of(options.base, lambda problem: _refusal([problem]))
    tensors = _tensors(adapter.edits, names)
    values = _values(adapter, output.metadata)
    name = output.single or FILE
    _stream(output.path(name), names.architecture.name, values, tensors)
    return name


def _tensors(edits: Sequence[Edit], names: Names) -> Tensors:
    """The tensors by name. Raises CannotStore naming every site that has no place."""
    tensors: Tensors = {}
    problems: list[str] = []
    for edit in edits:
        name = names.tensor(edit.site.module)
        found = _homeless(edit, name, names)
        if name is not None and not found:
            found = _problems(edit, name, names)
        if name is not None and f"{name}.lora_a" in tensors:
            found.append(f"{edit.site}: {name} can be adapted only once")
        problems += found
        if name is None or found:
            continue
        a, b = _sides(edit)
        heads = names.heads(name)
        tensors[f"{name}.lora_a"] = a
        tensors[f"{name}.lora_b"] = interleaved(b, heads) if heads else b
    if problems:
        raise _refusal(problems)
    return tensors


def _refusal(problems: list[str]) -> CannotStore:
    return CannotStore([*capped(problems), "--to native holds every edit"])


def _sides(edit: Edit) -> tuple[TensorRef, TensorRef]:
    """lora_a (r, in) and lora_b (out, r); of an embedding (vocabulary, r) and (dimension, r)."""
    factor = factor_of(edit)
    pair = None if factor is None else as_low_rank(factor)
    assert pair is not None and pair.scale == 1.0, "lowered for a target that folds scales"
    if edit.site.layer.kind == "embedding":
        return pair.up, pair.down.T
    return pair.down, pair.up


def _homeless(edit: Edit, name: str | None, names: Names) -> list[str]:
    """Why a site has no tensor that llama.cpp would find."""
    module = edit.site.module
    if name is None:
        return [f"{module}: llama.cpp's {names.architecture.name} has no tensor of its own for it"]
    if names.tied and name == HEAD:
        return [f"{module}: the base ties it to the embedding; llama.cpp would not find its tensor"]
    if names.tied and name == EMBEDDING:
        return [f"{module}: is the base's head too, and llama.cpp aborts on a delta of such a one"]
    return []


def _problems(edit: Edit, name: str, names: Names) -> list[str]:
    """Why the stored sides of an edit have no place."""
    module = edit.site.module
    a, b = _sides(edit)
    if {a.dtype.name, b.dtype.name} - DTYPES:
        return [f"{module}: llama.cpp applies no adapter in {a.dtype}: pass --dtype fp32"]
    heads = names.heads(name)
    return [] if heads is None else rows_problem(module, b, heads)


def _values(adapter: Adapter, metadata: Mapping[str, str]) -> dict[str, str | int | float]:
    """The key-value pairs; alpha 0 is llama.cpp's way to say that A and B are not scaled."""
    hints = adapter.hints.get("gguf", {})
    return {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
        **{key: str(hints[key]) for key in KEPT if hints.get(key)},
        **_base(adapter.base),
        **{_own(key): text for key, text in sorted(metadata.items())},
    }


def _base(base: BaseReference) -> dict[str, str | int | float]:
    """The base model, without the folders of a local path."""
    if not base.name:
        return {}
    *_, name = re.split(r"[/\\]", base.name.rstrip("/\\"))
    found: dict[str, str | int | float] = {"general.base_model.count": 1}
    found["general.base_model.0.name"] = name
    if HUB_ID.fullmatch(base.name):
        found["general.base_model.0.organization"] = base.name.partition("/")[0]
        found["general.base_model.0.repo_url"] = HUB + base.name
    if base.revision:
        found["adaptmerge.base_revision"] = base.revision
    return found


def _own(key: str) -> str:
    """A metadata entry under a key of our own; llama.cpp passes over keys it does not know."""
    return "adaptmerge." + (key.removeprefix("adaptmerge").lstrip(".") or "provenance")


def _stream(
    path: Path, architecture: str, values: Mapping[str, str | int | float], tensors: Tensors
) -> None:
    """The header first, then one tensor after the other."""
    gguf = library()
    with writing(path):
        writer = gguf.GGUFWriter(path, architecture)
        try:
            for key, value in values.items():
                _add(writer, key, value)
            for name, ref in tensors.items():
                dtype = gguf.GGMLQuantizationType[ref.dtype.name]
                writer.add_tensor_info(name, ref.shape, None, ref.nbytes, raw_dtype=dtype)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for ref in tensors.values():
                writer.write_tensor_data(numpy.frombuffer(tensor_bytes(ref.read()), dtype="uint8"))
        finally:
            writer.close()


def _add(writer: object, key: str, value: str | int | float) -> None:
    kind = {str: "add_string", int: "add_uint32", float: "add_float32"}[type(value)]
    if isinstance(value, str):
        value = value.encode("utf-8", "backslashreplace").decode()
    getattr(writer, kind)(key, value)
