"""The contract of a format, run for every format that is registered."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adaptmerge.adapters.graph import Adapter, Edit
from adaptmerge.bases.open import open_base
from adaptmerge.commands.combine import Options, combine
from adaptmerge.commands.verify.difference import difference
from adaptmerge.errors import AdaptmergeError
from adaptmerge.files.listing import Listing
from adaptmerge.formats.format import Output, WriteOptions
from adaptmerge.formats.inputs import InputSpec, open_input
from adaptmerge.formats.registry import detect, formats

FORMATS = sorted(formats())
WRITABLE = [name for name in FORMATS if formats()[name].write is not None]
# One source per format: what is written there for the writable ones, a recorded folder for others.
SOURCES = {"adapterhub": "adapterhub/llama/seq_bn"}
LORA = "tinyllama/lora-r8-shakespeare"


@pytest.fixture
def base(fixtures: Path) -> Path:
    return fixtures / "tinyllama" / "base"


def sample(name: str, fixtures: Path, base: Path, tmp_path: Path) -> Path:
    """An input in the format, small and real."""
    if name in SOURCES:
        return fixtures / SOURCES[name]
    if name not in WRITABLE:
        pytest.fail(f"format {name} needs a fixture in SOURCES")
    out = tmp_path / f"sample-{name}"
    combine([InputSpec(str(fixtures / LORA))], out, Options(target=name, base=str(base)))
    return out


def opened(path: Path, base: Path) -> Adapter:
    return open_input(InputSpec(str(path)), open_base(str(base))).adapter


def digests(path: Path) -> dict[str, str]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file()
    }


def test_there_is_a_sample_and_a_docs_page_for_every_format() -> None:
    docs = Path(__file__).parents[2] / "docs" / "formats"
    assert set(SOURCES) | set(WRITABLE) == set(FORMATS)
    assert [name for name in FORMATS if not (docs / f"{name}.md").is_file()] == []


@pytest.mark.parametrize("name", FORMATS)
def test_detect_claims_its_own_and_nothing_else(
    name: str, fixtures: Path, base: Path, tmp_path: Path
) -> None:
    path = sample(name, fixtures, base, tmp_path)
    assert detect(Listing.of(path, str(path))).name == name
    for other in FORMATS:
        if other != name:
            theirs = sample(other, fixtures, base, tmp_path / "other")
            assert detect(Listing.of(theirs, str(theirs))).name == other
            shutil.rmtree(tmp_path / "other", ignore_errors=True)


@pytest.mark.parametrize("name", WRITABLE)
def test_what_is_written_reads_back_as_the_same_adapter(
    name: str, fixtures: Path, base: Path, tmp_path: Path
) -> None:
    source = opened(fixtures / LORA, base)
    back = opened(sample(name, fixtures, base, tmp_path), base)
    found = difference(source, back)
    assert found.relative < 1e-6
    assert min(site.left for site in found.sites) > 0.0
    assert {str(edit.site) for edit in back.edits} == {str(edit.site) for edit in source.edits}


@pytest.mark.parametrize("name", WRITABLE)
def test_hints_and_promises_never_change_what_is_computed(
    name: str, fixtures: Path, base: Path, tmp_path: Path
) -> None:
    form = formats()[name]
    assert form.write is not None
    assert form.stores is not None
    source = open_input(InputSpec(str(fixtures / LORA)), open_base(str(base))).adapter
    bare = replace(source, hints={}, covers=frozenset(), notes=())
    folder = tmp_path / "bare"
    folder.mkdir()
    options = WriteOptions(ranks="per-site", base=open_base(str(base)))
    stores = form.stores(options)
    if stores.scale == "none":
        bare = _unscaled(bare)
    output = Output(lambda file: folder / file, None, {})
    from adaptmerge.adapters.graph import bundle_of

    form.write(bundle_of(bare), output, options)
    assert difference(source, opened(folder, base)).relative < 1e-6


def _unscaled(adapter: Adapter) -> Adapter:
    """The scale folded into up, for targets that store none."""
    from adaptmerge.adapters.weight_edits import factor_of, refitted
    from adaptmerge.algebra.low_rank import as_low_rank, low_rank

    def fold(edit: Edit) -> Edit:
        factor = factor_of(edit)
        assert factor is not None
        pair = as_low_rank(factor)
        assert pair is not None
        return refitted(edit, low_rank(pair.up.scaled(pair.scale), pair.down))

    return adapter.with_edits(fold(edit) for edit in adapter.edits)


@pytest.mark.parametrize("name", WRITABLE)
def test_equal_runs_give_equal_bytes_and_leave_inputs_alone(
    name: str, fixtures: Path, base: Path, tmp_path: Path
) -> None:
    before = digests(fixtures / LORA)
    one = sample(name, fixtures, base, tmp_path / "1")
    two = sample(name, fixtures, base, tmp_path / "2")
    assert digests(one) == digests(two)
    assert digests(fixtures / LORA) == before


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files_raise_our_errors_only(
    name: str, share: float, fixtures: Path, base: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "cut"
    shutil.copytree(sample(name, fixtures, base, tmp_path), copy)
    largest = max((f for f in copy.iterdir() if f.is_file()), key=lambda f: f.stat().st_size)
    data = largest.read_bytes()
    largest.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(AdaptmergeError):
        opened(copy, base)


@pytest.mark.parametrize("name", WRITABLE)
def test_a_flipped_header_byte_raises_our_errors_only(
    name: str, fixtures: Path, base: Path, tmp_path: Path
) -> None:
    path = sample(name, fixtures, base, tmp_path)
    largest = max((f for f in path.iterdir() if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(largest.read_bytes())
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        place = int(torch.randint(0, min(4096, len(data)), (), generator=generator))
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        largest.write_bytes(damaged)
        try:
            opened(path, base)
        except AdaptmergeError:
            continue
