"""Every error that adaptmerge raises on purpose.

AdaptmergeError
├── UsageError            arguments that cannot be meant (exit 2)
├── InputError            a file, folder or recipe that cannot be read as what it claims to be
├── CannotMerge           edits that have no well-defined merge as asked
├── CannotStore           a result that the target format has no place for
├── OutputError           an output that exists, cannot be written, or would overwrite an input
├── MissingExtra          an optional package is needed and not installed
└── VerificationFailed    the result does not compute what it should (exit 3)

A message says what was found, what was expected and what to try. Several problems of one thing are
raised together: `problems` holds one sentence each.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence


class AdaptmergeError(Exception):
    """Base of all errors; `where` names the file (and tensor), `problems` are whole sentences."""

    exit_code = 1

    def __init__(self, problems: str | Sequence[str], *, where: str | None = None) -> None:
        self.problems: tuple[str, ...] = (
            (problems,) if isinstance(problems, str) else tuple(problems)
        )
        self.where = where
        super().__init__(self._text())

    def _text(self) -> str:
        prefix = f"{self.where}: " if self.where else ""
        if len(self.problems) == 1:
            return prefix + self.problems[0]
        return (
            prefix + f"{len(self.problems)} problems\n" + "\n".join(f"- {p}" for p in self.problems)
        )

    def located(self, where: str) -> AdaptmergeError:
        """The same error, naming `where` unless it already names a place."""
        return self if self.where else type(self)(self.problems, where=where)


class UsageError(AdaptmergeError):
    """Arguments that contradict each other or the inputs."""

    exit_code = 2


class InputError(AdaptmergeError):
    """An input that is missing, damaged, hostile or not what it claims to be."""


class CannotMerge(AdaptmergeError):
    """Edits whose merge is not defined, or only approximate and not allowed."""


class CannotStore(AdaptmergeError):
    """A result that the chosen target format cannot hold."""


class OutputError(AdaptmergeError):
    """An output that exists, is not writable, or is one of the inputs."""


class MissingExtra(AdaptmergeError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package {package!r}: pip install 'adaptmerge[{extra}]'")

    def located(self, where: str) -> AdaptmergeError:
        """The same error: what is missing is missing everywhere."""
        return self


class VerificationFailed(AdaptmergeError):
    """A result that does not compute what was promised."""

    exit_code = 3


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The one of `known` that a word was meant to be, where one is near: a number in it is meant as it is,
    so that int4 is never taken for int8."""
    numbers = set(re.findall(r"\d+", word))
    fitting = [other for other in known if numbers <= set(re.findall(r"\d+", other))]
    return next(iter(difflib.get_close_matches(word, fitting, n=1, cutoff=0.6)), None)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A sentence fragment that suggests the closest of `known`, or lists them."""
    close = nearest(word, known)
    return f"did you mean {close!r}?" if close else f"known: {', '.join(known)}"
