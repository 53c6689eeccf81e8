"""Runs the command of a case in this process and judges what it did.

It may succeed or refuse, in a sentence, with a code from 0 to 3. It may not raise anything, hang, grow,
warn, change an input, leave anything half written, or write numbers that are none.
"""

from __future__ import annotations

import json
import resource
import signal
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from click.testing import CliRunner, Result
from fuzz.cases import Laid

import adaptmerge
from adaptmerge.cli import main

SECONDS = 20  # of the processor
WAITING = 5 * SECONDS  # in all: it may be busy with something else
GROWTH = 6 << 30  # bytes of addresses that a case may ask for
PEAK = 1 << 30  # bytes of memory that it may use at once
PACKAGE = Path(adaptmerge.__file__).parent
ENVIRONMENT = {"COLUMNS": "80", "ADAPTMERGE_DEBUG": "1", "HF_HUB_OFFLINE": "1"}
OUTPUTS = ("out", "out.safetensors", "out.gguf", "out.adaptmerge.json")
State = dict[str, tuple[int, ...]]


class Hang(BaseException):
    """No error of the program: nothing may catch it."""


@dataclass(frozen=True)
class Failure:
    """What is wrong, where (the group it belongs to), and all that is known."""

    kind: str
    where: str
    text: str

    @property
    def group(self) -> str:
        return f"{self.kind}: {self.where}"


def judged(laid: Laid) -> tuple[int, Failure | None]:
    """The exit code of a run of this case, and what is wrong with it, if anything is."""
    before = state(laid.folder)
    torch.set_warn_always(True)  # or what a case warns of would depend on those before it
    with warnings.catch_warnings(record=True) as warned, _bounded():
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", module="(?!adaptmerge)")
        try:
            result = _run(laid.line)
        except Hang as problem:
            return -1, _failure("hang", problem)
    return result.exit_code, (
        _raised(result)
        or _grown()
        or _unsaid(result)
        or _not_json(laid, result)
        or _changed_inputs(laid, before)
        or _half_written(laid, result, before)
        or _warned(warned)
    )


def _run(line: list[str]) -> Result:
    with _timed():
        return CliRunner(env=ENVIRONMENT).invoke(main, line, prog_name="adaptmerge")


