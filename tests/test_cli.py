"""Promises of the command line: what it imports, prints, leaves behind and writes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import pytest
from console import run
from fuse.models import llama_base
from made import make
from peft_cases import CASES
from safetensors.torch import load_file

from adaptmerge.cli import NEAR, main

HEAVY = ("torch", "numpy", "transformers", "peft", "gguf", "huggingface_hub")
COMMANDS = sorted(main.commands)
SAYS_JSON = {
    "calibrate": ["base", "text.txt"],
    "combine": ["prose", "code"],
    "convert": ["prose"],
    "diff": ["prose", "code"],
    "explain": ["out", "q_proj"],
    "extract": ["before", "after", "--rank", "2"],
    "formats": [],
    "fuse": ["base", "prose"],
    "inspect": ["prose", "--values"],
    "methods": [],
    "run": ["recipe.yaml"],
    "verify": ["out"],
}
FAILS = {
    "calibrate": ["base", "nowhere"],
    "combine": ["prose", "nowhere"],
    "convert": ["nowhere"],
    "diff": ["prose", "nowhere"],
    "explain": ["out", "nowhere"],
    "fuse": ["base", "nowhere"],
    "inspect": ["broken.safetensors"],
    "run": ["nowhere.yaml"],
    "verify": ["nowhere"],
}


@pytest.fixture
def here(tmp_path: Path, fixtures: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with small adapters in it."""
    make(tmp_path, fixtures)
    (tmp_path / "base").symlink_to(fixtures / "tinyllama" / "base", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("inputs: [prose, code]\noutput: by-recipe\n")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    return tmp_path


def python(code: str, *arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Python with `code`, warnings as errors, and `arguments` in sys.argv."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **env},
    )


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.mark.parametrize(
    "arguments", [["--help"], ["combine", "--help"], ["inspect", "prose"], ["formats"]], ids=str
)
def test_light_commands_import_nothing_heavy(arguments: Sequence[str], here: Path) -> None:
    code = f"""
import sys
from adaptmerge.cli import NEAR, main
try:
    main(prog_name="adaptmerge")
finally:
    print("loaded:", *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)
"""
    found = python(code, *arguments, cwd=here)
    assert found.returncode == 0, found.stderr
    assert found.stderr.strip() == "loaded:"


def test_python_m_works(here: Path) -> None:
    command = [sys.executable, "-m", "adaptmerge", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=here)
    assert found.returncode == 0
    assert found.stdout.startswith("adaptmerge, version ")


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_help(name: str, option: str) -> None:
    found = run(name, option)
    assert found.code == 0
    assert main.commands[name].help
    assert "Usage: adaptmerge " + name in found.stdout
    assert max(map(len, found.stdout.splitlines())) <= 80


def test_the_commands_are_listed_in_whole_sentences() -> None:
    shown = run("--help").stdout
    assert "..." not in shown.partition("Commands:")[2].partition("Examples:")[0]
    assert all(re.search(rf"^  {name} +[A-Z].*\.$", shown, re.MULTILINE) for name in COMMANDS)
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name: str) -> None:
    options = [p for p in main.commands[name].params if isinstance(p, click.Option)]
    assert not [option.name for option in options if not option.help]


def test_every_command_is_asked_for_json() -> None:
    assert sorted(SAYS_JSON) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_one_document(name: str, here: Path) -> None:
    assert run("combine", "prose", "code", "-o", "out").code == 0
    found = run(name, *SAYS_JSON[name], "--json")
    assert found.code in (0, 3), found.stderr
    strict_json(found.stdout)


@pytest.mark.parametrize("name", sorted(FAILS))
def test_json_of_an_error_is_one_document(name: str, here: Path) -> None:
    assert run("combine", "prose", "code", "-o", "out").code == 0
    found = run(name, *FAILS[name], "--json")
    assert found.code in (1, 2)
    assert strict_json(found.stdout)["error"]["problems"]
    assert found.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "arguments", [["combine"], ["inspect", "prose", "--nonsense"], ["combinate", "prose"]], ids=str
)
def test_json_of_wrong_usage_is_one_document(arguments: Sequence[str], here: Path) -> None:
    found = run(*arguments, "--json")
    assert found.code == 2
    assert strict_json(found.stdout)["error"]["problems"]


def strict_json(text: str) -> Mapping[str, Mapping[str, object]]:
    """The document, without NaN and infinity, which other readers refuse."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    found: Mapping[str, Mapping[str, object]] = json.loads(text, parse_constant=refuse)
    return found


def test_json_of_an_infinite_number_is_null(here: Path) -> None:
    document = strict_json(run("inspect", "broken", "--values", "--json").stdout)
    assert document[0]["families"][0]["norm"] is None  # type: ignore[index]


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "fixtures/tinyllama/lora-r4-dora-embed-cheaders", "--values"],
        ["inspect", "fixtures/tinyllama/ia3-shakespeare", "--values"],
        ["combine", "a-name-that-is-rather-long-for-a-table=prose", "code", "-o", "out"],
        ["combine", "prose", "code", "--dry-run"],
        ["diff", "prose", "code"],
        ["formats"],
        ["methods"],
        ["verify", "prose-code"],
        ["explain", "prose-code", "q_proj"],
        ["extract", "before", "after", "--dry-run"],
        ["extract", "before", "after", "--rank", "1", "-o", "extracted"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_tables_fit_80_columns(arguments: Sequence[str], here: Path, fixtures: Path) -> None:
    (here / "fixtures").symlink_to(fixtures, target_is_directory=True)
    assert run("combine", "prose", "code", "-o", "prose-code", "--rank", "4").code == 0
    found = run(*arguments)
    assert found.code in (0, 3), found.stderr
    assert [line for line in found.stdout.splitlines() if len(line) > 80] == []


def test_a_long_path_is_not_broken(here: Path) -> None:
    output = "a-folder-whose-name-has-many-dashes/" * 3 + "out"
    found = run("combine", "prose", "code", "-o", output)
    assert found.code == 0
    assert output in found.stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_are_known_as_torch_calls_them(dtype: str, here: Path) -> None:
    assert run("combine", "prose", "--dtype", dtype, "-o", "out").code == 0
    stored = load_file("out/adapter_model.safetensors").values()
    assert {str(value.dtype) for value in stored} == {f"torch.{dtype}"}


def test_what_others_call_a_command_leads_to_ours() -> None:
    for word, advice in NEAR.items():
        assert advice in run(word).stderr
        assert any(f"{name!r}" in advice for name in main.commands)


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
def test_interrupt_leaves_nothing(
    as_json: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = hashes(here)
    monkeypatch.setattr("adaptmerge.outputs.session.write_bundle", interrupted)
    found = run("combine", "prose", "code", *as_json)
    assert (found.code, hashes(here)) == (130, before)
    assert found.stderr.splitlines()[-1] == "error: interrupted: nothing was written"
    assert bool(found.stdout) == bool(as_json)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_run_is_cleaned_up_by_the_next(here: Path) -> None:
    code = """
