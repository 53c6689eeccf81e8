"""Wrong inputs of a merge: the right error, one sentence that says what to do, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from console import run
from safetensors.torch import save_file
from samples import (
    CONFIG,
    MODULES,
    PREFIX,
    WEIGHTS,
    adapter,
    keys_of,
    random_sides,
    tensors_of,
    tree,
    write,
)
from torch import Tensor

from adaptmerge.commands.combine import Options, combine
from adaptmerge.errors import AdaptmergeError, CannotMerge, InputError, OutputError, UsageError
from adaptmerge.formats.inputs import InputSpec, parse_input
from adaptmerge.outputs.report import Report

Q, UP = MODULES


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return adapter(tmp_path / "good", 1)


def merge(*paths: Path, output: Path | None = None, **options: Any) -> Report:
    specs = [InputSpec(str(path)) for path in paths]
    return combine(specs, output or paths[0].parent / "out", Options(**options))


def refused(
    kind: type[AdaptmergeError], root: Path, attempt: Callable[[], object]
) -> tuple[str, ...]:
    """The problems of the one error that is raised, with not a byte below `root` changed."""
    before = tree(root)
    with pytest.raises(AdaptmergeError) as caught:
        attempt()
    assert type(caught.value) is kind, caught.value
    assert caught.value.exit_code == (2 if kind is UsageError else 1)
    assert tree(root) == before
    assert "Traceback" not in str(caught.value)
    return tuple(problem.replace(str(root), ".") for problem in caught.value.problems)


def refused_alone(root: Path, bad: Path, good: Path) -> str:
    """A bad adapter's one problem: the same alone, beside a good one, and as the second."""
    (alone,) = refused(InputError, root, lambda: merge(bad, output=root / "out"))
    for paths in ((bad, good), (good, bad)):
        (beside,) = refused(InputError, root, lambda p=paths: merge(*p, output=root / "out"))  # type: ignore[misc]
        assert beside == alone
    return alone


def renamed(path: Path, names: Mapping[str, str]) -> Path:
    """The adapter with parts of its keys replaced."""
    found = {}
    for key, value in tensors_of(path).items():
        for old, new in names.items():
            key = key.replace(old, new)
        found[key] = value
    save_file(found, path / WEIGHTS)
    return path


# Config


@pytest.mark.parametrize(
    ("config", "without", "message"),
    [
        ({}, ["r"], "r is None: expected the rank, a whole number of at least 1"),
        ({"r": 0}, [], "r is 0: expected the rank"),
        ({"r": "3"}, [], "r is '3': expected the rank"),
        ({"r": True}, [], "r is True: expected the rank"),
        ({}, ["lora_alpha"], "lora_alpha is None: expected a number"),
        ({"lora_alpha": "6"}, [], "lora_alpha is '6': expected a number"),
        ({"rank_pattern": ["q"]}, [], "rank_pattern is not an object"),
        ({"bias": "some"}, [], "bias is 'some': expected none, all or lora_only"),
        ({"peft_type": 3}, [], "peft_type is 3: expected a name such as LORA"),
        ({"use_bdlora": [2]}, [], "use_bdlora is [2]: expected an object"),
        ({"alora_invocation_tokens": "a"}, [], "alora_invocation_tokens is 'a': expected a list"),
        (
            {"init_lora_weights": "unheard"},
            [],
            "init_lora_weights is 'unheard', which this version does not know",
        ),
    ],
)
def test_configs(
    config: dict[str, Any], without: list[str], message: str, good: Path, tmp_path: Path
) -> None:
    bad = write(tmp_path / "bad", random_sides(2), without=without, **config)
    assert message in refused_alone(tmp_path, bad, good)


