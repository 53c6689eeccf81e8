"""GGUF adapters: names, orders of rows, scales, bit-exact round trips, and files that lie."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft_cases import CASES, PeftCase
from safetensors.torch import load_file, save_file

from adaptmerge.adapters.graph import Adapter
from adaptmerge.bases.base import Base
from adaptmerge.bases.llama_cpp import ARCHITECTURES, Names
from adaptmerge.bases.open import open_base
from adaptmerge.commands.combine import Options, combine
from adaptmerge.errors import AdaptmergeError, CannotStore, InputError, MissingExtra, UsageError
from adaptmerge.files.gguf import read_header
from adaptmerge.files.listing import Listing
from adaptmerge.formats.format import ReadOptions
from adaptmerge.formats.gguf import FORMAT
from adaptmerge.formats.inputs import open_input, parse_input

gguf = pytest.importorskip("gguf")

PREFIX = "base_model.model."
Array = np.ndarray[Any, Any]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The base folder of a model family, saved once."""
    root, saved = tmp_path_factory.mktemp("bases"), dict[str, Path]()

    def base(family: str) -> Path:
        if family not in saved:
            case = dataclasses.replace(CASES["plain"], family=family)
            saved[family] = case.save_base(root / family)
        return saved[family]

    return base


def convert(source: Path, out: Path, base: Path, **options: Any) -> None:
    combine([parse_input(str(source))], out, Options(base=str(base), **options))


def without_base_copies(adapter: Path) -> Path:
    """The adapter as PEFT saves it with save_embedding_layers=False."""
    path = adapter / "adapter_model.safetensors"
    kept = {key: value for key, value in load_file(path).items() if "lora_" in key}
    save_file(kept, path, {"format": "pt"})
    return adapter


def arrays(path: Path) -> dict[str, Array]:
    """All tensors of a file by gguf's own reader, in float32."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        value = np.asarray(tensor.data)
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            value = value.reshape(-1).view(np.uint16).astype(np.uint32) << 16
            value = value.view(np.float32).reshape(tensor.shape[::-1])
        found[tensor.name] = np.array(value, dtype=np.float32)
    return found


def fields(path: Path) -> dict[str, Any]:
    return {
        k: f.contents()
        for k, f in gguf.GGUFReader(path).fields.items()
        if not k.startswith("GGUF.")
    }


def interleaved(value: Array, heads: int) -> Array:
    """Row 2i of each head from its first half, row 2i + 1 from its second, one row at a time."""
    size = value.shape[0] // heads
    order = [
        h * size + half * (size // 2) + i
        for h in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return value[order]


@pytest.mark.parametrize("name", ["plain", "patterns", "bf16", "embedding", "conv1d_gpt2"])
def test_round_trip_is_bit_exact(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """A power of two as the scale is folded without rounding, so A and scale * B come back."""
    case = CASES[name]
    options: dict[str, Any] = {
        "lora_alpha": 8,
        "alpha_pattern": {"v_proj": 16, r"layers\.0\.self_attn\.q_proj": 4},
    }
    if name == "patterns":
        options |= {"rank_pattern": {"q_proj": 8}}
    else:
        del options["alpha_pattern"]
    adapter = without_base_copies(case.build(tmp_path / "adapter", seed=1, **options))
    base = bases(case.family)
    convert(adapter, tmp_path / "x.gguf", base)
    convert(tmp_path / "x.gguf", tmp_path / "back", base, target="peft", ranks="per-site")
    before = load_file(adapter / "adapter_model.safetensors")
    after = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        scale = 1.0
        if "lora_B" in key or "lora_embedding_A" in key:
            scale = expected_scale(name, key)
        assert after[key].dtype == value.dtype
        assert torch.equal(after[key], value * scale), key


def expected_scale(name: str, key: str) -> float:
    if name == "patterns" and "v_proj" in key:
        return 16 / 4
    if name == "patterns" and "q_proj" in key:
        return 4 / 8 if "layers.0" in key else 8 / 8
    return 8 / 4


def test_a_second_round_trip_changes_nothing(bases: Callable[[str], Path], tmp_path: Path) -> None:
    case = CASES["rslora_patterns"]
    adapter = case.build(tmp_path / "adapter", seed=2)
    base = bases("llama")
    convert(adapter, tmp_path / "1.gguf", base)
    convert(tmp_path / "1.gguf", tmp_path / "back.safetensors", base, ranks="per-site")
    convert(tmp_path / "back.safetensors", tmp_path / "2.gguf", base)
    one, two = arrays(tmp_path / "1.gguf"), arrays(tmp_path / "2.gguf")
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", ["plain", "rslora", "patterns", "rslora_patterns"])
def test_scales_and_row_orders(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """lora_b @ lora_a is PEFT's own delta with the rows of q and k reordered, and nothing else is."""
    adapter = CASES[name].build(tmp_path / "adapter", seed=3)
    convert(adapter, tmp_path / "x.gguf", bases("llama"))
    assert FORMAT.stores is not None
    found = arrays(tmp_path / "x.gguf")
    deltas = peft_deltas(CASES[name], adapter)
    assert len(found) == 2 * len(deltas)
    for module, delta in deltas.items():
        tensor = llama_name(module)
        heads = {"attn_q": 4, "attn_k": 2}.get(tensor.split(".")[2])
        expected = interleaved(delta, heads) if heads else delta
        result = found[f"{tensor}.lora_b"] @ found[f"{tensor}.lora_a"]
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)
        if heads:
            assert np.abs(result - delta).max() > 0.01


