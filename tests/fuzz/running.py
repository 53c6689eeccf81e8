"""Cases one after the other, in this process or several, and what they came to."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from fuzz import valid
from fuzz.cases import Case, lay, numbered
from fuzz.judging import Failure, judged

DEAD = 120  # seconds after which a process that says nothing is given up


@dataclass
class Summary:
    """The numbers of the cases that failed, by group, with the first failure of each."""

    cases: int = 0
    seconds: float = 0.0
    codes: Counter[tuple[str, int | None]] = field(default_factory=Counter)
    failed: dict[str, list[int]] = field(default_factory=dict)
    first: dict[str, Failure] = field(default_factory=dict)

    def add(self, one: Outcome) -> None:
        number, failure = one.number, one.failure
        self.cases += 1
        self.codes[one.command, one.code] += 1
        if failure is not None:
            self.failed.setdefault(failure.group, []).append(number)
            self.first.setdefault(failure.group, failure)

    def lines(self, run: int) -> list[str]:
        """One for each group, the most frequent first, with how to see one case of it again."""
        found = [f"{self.cases} cases, {self.seconds:.0f} s, {len(self.failed)} groups of failures"]
        for command in sorted({command for command, _ in self.codes}):
            codes = {str(code): n for (of, code), n in self.codes.items() if of == command}
            found.append(
                f"{command}: " + ", ".join(f"{n} x {code}" for code, n in sorted(codes.items()))
            )
        for group, numbers in sorted(self.failed.items(), key=lambda item: -len(item[1])):
            last = (self.first[group].text.strip().splitlines() or [""])[-1][:160]
            again = f"python -m tests.fuzz --seed {run} --case {numbers[0]}"
            found += [f"{len(numbers)} x {group}", f"    {last}", f"    {again}"]
        return found


class Outcome(NamedTuple):
    """What became of the case of a number."""

    number: int
    command: str
    code: int | None
    failure: Failure | None


def outcome(case: Case, folder: Path, number: int = 0) -> Outcome:
    """What became of a case; its files are removed again."""
    try:
        laid = lay(case, folder)
        return Outcome(number, laid.line[0], *judged(laid))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_here(run: int, numbers: Iterable[int], folder: Path) -> Iterator[Outcome]:
    """What became of each."""
    valid.Store.root = folder / "valid"
    for number in numbers:
        yield outcome(numbered(run, number), folder / f"case-{number}", number)


def run_beside(run: int, numbers: range, folder: Path, jobs: int) -> Iterator[Outcome]:
    """The same with several processes; one that dies fails its case, and another takes its place."""
    context = multiprocessing.get_context("spawn")
    left = [numbers[start::jobs] for start in range(jobs)]
    working: list[tuple[multiprocessing.process.BaseProcess, Connection, range]] = []

    def start(part: range) -> None:
        mine, theirs = context.Pipe()
        process = context.Process(target=_worker, args=(run, part, folder, theirs))
        process.start()
        theirs.close()
        working.append((process, mine, part))

    for part in left:
        start(part)
    while working:
        process, mine, part = working.pop(0)
        if not part:
            process.join()
            continue
        try:
            if not mine.poll(DEAD):
                process.kill()
            result = mine.recv()
        except EOFError:
            process.join()
            died = Failure("died", f"exit code {process.exitcode}", "the process has ended")
            yield Outcome(part[0], "any", None, died)
            start(part[1:])
            continue
        yield result
        working.append((process, mine, part[1:]))


def _worker(run: int, numbers: range, folder: Path, to: Connection) -> None:
    for result in run_here(run, numbers, folder):
        to.send(result)
    to.close()


def smallest(case: Case, folder: Path) -> Case:
    """The case with only those changes that its failure needs."""
    wanted = outcome(case, folder).failure
    if wanted is None:
        return case
    for change in case.changes:
        fewer = replace(case, changes=tuple(c for c in case.changes if c is not change))
        found = outcome(fewer, folder).failure
        if found is not None and found.group == wanted.group:
            case = fewer
    return case


def timed(results: Iterable[Outcome]) -> Summary:
    """All results in one."""
    summary, start = Summary(), time.monotonic()
    for one in results:
        summary.add(one)
    summary.seconds = time.monotonic() - start
    return summary