@contextmanager
def _timed() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    numbers = (signal.SIGALRM, signal.SIGPROF)
    before = [signal.signal(number, stop) for number in numbers]
    signal.alarm(WAITING)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _bounded() -> Iterator[None]:
    """Asking for much more memory than there is now fails; and the peak is forgotten."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + GROWTH, before[1]))
    try:
        Path("/proc/self/clear_refs").write_text("5")
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _memory(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split()[0]) << 10


def _grown() -> Failure | None:
    over = _memory("VmHWM") - _memory("VmRSS")
    return Failure("memory", "peak", f"{over >> 20} MiB at once") if over > PEAK else None


def state(folder: Path) -> State:
    """What tells whether anything has been written, of all below a folder."""
    found = {}
    for path in folder.rglob("*"):
        said = path.lstat()
        times = () if path.is_dir() else (said.st_mtime_ns,)
        found[str(path.relative_to(folder))] = (said.st_mode, said.st_size, said.st_ino, *times)
    return found


def _raised(result: Result) -> Failure | None:
    problem = result.exception
    if isinstance(problem, SystemExit) or problem is None:
        shown = result.stderr
        if "Traceback (most recent call last)" in shown:
            return Failure("crash", _last_line_of(shown), shown)
        return None
    return _failure("crash", problem)


def _failure(kind: str, problem: BaseException) -> Failure:
    """What was raised, and the last place in the package that it came through."""
    frames = traceback.extract_tb(problem.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    place = "outside"
    if own:
        name = Path(own[-1].filename).relative_to(PACKAGE).as_posix()
        place = f"{name}:{own[-1].name}"
    text = "".join(traceback.format_exception(problem))
    return Failure(kind, f"{place} {type(problem).__name__}", text)


def _last_line_of(shown: str) -> str:
    """The last place in the package that a traceback names."""
    places = [line.strip() for line in shown.splitlines() if f'File "{PACKAGE}' in line]
    if not places:
        return "outside"
    path, _, rest = places[-1].removeprefix('File "').partition('"')
    name = Path(path).relative_to(PACKAGE).as_posix()
    raised = [line for line in shown.splitlines() if line and not line.startswith(" ")][-1]
    return f"{name}:{rest.rpartition(' in ')[2]} {raised.partition(':')[0].rpartition('.')[2]}"


def _unsaid(result: Result) -> Failure | None:
    if result.exit_code not in (0, 1, 2, 3):
        return Failure("code", str(result.exit_code), result.output)
    said = result.stderr.strip() if result.exit_code in (1, 2) else result.output.strip()
    if not said:
        return Failure("silent", f"code {result.exit_code}", result.output)
    if result.exit_code == 1 and not any(ln.startswith("error: ") for ln in said.splitlines()):
        return Failure("silent", "no sentence", said)
    return None


def _not_json(laid: Laid, result: Result) -> Failure | None:
    if "--json" not in laid.line:
        return None
    try:
        json.loads(result.stdout, parse_constant=_refuse)
    except ValueError as problem:
        return Failure("not JSON", laid.line[0], f"{problem}\n{result.stdout[:2000]}")
    return None


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _changed_inputs(laid: Laid, before: State) -> Failure | None:
    after = state(laid.folder)
    changed = sorted(name for name in before if after.get(name) != before[name])
    mine = sorted(name for name in set(after) - set(before) if not _asked_for(laid, name))
    known = [name for name in changed if not _asked_for(laid, name)]
    if known:
        return Failure("inputs changed", laid.line[0], f"{known}")
    return Failure("leftovers", laid.line[0], f"{mine}") if mine else None


def _asked_for(laid: Laid, name: str) -> bool:
    """Whether it is the output, or what a fusion that was interrupted left for the next."""
    top = name.partition("/")[0]
    return top in (*OUTPUTS, "junit.xml") or top.startswith(".out")


def _half_written(laid: Laid, result: Result, before: State) -> Failure | None:
    """An output is there if and only if the command says so, and all of it can be read."""
    if "-o" not in laid.line or "--dry-run" in laid.line:
        return None
    out = Path(laid.line[laid.line.index("-o") + 1])
    there = out.exists()
    if result.exit_code and there:
        return Failure(
            "half written", laid.line[0], f"exit code {result.exit_code}, but there is {out.name}"
        )
    left = {path.name for path in laid.folder.glob(".out*")} - before.keys()
    if left and laid.line[0] != "fuse":
        return Failure("leftovers", laid.line[0], f"{left}")
    if not result.exit_code and not there:
        return Failure("half written", laid.line[0], "exit code 0, but there is no output")
    return _unreadable(laid, out) if there else None


def _unreadable(laid: Laid, out: Path) -> Failure | None:
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    for path in files:
        try:
            if path.suffix == ".json" and not _copied(path, laid.folder):
                json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
            if path.suffix == ".safetensors" and (said := _no_numbers(path, laid)):
                return Failure("no numbers", laid.line[0], said)
        except Exception as problem:
            return Failure("unreadable", f"{laid.line[0]} {path.name}", repr(problem))
    return None


def _copied(path: Path, folder: Path) -> bool:
    """Whether an input has the same bytes: what lies beside a model travels along as it is."""
    content = path.read_bytes()
    others = (p for p in folder.rglob(path.name) if p.is_file() and "out" not in p.parts)
    return any(other.read_bytes() == content for other in others)


def _no_numbers(path: Path, laid: Laid) -> str | None:
    """Values that are not finite, where nobody allowed them; a base's own are its own."""
    from safetensors import safe_open

    allowed = any("nonfinite" in word for word in laid.line) or laid.line[0] == "fuse"
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            if not allowed and tensor.is_floating_point() and not tensor.float().isfinite().all():
                return f"{path.name}: {name}"
    return None


def _warned(warned: list[warnings.WarningMessage]) -> Failure | None:
    for one in warned:
        place = f"{Path(one.filename).name}:{one.lineno} {one.category.__name__}"
        return Failure("warning", place, str(one.message))
    return None