def peft_deltas(case: PeftCase, adapter: Path) -> dict[str, Array]:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model: Any = PeftModel.from_pretrained(case.make_model(), adapter)
    return {
        name: module.get_delta_weight("default").detach().numpy()
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, LoraLayer)
    }


def llama_name(module: str) -> str:
    """The name in GGUF, by a table of the test's own."""
    leaves = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    leaves |= {f"{leaf}_proj": f"ffn_{leaf}" for leaf in ("gate", "up", "down")}
    *_, layer, _, leaf = module.split(".")
    return f"blk.{layer}.{leaves[leaf]}.weight"


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_rows_of_others_stay(family: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Neither are rows reordered, nor the factors of GPT-2's Conv1D layers transposed."""
    case = CASES["conv1d_gpt2" if family == "gpt2" else "plain"]
    case = dataclasses.replace(case, family=family)
    adapter = case.build(tmp_path / "adapter", seed=4, lora_alpha=4)
    convert(adapter, tmp_path / "x.gguf", bases(family))
    stored = {k.removeprefix(PREFIX): v for k, v in weights(adapter).items()}
    names = Names.of(open_base(str(bases(family))), InputError)
    found = arrays(tmp_path / "x.gguf")
    assert len(found) == len(stored)
    for key, value in stored.items():
        module, _, side = key.removesuffix(".weight").rpartition(".")
        written = found[f"{names.tensor(module)}.{side.lower()}"]
        assert np.array_equal(written, value.numpy())


def weights(adapter: Path) -> Tensors:
    found: Tensors = load_file(adapter / "adapter_model.safetensors")
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_names_are_those_of_gguf(family: str, bases: Callable[[str], Path]) -> None:
    """Every matrix of the base has a name that the architecture lists, and the way back is unique."""
    base = open_base(str(bases(family)))
    names = Names.of(base, InputError)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    arch = kinds[names.architecture.name]
    known = {
        gguf.TENSOR_NAMES[tensor].format(bid=block) + ".weight"
        for tensor in gguf.MODEL_TENSORS[arch]
        for block in range(2)
    }
    matrices = [n.removesuffix(".weight") for n, ref in base.tensors.items() if len(ref.shape) == 2]
    named = {module: names.tensor(module) for module in matrices}
    assert None not in named.values()
    assert set(named.values()) <= known
    assert {names.module(tensor or "") for tensor in named.values()} == set(matrices)


def test_every_architecture_is_known_to_gguf_and_transformers() -> None:
    from transformers import AutoConfig

    for model_type, architecture in ARCHITECTURES.items():
        assert architecture.name in gguf.MODEL_ARCH_NAMES.values()
        assert AutoConfig.for_model(model_type).tie_word_embeddings == architecture.tied, model_type


def test_header(bases: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = CASES["rslora"].build(tmp_path / "adapter", seed=1)
    convert(adapter, tmp_path / "x.gguf", bases("llama"))
    found = fields(tmp_path / "x.gguf")
    provenance = json.loads(found.pop("adaptmerge.provenance"))
    assert provenance["method"] == "linear"
    assert found == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
        "general.base_model.count": 1,
        "general.base_model.0.name": "llama",
        "general.base_model.0.organization": "tiny",
        "general.base_model.0.repo_url": "https://huggingface.co/tiny/llama",
    }
    assert str(tmp_path).encode() not in (tmp_path / "x.gguf").read_bytes()


def test_bytes_are_reproducible(bases: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = CASES["plain"].build(tmp_path / "adapter", seed=1)
    for name, jobs in (("a", 1), ("b", 4)):
        convert(adapter, tmp_path / f"{name}.gguf", bases("llama"), jobs=jobs)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_folder(bases: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = CASES["plain"].build(tmp_path / "adapter", seed=1)
    convert(adapter, tmp_path / "out", bases("llama"), target="gguf")
    assert (tmp_path / "out" / "adapter.gguf").is_file()
    base = open_base(str(bases("llama")))
    assert len(open_input(parse_input(str(tmp_path / "out")), base).adapter.edits) == 14
    (tmp_path / "out" / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="2 GGUF files: name one of them"):
        open_input(parse_input(str(tmp_path / "out")), base)


def test_a_merge_is_the_sum(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Adapters in GGUF merge as any other."""
    case, base = CASES["plain"], bases("llama")
    paths = [case.build(tmp_path / f"{seed}", seed=seed, rank=seed) for seed in (2, 3)]
    convert(paths[0], tmp_path / "one.gguf", base)
    specs = [parse_input(f"{tmp_path / 'one.gguf'}:0.25"), parse_input(f"{paths[1]}:-1.5")]
    combine(specs, tmp_path / "sum.gguf", Options(base=str(base)))
    one, two = (peft_deltas(case, path) for path in paths)
    adapter = opened(tmp_path / "sum.gguf", base)
    for edit in adapter.edits:
        expected = 0.25 * one[edit.site.module] - 1.5 * two[edit.site.module]
        result = edit.factor.dense().numpy()  # type: ignore[attr-defined]
        np.testing.assert_allclose(result, expected, atol=1e-5)


def opened(path: Path, base: Path | Base) -> Adapter:
    found = base if isinstance(base, Base) else open_base(str(base))
    return open_input(parse_input(str(path)), found).adapter


def lora(**changes: Any) -> dict[str, Any]:
    """Key-value pairs of a LoRA adapter for llama; None leaves a key out."""
    values = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 16.0}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in values.items() if value is not None}


def file(path: Path, values: Mapping[str, Any], tensors: Mapping[str, Array], arch: str) -> Path:
    """A GGUF file by gguf's own writer."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        kinds = {float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        kinds[type(value)](key, value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(name: str, rows: int, columns: int, rank: int = 4) -> dict[str, Array]:
    a = np.arange(rank * columns, dtype=np.float32).reshape(rank, columns)
    b = np.arange(rows * rank, dtype=np.float32).reshape(rows, rank)
    return {f"{name}.lora_a": a, f"{name}.lora_b": b}


V = "blk.0.attn_v.weight"


@pytest.mark.parametrize(
    ("values", "query", "scale"),
    [
        (lora(), "", 4.0),
        (lora(adapter__lora__alpha=0.0), "", 1.0),
        (lora(adapter__lora__alpha=None), "", 1.0),
        (lora(adapter__lora__alpha=None), "?alpha=2", 0.5),
    ],
)
def test_scale_of_others(
    values: dict[str, Any], query: str, scale: float, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    path = file(tmp_path / "x.gguf", values, pair(V, 32, 64), "llama")
    spec = parse_input(str(path) + query)
    (edit,) = open_input(spec, open_base(str(bases("llama")))).adapter.edits
    assert edit.site.module == "model.layers.0.self_attn.v_proj"
    assert edit.factor.scale == scale  # type: ignore[attr-defined]


def test_what_else_a_header_says(bases: Callable[[str], Path], tmp_path: Path) -> None:
    prompt = lora(adapter__lora__prompt_prefix="Say: ", general__name="Sayer")
    path = file(tmp_path / "x.gguf", prompt, pair(V, 32, 64), "llama")
    convert(path, tmp_path / "y.gguf", bases("llama"))
    found = fields(tmp_path / "y.gguf")
    assert (found["adapter.lora.prompt_prefix"], found["general.name"]) == ("Say: ", "Sayer")


def test_norms_are_left_out_with_a_note(bases: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = pair(V, 32, 64) | {"blk.0.attn_norm.weight": np.ones(64, np.float32)}
    (note,) = opened(file(tmp_path / "x.gguf", lora(), tensors, "llama"), bases("llama")).notes
    assert note.kind == "dropped"


def test_all_problems_at_once(bases: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = {
        "blk.0.attn_q.weight.lora_a": np.ones((4, 64), np.float32),
        **pair("blk.9.attn_q.weight", 64, 64),
        "blk.0.attn_v.weight.lora_a": np.ones((4, 64), np.float32),
        "blk.0.attn_v.weight.lora_b": np.ones((32, 3), np.float32),
        "blk.0.ffn_up.weight": np.ones((4, 64), np.float32),
        "blk.0.ffn_up_exps.weight.lora_a": np.ones((2, 4, 64), np.float32),
        "blk.0.ffn_up_exps.weight.lora_b": np.ones((2, 96, 4), np.float32),
    }
    path = file(tmp_path / "x.gguf", lora(), tensors, "qwen2")
    with pytest.raises(InputError) as caught:
        opened(path, bases("llama"))
    for said in ("'qwen2', but the base llama is 'llama'", "lora_b is missing", "no such weight",
                 "are no pair", "is no side of a LoRA", "experts"):  # fmt: skip
        assert said in str(caught.value)
    assert len(caught.value.problems) == 6


def test_quantised_tensors_are_named(bases: Callable[[str], Path], tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    quantised = gguf.quants.quantize(np.ones((4, 64), np.float32), kind)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor(f"{V}.lora_a", quantised, raw_dtype=kind)
    writer.add_tensor(f"{V}.lora_b", np.ones((32, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="lora_a' is stored as Q8_0: write the adapter as f32"):
        opened(tmp_path / "x.gguf", bases("llama"))


@pytest.mark.parametrize(
    ("values", "arch", "said"),
    [
        ({}, "llama", "no adapter"),
        (lora(general__type="model"), "llama", "general.type is 'model'"),
        (lora(adapter__type="dora"), "llama", "of type 'dora'"),
        (lora(), "controlvector", "control vector"),
        (lora(adapter__alora__invocation_tokens=[1, 2]), "llama", "aLoRA"),
        (lora(adapter__lora__alpha="big"), "llama", "alpha is 'big'"),
        (lora(adapter__lora__alpha=float("nan")), "llama", "alpha is nan"),
    ],
)
def test_other_kinds_of_gguf(
    values: dict[str, Any], arch: str, said: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    path = file(tmp_path / "x.gguf", values, pair(V, 32, 64), arch)
    assert FORMAT.detect(Listing.of(path, "x"))
    with pytest.raises(InputError, match=said):
        opened(path, bases("llama"))


def test_legacy_and_unrelated_files(tmp_path: Path) -> None:
    (tmp_path / "old.bin").write_bytes(b"algg" + bytes(12))
    listing = Listing.of(tmp_path / "old.bin", "old")
    assert FORMAT.detect(listing)
    with pytest.raises(InputError, match="GGLA"):
        FORMAT.read(listing, ReadOptions())
    (tmp_path / "x.gguf").write_bytes(b"\x80\x04data")
    assert not FORMAT.detect(Listing.of(tmp_path / "x.gguf", "x"))
    assert not FORMAT.detect(Listing.of(CASES["plain"].build(tmp_path / "p", seed=1), "p"))


def test_the_base_is_asked_for(bases: Callable[[str], Path], tmp_path: Path) -> None:
    path = file(tmp_path / "x.gguf", lora(), pair(V, 32, 64), "llama")
    with pytest.raises(InputError, match="pass --base DIR"):
        open_input(parse_input(str(path)))
    adapter = CASES["plain"].build(tmp_path / "adapter", seed=1)
    with pytest.raises(UsageError, match="pass --base DIR"):
        combine([parse_input(str(adapter))], tmp_path / "y.gguf", Options())
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((bases("llama") / "config.json").read_bytes())
    with pytest.raises(InputError, match="only a config"):
        opened(path, bare)
    convert(adapter, tmp_path / "y.gguf", bare)  # to write, the config is enough
    assert len(read_header(tmp_path / "y.gguf").refs) == 28


def test_gguf_is_an_extra(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(tmp_path / "x.gguf", lora(), pair(V, 32, 64), "llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r"adaptmerge\[gguf\]"):
        opened(path, bases("llama"))


def refusal(case: str, family: str, tmp_path: Path, base: Path, **options: Any) -> str:
    built = dataclasses.replace(CASES[case], family=family)
    adapter = without_base_copies(built.build(tmp_path / "adapter", seed=1, **options))
    with pytest.raises(CannotStore) as caught:
        convert(adapter, tmp_path / "x.gguf", base)
    assert not (tmp_path / "x.gguf").exists()
    assert "--to native" in str(caught.value)
    return str(caught.value)


def test_what_has_no_place(bases: Callable[[str], Path], tmp_path: Path) -> None:
    said = refusal("head_bert", "bert", tmp_path / "bert", bases("bert"), modules_to_save=[])
    assert "'bert', whose names in GGUF are not known" in said
    tied = {"target_modules": ["lm_head", "wte", "c_attn"], "fan_in_fan_out": False}
    said = refusal("conv1d_gpt2", "gpt2", tmp_path / "tied", bases("gpt2"), **tied)
    assert "lm_head: the base ties it to the embedding" in said
    assert "wte: is the base's head too" in said


def test_sites_without_a_name(bases: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = CASES["plain"].build(tmp_path / "adapter", seed=1)
    path = adapter / "adapter_model.safetensors"
    renamed = {k.replace("up_proj", "side_proj"): v for k, v in load_file(path).items()}
    save_file(renamed, path, {"format": "pt"})
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((bases("llama") / "config.json").read_bytes())
    with pytest.raises(CannotStore) as caught:
        convert(adapter, tmp_path / "x.gguf", bare)
    assert str(caught.value).count("side_proj: llama.cpp's llama has no tensor of its own") == 2


def test_heads_that_do_not_fit(bases: Callable[[str], Path], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    config = json.loads((bases("llama") / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"num_attention_heads": 7}))
    adapter = CASES["plain"].build(tmp_path / "adapter", seed=1)
    with pytest.raises(CannotStore, match="64 rows are not made of 7 heads"):
        convert(adapter, tmp_path / "x.gguf", bare)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(tensors: int, pairs: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


def entry(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


KEY = text("k")
HOSTILE = {
    "only magic": (b"GGUF", "cut off"),
    "version 1": (header(0, 0, version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "2^60 pairs": (header(0, 2**60), r"announces \d+ entries"),
    "2^60 tensors": (header(2**60, 0), r"announces \d+ tensors"),
    "endless key": (header(0, 1, struct.pack("<Q", 2**62) + bytes(20)), "cut off"),
    "endless array": (header(0, 1, KEY + struct.pack("<IIQ", 9, 7, 2**62)), "array elements"),
    "endless strings": (
        header(0, 1, KEY + struct.pack("<IIQ", 9, 8, 1) + struct.pack("<Q", 2**63)),
        "cut off",
    ),
    "nested array": (header(0, 1, KEY + struct.pack("<IIQ", 9, 9, 1)), "array of the unknown"),
    "unknown value": (header(0, 1, KEY + struct.pack("<I", 77)), "unknown type 77"),
    "repeated key": (header(0, 2, (KEY + struct.pack("<IB", 0, 1)) * 2), "'k' appears twice"),
    "not UTF-8": (
        header(0, 1, struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 1)),
        "not UTF-8",
    ),
    "alignment 3": (
        header(0, 1, text("general.alignment") + struct.pack("<II", 4, 3)),
        "power of two",
    ),
    "5 dimensions": (header(1, 0, entry("w", (1, 1, 1, 1, 1))), "5 dimensions"),
    "data missing": (header(1, 0, entry("w", (4, 4))), r"\d+ bytes are missing: 'w'"),
    "huge tensor": (header(1, 0, entry("w", (2**60, 2**60))), "bytes are missing"),
    "overlap": (
        header(2, 0, entry("w", (8,)) + entry("v", (8,), offset=4) + bytes(128)),
        "'w' and 'v' overlap",
    ),
    "repeated tensor": (
        header(2, 0, entry("w", (8,)) + entry("w", (8,), offset=32) + bytes(128)),
        "'w' appears twice",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    data, said = HOSTILE[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError, match=said):
        opened(path, bases("llama"))


def test_no_truncation_goes_unnoticed(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Cut anywhere, a file is refused in words; changed anywhere, it reads or is refused in words."""
    whole = file(tmp_path / "whole.gguf", lora(), pair(V, 32, 64), "llama").read_bytes()
    base, path = open_base(str(bases("llama"))), tmp_path / "x.gguf"
    for length in [*range(4, 420, 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            opened(path, base)
    for place in range(4, 420, 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            opened(path, base)
        except AdaptmergeError as problem:
            assert str(problem)


def test_vocabularies_are_skipped(tmp_path: Path) -> None:
    tokens = [f"t{number}" for number in range(70_000)]
    values = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": [0.5] * 70_000}
    path = file(
        tmp_path / "x.gguf", {**values, "k": [1, 2]}, {"w": np.ones(3, np.float32)}, "llama"
    )
    found = read_header(path)
    assert found.values == {"general.architecture": "llama", "k": [1, 2]} | dict.fromkeys(values)
    assert torch.equal(found.refs["w"].read(), torch.ones(3))


def test_heads_of_a_base_are_counted_in_whole_numbers(fixtures: Path, tmp_path: Path) -> None:
    shutil.copytree(fixtures / "tinyllama" / "base", tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_attention_heads": "four"}))
    source = str(fixtures / "tinyllama" / "lora-r8-perl")
    with pytest.raises(InputError, match="(counts 'four' heads|num_attention_heads is 'four')"):
        combine(source, tmp_path / "out.gguf", Options(base=str(tmp_path / "base"), target="gguf"))