def test_all_problems_of_a_config_at_once(tmp_path: Path) -> None:
    bad = write(tmp_path / "bad", random_sides(2), r=0, lora_alpha=None, bias="x")
    assert len(refused(InputError, tmp_path, lambda: merge(bad))) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[1]", "expected an object"), ("", "is empty (0 bytes)")],
)
def test_configs_that_are_not_json(text: str, message: str, good: Path, tmp_path: Path) -> None:
    bad = adapter(tmp_path / "bad", 2)
    (bad / CONFIG).write_text(text)
    assert message in refused_alone(tmp_path, bad, good)


def test_families_that_are_not_known_are_named(good: Path, tmp_path: Path) -> None:
    problem = refused_alone(tmp_path, adapter(tmp_path / "bad", 2, peft_type="NEWER"), good)
    assert problem.startswith("is a PEFT NEWER adapter, a family that this version does not know")


@pytest.mark.parametrize("family", ["LOHA", "PREFIX_TUNING", "ADALORA", "XLORA", "OFT"])
def test_tensors_of_another_family_than_the_config_says(
    family: str, good: Path, tmp_path: Path
) -> None:
    bad = adapter(tmp_path / "bad", 2, peft_type=family)
    said = refused(InputError, tmp_path, lambda: merge(good, bad))
    assert any("lora_A" in problem or "lora_E" in problem for problem in said)


def test_no_weights(good: Path, tmp_path: Path) -> None:
    bad = adapter(tmp_path / "bad", 2)
    (bad / WEIGHTS).rename(bad / "model.safetensors")
    problem = refused_alone(tmp_path, bad, good)
    assert "no weights: expected adapter_model.safetensors" in problem


def test_no_config_and_no_weights(good: Path, tmp_path: Path) -> None:
    bad = adapter(tmp_path / "bad", 2)
    (bad / CONFIG).unlink()
    (bad / WEIGHTS).unlink()
    (bad / "notes.txt").write_text("nothing of use")
    assert "holds no adapter of a known format" in refused_alone(tmp_path, bad, good)


def test_a_training_folder_points_to_its_checkpoints(good: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "run" / "checkpoint-30", 2)
    problem = refused_alone(tmp_path, tmp_path / "run", good)
    assert "is the folder of a training run" in problem
    assert "the adapter is in checkpoint-30: give ./run/checkpoint-30" in problem


# Tensors


def dropped(leaf: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{PREFIX}{Q}.{leaf}.weight"]

    return change


def changed(leaf: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"{PREFIX}{Q}.{leaf}.weight": value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dropped("lora_B"), f"{Q}: lora_B is missing, found only lora_A"),
        (dropped("lora_A"), f"{Q}: lora_A is missing, found only lora_B"),
        (
            changed("lora_B", torch.ones(12, 4)),
            f"{Q}: lora_A [3, 9] has rank 3 and lora_B [12, 4] has rank 4: they must be equal",
        ),
        (changed("lora_B", torch.ones(12)), f"{Q}: lora_B has shape [12]: expected (out, r"),
        (changed("lora_B", torch.ones(12, 3, 1)), "are no pair"),
    ],
    ids=["no B", "no A", "ranks", "vector", "dimensions"],
)
def test_pairs(
    change: Callable[[dict[str, Tensor]], None], message: str, good: Path, tmp_path: Path
) -> None:
    tensors = keys_of(random_sides(2))
    change(tensors)
    bad = write(tmp_path / "bad", {}, tensors=tensors, r=3, lora_alpha=6)
    assert message in refused_alone(tmp_path, bad, good)


def test_ranks_that_the_config_does_not_say(good: Path, tmp_path: Path) -> None:
    bad = adapter(tmp_path / "bad", 2, r=8)
    (first, second) = refused(InputError, tmp_path, lambda: merge(bad, good))
    expected = "lora_A [3, 9] has rank 3, but the config says 8: is this config of another adapter?"
    assert first == f"{Q}: {expected}"
    assert second == f"{UP}: {expected}"


