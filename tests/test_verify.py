"""The verifier passes what is right and fails what is wrong, each defect on its own."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import console
import pytest
import samples
import torch
from console import run
from fuse.tiny import cut
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adaptmerge.algebra.fit import Budget
from adaptmerge.commands import verify as library
from adaptmerge.commands.combine import Options, combine
from adaptmerge.commands.verify import figures, forward, native
from adaptmerge.commands.verify.difference import difference
from adaptmerge.errors import InputError
from adaptmerge.formats.inputs import InputSpec, open_input
from adaptmerge.formats.peft.config import PeftConfig
from adaptmerge.runtime import memory

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
K0, V0 = Q0.replace("q_proj", "k_proj"), Q0.replace("q_proj", "v_proj")


@pytest.fixture(scope="module")
def tiny(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with fewer layers, and adapters of it."""
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("base", "lora-r8-shakespeare", "lora-r8-cheaders", "lora-r8-perl"):
        cut(fixtures / "tinyllama" / name, folder / name)
    return folder


def merged(tiny: Path, out: Path, **options: object) -> Path:
    names = ("lora-r8-shakespeare", "lora-r8-cheaders")
    specs = [
        InputSpec(str(tiny / name), weight=w) for name, w in zip(names, (0.7, 0.4), strict=True)
    ]
    combine(specs, out, Options(**options))  # type: ignore[arg-type]
    return out


def ask(tiny: Path, out: Path, *, base: Path | None = None, **more: object) -> library.Verdict:
    inputs = {name: str(tiny / name) for name in ("lora-r8-shakespeare", "lora-r8-cheaders")}
    questions = library.Questions(
        base=str(base or tiny / "base"),
        inputs=inputs,
        device="cpu",
        **more,  # type: ignore[arg-type]
    )
    return library.verify(out, questions)


def statuses(verdict: library.Verdict) -> dict[str, str]:
    return {check.name: check.status for check in verdict.checks}


