from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from files import hostile
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adaptmerge.errors import InputError, OutputError
from adaptmerge.files.safetensors import CHUNK, read_header, read_index, write_safetensors
from adaptmerge.tensors import dtypes, refs

QUIET = settings(derandomize=True, deadline=None, max_examples=60)
TORCH_DTYPES = [
    dtype
    for dtype in dtypes.BY_NAME.values()
    if dtype.torch_name and hasattr(torch, dtype.torch_name)
]


def sample(dtype: dtypes.DType, *shape: int) -> torch.Tensor:
    """A tensor of every bit pattern that fits."""
    count = max(1, torch.Size(shape).numel()) * dtype.bits // 8
    raw = (torch.arange(count) * 37 % 251).to(torch.uint8)
    raw = raw % 2 if dtype.name == "BOOL" else raw
    return raw.view(dtype.torch)[: torch.Size(shape).numel()].reshape(shape)


def raw(value: torch.Tensor) -> bytes:
    return bytes(value.contiguous().reshape(-1).view(torch.uint8).numpy())


def deserialized(content: bytes) -> dict[str, Any]:
    return dict(safetensors.deserialize(content))


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_every_dtype_round_trips_through_the_safetensors_package(
    tmp_path: Path, dtype: dtypes.DType
) -> None:
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    values = {"matrix": sample(dtype, 3, 4), "scalar": sample(dtype), "empty": sample(dtype, 0, 5)}
    save_file(values, theirs, {"k": "v"})
    read = read_header(theirs)
    assert read.metadata == {"k": "v"}
    for name, value in values.items():
        found = read.refs[name].read()
        assert (found.dtype, found.shape, raw(found)) == (value.dtype, value.shape, raw(value))
    changed = {name: ref.reshape(ref.count) for name, ref in read.refs.items()}
    write_safetensors(ours, {n: r.reshape(*values[n].shape) for n, r in changed.items()}, {})
    again = load_file(ours)
    for name, value in values.items():
        assert (again[name].dtype, again[name].shape) == (value.dtype, value.shape)
        assert raw(again[name]) == raw(value)


def test_types_that_torch_lacks_are_copied_as_bytes(tmp_path: Path) -> None:
    table = {"w": hostile.entry("F4", [2, 3], [0, 3]), "v": hostile.entry("F6_E2M3", [4], [3, 6])}
    (tmp_path / "a.safetensors").write_bytes(hostile.file(table, b"abcdef"))
    read = read_header(tmp_path / "a.safetensors")
    write_safetensors(tmp_path / "b.safetensors", read.refs, {})
    copied = read_header(tmp_path / "b.safetensors").refs
    assert {n: raw(r.read()) for n, r in copied.items()} == {"w": b"abc", "v": b"def"}


