"""The format that an output is written in, and which names of it fit."""

from __future__ import annotations

from pathlib import Path

from adaptmerge.errors import UsageError
from adaptmerge.formats.format import Format
from adaptmerge.formats.inputs import SUFFIXES
from adaptmerge.formats.registry import formats


def check_version(version: str | None, target: Format) -> None:
    """Raises UsageError for a version of a library that the target cannot be written for."""
    if version is None:
        return
    if not target.versions:
        raise UsageError(f"--peft-version {version}: is not for {target.name}: leave it out")
    if not any(version == known or version.startswith(f"{known}.") for known in target.versions):
        oldest, newest = target.versions[0], target.versions[-1]
        raise UsageError(f"--peft-version {version}: expected a release from {oldest} to {newest}")


def check_name(output: Path, target: Format) -> None:
    """Raises UsageError for a file name that promises another kind of file than will be written."""
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
