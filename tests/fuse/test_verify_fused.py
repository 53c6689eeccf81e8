"""The verifier passes fused models that are right, of any tool, and names what is wrong with others."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fuse.models import fuse, llama_base
from peft_cases import CASES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptmerge.commands.verify import FAIL, PASS, Questions, Verdict, verify
from adaptmerge.errors import AdaptmergeError, UsageError
from adaptmerge.formats.inputs import InputSpec

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT advises the person who trains
INDEX, REPORT = "model.safetensors.index.json", "adaptmerge.json"
RANK = 4  # alpha is 11
Q = "model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Setting:
    """A base, an adapter for it, and the fused model, which is never changed."""

    base: Path
    adapter: Path
    fused: Path

    def copy(self, folder: Path) -> Path:
        """The fused model to be spoilt, beside its inputs."""
        return Path(shutil.copytree(self.fused, folder / "spoilt"))

    def other(self, folder: Path, weight: float) -> Path:
        """The same fusion with another weight."""
        allowed = frozenset({"loss"})
        fuse(self.base, {self.adapter: weight}, folder / "other", allow=allowed)
        return folder / "other"


def made(folder: Path, case: str = "plain", *, tied: bool = False, **options: Any) -> Setting:
    base = llama_base(folder / "base", shard="60KB", tie_word_embeddings=tied)
    adapter = CASES[case].build(folder / "adapter", 1)
    fuse(base, [adapter], folder / "fused", **options)
    return Setting(base, adapter, folder / "fused")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return made(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return made(tmp_path_factory.mktemp("adaptive"), rounding="adaptive")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return made(tmp_path_factory.mktemp("tied"), "embedding", tied=True)


def ask(found: Setting, model: Path, *, report: bool, weight: float = 1.0, **more: Any) -> Verdict:
    """With the model's report, or as a model of another tool."""
    if report:
        inputs = {"adapter": str(found.adapter)}
        return verify(model, Questions(str(found.base), inputs, device="cpu", **more))
    (model / REPORT).unlink(missing_ok=True)
    specs = (InputSpec(str(found.adapter), weight=weight),)
    return verify(model, Questions(str(found.base), device="cpu", adapters=specs, **more))


def text(verdict: Verdict) -> str:
    return "; ".join(f"{c.name} {c.status}: {c.detail}" for c in verdict.checks)


def complaint(found: Setting, model: Path, *, report: bool) -> str:
    """What the verifier says of a model that is wrong."""
    try:
        verdict = ask(found, model, report=report)
    except AdaptmergeError as problem:
        return "; ".join(problem.problems)
    assert verdict.status == FAIL, text(verdict)
    return "; ".join(f"{c.name}: {c.detail}" for c in verdict.checks if c.status == FAIL)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def holder(folder: Path, name: str) -> Path:
    """The file that holds a tensor."""
    return folder / str(json.loads((folder / INDEX).read_text())["weight_map"][name])


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata)


