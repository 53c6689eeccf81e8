from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adaptmerge.errors import OutputError
from adaptmerge.files import staging
from adaptmerge.files.staging import Staging


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else "/"
        for path in sorted(folder.rglob("*"))
    }


def commit(target: Path, text: str = "new", **options: bool) -> None:
    single = options.get("single", False)
    main = target.name if single else "main.bin"
    with Staging(target, force=options.get("force", False), inputs=[], single=single) as stage:
        stage.path(main).write_text(text)
        stage.path("z.json").write_text(text)
        stage.scratch("heap").write_text("x" * 100)
        stage.commit(main)


def test_a_folder_appears_at_once(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "out"
    with Staging(target, force=False, inputs=[]) as stage:
        stage.path("main.bin").write_text("1")
        stage.path("sub/x").write_text("2")
        assert not (tmp_path / "deep").exists()
        assert stage.path("main.bin").parent.parent.name.startswith(".out.adaptmerge-")
        stage.commit("main.bin")
    assert tree(tmp_path / "deep") == {
        "er": "/",
        "er/out": "/",
        "er/out/main.bin": "1",
        "er/out/sub": "/",
        "er/out/sub/x": "2",
    }
    assert os.listdir(tmp_path) == ["deep"]  # noqa: PTH208


def test_a_single_file_and_its_companions(tmp_path: Path) -> None:
    commit(tmp_path / "m.safetensors", single=True)
    assert tree(tmp_path) == {"z.json": "new", "m.safetensors": "new"}
    with pytest.raises(OutputError, match="m.safetensors exists: .* --force"):
        commit(tmp_path / "m.safetensors", single=True)
    commit(tmp_path / "m.safetensors", "newer", single=True, force=True)
    assert tree(tmp_path) == {"z.json": "newer", "m.safetensors": "newer"}
    (tmp_path / "m.safetensors").unlink()
    with pytest.raises(OutputError, match=r"z.json exists"):
        commit(tmp_path / "m.safetensors", single=True)
    assert tree(tmp_path) == {"z.json": "newer"}


def test_without_a_commit_nothing_happens(tmp_path: Path) -> None:
    with Staging(tmp_path / "new" / "out", force=False, inputs=[]) as stage:
        stage.path("x").write_text("1")
    with (
        pytest.raises(KeyboardInterrupt),
        Staging(tmp_path / "out", force=False, inputs=[]) as stage,
    ):
        stage.path("x").write_text("1")
        raise KeyboardInterrupt
    assert tree(tmp_path) == {}


def old_output(target: Path) -> Path:
    """A folder that is replaced, with files of somebody else in it."""
    (target / "empty").mkdir(parents=True)
    (target / "deep").mkdir()
    for name in ("main.bin", "z.json", "kept", "deep/kept"):
        (target / name).write_text("old")
    (target / "link").symlink_to("kept")
    return target


KEPT = {"empty": "/", "deep": "/", "kept": "old", "deep/kept": "old", "link": "old"}
OLD = {**KEPT, "main.bin": "old", "z.json": "old"}
NEW = {**KEPT, "main.bin": "new", "z.json": "new"}


@pytest.mark.parametrize("beside", [True, False])
def test_force_keeps_the_files_of_others(
    beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = old_output(tmp_path / "out")
    target.chmod(0o750)
    with pytest.raises(OutputError, match=r"exists: choose another -o or pass --force"):
        commit(target)
    monkeypatch.setattr(staging, "_writable", lambda folder: beside or folder != tmp_path)
    commit(target, force=True)
    assert tree(target) == NEW
    assert (target / "link").is_symlink()
    assert target.stat().st_mode & 0o777 == 0o750
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208


def test_without_hard_links_files_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    target = old_output(tmp_path / "out")
    commit(target, force=True)
    assert tree(target) == NEW


MOVES = ("replace", "rename", "unlink")  # methods of a path that change what is there


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("number", range(6))
def test_a_commit_that_fails_is_undone(
    number: int,
    error: BaseException,
    beside: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At whichever move it fails."""
    target = old_output(tmp_path / "out")
    moves: list[str] = []
    monkeypatch.setattr(staging, "_writable", lambda folder: beside or folder != tmp_path)
    for name in MOVES:
        monkeypatch.setattr(Path, name, failing(name, number, error, moves))
    try:
        commit(target, force=True)
    except (OutputError, KeyboardInterrupt) as problem:
        assert "the disk is full" in str(problem) or not str(problem)
        assert tree(target) == OLD
    else:
        assert number >= (2 if beside else 5)
        assert tree(target) == NEW
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208


def failing(
    name: str, number: int, error: BaseException, moves: list[str]
) -> Callable[..., object]:
    """A method of a path that fails where it is the move of that number."""
    move = getattr(Path, name)

    def moved(self: Path, *rest: object, **more: object) -> object:
        moves.append(f"{name} {self.name}")
        if len(moves) == number + 1:
            raise error
        return move(self, *rest, **more)

    return moved


class Killed(BaseException):
    """Takes the place of a kill: nothing is cleaned up."""


def killed_at(
    number: int, target: Path, monkeypatch: pytest.MonkeyPatch, *, single: bool = False
) -> bool:
    """Whether a commit has as many moves that the process can die before one of that number."""
    with monkeypatch.context() as patch:
        moves: list[str] = []
        for name in MOVES:
            patch.setattr(Path, name, failing(name, number, Killed(), moves))
        patch.setattr("adaptmerge.files.commit.take_back", lambda *_, **__: True)
        patch.setattr(Staging, "discard", lambda self: None)
        patch.setattr(os, "getpid", lambda: 2**22 + 1)
        try:
            commit(target, force=True, single=single)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize(
    ("single", "beside"), [(False, True), (False, False), (True, True)], ids=str
)
def test_what_a_killed_commit_moved_is_taken_back(
    number: int, single: bool, beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And meanwhile no main file lies there that does not belong to the rest."""
    folder = old_output(tmp_path / "out")
    target = folder / "main.bin" if single else folder
    monkeypatch.setattr(staging, "_writable", lambda place: beside or place != tmp_path)
    if not killed_at(number, target, monkeypatch, single=single):
        assert number >= (2 if beside and not single else 5)
        return
    now = {name: text for name, text in tree(folder).items() if name in ("main.bin", "z.json")}
    assert "main.bin" not in now or len(set(now.values())) == 1
    Staging(target, force=True, inputs=[], single=single)
    assert tree(folder) == (NEW if now == {"main.bin": "new", "z.json": "new"} else OLD)
    assert not [path.name for path in tmp_path.rglob("*") if ".adaptmerge-" in path.name]


def test_what_others_wrote_after_a_kill_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = old_output(tmp_path / "out")
    assert killed_at(1, target, monkeypatch)
    assert not target.exists()
    target.mkdir()
    (target / "mine").write_text("mine")
    with pytest.raises(OutputError, match="was here before a run that was killed"):
        Staging(target, force=True, inputs=[])
    (before,) = tmp_path.glob("*/before")
    assert tree(before) == OLD
    assert tree(target) == {"mine": "mine"}


def test_an_orphan_is_replaced_only_where_its_main_file_is_gone(tmp_path: Path) -> None:
    target = tmp_path / "m.bin"
    (tmp_path / "m.json").write_text("ours")

    def stage() -> None:
        ours = {"single": True, "is_orphan": lambda path: path.read_text() == "ours"}
        with Staging(target, force=False, inputs=[], **ours) as found:  # type: ignore[arg-type]
            for name in ("m.bin", "m.json"):
                found.path(name).write_text("new")
            found.commit("m.bin")

    stage()
    assert tree(tmp_path) == {"m.bin": "new", "m.json": "new"}
    target.unlink()
    with pytest.raises(OutputError, match=r"m.json exists"):
        stage()


def test_a_folder_in_the_way_is_an_error(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "main.bin" / "x").mkdir(parents=True)
    with pytest.raises(OutputError, match="folder"):
        commit(target, force=True)
    assert tree(target) == {"main.bin": "/", "main.bin/x": "/"}


def test_created_parents_are_removed_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, to: Path) -> Path:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="read-only"):
        commit(tmp_path / "a" / "b" / "out")
    assert tree(tmp_path) == {}


def test_inputs_are_never_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "x.bin").write_text("1")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "hard.bin").hardlink_to(source / "x.bin")
    for target, inputs, message in (
        (source, [source], "is the input"),
        (tmp_path / "link", [source], "is the input"),
        (source / "out", [source], "lies inside the input"),
        (source, [source / "x.bin"], "contains the input"),
        (tmp_path, [source], "contains the input"),
    ):
        with pytest.raises(OutputError, match=message):
            Staging(target, force=True, inputs=inputs)
    with pytest.raises(OutputError, match="is the input"):
        Staging(tmp_path / "hard.bin", force=True, inputs=[source / "x.bin"], single=True)
    with (
        Staging(source / "y.bin", force=True, inputs=[source / "x.bin"], single=True) as stage,
        pytest.raises(OutputError, match="is an input"),
    ):
        stage.path("x.bin")


