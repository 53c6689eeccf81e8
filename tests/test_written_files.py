"""The report has the sha256 of every file of an output, and the verifier compares them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fuse.tiny import Tiny

from adaptmerge.commands.combine import Options, combine
from adaptmerge.commands.verify import FAIL, PASS, SKIPPED, Check, Questions, verify
from adaptmerge.commands.verify.files import check_files
from adaptmerge.errors import InputError, OutputError
from adaptmerge.formats.inputs import InputSpec
from adaptmerge.outputs.report import report_path

REPORT = "adaptmerge.json"
NAMES = ("lora-r8-shakespeare", "lora-r8-cheaders")


def merged(tiny: Tiny, output: Path, **options: object) -> Path:
    combine([InputSpec(str(tiny(name))) for name in NAMES], output, Options(**options))  # type: ignore[arg-type]
    return output


def files_check(tiny: Tiny, output: Path) -> Check:
    questions = Questions(inputs={name: str(tiny(name)) for name in NAMES})
    return next(check for check in verify(output, questions).checks if check.name == "files")


def said(output: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads(report_path(output).read_text())["files"]
    return found


def change_report(output: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = report_path(output)
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("out", {}),
        ("out.safetensors", {}),
        ("out", {"target": "native"}),
        ("out", {"method": "svd", "dtype": "bf16", "ranks": "per-site"}),
        ("out.gguf", {"base": "base"}),
    ],
)
def test_every_file_is_in_the_report(
    name: str, options: dict[str, str], tiny: Tiny, tmp_path: Path
) -> None:
    if "base" in options:
        options = {**options, "base": str(tiny("base"))}
    output = merged(tiny, tmp_path / "made" / name, **options)
    written = {path.name: path for path in output.parent.rglob("*") if path.is_file()}
    del written[report_path(output).name]
    assert said(output) == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in written.items()
    }
    assert check_files(output, said(output)).status == PASS


def test_a_lone_file_may_be_renamed_with_its_report(tiny: Tiny, tmp_path: Path) -> None:
    output = merged(tiny, tmp_path / "out.safetensors")
    report_path(output).rename(tmp_path / f"other.{REPORT}")
    output = output.rename(tmp_path / "other.safetensors")
    assert files_check(tiny, output).status == PASS
    raw = bytearray(output.read_bytes())
    raw[-1] ^= 1
    output.write_bytes(raw)
    check = files_check(tiny, output)
    assert check.status == FAIL
    assert "sha256 differs" in check.detail


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("adapter_config.json", None, "adapter_config.json is not the file that was written"),
        ("adapter_model.bin", "", "adapter_model.bin was not written with them"),
        ("config.json", "{}", "config.json was not written with them"),
    ],
)
def test_changed_and_added_files_fail(
    name: str, text: str | None, complaint: str, tiny: Tiny, tmp_path: Path
) -> None:
    path = merged(tiny, tmp_path / "out") / name
    path.write_text(path.read_text() + "\n" if text is None else text)
    check = files_check(tiny, tmp_path / "out")
    assert check.status == FAIL
    assert complaint in check.detail


def test_a_lost_file_fails(tiny: Tiny, tmp_path: Path) -> None:
    output = merged(tiny, tmp_path / "out")
    change_report(output, lambda report: report["files"].update({"merges.txt": "0" * 64}))  # type: ignore[attr-defined]
    assert "merges.txt is missing" in files_check(tiny, output).detail


def test_a_model_card_is_for_people_to_write_in(tiny: Tiny, tmp_path: Path) -> None:
    output = merged(tiny, tmp_path / "out")
    (output / "README.md").write_text("mine")
    (output / "notes.txt").write_text("mine, too")
    check = files_check(tiny, output)
    assert check.status == PASS
    assert check.detail.endswith("README.md has changed since")


def test_reports_of_earlier_versions_have_no_checksums(tiny: Tiny, tmp_path: Path) -> None:
    output = merged(tiny, tmp_path / "out")
    change_report(output, lambda report: report.pop("files"))
    with pytest.raises(InputError, match="has no sha256 of files"):
        files_check(tiny, output)
    change_report(output, lambda report: report.update(report=1))
    check = files_check(tiny, output)
    assert check.status == SKIPPED
    assert "earlier version" in check.detail


@pytest.mark.parametrize("digest", [None, 7, "", "g" * 64])
def test_a_checksum_that_is_none_is_damage(digest: object, tiny: Tiny, tmp_path: Path) -> None:
    output = merged(tiny, tmp_path / "out")
    change_report(output, lambda report: report["files"].update({"README.md": digest}))  # type: ignore[attr-defined]
    with pytest.raises(
        InputError, match="report is damaged: files has|files.README.md is .*: expected text"
    ):
        files_check(tiny, output)


def test_names_outside_the_output_are_never_read(tiny: Tiny, tmp_path: Path) -> None:
    output = merged(tiny, tmp_path / "out")
    (tmp_path / "secret").write_text("")
    digest = hashlib.sha256(b"").hexdigest()
    change_report(output, lambda report: report["files"].update({"../secret": digest}))  # type: ignore[attr-defined]
    assert "../secret is missing" in files_check(tiny, output).detail


def test_a_report_without_its_file_is_replaced(tiny: Tiny, tmp_path: Path) -> None:
    """A run that was killed between the two leaves one; a file of somebody else of that name stays."""
    output = merged(tiny, tmp_path / "out.safetensors")
    before = report_path(output).read_bytes()
    output.unlink()
    merged(tiny, output)
    assert report_path(output).read_bytes() == before
    output.unlink()
    report_path(output).write_text('{"command": "mine"}')
    with pytest.raises(OutputError, match=r"out.adaptmerge.json exists"):
        merged(tiny, output)