def reseal(folder: Path) -> None:
    """Has the report name the files as they are now, so that only what is in them can be wrong."""
    report = json.loads((folder / REPORT).read_text())
    for name in report["files"]:
        if (folder / name).is_file():
            report["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / REPORT).write_text(json.dumps(report))


def configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# What is right


@pytest.mark.parametrize("report", [True, False])
def test_nearest_is_right_bit_for_bit(plain: Setting, report: bool, tmp_path: Path) -> None:
    verdict = ask(plain, plain.copy(tmp_path), report=report)
    assert verdict.status == PASS, text(verdict)
    (weights,) = (c for c in verdict.checks if c.name == "weights")
    assert sum(weights.numbers["agreement"].get(how, 0) for how in ("exact", "near ties")) == 14
    # a float32 sum has 16 bits more than bfloat16: one in 2^16 of 61,440 comes to lie in the middle
    assert weights.numbers["near_ties"] < 20
    assert "7 tensors are the base's own bits" in text(verdict)
    (forward,) = (c for c in verdict.checks if c.name == "forward")
    assert forward.numbers["effect"] > 0.1


@pytest.mark.parametrize("report", [True, False])
def test_adaptive_is_right_by_its_certificate(
    adaptive: Setting, report: bool, tmp_path: Path
) -> None:
    verdict = ask(adaptive, adaptive.copy(tmp_path), report=report)
    assert verdict.status == PASS, text(verdict)
    assert "14 by their certificate" in text(verdict)
    assert "bit for bit" not in text(verdict)


@pytest.mark.parametrize("name", ["plain", "adaptive", "tied"])
def test_layer_by_layer_the_verdict_is_the_same(name: str, request: pytest.FixtureRequest) -> None:
    found: Setting = request.getfixturevalue(name)
    whole, streamed = (ask(found, found.fused, report=True, layerwise=x) for x in (False, True))
    assert whole.status == streamed.status == PASS, text(streamed)
    assert [(c.name, c.status) for c in whole.checks] == [
        (c.name, c.status) for c in streamed.checks
    ]


@pytest.mark.parametrize("name", ["stochastic", "fp16", "fp32"])
def test_other_ways_to_write_it_are_right(name: str, tmp_path: Path) -> None:
    key = "rounding" if name == "stochastic" else "dtype"
    found = made(tmp_path, "plain", **{key: name})  # type: ignore[arg-type]
    verdict = ask(found, found.fused, report=True)
    assert verdict.status == PASS, text(verdict)


@pytest.mark.parametrize(
    "case", ["dora", "embedding", "head_llama", "tokens", "bias_all", "conv1d_gpt2", "head_bert"]
)
@pytest.mark.parametrize("report", [True, False])
def test_every_kind_of_edit_is_right(case: str, report: bool, tmp_path: Path) -> None:
    base = CASES[case].save_base(tmp_path / "base")
    found = Setting(base, CASES[case].build(tmp_path / "adapter", 1), tmp_path / "fused")
    fuse(base, [found.adapter], found.fused)
    verdict = ask(found, found.fused, report=report)
    assert verdict.status == PASS, text(verdict)


def test_a_vocabulary_of_which_every_row_is_replaced(tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    rows = list(range(128))
    adapter = CASES["tokens"].build(tmp_path / "adapter", 1, trainable_token_indices=rows)
    fuse(base, [adapter], tmp_path / "fused")
    found = Setting(base, adapter, tmp_path / "fused")
    assert ask(found, found.fused, report=True).status == PASS


def merged_by_peft(found: Setting, folder: Path, **options: Any) -> Path:
    """The base in its own dtype with the adapter, merged and saved by PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(found.base, dtype="auto")
    assert model.dtype == torch.bfloat16
    merged = PeftModel.from_pretrained(model, found.adapter, **options).merge_and_unload()
    merged.save_pretrained(folder)
    return folder


def test_what_peft_merges_passes(plain: Setting, tmp_path: Path) -> None:
    """It keeps adapters in float32, and then rounds once."""
    verdict = ask(plain, merged_by_peft(plain, tmp_path / "peft"), report=False)
    assert verdict.status == PASS, text(verdict)
    assert "matrices bit for bit" in text(verdict)


def test_what_peft_rounds_twice_passes_and_is_said(tmp_path: Path) -> None:
    """With the adapter in the base's dtype, too, its delta is rounded before it is added."""
    found = made(tmp_path, "bf16")
    model = merged_by_peft(found, tmp_path / "peft", autocast_adapter_dtype=False)
    verdict = ask(found, model, report=False)
    assert verdict.status == PASS, text(verdict)
    assert "14 rounded twice (first the delta, then the sum, as PEFT merges)" in text(verdict)


# What is wrong

Change = Callable[[Setting, Path, Path], None]


def never_applied(found: Setting, model: Path, folder: Path) -> None:
    for path in shards(found.base):
        shutil.copyfile(path, model / path.name)


def weighted(weight: float) -> Change:
    def change(found: Setting, model: Path, folder: Path) -> None:
        for path in shards(found.other(folder, weight)):
            shutil.copyfile(path, model / path.name)

    return change


def unfused_shard(found: Setting, model: Path, folder: Path) -> None:
    name = holder(model, f"{Q}.weight").name
    shutil.copyfile(found.base / name, model / name)


def missing_shard(found: Setting, model: Path, folder: Path) -> None:
    holder(model, f"{Q}.weight").unlink()


def swapped_shards(found: Setting, model: Path, folder: Path) -> None:
    one, two = shards(model)[1:3]
    one.rename(model / "other")
    two.rename(one)
    (model / "other").rename(two)


def swapped_layers(found: Setting, model: Path, folder: Path) -> None:
    """Two matrices of one shape in each other's place."""
    names = [f"{Q}.weight", f"{Q.replace('.0.', '.1.')}.weight"]
    values = [load_file(holder(model, name))[name] for name in names]
    for name, value in zip(names, values[::-1], strict=True):
        rewrite(holder(model, name), lambda t, name=name, value=value: t.update({name: value}))  # type: ignore[misc]


def flipped_bit(found: Setting, model: Path, folder: Path) -> None:
    """In a tensor that no adapter touches: the last bit of its last value."""
    path = holder(model, "model.norm.weight")

    def flip(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"].view(torch.int16)[-1] ^= 1

    rewrite(path, flip)


def one_value(found: Setting, model: Path, folder: Path) -> None:
    """Of a matrix that was fused."""

    def move(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.weight"][3, 5] += 0.5

    rewrite(holder(model, f"{Q}.weight"), move)


def extra_tensor(found: Setting, model: Path, folder: Path) -> None:
    index = json.loads((model / INDEX).read_text())
    path = shards(model)[0]
    rewrite(path, lambda tensors: tensors.update({"model.extra.weight": torch.ones(3)}))
    index["weight_map"]["model.extra.weight"] = path.name
    (model / INDEX).write_text(json.dumps(index))


WRONG: dict[str, tuple[Change, str]] = {
    "never applied": (
        never_applied,
        r"_proj: adapter is not in it \((< 0\.01|-?\d(\.\d+)?) % of it arrived\)",
    ),
    "twice": (weighted(2.0), r"_proj: adapter is in it twice \(20\d(\.\d+)? % of it arrived\)"),
    "alpha": (
        weighted(RANK),
        r"_proj: adapter is in it 4 times: is its scale \(alpha / r\) right",
    ),
    "subtracted": (weighted(-1.0), r"_proj: adapter is in it -1 times"),
    "half": (weighted(0.5), r"_proj: adapter is in it 0\.5 times"),
    "unfused shard": (unfused_shard, r"layers\.0\.\S+_proj: adapter is not in it"),
    "missing shard": (missing_shard, r"model-0000\d-of-0000\d\.safetensors"),
    "swapped shards": (swapped_shards, r"model-0000\d-of-0000\d\.safetensors"),
    "swapped layers": (swapped_layers, rf"{re.escape(Q)}: "),
    "flipped bit": (flipped_bit, r"model\.norm\.weight: differs from what base and adapters"),
    "one value": (one_value, rf"{re.escape(Q)}: "),
    "extra tensor": (extra_tensor, r"model\.extra\.weight: is stored, and neither base nor"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("report", [True, False])
def test_what_is_wrong_is_named(name: str, report: bool, plain: Setting, tmp_path: Path) -> None:
    change, sentence = WRONG[name]
    model = plain.copy(tmp_path)
    change(plain, model, tmp_path)
    reseal(model)
    assert re.search(sentence, complaint(plain, model, report=report))


@pytest.mark.parametrize("name", ["never applied", "twice", "alpha", "unfused shard", "one value"])
def test_what_is_wrong_with_an_adaptive_one_is_named(
    name: str, adaptive: Setting, tmp_path: Path
) -> None:
    change, sentence = WRONG[name]
    model = adaptive.copy(tmp_path)
    change(adaptive, model, tmp_path)
    reseal(model)
    assert re.search(sentence, complaint(adaptive, model, report=True))


def test_files_that_are_not_those_written_are_named(plain: Setting, tmp_path: Path) -> None:
    model = plain.copy(tmp_path)
    flipped_bit(plain, model, tmp_path)
    name = holder(model, "model.norm.weight").name
    found = complaint(plain, model, report=True)
    assert f"{name} is not the file that was written (its sha256 differs)" in found
    assert "model.norm.weight: differs" in found


@pytest.mark.parametrize("report", [True, False])
def test_a_wrong_tie_is_named(report: bool, tied: Setting, tmp_path: Path) -> None:
    """The head is stored, but the config has the model use the embedding's matrix."""
    model = tied.copy(tmp_path)
    configure(model, tie_word_embeddings=True)
    found = complaint(tied, model, report=report)
    assert "tie_word_embeddings is True, expected False" in found


@pytest.mark.parametrize("report", [True, False])
def test_a_head_that_was_lost_in_the_tie_is_named(
    report: bool, tied: Setting, tmp_path: Path
) -> None:
    """As tools save it that know of one matrix only: the head is gone."""
    model = tied.copy(tmp_path)
    configure(model, tie_word_embeddings=True)
    index = json.loads((model / INDEX).read_text())
    path = holder(model, "lm_head.weight")
    rewrite(path, lambda tensors: tensors.pop("lm_head.weight"))
    del index["weight_map"]["lm_head.weight"]
    (model / INDEX).write_text(json.dumps(index))
    reseal(model)
    found = complaint(tied, model, report=report)
    assert "lm_head.weight: differs" in found
    assert "is it tied to an embedding that changed?" in found


def test_pefts_merge_into_a_tied_embedding_is_named(tied: Setting, tmp_path: Path) -> None:
    """It changes the head, too, which the adapter beside the base does not."""
    found = complaint(tied, merged_by_peft(tied, tmp_path / "peft"), report=False)
    assert "lm_head" in found


EDITS: Mapping[str, Any] = {  # also what outputs show, but do not name
    "vocab_size": 120,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "num_attention_heads": 2,
    "hidden_act": "gelu",
}


@pytest.mark.parametrize("key", EDITS)
@pytest.mark.parametrize("report", [True, False])
def test_an_edited_config_is_named(key: str, report: bool, plain: Setting, tmp_path: Path) -> None:
    model = plain.copy(tmp_path)
    configure(model, **{key: EDITS[key]})
    assert key in complaint(plain, model, report=report)


# Questions


def test_another_base_is_refused(plain: Setting, tmp_path: Path) -> None:
    base = shutil.copytree(plain.base, tmp_path / "other")
    rewrite(holder(base, "model.norm.weight"), lambda t: t["model.norm.weight"].add_(1))
    other = Setting(base, plain.adapter, plain.fused)
    found = complaint(other, plain.fused, report=True)
    assert "other is not the base that was fused into (its fingerprint differs)" in found


def test_another_adapter_is_refused(plain: Setting, tmp_path: Path) -> None:
    adapter = CASES["plain"].build(tmp_path / "adapter", 2)
    other = Setting(plain.base, adapter, plain.fused)
    assert "has changed since the merge" in complaint(other, plain.fused, report=True)
    spoilt = plain.copy(tmp_path)
    assert "_proj: adapter is not in it" in complaint(other, spoilt, report=False)


def test_the_base_must_be_named(plain: Setting) -> None:
    with pytest.raises(UsageError, match="a fused model is compared with its base: pass --base"):
        verify(plain.fused, Questions(None, {"adapter": str(plain.adapter)}, device="cpu"))


def test_weights_are_those_that_are_named(plain: Setting, tmp_path: Path) -> None:
    other = plain.other(tmp_path, 0.5)
    (other / REPORT).unlink()
    assert ask(plain, other, report=False, weight=0.5).status == PASS
    assert "adapter is in it 0.5 times" in complaint(plain, other, report=False)


def test_several_adapters_of_another_tool(plain: Setting, tmp_path: Path) -> None:
    second = CASES["dora"].build(tmp_path / "second", 2)
    fuse(plain.base, {plain.adapter: 0.7, second: 0.3}, tmp_path / "out")
    (tmp_path / "out" / REPORT).unlink()
    specs = [InputSpec(str(plain.adapter), weight=0.7), InputSpec(str(second), weight=0.3)]
    questions = Questions(str(plain.base), device="cpu", adapters=tuple(specs))
    verdict = verify(tmp_path / "out", questions)
    assert verdict.status == PASS, text(verdict)
    verdict = verify(tmp_path / "out", replace(questions, adapters=(specs[0],)))
    assert verdict.status == FAIL
    assert "was something else fused, too?" in text(verdict)