def test_zero_size_tensors_get_their_own_message(good: Path, tmp_path: Path) -> None:
    tensors = {key: torch.empty(0) for key in keys_of(random_sides(2))}
    bad = write(tmp_path / "bad", {}, tensors=tensors, r=3, lora_alpha=6)
    problems = refused(InputError, tmp_path, lambda: merge(good, bad))
    assert len(problems) == 4
    assert all("[0] and no values: it was saved under DeepSpeed ZeRO-3" in p for p in problems)
    assert all("zero_to_fp32" in p for p in problems)


def test_all_unknown_keys_are_listed(good: Path, tmp_path: Path) -> None:
    extra = {"mystery": torch.ones(2), "lone": torch.ones(2)}
    bad = adapter(tmp_path / "bad", 2, tensors=extra)
    assert refused(InputError, tmp_path, lambda: merge(bad, good)) == (
        "tensor 'lone' belongs to nothing this format knows",
        "tensor 'mystery' belongs to nothing this format knows",
    )


def test_keys_that_are_equal_without_their_prefix(good: Path, tmp_path: Path) -> None:
    twice = keys_of({Q: random_sides(2)[Q]}, f"{PREFIX}module.")
    bad = adapter(tmp_path / "bad", 2, tensors=twice)
    problems = refused(InputError, tmp_path, lambda: merge(bad, good))
    assert len(problems) == 2
    for problem in problems:
        assert "name the same tensor once prefixes are removed: delete the one" in problem
        assert f"'{PREFIX}module.{Q}.lora_" in problem


def test_two_adapter_names_in_one_file(good: Path, tmp_path: Path) -> None:
    sides = random_sides(2)
    tensors = {
        key.replace(".weight", f".{name}.weight"): value.clone()
        for name in ("default", "other")
        for key, value in keys_of(sides).items()
    }
    bad = write(tmp_path / "bad", {}, tensors=tensors, r=3, lora_alpha=6)
    problems = refused(InputError, tmp_path, lambda: merge(bad, good))
    assert f"{Q}: lora_A is stored for several adapter names: split the file first" in problems


def test_two_bad_inputs_are_reported_together(good: Path, tmp_path: Path) -> None:
    bad = [adapter(tmp_path / name, 2, lora_alpha=None) for name in ("b", "c")]
    problems = refused(InputError, tmp_path, lambda: merge(good, *bad))
    assert [problem.split(":")[0] for problem in problems] == [f"./b/{CONFIG}", f"./c/{CONFIG}"]


# Adapters that do not belong together