def rewrite(out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(out / WEIGHTS)
    with safe_open(out / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, out / WEIGHTS, metadata=metadata)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"budget": Budget(rank=4)},
        {"budget": Budget(energy=0.9)},
        {"budget": Budget(max_error=0.2, per_site=True)},
        {"dtype": "bf16"},
        {"method": "svd", "dtype": "fp16", "ranks": "per-site"},
        {"method": "peft-linear"},
        {"method": "cat", "target": "native"},
    ],
    ids=str,
)
def test_a_right_merge_passes_every_oracle(
    tiny: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    verdict = ask(tiny, merged(tiny, tmp_path / "out", **options))
    assert verdict.status == library.PASS, verdict.checks
    effects = [c.numbers["effect"] for c in verdict.checks if "effect" in c.numbers]
    assert effects
    assert min(effects) > 0.1
    if options.get("target") != "native":
        assert statuses(verdict)["forward in peft"] == library.PASS
        assert verdict.trusted == ""


def test_layerwise_gives_the_same_verdict(tiny: Path, tmp_path: Path) -> None:
    out = merged(tiny, tmp_path / "out")
    verdict = ask(tiny, out, layerwise=True)
    assert verdict.status == library.PASS
    assert "readers" in verdict.trusted


@pytest.mark.parametrize("free", [10**6, None])
def test_a_base_that_does_not_fit_is_streamed(
    free: int | None, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    verdict = ask(tiny, merged(tiny, tmp_path / "out"))
    (check,) = (check for check in verdict.checks if check.name == "forward")
    assert verdict.status == library.PASS
    assert ("streamed: " in check.detail) == (free is not None)
    assert ("forward in peft" in statuses(verdict)) == (free is None)


def test_inputs_by_absolute_paths_are_found_beside_the_base(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report has their names alone, so that it holds nobody's folders."""
    monkeypatch.chdir(tmp_path)
    console.run(
        "combine", *(str(tiny / name) for name in ("lora-r8-perl", "lora-r8-cheaders")), "-o", "out"
    )
    assert str(tiny) not in Path("out", "adaptmerge.json").read_text("utf-8")
    without, beside = (
        library.verify(Path("out"), library.Questions(base=base))
        for base in (None, str(tiny / "base"))
    )
    assert statuses(without)["inputs"] == library.FAIL
    assert beside.status == library.PASS


def test_the_memory_that_is_free_is_known_here() -> None:
    if not memory.MEMINFO.is_file():
        pytest.skip("there is no /proc/meminfo")
    free = memory.free_memory("cpu")
    assert free is not None
    assert 10**6 < free < 10**14


def test_without_a_base_the_readers_are_said_to_be_trusted(tiny: Path, tmp_path: Path) -> None:
    out = merged(tiny, tmp_path / "out")
    inputs = {name: str(tiny / name) for name in ("lora-r8-shakespeare", "lora-r8-cheaders")}
    verdict = library.verify(out, library.Questions(inputs=inputs))
    assert verdict.status == library.PASS
    assert statuses(verdict)["forward"] == library.SKIPPED
    assert verdict.trusted


def scale_up(out: Path) -> None:
    config = json.loads((out / CONFIG).read_text())
    config["lora_alpha"] *= math.sqrt(2)
    (out / CONFIG).write_text(json.dumps(config))


def swap_k_and_v(out: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for side in ("lora_A.weight", "lora_B.weight"):
            k, v = f"{K0}.{side}", f"{V0}.{side}"
            tensors[k], tensors[v] = tensors[v], tensors[k]

    rewrite(out, change)


def zero_one_site(out: Path) -> None:
    rewrite(out, lambda tensors: tensors[f"{Q0}.lora_B.weight"].zero_())  # type: ignore[arg-type]


def swap_layers(out: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for side in ("lora_A.weight", "lora_B.weight"):
            a, b = f"{Q0}.{side}", f"{Q0}.{side}".replace("layers.0", "layers.1")
            tensors[a], tensors[b] = tensors[b], tensors[a]

    rewrite(out, change)


def zero_everything(out: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for value in tensors.values():
            value.zero_()

    rewrite(out, change)


Damage = Callable[[Path], None]
Damaged = Callable[[Damage, Budget], library.Verdict]


@pytest.fixture(scope="module")
def damaged(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    """What is said of a merge that was damaged, asked once."""

    @cache
    def found(damage: Damage, budget: Budget) -> library.Verdict:
        out = merged(tiny, tmp_path_factory.mktemp("damaged") / "out", budget=budget)
        damage(out)
        return ask(tiny, out)

    return found


@pytest.mark.parametrize(
    "damage", [scale_up, swap_k_and_v, zero_one_site, swap_layers, zero_everything]
)
@pytest.mark.parametrize("budget", [Budget(), Budget(rank=6)], ids=["exact", "rank6"])
def test_a_damaged_result_fails(damaged: Damaged, damage: Damage, budget: Budget) -> None:
    verdict = damaged(damage, budget)
    assert verdict.status == library.FAIL
    assert statuses(verdict)["weights"] == library.FAIL


@pytest.mark.parametrize("damage", [scale_up, swap_k_and_v, zero_one_site])
def test_the_model_alone_sees_the_damage_too(damaged: Damaged, damage: Damage) -> None:
    found = statuses(damaged(damage, Budget()))
    assert found["forward"] == library.FAIL
    assert found["forward in peft"] == library.FAIL


def test_a_result_that_no_model_computes_with_fails(tiny: Path, tmp_path: Path) -> None:
    head = load_file(tiny / "base" / "model.safetensors")["lm_head.weight"]
    kept = {f"{samples.PREFIX}lm_head.weight": head + 1}
    samples.write(tmp_path / "a", {}, tensors=kept, modules_to_save=["lm_head"])
    combine([InputSpec(str(tmp_path / "a"))], tmp_path / "out", Options())
    rewrite(tmp_path / "out", lambda found: found.update({n: v[None] for n, v in kept.items()}))
    questions = library.Questions(base=str(tiny / "base"), device="cpu")
    checks = library.verify(tmp_path / "out", questions).checks
    (check,) = (check for check in checks if check.name == "forward")
    assert check.status == library.FAIL
    assert "with the result it does not" in check.detail


def other_base(tiny: Path, where: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(tiny / "base", where)
    tensors = load_file(where / "model.safetensors")
    change(tensors)
    save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
    return where


def test_another_base_of_the_same_shapes_fails_by_its_fingerprint(
    tiny: Path, tmp_path: Path
) -> None:
    out = merged(tiny, tmp_path / "out", base=str(tiny / "base"))

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] += 0.01

    verdict = ask(tiny, out, base=other_base(tiny, tmp_path / "base", nudge))
    assert statuses(verdict)["base"] == library.FAIL
    assert verdict.status == library.FAIL


def test_another_base_of_other_shapes_fails_without_a_fingerprint(
    tiny: Path, tmp_path: Path
) -> None:
    out = merged(tiny, tmp_path / "out")

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        key = "model.layers.0.mlp.up_proj.weight"
        tensors[key] = torch.zeros(400, 128)

    verdict = ask(tiny, out, base=other_base(tiny, tmp_path / "base", widen))
    (check,) = [c for c in verdict.checks if c.name == "base"]
    assert check.status == library.FAIL
    assert "up_proj" in check.detail


def test_a_reader_with_a_broken_scale_is_caught_by_the_own_library(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = PeftConfig.scale
    monkeypatch.setattr(PeftConfig, "scale", lambda self, *args: right(self, *args) * math.sqrt(2))
    out = merged(tiny, tmp_path / "out")
    verdict = ask(tiny, out)
    found = statuses(verdict)
    assert found["input lora-r8-shakespeare in peft"] == library.FAIL
    assert verdict.status == library.FAIL


def test_changed_and_missing_inputs_fail(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "lora-r8-shakespeare", tmp_path / "a")
    combine([InputSpec(str(tmp_path / "a"))], tmp_path / "out")
    rewrite(tmp_path / "a", lambda tensors: tensors[f"{Q0}.lora_A.weight"].mul_(2))  # type: ignore[arg-type]
    verdict = library.verify(tmp_path / "out")
    assert statuses(verdict) == {"inputs": library.FAIL, "files": library.PASS}
    assert "changed" in verdict.checks[0].detail
    shutil.rmtree(tmp_path / "a")
    verdict = library.verify(tmp_path / "out")
    assert "--input a=PATH" in verdict.checks[0].detail
    assert verdict.status == library.FAIL


def test_an_output_without_a_report_is_an_error(tiny: Path) -> None:
    with pytest.raises(InputError, match="adaptmerge diff"):
        library.verify(tiny / "lora-r8-perl")


def test_noise_that_hides_the_effect_is_undecidable_and_never_passes() -> None:
    torch.manual_seed(0)
    from adaptmerge.tensors.dtypes import F32

    base = torch.randn(2, 8, 32)
    found = forward.compare(base + 2e-6, base + 2e-6, base, F32)
    check = forward.judge("forward", found)
    assert check.status == library.UNDECIDABLE
    assert library.Verdict("x", [check]).status == library.UNDECIDABLE


def test_an_adapter_without_effect_fails() -> None:
    from adaptmerge.tensors.dtypes import F32

    base = torch.randn(2, 8, 32)
    check = forward.judge("forward", forward.compare(base, base, base, F32))
    assert check.status == library.FAIL


def test_half_precision_tolerance_is_wider_but_still_catches_a_zeroed_site(
    tiny: Path, tmp_path: Path
) -> None:
    """That it passes undamaged: above."""
    out = merged(tiny, tmp_path / "out", dtype="bf16")
    zero_one_site(out)
    assert ask(tiny, out).status == library.FAIL


def test_junit_names_failures(tiny: Path, tmp_path: Path) -> None:
    from xml.etree import ElementTree

    out = merged(tiny, tmp_path / "out")
    zero_one_site(out)
    suite = ElementTree.fromstring(ask(tiny, out).as_junit())
    assert suite.tag == "testsuite"
    assert int(suite.attrib["failures"]) >= 1
    failed = {case.attrib["name"] for case in suite if case.find("failure") is not None}
    assert "weights" in failed


@pytest.mark.parametrize(
    ("junit", "said"),
    [("nowhere/verify.xml", "its folder does not exist"), ("here", "is a folder: name a file")],
)
def test_a_junit_file_that_cannot_be_is_refused_before_any_work(
    junit: str, said: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    asked: list[object] = []
    monkeypatch.setattr(library, "verify", lambda *questions: asked.append(questions))
    outcome = run("verify", str(tmp_path), "--junit", str(tmp_path / junit))
    assert outcome.code == 1
    assert said in outcome.stderr
    assert not asked


@pytest.mark.parametrize(("damaged", "code"), [(False, 1), (True, 3)])
def test_the_verdict_is_shown_though_the_junit_file_is_lost(
    damaged: bool, code: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk may fill meanwhile; a verification that failed is the worse news."""
    out = merged(tiny, tmp_path / "out")
    if damaged:
        zero_one_site(out)
    write, junit = Path.write_text, tmp_path / "verify.xml"

    def full(path: Path, *given: Any, **named: Any) -> int:
        if path == junit:
            raise OSError(28, "No space left on device")
        return write(path, *given, **named)

    monkeypatch.setattr(Path, "write_text", full)
    names = ("lora-r8-shakespeare", "lora-r8-cheaders")
    inputs = [word for name in names for word in ("--input", f"{name}={tiny / name}")]
    outcome = run("verify", str(out), *inputs, "--junit", str(junit))
    assert outcome.code == code
    assert f"out: {'fail' if damaged else 'pass'}" in outcome.stdout
    assert "verify.xml: cannot be written: No space left on device" in outcome.stderr


def test_diff_of_equal_and_unequal_adapters(tiny: Path, tmp_path: Path) -> None:
    a = open_input(InputSpec(str(tiny / "lora-r8-perl"))).adapter
    b = open_input(InputSpec(str(tiny / "lora-r8-cheaders"))).adapter
    assert difference(a, a).relative == 0.0
    assert difference(a, b).relative > 0.5
    combine([InputSpec(str(tiny / "lora-r8-perl"))], tmp_path / "n", Options(target="native"))
    c = open_input(InputSpec(str(tmp_path / "n"))).adapter
    assert difference(a, c).relative == 0.0


def test_products_of_thin_sides_take_one_thread(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads inside a small product wait for each other: minutes on cores that others use, too."""
    out = merged(tiny, tmp_path / "out")
    seen: dict[str, set[int]] = {}

    def watch(module: Any, name: str) -> None:
        own = getattr(module, name)

        def watched(*given: Any) -> Any:
            seen.setdefault(name, set()).add(torch.get_num_threads())
            return own(*given)

        monkeypatch.setattr(module, name, watched)

    watch(figures, "_inner")
    watch(native, "_answer")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert ask(tiny, out).status == library.PASS
    finally:
        torch.set_num_threads(before)
    assert seen == {"_inner": {1}, "_answer": {1}}


def test_a_base_may_lie_in_a_folder_of_another_name(tiny: Path, tmp_path: Path) -> None:
    out = merged(tiny, tmp_path / "out")
    shutil.copytree(tiny / "base", tmp_path / "renamed")
    inputs = {name: str(tiny / name) for name in ("lora-r8-shakespeare", "lora-r8-cheaders")}
    questions = library.Questions(base=str(tmp_path / "renamed"), inputs=inputs)
    assert library.verify(out, questions).status == library.PASS


def test_a_note_on_the_name_of_a_base_is_compared_where_the_base_kept_it(
    tiny: Path, tmp_path: Path
) -> None:
    out = merged(tiny, tmp_path / "out", base=str(tiny / "base"))
    path = out / "adaptmerge.json"
    said = json.loads(path.read_text("utf-8"))
    said["notes"].append({"kind": "info", "what": "was made for another world", "site": ""})
    path.write_text(json.dumps(said), "utf-8")
    assert statuses(ask(tiny, out))["report"] == library.FAIL


def test_entries_that_another_version_told_are_said_not_to_be_computed(
    tiny: Path, tmp_path: Path
) -> None:
    out = merged(tiny, tmp_path / "out")
    path = out / "adaptmerge.json"
    said = json.loads(path.read_text("utf-8"))
    said["versions"]["adaptmerge"] = "0.0.1"
    path.write_text(json.dumps(said), "utf-8")
    (check,) = (check for check in ask(tiny, out).checks if check.name == "report")
    assert check.status == library.PASS
    assert "not computed again: entries and notes, which another version told" in check.detail
