from __future__ import annotations

from pathlib import Path

import pytest

from adaptmerge.errors import InputError, UsageError
from adaptmerge.formats.inputs import (
    InputSpec,
    in_natural_order,
    named,
    open_input,
    open_inputs,
    parse_input,
)


def spec(
    source: str, name: str | None = None, weight: float | None = None, alpha: float | None = None
) -> InputSpec:
    return InputSpec(source, name, weight, alpha)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What exists decides how an input is read, so start from nothing."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("adapter", spec("adapter")),
        ("x.safetensors", spec("x.safetensors")),
        ("x.safetensors:0.5", spec("x.safetensors", weight=0.5)),
        ("sql=x.safetensors:-1e-2", spec("x.safetensors", "sql", -0.01)),
        ("sql=runs/a/:+2", spec("runs/a/", "sql", 2.0)),
        ("x:.5", spec("x:.5")),  # a drive letter
        ("xx:.5", spec("xx", weight=0.5)),
        ("x.bin?alpha=32", spec("x.bin", alpha=32.0)),
        ("sql=x.bin:0.7?alpha=32", spec("x.bin", "sql", 0.7, 32.0)),
        ("sql=x.bin?alpha=32:0.7", spec("x.bin", "sql", 0.7, 32.0)),
        ("hf://org/name", spec("org/name")),
        ("sql=hf://org/name@v1/sub/folder:2", spec("org/name@v1//sub/folder", "sql", 2.0)),
        ("https://huggingface.co/org/name:0.5", spec("org/name", weight=0.5)),
        (
            "https://huggingface.co/org/name/resolve/v1/x.safetensors?download=true&alpha=8:0.5",
            spec("org/name@v1//x.safetensors", None, 0.5, 8.0),
        ),
        ("a-b.c_2=x", spec("x", "a-b.c_2")),
        ("org/name", spec("org/name")),
        ("org/name:0.5", spec("org/name", weight=0.5)),
        ("sql=org/name@v1.0//sub/folder:2", spec("org/name@v1.0//sub/folder", "sql", 2.0)),
        ("org/name@0123abc:1", spec("org/name@0123abc", weight=1.0)),
        ("C:\\x.safetensors", spec("C:\\x.safetensors")),
        ("C:\\x.safetensors:0.5", spec("C:\\x.safetensors", weight=0.5)),
        ("sql=C:\\runs\\a:0.5", spec("C:\\runs\\a", "sql", 0.5)),
        ("D:/runs/7", spec("D:/runs/7")),
        ("C:7", spec("C:7")),
        ("runs/epoch=3.safetensors", spec("runs/epoch=3.safetensors")),
        ("./lr=1e-4/x", spec("./lr=1e-4/x")),
        ("x:0.5:0.25", spec("x:0.5", weight=0.25)),
        ("3=x", spec("3=x")),  # a name begins with a letter
    ],
)
def test_the_grammar(text: str, expected: InputSpec) -> None:
    assert parse_input(text) == expected


def test_a_weight_before_and_after_the_options_is_one_too_many() -> None:
    with pytest.raises(UsageError, match="two weights, 0.5 and 0.3"):
        parse_input("x.bin:0.5?alpha=16:0.3")


@pytest.mark.parametrize(
    ("exists", "text", "expected"),
    [
        ("a=b", "a=b", spec("a=b")),
        ("a=b", "a=b:2", spec("a=b", weight=2.0)),
        ("a=b", "n=a=b:2", spec("a=b", "n", 2.0)),
        ("step:1000", "step:1000", spec("step:1000")),
        ("step:1000", "step:1000:0.5", spec("step:1000", weight=0.5)),
        ("step:1000", "n=step:1000", spec("step:1000", "n")),
        ("what?alpha=3", "what?alpha=3", spec("what?alpha=3")),
        ("a", "a:0.5", spec("a", weight=0.5)),  # no drive letter when it exists
        ("b", "a=b", spec("b", "a")),
        ("a?alpha=3:1", "a?alpha=3:1", spec("a?alpha=3:1")),
    ],
)
def test_what_exists_is_read_as_written(
    empty_folder: Path, exists: str, text: str, expected: InputSpec
) -> None:
    (empty_folder / exists).mkdir()
    assert parse_input(text) == expected