def test_conflicting_shapes_name_both_inputs(good: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", random_sides(2, shape=(12, 10)))
    problems = refused(CannotMerge, tmp_path, lambda: merge(good, other))
    expected = "the adapters are for different shapes: good [12, 9], other [12, 10]"
    assert problems == (f"{Q}: {expected}", f"{UP}: {expected}")


def test_a_convolution_and_a_linear_layer_do_not_meet(good: Path, tmp_path: Path) -> None:
    kernels = {
        key: value.reshape(*value.shape, 1, 1) for key, value in keys_of(random_sides(2)).items()
    }
    other = write(tmp_path / "other", {}, tensors=kernels, r=3, lora_alpha=6)
    problems = refused(CannotMerge, tmp_path, lambda: merge(good, other))
    assert f"{Q}: the adapters are for different layers: good linear, other conv" in problems


def test_modules_that_coincide_only_without_a_prefix(good: Path, tmp_path: Path) -> None:
    other = renamed(adapter(tmp_path / "other", 2), {f"{PREFIX}model.": PREFIX})
    (problem,) = refused(CannotMerge, tmp_path, lambda: merge(good, other))
    assert f"good has {Q} where other has {Q.removeprefix('model.')} (and 1 more)" in problem
    assert "pass --base DIR to decide" in problem


def test_wrappers_of_training_are_no_prefix(good: Path, tmp_path: Path) -> None:
    other = renamed(adapter(tmp_path / "other", 2), {PREFIX: f"{PREFIX}module._orig_mod."})
    report = merge(good, other)
    assert "wrapper prefixes were removed from 4 tensor names" in {n.what for n in report.notes}
    assert len(report.sites) == 2


def test_different_bases(good: Path, tmp_path: Path) -> None:
    other = adapter(tmp_path / "other", 2, base_model_name_or_path="meta/Llama-3-8B")
    (problem,) = refused(CannotMerge, tmp_path, lambda: merge(good, other))
    assert "the adapters name different bases (good: tiny/base, other: meta/Llama-3-8B)" in problem
    assert "--allow base" in problem
    report = merge(good, other, allow=frozenset({"base"}))
    assert [n.kind for n in report.notes if "different bases were allowed" in n.what] == ["assumed"]


@pytest.mark.parametrize(
    "name",
    [
        "/data/models/base",
        "tiny/Base",
        "unsloth/base-bnb-4bit",
        "tiny/base-unsloth-bnb-4bit",
        "someone/base-GPTQ",
        "C:\\models\\base\\",
    ],
)
def test_bases_that_differ_by_spelling_are_a_note(name: str, good: Path, tmp_path: Path) -> None:
    other = adapter(tmp_path / "other", 2, base_model_name_or_path=name)
    notes = [n for n in merge(good, other, strict=True).notes if "spelled differently" in n.what]
    assert [note.kind for note in notes] == ["info"]


@pytest.mark.parametrize("name", ["tiny/base-instruct", "tiny/base-v2", "tiny/base-70b"])
def test_bases_that_differ_by_more_are_refused(name: str, good: Path, tmp_path: Path) -> None:
    other = adapter(tmp_path / "other", 2, base_model_name_or_path=name)
    refused(CannotMerge, tmp_path, lambda: merge(good, other))


def test_a_base_that_does_not_have_the_module(good: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({f"{Q}.weight": torch.ones(12, 9)}, base / "model.safetensors")
    (problem,) = refused(CannotMerge, tmp_path, lambda: merge(good, base=str(base)))
    assert problem.startswith(f"good: {UP} is not in the base")
    assert problem.endswith("is it for another model?")
    save_file(
        {f"{Q}.weight": torch.ones(12, 9), f"{UP}.weight": torch.ones(12, 5)},
        base / "model.safetensors",
    )
    (problem,) = refused(CannotMerge, tmp_path, lambda: merge(good, base=str(base)))
    assert problem.startswith(f"good: {UP} is for a weight of [12, 9], but the base")
    assert problem.endswith("has [12, 5]")


def test_the_base_decides_about_prefixes(good: Path, tmp_path: Path) -> None:
    other = renamed(adapter(tmp_path / "other", 2), {f"{PREFIX}model.": PREFIX})
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({f"{m}.weight": torch.ones(12, 9) for m in MODULES}, base / "model.safetensors")
    report = merge(good, other, base=str(base))
    assert [line.module for line in report.sites] == [Q, UP]
    assert all(len(line.weights) == 2 for line in report.sites)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "1,2,3"}, "--weights has 3 numbers for 2 inputs: give one each"),
        ({"weights": "1"}, "--weights has 1 number for 2 inputs"),
        ({"weights": "1,nan"}, "'nan' is not a finite number"),
        ({"weights": "last:3"}, "there are 2 inputs, keep 1 to 2"),
        ({"method": "liner"}, "no method is named 'liner': did you mean 'linear'?"),
        ({"target": "pefft"}, "no format is named 'pefft': did you mean 'peft'?"),
        ({"dtype": "int8"}, "--dtype int8: expected bf16"),
        ({"ranks": "some"}, "--ranks some: expected uniform or per-site"),
        ({"heads": "goood"}, "--heads goood: no input has that name (good, other)"),
        ({"allow": frozenset({"everything"})}, "--allow everything: expected base, nonfinite"),
    ],
)
def test_options(options: dict[str, Any], message: str, good: Path, tmp_path: Path) -> None:
    other = adapter(tmp_path / "other", 2)
    (problem,) = refused(UsageError, tmp_path, lambda: merge(good, other, **options))
    assert message in problem


