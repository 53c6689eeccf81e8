"""What a verification found: checks with a status each, and the verdict over all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from xml.sax.saxutils import quoteattr

PASS, FAIL, UNDECIDABLE, SKIPPED = "pass", "fail", "undecidable", "skipped"


def within(found: float, allowed: float) -> bool:
    """Whether a measured error passes: it is at most what is allowed, and both are numbers.

    Every check judges by this: NaN compares as neither larger nor smaller, so that it would slip past a
    test for errors that are too large.
    """
    return math.isfinite(found) and math.isfinite(allowed) and found <= allowed


@dataclass(frozen=True, slots=True)
class Check:
    """One question asked: its status, one sentence on what it shows, and the numbers behind it."""

    name: str
    status: str
    detail: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """All checks of one verification; `trusted` says what no outside oracle has proved."""

    subject: str
    checks: Sequence[Check]
    trusted: str = ""

    @property
    def status(self) -> str:
        """fail if any check failed, undecidable if any could not be decided or none was made."""
        found = {check.status for check in self.checks}
        if FAIL in found:
            return FAIL
        return UNDECIDABLE if UNDECIDABLE in found or PASS not in found else PASS

    def as_json(self) -> dict[str, Any]:
        """The verdict as plain data."""
        return {"status": self.status, **asdict(self)}

    def as_junit(self) -> str:
        """The verdict as a JUnit test suite, for CI systems."""
        bad = sum(check.status in (FAIL, UNDECIDABLE) for check in self.checks)
        skipped = sum(check.status == SKIPPED for check in self.checks)
        cases = "".join(_case(self.subject, check) for check in self.checks)
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f'<testsuite name="adaptmerge verify" tests="{len(self.checks)}" failures="{bad}" '
            f'skipped="{skipped}">\n{cases}</testsuite>\n'
        )


def _case(subject: str, check: Check) -> str:
    head = f"  <testcase classname={quoteattr(subject)} name={quoteattr(check.name)}"
    if check.status == PASS:
        return f"{head}/>\n"
    tag = "skipped" if check.status == SKIPPED else "failure"
    message = f"{check.status}: {check.detail}"
    return f"{head}>\n    <{tag} message={quoteattr(message)}/>\n  </testcase>\n"
