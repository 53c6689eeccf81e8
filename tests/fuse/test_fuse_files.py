"""The files of a fused model: laid out as the base's, whole or absent, the same bytes on every run."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families.cases import all_cases
from fuse.models import error, fuse, llama_base, outputs, save_in_shards
from peft_cases import CASES
from safetensors.torch import load_file, save_file
from samples import tree

from adaptmerge.commands import fuse as library
from adaptmerge.commands.combine import Options, combine
from adaptmerge.errors import AdaptmergeError, CannotMerge, InputError, OutputError, UsageError
from adaptmerge.formats.inputs import InputSpec

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT advises the person who trains
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CARD = "---\nlicense: {}\n---\n# A model\n"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA on q and v of layer 1, so that most tensors stay."""
    case = CASES["plain"]
    return case.build(
        tmp_path / "adapter", 1, target_modules=["q_proj", "v_proj"], layers_to_transform=[1]
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return llama_base(tmp_path / "base", shard="60KB")


def headers(folder: Path) -> dict[str, bytes]:
    """The first bytes of every safetensors file, up to the data."""
    return {path.name: header_of(path) for path in sorted(folder.glob("*.safetensors"))}


def header_of(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[: 8 + int.from_bytes(raw[:8], "little")]


def data_of(path: Path) -> dict[str, bytes]:
    """The stored bytes of every tensor of a file."""
    raw, first = path.read_bytes(), header_of(path)
    said: dict[str, Any] = json.loads(first[8:])
    spans = {n: v["data_offsets"] for n, v in said.items() if n != "__metadata__"}
    return {name: raw[len(first) :][start:stop] for name, (start, stop) in spans.items()}


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def notes_of(report: library.FuseReport) -> str:
    return "; ".join(str(note) for note in report.notes)


# Layout


def test_files_are_laid_out_as_the_bases(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = fuse(base, [adapter], tmp_path / "out")
    out = tmp_path / "out"
    assert len(headers(base)) > 2
    assert headers(out) == headers(base)
    assert (out / INDEX).read_bytes() == (base / INDEX).read_bytes()
    assert config_of(out) == config_of(base)
    assert report.changed == [f"model.layers.1.self_attn.{leaf}_proj.weight" for leaf in ("q", "v")]
    for name in headers(base):
        before, after = data_of(base / name), data_of(out / name)
        differ = {tensor for tensor in before if before[tensor] != after[tensor]}
        assert differ == {tensor for tensor in before if tensor in report.changed}
    written = {path.name for path in out.iterdir()} - {"adaptmerge.json"}
    assert written > {"README.md", "config.json", INDEX, *headers(out)}
    digests = {n: hashlib.sha256((out / n).read_bytes()).hexdigest() for n in written}
    assert report.files == digests
    assert sorted(report.shards) == sorted(headers(out))


def test_a_base_of_one_file_stays_one(adapter: Path, tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    fuse(base, [adapter], tmp_path / "out")
    assert headers(tmp_path / "out").keys() == {SINGLE}
    assert headers(tmp_path / "out") == headers(base)
    assert not (tmp_path / "out" / INDEX).exists()


def test_one_file_of_weights_may_be_named(adapter: Path, tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    (base / SINGLE).rename(base / "special.safetensors")
    fuse(base / "special.safetensors", [adapter], tmp_path / "out")
    fuse(base / "special.safetensors", [adapter], tmp_path / "again")
    assert list(headers(tmp_path / "out").values()) == list(headers(base).values())
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


def test_metadata_of_files_is_kept(adapter: Path, tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    save_file(load_file(base / SINGLE), base / SINGLE, {"format": "pt", "made by": "someone"})
    fuse(base, [adapter], tmp_path / "out", dtype="fp32")
    said = json.loads(header_of(tmp_path / "out" / SINGLE)[8:])
    assert said["__metadata__"] == {"format": "pt", "made by": "someone"}


def test_other_files_go_along(base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / "tokenizer.json").write_text('{"a": 1}')
    (base / "LICENSE").write_text("do as you like")
    (base / "deep" / "er").mkdir(parents=True)
    (base / "deep" / "er" / "notes.txt").write_text("hello")
    (base / ".cache").mkdir()
    (base / ".cache" / "lock").write_text("")
    (base / "config.json").write_text(json.dumps(config_of(base)))  # spelled in its own way
    fuse(base, [adapter], tmp_path / "out")
    before, after = tree(base), tree(tmp_path / "out")
    new = {"adaptmerge.json", "README.md"}
    assert after.keys() - before.keys() == new
    assert before.keys() - after.keys() == {".cache", ".cache/lock"}
    weights = {name for name in after if name.endswith(".safetensors")}
    for name in after.keys() - new - weights:
        assert after[name] == before[name], name


def test_stale_weights_are_left_out(base: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.gguf", "tf_model.h5", "onnx/model.onnx"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"other weights")
    report = fuse(base, [adapter], tmp_path / "out")
    assert not [p for p in (tmp_path / "out").rglob("*") if p.suffix in (".bin", ".gguf", ".onnx")]
    assert "other weights of the base are left out" in notes_of(report)
    assert "pytorch_model.bin" in notes_of(report)
    assert "onnx/model.onnx" in notes_of(report)


def as_pickles(base: Path, folder: Path) -> Path:
    """The same checkpoint as older versions of transformers saved it."""
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    index = json.loads((base / INDEX).read_text())
    renamed = {name: f"pytorch_{name}".replace(".safetensors", ".bin") for name in headers(base)}
    for name, new in renamed.items():
        torch.save(load_file(base / name), folder / new)
    index["weight_map"] = {key: renamed[name] for key, name in index["weight_map"].items()}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def test_pickles_become_safetensors(base: Path, adapter: Path, tmp_path: Path) -> None:
    fuse(base, [adapter], tmp_path / "out")
    fuse(as_pickles(base, tmp_path / "old"), [adapter], tmp_path / "new")
    out, new = tmp_path / "out", tmp_path / "new"
    assert headers(new).keys() == headers(out).keys()
    assert not list(new.glob("*.bin*"))
    assert json.loads((new / INDEX).read_text()) == json.loads((out / INDEX).read_text())
    for name in headers(out):
        assert data_of(out / name) == data_of(new / name)
    case = all_cases()["lora_plain"]
    assert torch.equal(outputs(new, case), outputs(out, case))


class Exploit:
    """Code in a pickle."""

    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_code_in_pickles_is_never_run(
    base: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    old = as_pickles(base, tmp_path / "old")
    torch.save({"weight": Exploit()}, sorted(old.glob("*.bin"))[0])
    with pytest.raises(InputError):
        fuse(old, [adapter], tmp_path / "out")
    assert "executed" not in capfd.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dtype", "name"), [("fp32", "float32"), ("fp16", "float16")])
def test_another_dtype(dtype: str, name: str, adapter: Path, tmp_path: Path) -> None:
    case = all_cases()["lora_plain"]
    base = llama_base(tmp_path / "base", shard="60KB")
    fuse(base, [adapter], tmp_path / "own")
    report = fuse(base, [adapter], tmp_path / "out", dtype=dtype)
    out = tmp_path / "out"
    assert headers(out).keys() == headers(base).keys()
    kinds = {v.dtype for f in headers(out) for v in load_file(out / f).values()}
    assert kinds == {getattr(torch, name)}
    assert config_of(out)["dtype"] == name
    assert report.config["dtype"] == name
    index = json.loads((out / INDEX).read_text())
    values = [v for f in headers(out) for v in load_file(out / f).values()]
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in values)
    wide, narrow, plain = (outputs(tmp_path / n, case) for n in ("out", "own", "base"))
    assert error(narrow, wide, plain) < 0.1


def test_only_floats_are_cast(adapter: Path, tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    more = {"model.count": torch.arange(3), "model.mask": torch.tensor([True, False])}
    save_file({**load_file(base / SINGLE), **more}, base / SINGLE, {"format": "pt"})
    fuse(base, [adapter], tmp_path / "out", dtype="fp32")
    found = load_file(tmp_path / "out" / SINGLE)
    assert all(torch.equal(found[key], value) for key, value in more.items())
    assert found["model.norm.weight"].dtype == torch.float32


# What follows in the config is in test_fuse_against_peft.py, where the models are run, and here


def tied_adapter(folder: Path, **options: Any) -> Path:
    return CASES["plain"].build(folder, 1, target_modules=["embed_tokens"], **options)


def test_an_untied_head_is_said_in_the_config(tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base", shard="60KB", tie_word_embeddings=True)
    report = fuse(base, [tied_adapter(tmp_path / "adapter")], tmp_path / "out")
    out = tmp_path / "out"
    assert config_of(base)["tie_word_embeddings"] is True
    assert config_of(out) == {**config_of(base), "tie_word_embeddings": False}
    assert report.config == {"tie_word_embeddings": False}
    assert "untied" in notes_of(report)
    before, after = (json.loads((f / INDEX).read_text())["weight_map"] for f in (base, out))
    assert after.keys() - before.keys() == {"lm_head.weight"}
    assert after["lm_head.weight"] == before["model.embed_tokens.weight"]


def test_a_tied_head_is_kept_tied_on_request(tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base", tie_word_embeddings=True)
    path = tied_adapter(tmp_path / "adapter")
    with pytest.raises(CannotMerge, match="one matrix in the base: leave out --keep-tied"):
        fuse(base, [path], tmp_path / "out", keep_tied=True)
    other = CASES["tokens"].build(tmp_path / "other", 1)
    assert not (tmp_path / "out").exists()
    fuse(base, [other], tmp_path / "out", keep_tied=True)


# Determinism and care


def test_the_same_bytes_with_more_workers(base: Path, adapter: Path, tmp_path: Path) -> None:
    """And with another hash seed: test_cli.py."""
    for jobs in (1, 2):
        fuse(base, [adapter], tmp_path / f"jobs{jobs}", jobs=jobs)
    assert tree(tmp_path / "jobs1") == tree(tmp_path / "jobs2")


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "adaptive"])
def test_the_order_of_pieces_does_not_matter(
    rounding: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptmerge.rounding.matrix.PIECE", 1 << 9)
    options: dict[str, Any] = {"rounding": rounding, "allow": frozenset({"loss"})}
    for jobs in (1, 3):
        fuse(base, [adapter], tmp_path / f"jobs{jobs}", jobs=jobs, **options)
    assert tree(tmp_path / "jobs1") == tree(tmp_path / "jobs3")


def test_inputs_stay_as_they_are(base: Path, adapter: Path, tmp_path: Path) -> None:
    before = tree(base), tree(adapter)
    fuse(base, [adapter], tmp_path / "out")
    assert (tree(base), tree(adapter)) == before
    with pytest.raises(OutputError, match="is the input"):
        fuse(base, [adapter], base, force=True)
    with pytest.raises(OutputError, match="lies inside the input"):
        fuse(base, [adapter], adapter / "out")
    assert (tree(base), tree(adapter)) == before


def test_an_output_is_replaced_on_request_only(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"old")
    (out / "old.bin").write_bytes(b"old")
    (out / "mine.txt").write_text("kept")
    before = tree(out)
    with pytest.raises(OutputError, match="exists: choose another -o or pass --force"):
        fuse(base, [adapter], out)
    assert tree(out) == before
    fuse(base, [adapter], out, force=True)
    fuse(base, [adapter], tmp_path / "fresh")
    assert tree(out) == {**tree(tmp_path / "fresh"), "mine.txt": b"kept"}


def test_a_full_disk_is_known_before_anything_is_written(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "shutil", SimpleNamespace(disk_usage=lambda _: usage(1 << 20)))
    with pytest.raises(OutputError, match=r"needs 0\.07 GB and its disk has 0\.00 GB left"):
        fuse(base, [adapter], tmp_path / "out")
    assert not [p for p in tmp_path.rglob("*.safetensors") if ".out." in str(p)]
    assert not (tmp_path / "out").exists()


def usage(free: int) -> SimpleNamespace:
    return SimpleNamespace(total=free, used=0, free=free)


def poisoned(base: Path, value: float) -> None:
    """The base with one entry of a fused matrix that is not finite."""
    name = "model.layers.1.self_attn.q_proj.weight"
    path = base / json.loads((base / INDEX).read_text())["weight_map"][name]
    tensors = load_file(path)
    tensors[name][3, 5] = value
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_and_leaves_nothing(
    value: float, base: Path, adapter: Path, tmp_path: Path
) -> None:
    poisoned(base, value)
    before = tree(tmp_path)
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj.* holds NaN or infinity"):
        fuse(base, [adapter], tmp_path / "out")
    assert tree(tmp_path) == before
    fuse(base, [adapter], tmp_path / "out", allow=frozenset({"nonfinite"}))
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_named_and_leaves_nothing(
    value: float, side: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if side in name)
    tensors[name][1, 2] = value
    save_file(tensors, path)
    before = tree(tmp_path)
    with pytest.raises(InputError, match=rf"{re.escape(name)}.* holds NaN or infinity"):
        fuse(base, [adapter], tmp_path / "out")
    assert tree(tmp_path) == before
    fuse(base, [adapter], tmp_path / "out", allow=frozenset({"nonfinite"}))


@pytest.mark.parametrize(
    ("options", "problem", "sentence"),
    [
        ({"rounding": "up"}, UsageError, "--rounding up: expected auto, nearest, stochastic"),
        ({"dtype": "int4"}, UsageError, "--dtype int4: expected"),
        ({"trained_on": "nf5"}, UsageError, "--trained-on nf5: expected original, nf4"),
        ({"executor": "slurm"}, UsageError, "--executor slurm: expected local, ray"),
        ({"allow": frozenset({"all"})}, UsageError, "--allow all: expected base, "),
    ],
)
def test_options_that_are_refused_leave_nothing(
    options: Mapping[str, Any],
    problem: type[AdaptmergeError],
    sentence: str,
    base: Path,
    adapter: Path,
    tmp_path: Path,
) -> None:
    before = tree(tmp_path)
    with pytest.raises(problem, match=sentence):
        fuse(base, [adapter], tmp_path / "out", **options)
    assert tree(tmp_path) == before


def test_adapters_that_rounding_would_lose_leave_nothing(base: Path, tmp_path: Path) -> None:
    path = CASES["plain"].build(tmp_path / "adapter", 1)
    before = tree(tmp_path)
    with pytest.raises(CannotMerge, match=r"rounding leaves .* use --rounding adaptive"):
        fuse(base, {path: 1e-3}, tmp_path / "out", rounding="nearest")
    assert tree(tmp_path) == before
    report = fuse(
        base,
        {path: 1e-3},
        tmp_path / "out",
        rounding="nearest",
        allow=frozenset({"loss"}),
    )
    assert "as allowed" in notes_of(report)


def test_a_quantised_base_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    config = {**config_of(base), "quantization_config": {"quant_method": "bitsandbytes"}}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"is quantised \(bitsandbytes\).*--trained-on"):
        fuse(base, [adapter], tmp_path / "out")


def test_an_adapter_for_other_weights_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = llama_base(tmp_path / "other", hidden_size=32)
    with pytest.raises(CannotMerge, match=r"q_proj is for a weight of \[64, 64\]"):
        fuse(other, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The card


def test_the_card_names_where_the_model_comes_from(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    (base / "README.md").write_text(CARD.format("apache-2.0"))
    (adapter / "README.md").write_text(CARD.format("apache-2.0"))
    report = fuse(base, {adapter: 0.5}, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    head = text.split("---\n")[1]
    assert "base_model: tiny/llama\n" in head
    assert "base_model_relation: finetune\n" in head
    assert "license: apache-2.0\n" in head
    assert "| adapter | peft | 0.5 | apache-2.0 |" in text
    assert "licences differ" not in notes_of(report)


def test_licences_that_differ_are_a_note(base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / "README.md").write_text(CARD.format("llama3"))
    (adapter / "README.md").write_text(CARD.format("cc-by-nc-4.0"))
    (base / "LICENSE").write_text("theirs")
    (adapter / "LICENSE").write_text("mine")
    report = fuse(base, [adapter], tmp_path / "out")
    assert "licences differ (base: llama3, adapter: cc-by-nc-4.0)" in notes_of(report)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "license:" not in text.split("---\n")[1]
    assert (tmp_path / "out" / "LICENSE").read_text() == "theirs"
    assert (tmp_path / "out" / "LICENSE.adapter").read_text() == "mine"


def test_a_moved_report_is_the_same(base: Path, adapter: Path, tmp_path: Path) -> None:
    """No absolute paths and no times: equal runs elsewhere give equal bytes."""
    fuse(base, [adapter], tmp_path / "out")
    elsewhere = tmp_path / "elsewhere"
    for path in (base, adapter):
        shutil.copytree(path, elsewhere / path.name)
    fuse(elsewhere / base.name, [elsewhere / adapter.name], elsewhere / "out")
    one, two = (tree(folder / "out") for folder in (tmp_path, elsewhere))
    assert one == two


def test_shards_that_nothing_touches_are_copies(tmp_path: Path) -> None:
    case = all_cases()["lora_plain"]
    base = save_in_shards(case, tmp_path / "base")
    path = case.build(tmp_path / "adapter", layers_to_transform=[0])
    report = fuse(base, [path], tmp_path / "out")
    weights = json.loads((base / INDEX).read_text())["weight_map"]
    touched = {weights[name] for name in report.changed}
    assert touched < set(weights.values())
    for name in set(weights.values()) - touched:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_an_adapter_in_the_folder_of_the_base_stays_there(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """transformers would load it with the fused model."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, base / name)
    report = fuse(base, [adapter], tmp_path / "out")
    assert not [path.name for path in (tmp_path / "out").iterdir() if "adapter_" in path.name]
    assert "adapter_model.safetensors" in notes_of(report)


def test_no_adapter_is_written_into_the_folder_of_a_model(base: Path, adapter: Path) -> None:
    before = tree(base)
    with pytest.raises(OutputError, match="holds a whole model"):
        combine([InputSpec(str(adapter))], base, Options(force=True))
    assert tree(base) == before