import os, signal
from adaptmerge.outputs import session
from adaptmerge.cli import NEAR, main
session.write_bundle = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main()
"""
    before = {path.name for path in here.iterdir()}
    killed = python(code, "combine", "prose", "code", cwd=here)
    assert killed.returncode == -signal.SIGKILL
    (left,) = {path.name for path in here.iterdir()} - before
    assert left.startswith(".merged.adaptmerge-")
    assert run("combine", "prose", "code").code == 0
    assert {path.name for path in here.iterdir()} - before == {"merged"}


# Commands after one another in one process, which takes longer to start than to run them.
IN_TURN = """
import json, sys
from adaptmerge.cli import NEAR, main
codes = []
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as end:
        codes.append(end.code or 0)
print(json.dumps(codes))
"""


def in_turn(
    commands: Sequence[Sequence[str]], cwd: Path, *, first: str = "", **env: str
) -> tuple[list[int], str]:
    """The exit codes of command lines and what they say of errors; `first` is run before."""
    done = python(first + IN_TURN, json.dumps(commands), cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    codes: list[int] = json.loads(done.stdout.splitlines()[-1])
    return codes, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs setrlimit")
def test_full_disk_leaves_nothing(here: Path) -> None:
    limit = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
"""
    before = hashes(here)
    outputs = ("merged", "one.safetensors")
    commands = [["combine", "prose", "code", "-o", output] for output in outputs]
    codes, said = in_turn(commands, here, first=limit)
    assert codes == [1, 1]
    assert said.count("larger than the file system or a limit") == 2
    assert "Traceback" not in said
    assert hashes(here) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["combine", "prose", "code", "--rank", "4", "-o", "out"],
        ["convert", "prose", "--dtype", "bf16", "-o", "out.safetensors"],
        ["convert", "prose", "--to", "native", "-o", "out"],
        ["combine", "prose", "code", "-o", "prose", "--force"],
        ["combine", "prose", "broken"],
        ["extract", "before", "after", "--rank", "2", "-o", "before", "--force"],
    ],
    ids=" ".join,
)
def test_inputs_are_never_changed(arguments: Sequence[str], here: Path) -> None:
    before = hashes(here)
    run(*arguments)
    after = hashes(here)
    assert {name: after.get(name) for name in before} == before


def test_output_is_the_same_bytes(tmp_path: Path, fixtures: Path) -> None:
    """Stacked, fitted and fused, whatever the workers and the order of sets."""
    tiny = fixtures / "tinyllama"
    one, two, three = (
        str(tiny / f"lora-{name}")
        for name in ("r8-shakespeare", "r8-cheaders", "r16-rslora-qv-perl")
    )
    sharded = llama_base(tmp_path / "base", shard="60KB")
    its = CASES["plain"].build(tmp_path / "its", 1)
    commands = {
        "stacked": ["combine", one, two],
        "fitted": [
            *("combine", f"{one}:0.7", f"{three}:0.3"),
            *("--max-error", "0.1", "--ranks", "per-site", "--dtype", "bf16"),
        ],
        "fused": ["fuse", str(sharded), str(its)],
    }
    found = []
    for seed, jobs in (("1", "1"), ("2", "2")):
        folder = tmp_path / seed
        folder.mkdir()
        asked = [[*words, "--jobs", jobs, "-o", name] for name, words in commands.items()]
        codes, said = in_turn(asked, folder, PYTHONHASHSEED=seed)
        assert codes == [0, 0, 0], said
        found.append({name: hashes(folder / name) for name in commands})
    assert found[0] == found[1]
    assert [len(found[0][name]) for name in ("stacked", "fitted")] == [4, 4]
    assert sum(name.endswith(".safetensors") for name in found[0]["fused"]) > 2


@pytest.mark.parametrize("more", [["-o", "out/merged"], ["-o", "out/one.safetensors"]], ids=str)
def test_output_names_no_folder_and_no_date(more: Sequence[str], here: Path) -> None:
    inputs = [str(here / "prose"), str(here / "code")]
    assert run("combine", *inputs, "--rank", "4", *more).code == 0
    for path in (here / "out").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert str(here).encode() not in content, path
            assert str(here.resolve()).encode() not in content, path
            assert not re.search(rb"\b20\d\d-[01]\d-[0-3]\d|\d\d:\d\d:\d\d", content), path
