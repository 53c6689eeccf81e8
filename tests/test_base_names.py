"""Adapters on a base of another name than the one that they were made for: said, and assumed only where the
base has a name of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from console import run
from peft_cases import CASES

from adaptmerge.adapters.graph import Adapter, BaseReference, Kind, Note
from adaptmerge.bases.base import Base
from adaptmerge.commands.verify import Questions, verify
from adaptmerge.merging.base_names import on_another_base

MADE_FOR = "meta-llama/Llama-3-8B"
Models = tuple[Path, Path, Path]
SNAPSHOT = "/cache/models--{}/snapshots/0123"


def notes(
    name: str | None, path: str, said: str | None = None, mark: str | None = None
) -> list[Note]:
    """What is said of an adapter made for `name` on a base at a path, whose config has a name or none."""
    base = Base(Path(path), {} if said is None else {"_name_or_path": said}, {})
    own = base.fingerprint if mark == "same" else mark
    adapter = Adapter("default", (), BaseReference(name, fingerprint=own))
    return on_another_base({"mine": adapter}, base)


@pytest.mark.parametrize(
    ("name", "path", "said"),
    [
        (None, "./llama", None),
        ("", "./llama", None),
        (MADE_FOR, "models/Llama-3-8B", None),
        (MADE_FOR, "models/llama-3-8b/", None),
        (MADE_FOR + "/", "./llama-3-8b-hf", None),
        ("unsloth/llama-3-8b-bnb-4bit", "./Llama-3-8B", None),
        (MADE_FOR, "./base", MADE_FOR.lower()),
        (MADE_FOR, SNAPSHOT.format("meta-llama--Llama-3-8B"), None),
        ("/home/me/models/Llama-3-8B", SNAPSHOT.format("meta-llama--Llama-3-8B"), None),
        ("../models/llama", "/elsewhere/llama", None),
        (MADE_FOR, "Llama-3-8B.gguf", None),
    ],
)
def test_names_that_mean_the_same(name: str | None, path: str, said: str | None) -> None:
    assert notes(name, path, said) == []


@pytest.mark.parametrize(
    ("name", "path", "said", "kind"),
    [
        (MADE_FOR, "./base", None, Kind.INFO),
        (MADE_FOR, "./Llama-2-7b", None, Kind.INFO),
        (MADE_FOR, "./base", "/somewhere/base", Kind.INFO),
        ("/home/me/mine", "./base", "mistralai/Mistral-7B", Kind.INFO),
        (MADE_FOR, "./base", "mistralai/Mistral-7B-v0.1", Kind.ASSUMED),
        (MADE_FOR, SNAPSHOT.format("mistralai--Mistral-7B-v0.1"), None, Kind.ASSUMED),
        (MADE_FOR, SNAPSHOT.format("meta-llama--Llama-3-8B-Instruct"), None, Kind.ASSUMED),
    ],
)
def test_names_that_differ(name: str, path: str, said: str | None, kind: str) -> None:
    (found,) = notes(name, path, said)
    assert found.kind == kind
    assert name in found.what
    assert found.input == "mine"


def test_a_fingerprint_settles_it() -> None:
    assert notes(MADE_FOR, "./base", "mistralai/Mistral-7B", "same") == []
    for name in (None, MADE_FOR):
        (found,) = notes(name, "./Llama-3-8B", None, "sampled-1:other")
        assert found.kind == Kind.ASSUMED
        assert "another fingerprint" in found.what


def inputs(command: str, adapter: Path, base: Path) -> list[str]:
    """Both as the command takes them."""
    given = [str(adapter), "--base", str(base)]
    return given if command == "combine" else [str(base), str(adapter)]


def renamed(adapter: Path, name: str) -> Path:
    """An adapter that names another base."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name}))
    return adapter


@pytest.fixture
def models(tmp_path: Path) -> Models:
    """An adapter, a base in a plain folder, and one whose config names another model."""
    base = CASES["plain"].save_base(tmp_path / "base")
    other = shutil.copytree(base, tmp_path / "other")
    config = {**json.loads((other / "config.json").read_text()), "_name_or_path": "some/model"}
    (other / "config.json").write_text(json.dumps(config))
    return renamed(CASES["plain"].build(tmp_path / "a", 1), MADE_FOR), base, other


@pytest.mark.parametrize("command", ["combine", "fuse"])
def test_commands_say_it_and_write_it_down(command: str, models: Models, tmp_path: Path) -> None:
    adapter, base, other = models

    def asked(model: Path, output: str, *more: str) -> tuple[int, str]:
        found = run(command, *inputs(command, adapter, model), "-o", str(tmp_path / output), *more)
        return found.code, " ".join(found.stderr.split())

    code, said = asked(base, "plain", "--strict")
    assert code == 0
    assert f"info: a: was made for {MADE_FOR}; whether base is that model" in said
    code, said = asked(other, "named", "--strict")
    assert code == 1
    assert f"was made for {MADE_FOR}, and the base says that it is some/model" in said
    assert asked(other, "named")[0] == 0
    (report,) = (tmp_path / "named").glob("adaptmerge*.json")
    assert any("some/model" in note["what"] for note in json.loads(report.read_text())["notes"])
    code, said = asked(other, "allowed", "--strict", "--allow", "base")
    assert code == 0
    assert MADE_FOR not in said


@pytest.mark.parametrize("command", ["combine", "fuse"])
def test_verdicts_say_it(command: str, models: Models, tmp_path: Path) -> None:
    adapter, _, other = models
    out = tmp_path / "out"
    assert run(command, *inputs(command, adapter, other), "-o", str(out)).code == 0
    verdict = verify(out, Questions(str(other), {"a": str(adapter)}))
    (check,) = [check for check in verdict.checks if check.name == "base"]
    assert check.status == "pass"
    assert "the base says that it is some/model" in check.detail