def test_another_folder_decides_for_recipes(empty_folder: Path) -> None:
    (empty_folder / "sub" / "a=b").mkdir(parents=True)
    assert parse_input("a=b") == spec("b", "a")
    assert parse_input("a=b", empty_folder / "sub") == spec("a=b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("xx:nan", "input 'xx:nan': weight: 'nan' is not a finite number"),
        ("xx:-inf", "'-inf' is not a finite number"),
        ("xx:1.2.3", "'1.2.3' is not a finite number"),
        ("xx:1e999", "'1e999' is not a finite number"),
        ("xx?alhpa=3", "input 'xx?alhpa=3': option 'alhpa': did you mean 'alpha'?"),
        ("xx?zzz=3", "option 'zzz': known: alpha"),
        ("xx?alpha", "option 'alpha'"),
        ("xx?", "option ''"),
        ("xx?alpha=big", "alpha: 'big' is not a finite number"),
        ("xx?alpha=nan", "alpha: 'nan' is not a finite number"),
        ("xx?alpha=1&rank=2", "option 'rank': known: alpha"),
    ],
)
def test_what_cannot_be_meant(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_input(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("runs/sql", "sql"),
        ("runs/sql/", "sql"),
        ("runs\\sql\\", "sql"),
        ("x/lora.safetensors", "lora"),
        ("x/lora.v2.bin", "lora.v2"),
        ("org/name", "name"),
        ("org/name@main", "name"),
        ("org/name@main//sub/deep", "deep"),
        ("C:\\runs\\a.pt", "a"),
        ("checkpoint-100", "checkpoint-100"),
    ],
)
def test_default_names(source: str, name: str) -> None:
    assert spec(source).default_name == name


def test_a_dot_is_named_after_its_folder(empty_folder: Path) -> None:
    (empty_folder / "sub").mkdir()
    assert spec(".").default_name == empty_folder.name
    assert spec("sub/..").default_name == empty_folder.name


def test_names_are_made_unique() -> None:
    found = named([spec("x/a"), spec("y/a"), spec("z/a", "a-2"), spec("b")])
    names = [item.name for item in found]
    assert len(set(names)) == 4
    assert names[0] == "a"
    assert names[3] == "b"


def test_a_given_name_is_kept() -> None:
    """Rules and --heads refer to it, whatever default names come before it."""
    assert [s.name for s in named([spec("x/sql"), spec("y", "sql")])][1] == "sql"


def test_two_given_names_that_are_equal() -> None:
    with pytest.raises(UsageError, match="two inputs are named 'a': give each its own NAME="):
        named([spec("x", "a"), spec("y", "a")])


def test_checkpoints_in_natural_order() -> None:
    texts = ["run/checkpoint-1000", "run/checkpoint-200", "run/checkpoint-30"]
    ordered = in_natural_order([spec(text) for text in texts])
    assert [item.source for item in ordered] == texts[::-1]


def test_what_is_missing_is_named_for_all_inputs() -> None:
    with pytest.raises(InputError, match="nope/a: does not exist"):
        open_input(spec("./nope/a"))
    with pytest.raises(InputError) as caught:
        open_inputs([spec("./no-a"), spec("./no-b")])
    assert [str(p).split(":")[0] for p in caught.value.problems] == ["no-a", "no-b"]


def test_an_opened_input(fixtures: Path) -> None:
    found = open_input(spec(str(fixtures / "tinyllama" / "lora-r8-perl")))
    assert found.name == found.adapter.name == "lora-r8-perl"
    assert found.path == fixtures / "tinyllama" / "lora-r8-perl"
    assert found.format.name == "peft"
    assert found.listing.used == ("adapter_config.json", "adapter_model.safetensors")
    file = found.path / "adapter_model.safetensors"
    assert open_input(spec(str(file), "p")).path == file