def test_no_input_at_all(tmp_path: Path) -> None:
    (problem,) = refused(UsageError, tmp_path, lambda: combine([], tmp_path / "out"))
    assert problem == "no input was given: name at least one adapter"


def test_weights_given_twice(good: Path, tmp_path: Path) -> None:
    specs = [parse_input(f"{good}:0.5"), parse_input(f"b={adapter(tmp_path / 'b', 2)}")]
    (problem,) = refused(
        UsageError, tmp_path, lambda: combine(specs, tmp_path / "out", Options(weights="1,1"))
    )
    assert problem == "weights are given both after the inputs and by --weights: choose one"


def test_nothing_is_left(good: Path, tmp_path: Path) -> None:
    spec = InputSpec(str(good), weight=0.0)
    (problem,) = refused(CannotMerge, tmp_path, lambda: combine([spec], tmp_path / "out"))
    assert problem == "no site is left: every weight is zero"


# Outputs


def test_an_output_that_exists(good: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    (problem,) = refused(OutputError, tmp_path, lambda: merge(good))
    assert problem == "./out exists: choose another -o or pass --force"
    merge(good, force=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("where", [".", "sub", "..", WEIGHTS])
def test_an_output_that_is_or_touches_an_input(
    force: bool, where: str, good: Path, tmp_path: Path
) -> None:
    output = (good / where).resolve()
    refused(OutputError, tmp_path, lambda: merge(good, output=output, force=force))


def test_an_output_that_is_an_input_by_another_name(good: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(good)
    (problem,) = refused(OutputError, tmp_path, lambda: merge(good, output=link, force=True))
    assert "is the input ./good: choose another -o" in problem


def test_an_output_below_a_file(good: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(OutputError, tmp_path, lambda: merge(good, output=tmp_path / "file" / "out"))


def test_strict_notes_write_nothing(good: Path, tmp_path: Path) -> None:
    lone = tmp_path / "lone" / "x.safetensors"
    lone.parent.mkdir()
    lone.write_bytes((good / WEIGHTS).read_bytes())
    (problem,) = refused(
        AdaptmergeError, tmp_path, lambda: merge(lone, output=tmp_path / "out", strict=True)
    )
    assert "no config was found: alpha = r is assumed" in problem


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("fuse good base", "is an adapter: a model belongs here"),
        ("inspect good --base good", "is an adapter: a model belongs here"),
        ("verify base", "is a model without a report: say what should be in it, with --adapter"),
        ("run good", "is a folder: give a recipe"),
        ("combine good --to safetensors", "write -o NAME.safetensors for one file"),
        ("combine good --allow x", "expected base, nonfinite, approximate or labels"),
    ],
)
def test_what_was_mixed_up_is_said(
    command: str, said: str, good: Path, fixtures: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "base").symlink_to(fixtures / "tinyllama" / "base", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    outcome = run(*command.split())
    assert outcome.code in (1, 2)
    assert said in outcome.stderr


@pytest.mark.parametrize("value", [10**400, float("nan"), "sixteen"])
def test_an_alpha_that_is_no_number_that_floats_hold(
    value: object, good: Path, tmp_path: Path
) -> None:
    problem = refused_alone(tmp_path, adapter(tmp_path / "bad", 2, lora_alpha=value), good)
    assert "lora_alpha" in problem or "NaN" in problem


@pytest.mark.parametrize("field", ["num_virtual_tokens", "token_dim"])
def test_sizes_of_prompts_are_whole_numbers(field: str, good: Path, tmp_path: Path) -> None:
    said: dict[str, Any] = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", field: {"a": 1}}
    own = {"prompt_embeddings": torch.ones(4, 9)}
    bad = write(tmp_path / "bad", {}, tensors=own, without=("r", "lora_alpha"), **said)
    assert f"{field} is {{'a': 1}}: expected a whole number" in refused_alone(tmp_path, bad, good)
