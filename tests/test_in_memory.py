"""Adapters in memory as inputs, and results that stay there: the same as through files."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import samples
import torch
from families.cases import FamilyCase, all_cases, family
from peft_cases import CASES, TASKS, randomise, save_adapter
from safetensors.torch import load_file
from tiers import first_of, slow

import adaptmerge
from adaptmerge import Combined, InputSpec, Options, Questions
from adaptmerge.adapters.graph import Adapter
from adaptmerge.errors import AdaptmergeError, CannotStore, InputError
from adaptmerge.tensors.walk import refs_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def same_adapters(a: Adapter, b: Adapter) -> bool:
    """Whether two hold the same edits with the same bits, and say the same of them."""
    if [type(edit) for edit in a.edits] != [type(edit) for edit in b.edits]:
        return False
    pairs = zip(a.edits, b.edits, strict=True)
    refs = [(x, y) for e, f in pairs for x, y in zip(refs_of(e), refs_of(f), strict=True)]
    assert refs
    said = (a.notes, a.base, a.covers) == (b.notes, b.base, b.covers)
    return said and all(samples.same_bits({"": x.read()}, {"": y.read()}) for x, y in refs)


def live_model(case: FamilyCase) -> Any:
    """The model of a case with its adapter, trained."""
    import peft

    options = {"task_type": case.task or TASKS.get(case.model), **case.options}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = peft.get_peft_model(case.base_model(), getattr(peft, case.config)(**options))
        case.randomise(model)
    return model


def check_live(model: Any, folder: Path, base: Path | None = None, name: str = "default") -> None:
    """What is taken from the model is what it saves, and reads alike."""
    live = adaptmerge.from_peft(model, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapter(model, folder)
    saved = folder if name == "default" else folder / name
    assert live.held is not None
    taken = {k: ref.read() for k, ref in live.held.tensors(WEIGHTS).refs.items()}
    assert samples.same_bits(taken, load_file(saved / WEIGHTS))
    assert ordered(live.held.json(CONFIG)) == ordered(json.loads((saved / CONFIG).read_text()))
    opened = None if base is None else adaptmerge.open_base(base)
    assert same_adapters(
        adaptmerge.open_input(live, opened).adapter, adaptmerge.open_input(saved, opened).adapter
    )


def ordered(config: dict[str, Any]) -> dict[str, Any]:
    """A config with its lists in order: PEFT keeps sets, which have none."""
    return {k: sorted(v, key=str) if isinstance(v, list) else v for k, v in config.items()}


@pytest.mark.parametrize("name", first_of(all_cases(), family))
def test_every_family_of_a_live_model_is_what_it_saves(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    case = all_cases()[name]
    model = live_model(case)
    check_live(model, tmp_path / "saved", case.save_base(tmp_path / "base"))


@pytest.mark.parametrize("name", ["head_bert", "bias_all", "tokens", "dora", "embedding", "bf16"])
def test_what_lies_beside_a_lora(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    case = CASES[name]
    options = {"r": 4, "lora_alpha": 11, "task_type": TASKS.get(case.family), **case.options(4)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(case.make_model(), peft.LoraConfig(**options))
        randomise(model, 1, case.dtype)
    check_live(model, tmp_path / "saved")


def two_adapters() -> Any:
    """A model with adapters "one" and "two"."""
    peft = pytest.importorskip("peft")
    case = CASES["plain"]
    config = peft.LoraConfig(r=4, lora_alpha=11, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(case.make_model(), config, adapter_name="one")
    model.add_adapter("two", config)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for key, value in model.named_parameters():
            if "lora_" in key:
                value.copy_(0.1 * torch.randn(value.shape))
    return model


@pytest.mark.parametrize("name", ["one", "two"])
def test_one_of_several_adapters(name: str, tmp_path: Path) -> None:
    check_live(two_adapters(), tmp_path / "saved", name=name)


def test_an_adapter_of_transformers_own_reads_like_one_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=11, target_modules=["q_proj"])
    model: Any = CASES["plain"].make_model()
    model.add_adapter(config)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_" in key:
                value.copy_(0.1 * torch.randn(value.shape))
    found = adaptmerge.open_input(adaptmerge.from_peft(model)).adapter
    model.save_pretrained(tmp_path)
    saved = adaptmerge.open_input(tmp_path).adapter
    assert [str(e.site) for e in found.edits] == [str(e.site) for e in saved.edits]
    pairs = zip(found.edits, saved.edits, strict=True)
    refs = [(x, y) for e, f in pairs for x, y in zip(refs_of(e), refs_of(f), strict=True)]
    assert all(torch.equal(x.read(), y.read()) for x, y in refs)


def test_what_is_taken_does_not_change_with_the_model() -> None:
    model = two_adapters()
    before = adaptmerge.from_peft(model, "one")
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(2)
    after = adaptmerge.from_peft(model, "one")
    assert before.held is not None
    assert after.held is not None
    old, new = (spec.held.tensors(WEIGHTS).refs for spec in (before, after) if spec.held)
    assert all(torch.equal(2 * old[key].read(), new[key].read()) for key in old)


def test_models_without_the_adapter_are_refused() -> None:
    with pytest.raises(InputError, match="a Linear has no adapters of PEFT"):
        adaptmerge.from_peft(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="no adapter 'on': did you mean 'one'"):
        adaptmerge.from_peft(two_adapters(), "on")


@pytest.fixture
def saved(tmp_path: Path) -> list[Path]:
    """Two LoRA adapters as PEFT saves them."""
    return [samples.adapter(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))]


def in_memory(folder: Path, **given: Any) -> InputSpec:
    config = json.loads((folder / CONFIG).read_text())
    return adaptmerge.from_state_dict(load_file(folder / WEIGHTS), config, **given)


def combined(folders: list[Path], options: Options = Options()) -> Combined:  # noqa: B008
    sources = [in_memory(folder, name=folder.name) for folder in folders]
    return adaptmerge.combine_in_memory(sources, options)


def test_a_state_dict_is_read_as_its_folder(saved: list[Path]) -> None:
    found = adaptmerge.open_input(in_memory(saved[0])).adapter
    assert same_adapters(found, adaptmerge.open_input(saved[0]).adapter)


@pytest.mark.parametrize("method", ["linear", "svd"])
def test_a_merge_in_memory_has_the_bytes_of_one_through_files(
    method: str, saved: list[Path], tmp_path: Path
) -> None:
    options = Options(method=method)
    report = adaptmerge.combine(saved, tmp_path / "out", options)
    found = combined(saved, options)
    assert samples.same_bits(found.tensors(), load_file(tmp_path / "out" / WEIGHTS))
    assert found.config == json.loads((tmp_path / "out" / CONFIG).read_text())
    assert found.report.totals == report.totals
    assert found.report.sites == report.sites


def test_nothing_is_written_and_nothing_computed_before_it_is_asked(
    saved: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaptmerge.files.in_memory import SnapshotScratch

    asked: list[str] = []
    put = SnapshotScratch.put

    def counted(self: SnapshotScratch, tensor: torch.Tensor, name: str = "") -> Any:
        asked.append(name)
        return put(self, tensor, name)

    monkeypatch.setattr(SnapshotScratch, "put", counted)
    before = sorted(tmp_path.rglob("*"))
    found = combined(saved)
    assert not asked
    first = found.tensors()
    count = len(asked)
    next(iter(first.values())).zero_()
    assert all(value.any() for value in found.tensors().values())
    assert count == len(asked) > 0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_result_is_an_input(saved: list[Path], tmp_path: Path) -> None:
    found = combined(saved)
    adaptmerge.combine(found.as_input(), tmp_path / "out")
    assert samples.same_bits(load_file(tmp_path / "out" / WEIGHTS), found.tensors())


def test_the_native_format_stays_in_memory(saved: list[Path]) -> None:
    found = combined(saved, Options(target="native"))
    assert found.config["adapters"]
    again = adaptmerge.open_input(found.as_input()).adapter
    assert len(again.edits) == len(found.report.sites)


def test_what_is_assumed_is_fatal_under_strict(saved: list[Path]) -> None:
    bare = adaptmerge.from_state_dict(load_file(saved[0] / WEIGHTS))
    assert any("alpha = r is assumed" in str(n) for n in adaptmerge.combine_in_memory(bare).notes)
    with pytest.raises(AdaptmergeError, match="alpha = r is assumed"):
        adaptmerge.combine_in_memory(bare, Options(strict=True))
    said = adaptmerge.from_state_dict(load_file(saved[0] / WEIGHTS), alpha=6.0)
    found = adaptmerge.open_input(said).adapter
    assert not found.notes
    assert adaptmerge.difference(found, adaptmerge.open_input(saved[0]).adapter).relative == 0


def test_a_format_that_is_a_file_is_refused_before_anything_is_computed(
    fixtures: Path,
) -> None:
    tiny = fixtures / "tinyllama"
    options = Options(target="gguf", base=str(tiny / "base"))
    with pytest.raises(CannotStore, match="gguf is only written to a file"):
        adaptmerge.combine_in_memory(tiny / "lora-r8-perl", options)


def test_heads_that_make_several_adapters_are_refused(fixtures: Path) -> None:
    sources = [fixtures / "classifiers" / name for name in ("language", "kind")]
    with pytest.raises(CannotStore, match="several adapters .language, kind.*folder as output"):
        adaptmerge.combine_in_memory(sources, Options(heads="separate"))


@pytest.mark.parametrize(
    "value", [1.0, torch.zeros(2, device="meta"), torch.eye(2).to_sparse(), None]
)
def test_what_no_file_could_hold_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="'x' is .*expected a tensor with values"):
        adaptmerge.from_state_dict({"x": value}, {"peft_type": "LORA"})


def test_equal_names_are_numbered(saved: list[Path]) -> None:
    sources = [in_memory(folder) for folder in saved]
    names = [item.name for item in adaptmerge.open_inputs(sources)]
    assert names == ["adapter", "adapter-2"]


def test_sources_may_be_text_paths_and_specs(saved: list[Path], tmp_path: Path) -> None:
    one, two = saved
    sources: list[str | InputSpec] = [f"{one}:0.25", InputSpec(str(two), weight=0.75)]
    report = adaptmerge.combine(sources, str(tmp_path / "out"))
    assert report.options["weights"] == {"a": 0.25, "b": 0.75}
    adaptmerge.combine(one, tmp_path / "alone")
    assert samples.same_bits(load_file(tmp_path / "alone" / WEIGHTS), load_file(one / WEIGHTS))


def test_a_path_is_taken_as_it_is(saved: list[Path], tmp_path: Path) -> None:
    odd = saved[0].rename(tmp_path / "sql=a:0.5")
    assert adaptmerge.open_input(odd).spec.weight is None


def test_verify_asks_for_inputs_that_were_in_memory(saved: list[Path], tmp_path: Path) -> None:
    sources = {folder.name: in_memory(folder, name=folder.name) for folder in saved}
    adaptmerge.combine([*sources.values()], tmp_path / "out")
    missing = adaptmerge.verify(tmp_path / "out")
    assert missing.status == "fail"
    assert "was in memory when it was merged: give it again" in missing.checks[0].detail
    assert adaptmerge.verify(tmp_path / "out", Questions(inputs=sources)).status == "pass"


def test_verify_sees_other_tensors_than_were_merged(saved: list[Path], tmp_path: Path) -> None:
    sources = {folder.name: in_memory(folder, name=folder.name) for folder in saved}
    adaptmerge.combine([*sources.values()], tmp_path / "out")
    tensors = load_file(saved[0] / WEIGHTS)
    tensors[min(tensors)][0, 0] += 1
    config = json.loads((saved[0] / CONFIG).read_text())
    sources["a"] = adaptmerge.from_state_dict(tensors, config)
    found = adaptmerge.verify(tmp_path / "out", Questions(inputs=sources))
    assert found.status == "fail"
    assert "has changed since the merge" in found.checks[0].detail


def test_fuse_takes_them_like_folders(fixtures: Path, tmp_path: Path) -> None:
    tiny = fixtures / "tinyllama"
    source = in_memory(tiny / "lora-r8-perl", name="lora-r8-perl")
    for name, given in (("files", tiny / "lora-r8-perl"), ("memory", source)):
        adaptmerge.fuse(tiny / "base", given, tmp_path / name)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("files", "memory"))
    assert samples.same_bits(one, two)
    assert not samples.same_bits(one, load_file(tiny / "base" / "model.safetensors"))


@pytest.mark.parametrize("target", ["peft", "native", "gguf"])
@pytest.mark.parametrize(
    "name", ["lora-r8-perl", *slow("vera-r64-shakespeare", "loha-r4-shakespeare", "lokr-r4-perl")]
)
def test_they_convert_like_folders(name: str, target: str, fixtures: Path, tmp_path: Path) -> None:
    tiny = fixtures / "tinyllama"
    base = str(tiny / "base") if target == "gguf" else None
    for folder, given in (("files", tiny / name), ("memory", in_memory(tiny / name, name=name))):
        adaptmerge.combine(given, tmp_path / folder, Options(target=target, base=base))
    one, two = (tensor_files(tmp_path / folder) for folder in ("files", "memory"))
    assert one == two
    assert one


def tensor_files(folder: Path) -> dict[str, bytes]:
    """The files with tensors, without what a header says of inputs."""
    found = {
        p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".safetensors", ".gguf")
    }
    return {name: re.sub(rb'"sha256.*?}', b"", raw) for name, raw in found.items()}


def test_a_model_without_a_report_is_compared_with_what_is_in_memory(
    fixtures: Path, tmp_path: Path
) -> None:
    tiny = fixtures / "tinyllama"
    adaptmerge.fuse(tiny / "base", tiny / "lora-r8-perl", tmp_path / "out")
    (tmp_path / "out" / "adaptmerge.json").unlink()
    right, wrong = (in_memory(tiny / f"lora-r8-{name}") for name in ("perl", "cheaders"))
    for source, status in ((right, "pass"), (str(tiny / "lora-r8-perl"), "pass"), (wrong, "fail")):
        asked = Questions(base=tiny / "base", adapters=(source,))
        assert adaptmerge.verify(tmp_path / "out", asked).status == status
