"""Processor time of tests against what they may take: said after a run, and fatal with CHECK_TIMES=1.

A test's own time is that of the process it runs in; a file's time has what it starts, too. Seconds are
those of the machine that the budgets were set on: how much slower another one is, counting tells. A test
in which many modules were imported counts nowhere: whichever is the first to need them pays for all.
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

TEST = 1.0  # seconds of a test that is not marked slow
FORMAT, CAPABILITY = 5.0, 20.0  # of a file of tests: one format, scheme or family, and all else
FORMATS = ("families", "formats", "schemes")
CONTRACTS = {  # of files that all families or schemes go through
    "tests/families/test_families.py": 50.0,
    "tests/families/test_merging.py": CAPABILITY,
    "tests/schemes/test_against_gptq.py": CAPABILITY,
    "tests/schemes/test_contract.py": CAPABILITY,
    "tests/test_defects_families.py": 25.0,
}
DOCUMENTS = {
    "tests/test_docs.py": 3.0,
    "tests/test_commands.py": 3.0,
}  # of a test: all commands of one
IMPORTED = 10  # modules, from which on a test is not judged
COUNTING = 0.016  # seconds that counting took on the machine of the budgets
SPENT = "processor seconds"


class Spent(NamedTuple):
    """So far: seconds of this process, of it and its children, and imported modules."""

    own: float
    whole: float
    modules: int

    @classmethod
    def now(cls) -> Spent:
        return cls(time.process_time(), sum(os.times()[:4]), len(sys.modules))


def slowness() -> float:
    """How many times longer this machine takes than that of the budgets, at least once."""

    def counting() -> float:
        start = time.process_time()
        sum(i * i % 7 for i in range(300_000))
        return time.process_time() - start

    return max(1.0, min(counting() for _ in range(5)) / COUNTING)


def budget_of(file: str) -> float:
    """Seconds that all tests of a file may take together, but for those that are slow."""
    parts = Path(file).parts
    return CONTRACTS.get(file, FORMAT if set(parts[:-1]) & set(FORMATS) else CAPABILITY)


def limit_of(test: str) -> float:
    """Seconds that a test may take."""
    return DOCUMENTS.get(test.partition("::")[0], TEST)


class Budgets:
    """A plugin of pytest; with xdist workers measure, and the process that they report to sums up."""

    def __init__(self, *, fatal: bool) -> None:
        self.fatal = fatal
        self.slowness = slowness()
        self.before = Spent.now()
        self.files: dict[str, float] = defaultdict(float)
        self.tests: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        self.before = Spent.now()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        report: pytest.TestReport = yield  # type: ignore[assignment]
        now = Spent.now()
        seconds = [(a - b) / self.slowness for a, b in zip(now[:2], self.before[:2], strict=True)]
        imported = now.modules - self.before.modules
        report.user_properties.append((SPENT, [*seconds, imported]))
        self.before = now
        return report  # type: ignore[return-value]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        spent: Any = dict(report.user_properties).get(SPENT)
        if spent is None or "slow" in report.keywords:
            return
        own, whole, imported = spent
        if imported >= IMPORTED:
            return
        self.files[report.nodeid.partition("::")[0]] += whole
        if report.when == "call":
            self.tests[report.nodeid] = own

    def beyond(self) -> list[str]:
        """What takes longer than it may, longest first."""
        tests = [
            (seconds, f"this test may take {limit_of(test):g} s", test)
            for test, seconds in self.tests.items()
            if seconds > limit_of(test)
        ]
        files = [
            (seconds, f"this file may take {budget_of(file):g} s", file)
            for file, seconds in self.files.items()
            if seconds > budget_of(file)
        ]
        return [f"{s:6.1f} s, {what}: {name}" for s, what, name in sorted(tests + files)[::-1]]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.fatal and self.beyond() and not session.exitstatus:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.beyond():
            terminalreporter.section("more processor time than the budget (CONTRIBUTING.md)")
            terminalreporter.write_line("\n".join(self.beyond()))
        if self.fatal:
            terminalreporter.section("processor time")
            for file, seconds in sorted(self.files.items(), key=lambda item: -item[1])[:20]:
                terminalreporter.write_line(f"{seconds:6.1f} s {file}")
            whole = f"{sum(self.files.values()):6.0f} s in all"
            terminalreporter.write_line(f"{whole}, on a machine {self.slowness:.2f} times as slow")