def test_kinds_and_names(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    with pytest.raises(OutputError, match="is a file, but the output is a folder"):
        Staging(tmp_path / "file", force=True, inputs=[])
    with pytest.raises(OutputError, match="is a folder, but the output is a file"):
        Staging(tmp_path, force=True, inputs=[], single=True)
    with pytest.raises(OutputError, match="is not a folder"):
        Staging(tmp_path / "file" / "out", force=True, inputs=[])
    with Staging(tmp_path / "out", force=False, inputs=[]) as stage:
        for name in ("../x", "/x", ""):
            with pytest.raises(OutputError, match="leaves the output"):
                stage.path(name)
        with pytest.raises(ValueError, match="was not staged"):
            stage.commit("x")


def test_an_unwritable_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may write everywhere, so the answer of the system is simulated
    monkeypatch.setattr(staging, "_writable", lambda folder: folder != tmp_path)
    with pytest.raises(OutputError, match="is not writable"):
        Staging(tmp_path / "out", force=False, inputs=[])
    (tmp_path / "out").mkdir()
    commit(tmp_path / "out", force=True)
    assert tree(tmp_path / "out") == {"z.json": "new", "main.bin": "new"}


KILLED = """if True:
    import os, signal, sys
    from pathlib import Path
    from adaptmerge.tensors import dtypes, refs
    from adaptmerge.files.safetensors import write_safetensors
    from adaptmerge.files.staging import Staging
    target = Path(sys.argv[1])
    ref = refs.stored("/dev/zero", 0, (3_000_000,), dtypes.BY_NAME["U8"], "w")
    pieces = []
    def progress(count):
        pieces.append(count)
        if len(pieces) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    with Staging(target, force=True, inputs=[]) as stage:
        write_safetensors(stage.path("main.bin"), {"w": ref}, {}, progress)
"""


@pytest.mark.parametrize("exists", [False, True])
def test_kill_leaves_only_a_hidden_folder_that_the_next_run_removes(
    tmp_path: Path, exists: bool
) -> None:
    target = tmp_path / "out"
    if exists:
        target.mkdir()
        (target / "main.bin").write_text("old")
    before = tree(tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir() if path.name != "out"]
    assert len(left) == 1
    assert left[0].startswith(".out.adaptmerge-")
    other = tmp_path / f".out.adaptmerge-{os.getpid()}-alive"
    other.mkdir()
    Staging(target, force=True, inputs=[])
    assert other.exists()
    other.rmdir()
    assert tree(tmp_path) == before
