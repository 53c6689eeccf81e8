"""The format that an output is written in, and which names of it fit."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from adaptmerge.errors import CannotStore, UsageError
from adaptmerge.formats.format import Format, WriteOptions
from adaptmerge.formats.inputs import SUFFIXES
from adaptmerge.formats.registry import format_named, formats


def target_of(
    output: Path, asked: str | None, version: str | None, suggested: Callable[[], Format]
) -> Format:
    """The format asked for, else the one suggested, if it can be written under this name.

    Raises CannotStore for one that is only read, UsageError for a name or version that does not fit it.
    """
    target = format_named(asked) if asked else suggested()
    if target.write is None:
        names = ", ".join(found.name for found in writable())
        raise CannotStore(f"{target.name} is read only so far: use --to with one of {names}")
    check_name(output, target)
    check_version(version, target)
    return target


def writable() -> list[Format]:
    """The formats that can be written."""
    return [found for found in formats().values() if found.write is not None]


def like_input(output: Path, own: Format) -> Format:
    """The format that the output's name suggests, or else the input's own."""
    fitting = [found for found in writable() if output.suffix in found.suffixes]
    target = fitting[0] if fitting and own not in fitting else own
    return target if target.write is not None else _without_base()


def like_library(output: Path) -> Format:
    """The format that the output's name suggests; else one that a library of its own loads."""
    known = writable()
    own = [found for found in known if found.oracle] or known
    fitting = [found for found in known if output.suffix and output.suffix in found.suffixes]
    return next(iter([found for found in own if found in fitting] or fitting or own))


def _without_base() -> Format:
    """A format that can be written whatever is known of the base, for inputs of one that cannot."""
    found = (f for f in formats().values() if f.stores and not f.stores(WriteOptions()).base)
    return next(found)


def check_version(version: str | None, target: Format) -> None:
    """Raises UsageError for a version of a library that the target cannot be written for."""
    if version is None:
        return
    if not target.versions:
        raise UsageError(f"--peft-version {version}: is not for {target.name}: leave it out")
    if not any(version == known or version.startswith(f"{known}.") for known in target.versions):
        oldest, newest = target.versions[0], target.versions[-1]
        raise UsageError(f"--peft-version {version}: expected a release from {oldest} to {newest}")


def check_suffix(output: Path) -> None:
    """Raises UsageError for a name that ends almost, but not quite, like a file of a format: it would
    become a folder."""
    known = sorted({suffix for found in writable() for suffix in found.suffixes})
    suffix = output.suffix.lower().rstrip(".")
    close = difflib.get_close_matches(suffix, known, n=1, cutoff=0.75)
    if close and output.suffix != close[0]:
        meant = output.with_name(output.name[: -len(output.suffix)] + close[0])
        raise UsageError(f"-o {output}: did you mean {meant}?")


def check_name(output: Path, target: Format) -> None:
    """Raises UsageError for a file name that promises another kind of file than will be written."""
    check_suffix(output)
    suffixes = target.suffixes or (".safetensors",)
    if (is_file_name(output) or output.suffix in SUFFIXES) and output.suffix not in suffixes:
        wanted = " or ".join(suffixes)
        raise UsageError(
            f"-o {output}: {target.name} is written as a folder or a {wanted} file, not as "
            f"{output.suffix}: choose another -o or --to"
        )


def is_file_name(output: Path) -> bool:
    """Whether an output path names one file: its suffix is one that a format writes."""
    return any(output.suffix in f.suffixes for f in formats().values() if f.write and output.suffix)
