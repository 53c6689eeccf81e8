"""What a shell completes, asked as click asks: paths, and the words of options."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import samples
from click.shell_completion import ShellComplete
from conftest import ROOT

from adaptmerge.cli import main
from adaptmerge.cli.completion import Completed
from adaptmerge.commands.combine import combine
from adaptmerge.methods.registry import methods

FREE = {"rules", "max_growth"}  # texts of which nothing is known


def completions(*words: str) -> list[str]:
    """What the last word may become; "<files>" stands for the shell's own search."""
    asked = ShellComplete(main, {}, "adaptmerge", "_ADAPTMERGE_COMPLETE")
    found = asked.get_completions(list(words[:-1]), words[-1])
    return ["<files>" if item.type == "file" else item.value for item in found]


def test_every_text_can_be_completed() -> None:
    texts = {
        f"{name} {param.name}": param
        for name, command in main.commands.items()
        for param in command.params
        if isinstance(param.type, click.types.StringParamType) and param.name not in FREE
    }
    assert len(texts) > 50
    assert not [name for name, param in texts.items() if not isinstance(param.type, Completed)]


@pytest.mark.parametrize("option", ["--method", "--to", "--dtype", "--quant", "--trained-on"])
def test_every_word_that_is_completed_begins_as_it_was_written(option: str) -> None:
    command = "combine" if option == "--to" else "fuse"
    found = completions(command, "x", option, "")
    assert len(found) >= 2
    assert completions(command, "x", option, found[-1]) == [found[-1]]


@pytest.mark.parametrize(
    "words",
    [
        ("combine", "ad"),
        ("combine", "a", "ad"),
        ("combine", "-o", "me"),
        ("combine", "--base", "ll"),
        ("convert", "ad"),
        ("fuse", "ll"),
        ("fuse", "llama", "ad"),
        ("fuse", "--calibration", "te"),
        ("extract", "llama", "tu"),
        ("inspect", "ad"),
        ("diff", "a", "b"),
        ("explain", "me"),
        ("run", "re"),
        ("verify", "me"),
        ("verify", "--junit", "ve"),
        ("verify", "--input", "sq"),
        ("calibrate", "llama", "te"),
    ],
)
def test_paths_are_left_to_the_shell(words: tuple[str, ...]) -> None:
    assert completions(*words) == ["<files>"]


def test_a_path_after_a_name_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sql").mkdir(parents=True)
    (tmp_path / "runs" / "sort.safetensors").touch()
    assert completions("combine", "a=r") == ["a=runs/"]
    assert completions("combine", "a=runs/s") == ["a=runs/sort.safetensors", "a=runs/sql/"]
    assert completions("verify", "--input", "a=./runs/sq") == ["a=./runs/sql/"]
    assert completions("combine", "a=none/") == ["<files>"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("comb",), ["combine"]),
        (("combine", "--me"), ["--method"]),
        (("combine", "--method", ""), sorted(methods())),
        (("combine", "--to", "g"), ["gguf"]),
        (("combine", "--dtype", "bf"), ["bf16", "bfloat16"]),
        (("combine", "--as", ""), ["lora", "vera"]),
        (("combine", "--allow", "l"), ["labels"]),
        (("fuse", "--allow", "base,l"), ["base,labels", "base,loss"]),
        (("fuse", "--quant", "nf4"), ["nf4", "nf4,double"]),
        (("convert", "--ranks", ""), ["uniform", "per-site"]),
        (("convert", "--peft-version", "0.2"), ["0.20", "0.21"]),
    ],
)
def test_words(words: tuple[str, ...], expected: list[str]) -> None:
    assert completions(*words) == expected


def test_sites_of_an_output(tmp_path: Path) -> None:
    combine(samples.adapter(tmp_path / "a", 1), tmp_path / "out")
    found = completions("explain", str(tmp_path / "out"), "model.layers.1")
    assert found == [samples.MODULES[1]]
    assert completions("explain", str(tmp_path), "model") == []


def test_the_shell_is_answered_without_torch(tmp_path: Path) -> None:
    """As bash asks: by the environment, with the words that were typed."""
    code = (
        "import sys, atexit\nfrom adaptmerge.cli import main\n"
        "atexit.register(lambda: print('torch' in sys.modules))\nmain(prog_name='adaptmerge')"
    )
    asked = {"_ADAPTMERGE_COMPLETE": "bash_complete", "COMP_CWORD": "3"}
    environment = {**os.environ, **asked, "COMP_WORDS": "adaptmerge combine --method li"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["plain,linear", "False"]
