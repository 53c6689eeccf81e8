"""Killed at any moment a fusion leaves no output, and the next run goes on with what is whole."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fuse import interrupted
from fuse.models import fuse, llama_base
from safetensors.torch import load_file, save_file
from samples import tree

from adaptmerge.commands.fuse import FuseOptions
from adaptmerge.commands.fuse import fuse as fuse_with
from adaptmerge.errors import OutputError
from adaptmerge.formats.inputs import InputSpec

pytest.importorskip("peft")


@dataclass(frozen=True)
class Setting:
    """A base in several files, an adapter, what an uninterrupted run writes and how long it takes."""

    base: Path
    adapter: Path
    expected: dict[str, bytes | None]
    seconds: float
    pieces: int


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("resume")
    base = llama_base(folder / "base", shard="100KB", hidden_size=128, num_hidden_layers=4)
    adapter = folder / "adapter"
    _adapter(base, adapter)
    counted: list[int] = []
    start = time.perf_counter()
    fuse_with(
        str(base),
        [InputSpec(str(adapter))],
        folder / "out",
        FuseOptions(jobs=1),
        lambda done, total: counted.append(done),
    )
    seconds = time.perf_counter() - start
    assert len(list((folder / "out").glob("*.safetensors"))) > 5
    yield Setting(base, adapter, tree(folder / "out"), seconds, len(counted))


def _adapter(base: Path, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from peft_cases import LINEARS, randomise
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=7, target_modules=LINEARS))
    randomise(adapted, 1, torch.float32)
    adapted.save_pretrained(folder)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".out")]


def finished(folder: Path) -> dict[str, int]:
    """The shards that the journal says are finished, with the numbers of their files on the disk."""
    (left,) = leftovers(folder)
    entries = sorted((left / "scratch" / "finished").glob("*.json"))
    return {entry.stem: (left / "out" / entry.stem).stat().st_ino for entry in entries}


def goes_on(found: Setting, folder: Path) -> None:
    """The next run: the same bytes, with the shards that were finished, and nothing left beside it."""
    assert not (folder / "out").exists()
    whole = finished(folder) if leftovers(folder) else {}
    fuse(found.base, [found.adapter], folder / "out")
    assert tree(folder / "out") == found.expected
    assert not leftovers(folder)
    assert {name: (folder / "out" / name).stat().st_ino for name in whole} == whole


PIECES = [1, 2, 5, 9, 14, 20, 27, 33, 38, 41]


@pytest.mark.parametrize("number", PIECES)
def test_killed_between_pieces(number: int, setting: Setting, tmp_path: Path) -> None:
    assert number < setting.pieces
    process = interrupted.start(
        interrupted.dies_at_piece, setting.base, setting.adapter, tmp_path / "out", number
    )
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert leftovers(tmp_path)
    if number > 20:
        assert finished(tmp_path)
    goes_on(setting, tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9])
def test_killed_at_some_time(share: float, setting: Setting, tmp_path: Path) -> None:
    process = interrupted.start(interrupted.runs, setting.base, setting.adapter, tmp_path / "out")
    interrupted.until(lambda: bool(leftovers(tmp_path)) or (tmp_path / "out").exists())
    time.sleep(share * setting.seconds)
    process.kill()
    process.join()
    if (tmp_path / "out").exists():  # it was faster
        assert tree(tmp_path / "out") == setting.expected
    else:
        goes_on(setting, tmp_path)


@pytest.mark.parametrize("number", [1, 4, 8])
def test_killed_while_files_are_brought_to_the_disk(
    number: int, setting: Setting, tmp_path: Path
) -> None:
    process = interrupted.start(
        interrupted.dies_at_commit, setting.base, setting.adapter, tmp_path / "out", number
    )
    process.join()
    assert process.exitcode == -signal.SIGKILL
    goes_on(setting, tmp_path)


def test_killed_twice(setting: Setting, tmp_path: Path) -> None:
    before = 0
    for _ in range(3):
        process = interrupted.start(
            interrupted.dies_at_piece, setting.base, setting.adapter, tmp_path / "out", 14
        )
        process.join()
        assert len(finished(tmp_path)) > before
        before = len(finished(tmp_path))
    goes_on(setting, tmp_path)


def killed(found: Setting, folder: Path) -> Path:
    """Where a run was killed with some of its shards finished."""
    process = interrupted.start(
        interrupted.dies_at_piece, found.base, found.adapter, folder / "out", 33
    )
    process.join()
    assert len(finished(folder)) > 1
    (left,) = leftovers(folder)
    return left


@pytest.mark.parametrize("damage", ["changed", "shortened", "removed", "longer"])
def test_a_finished_shard_that_is_not_whole_is_written_again(
    damage: str, setting: Setting, tmp_path: Path
) -> None:
    """Its checksum decides, never that it is there."""
    left = killed(setting, tmp_path)
    path = left / "out" / min(finished(tmp_path))
    raw = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        other = bytearray(raw)
        other[-3] ^= 1
        path.write_bytes(
            {"changed": bytes(other), "shortened": raw[:-5], "longer": raw + b"\0"}[damage]
        )
    fuse(setting.base, [setting.adapter], tmp_path / "out")
    assert tree(tmp_path / "out") == setting.expected
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("entry", [b"", b"{", b"[]", b'{"sha256": 1}', b"\xff\xfe"])
def test_a_journal_that_cannot_be_read_counts_for_nothing(
    entry: bytes, setting: Setting, tmp_path: Path
) -> None:
    left = killed(setting, tmp_path)
    (left / "scratch" / "finished" / f"{min(finished(tmp_path))}.json").write_bytes(entry)
    fuse(setting.base, [setting.adapter], tmp_path / "out")
    assert tree(tmp_path / "out") == setting.expected


def test_another_plan_starts_anew(setting: Setting, tmp_path: Path) -> None:
    left = killed(setting, tmp_path)
    weights = {setting.adapter: 0.5}
    fuse(setting.base, weights, tmp_path / "out")
    assert not left.exists()
    assert not leftovers(tmp_path)
    fuse(setting.base, weights, tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")
    assert tree(tmp_path / "out") != setting.expected


def test_another_base_starts_anew(setting: Setting, tmp_path: Path) -> None:
    """Also where only its files' times and one value in the middle of a tensor tell."""
    base = llama_base(tmp_path / "base", shard="100KB", hidden_size=128, num_hidden_layers=4)
    same = Setting(base, setting.adapter, {}, 0.0, 0)
    killed(same, tmp_path)
    path = sorted(base.glob("*.safetensors"))[0]
    tensors = load_file(path)
    value = max(tensors.values(), key=torch.Tensor.numel)
    value.view(-1)[value.numel() // 2] += 1
    save_file(tensors, path, {"format": "pt"})
    fuse(base, [setting.adapter], tmp_path / "out")
    fuse(base, [setting.adapter], tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_an_interrupt_keeps_what_is_finished(setting: Setting, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    specs = [InputSpec(str(setting.adapter))]
    with pytest.raises(KeyboardInterrupt):
        fuse_with(str(setting.base), specs, tmp_path / "out", FuseOptions(jobs=1), interrupt)
    assert finished(tmp_path)
    goes_on(setting, tmp_path)


def test_progress_counts_what_is_finished_already(setting: Setting, tmp_path: Path) -> None:
    left = killed(setting, tmp_path)
    sizes = [(left / "out" / name).stat().st_size for name in finished(tmp_path)]
    seen: list[tuple[int, int]] = []
    specs = [InputSpec(str(setting.adapter))]
    fuse_with(
        str(setting.base),
        specs,
        tmp_path / "out",
        FuseOptions(jobs=1),
        lambda done, total: seen.append((done, total)),
    )
    assert [done for done, _ in seen[: len(sizes)]] == [
        sum(sizes[: i + 1]) for i in range(len(sizes))
    ]
    assert seen[-1][0] == seen[-1][1]


def test_two_runs_do_not_write_one_output(setting: Setting, tmp_path: Path) -> None:
    go_on = tmp_path / "go on"
    process = interrupted.start(
        interrupted.waits, setting.base, setting.adapter, tmp_path / "out", go_on
    )
    interrupted.until(Path(f"{go_on}.waiting").exists)
    with pytest.raises(OutputError, match="another run writes this output: wait for it"):
        fuse(setting.base, [setting.adapter], tmp_path / "out")
    go_on.touch()
    process.join()
    assert process.exitcode == 0
    assert tree(tmp_path / "out") == setting.expected
    with pytest.raises(OutputError, match="exists"):
        fuse(setting.base, [setting.adapter], tmp_path / "out")