@pytest.mark.parametrize("case", hostile.SAFETENSORS)
def test_damaged_and_hostile_files_are_one_sentence(tmp_path: Path, case: str) -> None:
    content, message = hostile.SAFETENSORS[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_header(path)
    assert caught.value.where == str(path)


def test_missing_folder_and_mistyped_names(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(InputError, match="did you mean '.*adapter_model.safetensors'"):
        read_header(tmp_path / "adapter_modle.safetensors")
    with pytest.raises(InputError, match="nor does '.*nowhere'"):
        read_header(tmp_path / "nowhere" / "x.safetensors")
    with pytest.raises(InputError, match="not a plain file"):
        read_header(tmp_path)


def test_all_problems_are_reported_together_and_capped(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    table = {f"t{n}": hostile.entry("F7", [1], [0, 1]) for n in range(30)}
    path.write_bytes(hostile.file({**table, "__metadata__": {"a": 1}}))
    with pytest.raises(InputError, match="and 21 more problems") as caught:
        read_header(path)
    assert len(caught.value.problems) == 11


def test_reading_a_header_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(hostile.one())
    code = """if True:
        import sys
        from pathlib import Path
        from adaptmerge.files import disk, hub, scratch, staging
        from adaptmerge.files.listing import Listing
        found = Listing.of(Path(sys.argv[1]), "x").tensors("x.safetensors")
        assert list(found.refs) == ["w"]
        assert not {"torch", "numpy", "safetensors", "huggingface_hub"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_only_the_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    size = 1 << 36
    path.write_bytes(hostile.file({"w": hostile.entry("U8", [size], [0, size])}))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    assert read_header(path).refs["w"].shape == (size,)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(
    lambda name: name != "__metadata__"
)
plan = st.dictionaries(
    names,
    st.tuples(
        st.sampled_from(["BOOL", "I8", "F8_E4M3", "BF16", "F16", "F32", "I64", "C64"]),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
    ),
    max_size=5,
)


@QUIET
@given(plan, st.dictionaries(names, names, max_size=3))
def test_random_files_are_what_the_safetensors_package_reads(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: dict[str, tuple[str, tuple[int, ...]]],
    metadata: dict[str, str],
) -> None:
    folder = tmp_path_factory.mktemp("random")
    source, path = folder / "source", folder / "out.safetensors"
    source.write_bytes(bytes(range(256)) * 8)
    tensors = {
        name: refs.stored(source, 8 * n, shape, dtypes.BY_NAME[kind], name)
        for n, (name, (kind, shape)) in enumerate(shapes.items())
    }
    digest = write_safetensors(path, tensors, metadata)
    content = path.read_bytes()
    assert digest == hashlib.sha256(content).hexdigest()
    data = source.read_bytes()
    theirs = deserialized(content)
    assert theirs.keys() == tensors.keys()
    for n, (name, ref) in enumerate(tensors.items()):
        assert tuple(theirs[name]["shape"]) == ref.shape
        assert theirs[name]["dtype"] == ref.dtype.name
        assert bytes(theirs[name]["data"]) == data[8 * n : 8 * n + ref.nbytes]
    ours = read_header(path)
    assert ours.metadata == metadata
    assert {n: (r.shape, r.dtype) for n, r in ours.refs.items()} == {
        n: (r.shape, r.dtype) for n, r in tensors.items()
    }
    offsets = [r.source.offset for r in ours.refs.values() if isinstance(r.source, refs.Stored)]
    assert offsets == sorted(offsets)
    write_safetensors(folder / "again", {n: ours.refs[n] for n in tensors}, ours.metadata)
    assert (folder / "again").read_bytes() == content


VALID = hostile.file(
    {
        "__metadata__": {"k": "v"},
        "a": hostile.entry("F16", [2, 1], [0, 4]),
        "b": hostile.entry("U8", [0], [4, 4]),
        "c": hostile.entry("U8", [], [4, 5]),
    },
    b"12345",
)


@QUIET
@given(st.integers(0, len(VALID) - 1), st.binary(min_size=0, max_size=2), st.integers(0, 2))
def test_what_is_accepted_the_safetensors_package_accepts(
    tmp_path_factory: pytest.TempPathFactory, where: int, patch: bytes, dropped: int
) -> None:
    content = VALID[:where] + patch + VALID[where + dropped :]
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(content)
    try:
        found = read_header(path)
    except InputError:
        return
    assert deserialized(content).keys() == found.refs.keys()


def test_writing_is_deterministic_and_ordered(tmp_path: Path) -> None:
    tensors = {name: refs.constant(1.0, (2,), dtypes.F32) for name in ("z", "a", "m")}
    for name, metadata in (("one", {"b": "1", "a": "2"}), ("two", {"a": "2", "b": "1"})):
        write_safetensors(tmp_path / name, tensors, metadata)
    content = (tmp_path / "one").read_bytes()
    assert content == (tmp_path / "two").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    assert list(json.loads(content[8 : 8 + length])) == ["__metadata__", "z", "a", "m"]
    assert list(read_header(tmp_path / "one").refs) == ["z", "a", "m"]


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    path = tmp_path / "x"
    kinds = ("U8", "F64", "BF16", "F32")
    tensors = {kind: refs.constant(1.0, (3,), dtypes.BY_NAME[kind]) for kind in kinds}
    write_safetensors(path, tensors, {})
    for ref in read_header(path).refs.values():
        assert isinstance(ref.source, refs.Stored)
        assert ref.source.offset * 8 % ref.dtype.bits == 0
    assert load_file(path)["F64"].tolist() == [1.0] * 3


def test_long_spans_are_copied_in_pieces_and_steps_are_applied(tmp_path: Path) -> None:
    count = CHUNK + 5
    value = (torch.arange(count) % 256).to(torch.uint8)
    (tmp_path / "raw").write_bytes(raw(value))
    long = refs.stored(tmp_path / "raw", 0, (count,), dtypes.BY_NAME["U8"], "long")
    matrix = refs.stored(tmp_path / "raw", 0, (2, 3), dtypes.BY_NAME["U8"], "m")
    told: list[int] = []
    write_safetensors(tmp_path / "x", {"long": long, "t": matrix.T}, {}, told.append)
    assert sum(told) == (tmp_path / "x").stat().st_size
    assert max(told) == CHUNK
    read = load_file(tmp_path / "x")
    assert torch.equal(read["long"], value)
    assert read["t"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    one = refs.constant(1.0, (1,), dtypes.F32)
    with pytest.raises(OutputError, match="cannot be called '__metadata__'"):
        write_safetensors(tmp_path / "x", {"__metadata__": one}, {})
    with pytest.raises(OutputError, match="UTF-8"):
        write_safetensors(tmp_path / "x", {"\ud800": one}, {})
    with pytest.raises(OutputError, match="cannot be written"):
        write_safetensors(tmp_path / "no" / "x", {"w": one}, {})
    (tmp_path / "short").write_bytes(b"123")
    short = refs.stored(tmp_path / "short", 0, (2,), dtypes.F32, "w")
    with pytest.raises(InputError, match="ends 5 bytes early"):
        write_safetensors(tmp_path / "x", {"w": short}, {})
    with pytest.raises(InputError, match="cannot be read"):
        gone = refs.stored(tmp_path / "gone", 0, (2,), dtypes.F32, "w")
        write_safetensors(tmp_path / "x", {"w": gone}, {})
    assert not (tmp_path / "x").exists()


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    code = """if True:
        import resource, sys
        from adaptmerge.errors import OutputError
        from adaptmerge.tensors import dtypes, refs
        from adaptmerge.files.safetensors import write_safetensors
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        ref = refs.stored("/dev/zero", 0, (1_000_000,), dtypes.F32, "w")
        try:
            write_safetensors(sys.argv[1], {"w": ref}, {})
        except OutputError as problem:
            sys.exit(str(problem))
    """
    path = tmp_path / "x.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert "limit (ulimit -f)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not path.exists()


def shards(folder: Path, weight_map: dict[str, Any], **more: Any) -> Path:
    for name in ("a", "b"):
        values = {f"{name}.{n}": torch.full((2,), float(n)) for n in range(2)}
        save_file(values, folder / f"{name}.safetensors", {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map, **more}))
    return index


WHOLE = {f"{name}.{n}": f"{name}.safetensors" for name in "ab" for n in range(2)}


def test_an_index_gathers_its_shards(tmp_path: Path) -> None:
    read = read_index(shards(tmp_path, WHOLE, metadata={"total_size": 32, "note": "x"}))
    assert list(read.refs) == ["a.0", "a.1", "b.0", "b.1"]
    assert read.metadata == {"format": "pt", "total_size": "32", "note": "x"}
    assert read.refs["b.1"].read().tolist() == [1.0, 1.0]


def test_an_index_may_name_pickles(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "p.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "p.bin"}}))
    assert read_index(index).refs["w"].read().tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "shard", ["../a.safetensors", "/etc/passwd", "sub/../../x", "C:x", "..\\x", "", "link/x"]
)
def test_an_index_cannot_leave_its_folder(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="outside its folder"):
        read_index(shards(folder, {**WHOLE, "c": shard}))


def test_shards_may_be_links_into_a_cache(tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    index = shards(folder, WHOLE)
    (folder / "a.safetensors").rename(tmp_path / "blob")
    (folder / "a.safetensors").symlink_to(tmp_path / "blob")
    assert len(read_index(index).refs) == 4


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    wrong = {**WHOLE, "b.0": "a.safetensors"}
    with pytest.raises(InputError, match="'a.safetensors' lacks 'b.0'") as caught:
        read_index(shards(tmp_path, wrong))
    assert "'b.0', which the index does not place there" in str(caught.value)
    with pytest.raises(InputError, match="'c.safetensors', which does not exist"):
        read_index(shards(tmp_path, {**WHOLE, "c": "c.safetensors"}))
    with pytest.raises(InputError, match="appears 2 times"):
        index = shards(tmp_path, WHOLE)
        index.write_text('{"weight_map": {"a.0": "a.safetensors", "a.0": "b.safetensors"}}')
        read_index(index)
    for content, message in (("[]", "weight_map"), ("nope", "not JSON"), ("", "empty")):
        index.write_text(content)
        with pytest.raises(InputError, match=message):
            read_index(index)
