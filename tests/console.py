"""Command lines with their output, written down in Markdown and run for real.

In a ```console block a line `$ COMMAND` is run and what follows is its output. Commands are
`adaptmerge ...`, run in this process, `ls FOLDER` and `echo $?`. In a case of tests/commands lines of
stderr begin with `! ` and an exit code that is not 0 is a last line `[CODE]`. In a document the output
is as a terminal shows it, and a command that fails must be followed by `echo $?`.

ACCEPT=1 rewrites outputs that have changed: read the difference before you commit it.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

import adaptmerge
from adaptmerge.cli import main

ACCEPT = bool(os.environ.get("ACCEPT"))
FENCE, END, PROMPT = "```console", "```", "$ "
LONG_FLOAT = re.compile(r"(?<=[\s\[])-?\d+\.\d{5,}(?:e[-+]?\d+)?(?=,?$)", re.MULTILINE)
SHA256 = re.compile(r"\b[0-9a-f]{64}\b|\b[0-9a-f]{12}(?=…)")
SHORT_FLOAT = re.compile(r"(?<!tolerance )\b\d\.\d+e[-+]\d\d\b")
WEIGHTS = re.compile(r"^weights +pass .*(?:\n +.*)*", re.MULTILINE)  # a row of a table, folded
AGREED = re.compile(
    r"(\d+) matrices bit for bit(?:, (\d+) but for \d+ near ties)?|(\d+) but for \d+ near ties"
)
VERSIONS = re.compile(r'("(?:adaptmerge|torch)": )"[^"]*"')
NOISE = 3e-5  # numbers up to this are rounding (of logits to 5e-6), and differ between machines


@dataclass(frozen=True)
class Outcome:
    """What a command printed, and its exit code."""

    stdout: str
    stderr: str
    code: int

    @property
    def marked(self) -> list[str]:
        """As cases write it: stderr marked, then stdout, then the exit code."""
        lines = [f"! {line}".rstrip() for line in self.stderr.splitlines()]
        lines += [line.rstrip() for line in self.stdout.splitlines()]
        return lines + ([f"[{self.code}]"] if self.code else [])

    @property
    def shown(self) -> list[str]:
        """As a terminal shows it."""
        return [line.rstrip() for line in (self.stderr + self.stdout).splitlines()]


@dataclass(frozen=True)
class Step:
    """A command of a document and the lines (numbers from 0) that its output takes up."""

    command: str
    output: list[str]
    start: int
    end: int


def steps(text: str) -> list[Step]:
    """All commands of the ```console blocks of a text."""
    lines = text.splitlines()
    found: list[Step] = []
    inside = False
    for number, line in enumerate(lines):
        if not inside:
            inside = line.strip() == FENCE
        elif line.strip() == END:
            inside = False
        elif line.startswith(PROMPT):
            end = next(
                i
                for i in range(number + 1, len(lines))
                if lines[i].startswith(PROMPT) or lines[i].strip() == END
            )
            command = line.removeprefix(PROMPT)
            found.append(Step(command, lines[number + 1 : end], number + 1, end))
    return found


def run(*arguments: str) -> Outcome:
    """`adaptmerge` with these arguments, in this process."""
    result = CliRunner(env={"COLUMNS": "80"}).invoke(
        main, list(arguments), prog_name="adaptmerge", catch_exceptions=True
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.stdout, result.stderr, result.exit_code)


def execute(command: str, previous: int) -> Outcome:
    """A command of a document, in the current folder."""
    if command == "echo $?":
        return Outcome(f"{previous}\n", "", 0)
    program, *arguments = shlex.split(command)
    if program == "ls":
        names = sorted(p.name for p in Path(*arguments).iterdir() if not p.name.startswith("."))
        return Outcome("".join(f"{name}\n" for name in names), "", 0)
    assert program == "adaptmerge", f"cannot run {command!r}"
    return run(*arguments)


def normal(lines: list[str], folder: Path) -> list[str]:
    """Lines without what differs between machines: folders, versions, rounding noise, near ties."""
    text = "\n".join(lines).rstrip()
    for path in {str(folder), str(folder.resolve())}:
        text = text.replace(path, "TMP")
    text = text.replace(f"version {adaptmerge.__version__}", "version VERSION")
    text = VERSIONS.sub(r'\1"VERSION"', text)
    text = SHA256.sub("SHA256", text)
    text = LONG_FLOAT.sub(_three_digits, text)
    text = WEIGHTS.sub(_without_ties, text)
    return SHORT_FLOAT.sub(_without_noise, text).splitlines()


def _three_digits(match: re.Match[str]) -> str:
    value = float(match[0])
    return "0.0" if abs(value) < NOISE else f"{value:.3g}"


def _without_ties(match: re.Match[str]) -> str:
    """Sums in float32 decide which matrices have entries that lie in the middle between two values."""
    line = " ".join(match[0].split())
    found = AGREED.search(line)
    if not found:
        return match[0]
    count = sum(int(number or 0) for number in found.groups())
    return f"{line[: found.start()]}{count} matrices to the nearest value{line[found.end() :]}"


def _without_noise(match: re.Match[str]) -> str:
    return "#.#e-##" if float(match[0]) <= NOISE else match[0]


def check(document: Path, folder: Path, *, terminal: bool = False) -> None:
    """Runs a document's commands in `folder` (the current one) and compares; ACCEPT rewrites."""
    text = document.read_text(encoding="utf-8")
    lines = text.splitlines()
    code, failed = 0, ""
    changed: list[tuple[Step, list[str]]] = []
    wrong: list[str] = []
    for step in steps(text):
        if failed:
            assert step.command == "echo $?", f"{document.name}: {failed!r} fails: show echo $?"
        outcome = execute(step.command, code)
        code = outcome.code
        failed = step.command if terminal and code else ""
        found = outcome.shown if terminal else outcome.marked
        wanted, got = normal(step.output, folder), normal(found, folder)
        if wanted != got:
            changed.append((step, found if terminal else got))
            wrong += [f"$ {step.command}", *_difference(wanted, got)]
    if ACCEPT:
        for step, found in reversed(changed):
            gap = [""] if step.output and not step.output[-1] else []
            lines[step.start : step.end] = found + gap
        document.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif wrong:
        wrong.append(f"if this is right: ACCEPT=1 make test ARGS='-k {document.stem}'")
        raise AssertionError(f"{document}\n" + "\n".join(wrong))


def _difference(wanted: list[str], got: list[str]) -> list[str]:
    import difflib

    return list(difflib.unified_diff(wanted, got, "expected", "found", lineterm=""))
