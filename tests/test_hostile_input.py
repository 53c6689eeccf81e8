"""What no format means: pipes, loops of links, data that holds itself, text that is none, deep nests; and
the last resort for errors that nothing foresaw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import console
import pytest
import samples
import torch

from adaptmerge.cli import last_resort

HALF = "\ud800"  # of a pair of UTF-16: JSON has it, UTF-8 has not
REPORT = "please report it with this input (ADAPTMERGE_DEBUG=1 shows where it happened)"


def refused(*arguments: str) -> str:
    """What a command that must be refused says, on one line."""
    outcome = console.run(*arguments)
    assert outcome.code == 1, outcome.stdout + outcome.stderr
    return " ".join(outcome.stderr.split())


def with_config(folder: Path, **fields: Any) -> Path:
    return samples.adapter(folder, 1, **fields)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes")
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("adaptmerge.json", ("verify", "a")),
        ("adapter_model.safetensors", ("inspect", "a/adapter_model.safetensors")),
        ("recipe.yaml", ("run", "a/recipe.yaml", "-o", "out")),
        ("text.txt", ("calibrate", "base", "a/text.txt", "-o", "moments.safetensors")),
    ],
)
def test_a_pipe_is_no_file(
    name: str, line: tuple[str, ...], fixtures: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base").symlink_to(fixtures / "tinyllama" / "base", target_is_directory=True)
    path = with_config(tmp_path / "a") / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    said = refused(*line)
    assert name in said
    assert "not a plain file" in said or "has no report" in said


def test_a_loop_of_links_is_nothing(tmp_path: Path) -> None:
    folder = with_config(tmp_path / "a")
    (folder / "one").symlink_to(folder / "other")
    (folder / "other").symlink_to(folder / "one")
    assert console.run("inspect", str(folder)).code == 0
    assert "one" in refused("inspect", str(folder / "one"))


def holding_itself() -> Any:
    found: list[Any] = []
    found.append(found)
    return found


def holding_itself_and_a_tensor() -> Any:
    found: dict[str, Any] = {"w": torch.ones(2)}
    found["again"] = [found]
    return found


@pytest.mark.parametrize(
    ("make", "said"),
    [(holding_itself, "belongs to nothing"), (holding_itself_and_a_tensor, "hides tensors")],
)
def test_a_list_that_holds_itself(make: Callable[[], Any], said: str, tmp_path: Path) -> None:
    folder = with_config(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"w": torch.ones(2), "odd": make()}, folder / "adapter_model.bin")
    assert said in refused("inspect", str(folder))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_half_a_character_is_shown_and_written(encoding: str, tmp_path: Path) -> None:
    """In a process of its own: what a terminal's encoding lacks, streams in memory have."""
    folder = with_config(tmp_path / "a", base_model_name_or_path=HALF, revision=f"\u00e9{HALF}")
    code = """
import sys
from adaptmerge.cli import main
for line in sys.argv[1:]:
    main(line.split("|"), standalone_mode=False)
"""
    out = tmp_path / "out"
    lines = (f"inspect|{folder}|--json", f"combine|{folder}|-o|{out}")
    done = subprocess.run(
        [sys.executable, "-c", code, *lines],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": encoding},
    )
    shown, _, rest = done.stdout.decode(encoding).partition("\n]\n")
    assert json.loads(shown + "]")[0]["base"] == {
        **json.loads(shown + "]")[0]["base"],
        "name": HALF,
        "revision": f"\u00e9{HALF}",
    }
    assert "wrote" in rest
    written = json.loads((out / "adapter_config.json").read_text("utf-8"))
    assert written["base_model_name_or_path"] == HALF


DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize("text", [DEEP, '{"r": ' * 200 + "1" + "}" * 200])
def test_deep_nests_are_refused(text: str, tmp_path: Path) -> None:
    folder = with_config(tmp_path / "a")
    (folder / "adapter_config.json").write_text(text)
    assert "nested" in refused("inspect", str(folder))


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (TypeError("'int' object is not iterable"), "TypeError: 'int' object is not iterable"),
        (RecursionError("maximum"), "is nested more deeply than can be read"),
        (MemoryError(), "needs more memory than there is"),
    ],
)
@pytest.mark.parametrize("as_json", [(), ("--json",)], ids=["text", "json"])
def test_what_nothing_foresaw_is_one_sentence(
    problem: Exception, said: str, as_json: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise problem

    monkeypatch.setattr("adaptmerge.merging.prepare.open_inputs", fail)
    line = ("combine", "one=a:0.5", "b", "-o", "out", *as_json)
    with pytest.raises(type(problem)):
        console.run(*line)
    monkeypatch.setenv(last_resort.DEBUG, "0")
    outcome = console.run(*line)
    assert outcome.code == 1
    assert len(outcome.stderr.splitlines()) == 1
    assert outcome.stderr.startswith("error: one=a:0.5, b: ")
    assert outcome.stderr.endswith(f"{said}{')' * ('Type' in said)}: {REPORT}\n")
    if as_json:
        found = json.loads(outcome.stdout)["error"]
        assert (found["where"], len(found["problems"])) == ("one=a:0.5, b", 1)


def test_who_stops_reading_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("adaptmerge.merging.prepare.open_inputs", fail)
    monkeypatch.setenv(last_resort.DEBUG, "0")
    assert console.run("combine", "a", "-o", "out").stderr == ""
