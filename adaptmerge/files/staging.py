"""Writing a set of files or nothing: everything is staged beside the target, then moved at once."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from adaptmerge.errors import OutputError
from adaptmerge.files.disk import failure, writing
from adaptmerge.files.paths import inside, plain

_MARK = ".adaptmerge-"
_RESUMED = "plan-"  # before the key of work that a later run may take up
_LOCK = "lock"
_BUSY = "another run writes this output: wait for it"


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raises OutputError for an output that exists, unless it may be replaced."""
    if os.path.lexists(path) and not force:
        raise OutputError(f"{path} exists: choose another -o or pass --force")


class Staging:
    """A context in which files are written under temporary names until `commit` moves them.

    The target is a folder, or a file when `single`; then every staged file lands beside it. Without
    a commit, or when one fails, everything temporary is removed and nothing else was touched.

    With a `key`, what was staged stays when the block is left by an error or the process is killed, and
    the next staging with the same target and key finds it; one with another key removes it.
    """

    def __init__(
        self,
        target: Path,
        *,
        force: bool,
        inputs: Sequence[Path],
        single: bool = False,
        key: str | None = None,
    ) -> None:
        """Check the target, touching only what killed runs left behind.

        Raises OutputError when it exists (unless `force`), is of the wrong kind, overlaps an input,
        or cannot be written.
        """
        self.given, self.target = target, target.resolve()
        self.force, self.single = force, single
        self._inputs = [path.resolve() for path in inputs]
        self._check_inputs()
        self._check_free(target)
        self._check_kind()
        self._anchor = self._writable_anchor()
        self._root: Path | None = None
        self._key, self._lock = key, None if key is None else Lock()
        with writing(self._where):
            self._remove_leftovers()
            if key is not None:
                self._take_up(key)

    def path(self, name: str) -> Path:
        """Where to write the file that will be called `name` (below the target, or beside it)."""
        if inside(Path(), name) is None or (self.single and not plain(name)):
            sentence = f"the file name {name!r} leaves the output: rename it"
            raise OutputError(sentence, where=self._where)
        if self.single and name != self.target.name:
            self._check_companion(self.target.parent / name)
        return self._temporary("out", name)

    def scratch(self, name: str) -> Path:
        """Where to write a file that is needed only until the commit."""
        return self._temporary("scratch", name)

    def staged(self) -> dict[str, Path]:
        """The files that a commit would move now, by name."""
        out = self._root / "out" if self._root else None
        if out is None or not out.is_dir():
            return {}
        found = [path for path in sorted(out.rglob("*")) if not path.is_dir()]
        return {path.relative_to(out).as_posix(): path for path in found}

    def commit(self, main: str, obsolete: Collection[str] = ()) -> None:
        """Move all staged files to the target, `main` last; of an output that is replaced, files
        called `obsolete` that are not among them are removed.

        Raises OutputError when that fails, after taking back what was moved.
        """
        # somebody else may have written it meanwhile
        self._check_free(self.target)
        files = list(self.staged())
        if main not in files:
            raise ValueError(f"{main!r} was not staged")
        files.sort(key=lambda name: (name == main, name))
        with writing(self._where):
            self._install(files, sorted(set(obsolete) - set(files)))
        self.discard()

    def discard(self) -> None:
        """Remove everything temporary."""
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)
            self._root = None
        self._release()

    def keep(self) -> None:
        """Leave what was staged for a run with the same key."""
        assert self._key is not None
        self._root = None
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _take_up(self, key: str) -> None:
        """The folder of that key, which is nobody else's while this staging lives."""
        self._root = self._anchor / f"{self._prefix}{_RESUMED}{key}"
        self._root.mkdir(exist_ok=True)
        assert self._lock is not None
        if not self._lock.acquire(self._root / _LOCK):
            self._root = None
            raise OutputError(_BUSY, where=self._where)

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._key is not None and kind is not None and self._root is not None:
            self.keep()
        else:
            self.discard()

    @property
    def _where(self) -> str:
        return str(self.given)

    def _check_free(self, path: Path) -> None:
        refuse_existing(path, force=self.force)

    def _check_kind(self) -> None:
        if self.target.exists() and self.target.is_dir() == self.single:
            found, wanted = ("folder", "file") if self.single else ("file", "folder")
            raise OutputError(
                f"is a {found}, but the output is a {wanted}: choose another -o", where=self._where
            )

    def _check_inputs(self) -> None:
        for path in self._inputs:
            relation = self._relation(path)
            if relation:
                sentence = f"{relation} the input {path}: choose another -o"
                raise OutputError(sentence, where=self._where)

    def _relation(self, path: Path) -> str | None:
        if self._same(self.target, path):
            return "is"
        if self.target in path.parents:
            return "contains"
        return "lies inside" if path in self.target.parents else None

    def _check_companion(self, path: Path) -> None:
        self._check_free(path)
        if any(self._same(path, other) for other in self._inputs):
            raise OutputError(f"{path} would be overwritten, but is an input: choose another -o")

    @staticmethod
    def _same(one: Path, two: Path) -> bool:
        # hard links are one file under two names
        return one == two or (one.exists() and two.exists() and one.samefile(two))

    def _writable_anchor(self) -> Path:
        """The folder for the temporary one: beside the target, on the same file system."""
        anchor = self.target.parent
        while not os.path.lexists(anchor):
            anchor = anchor.parent
        if not anchor.is_dir():
            raise OutputError(f"{anchor} is not a folder: choose another -o", where=self._where)
        if self.target.is_dir() and not (_writable(anchor) and not os.path.ismount(self.target)):
            anchor = self.target
        if not _writable(anchor):
            raise OutputError(
                f"{anchor} is not writable: choose another -o or change its permissions",
                where=self._where,
            )
        return anchor

    @property
    def _prefix(self) -> str:
        return f".{self.target.name}{_MARK}"

    def _remove_leftovers(self) -> None:
        for entry in list(os.scandir(self._anchor)):
            owner = entry.name.removeprefix(self._prefix).partition("-")[0]
            ours = entry.name.startswith(self._prefix) and entry.is_dir(follow_symlinks=False)
            dead = owner.isdecimal() and not _alive(int(owner))
            if ours and (dead or (owner == _RESUMED[:-1] and self._is_left(entry))):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif ours and owner == _RESUMED[:-1] and not self._is_own(entry):
                raise OutputError(_BUSY, where=self._where)

    def _is_own(self, entry: os.DirEntry[str]) -> bool:
        """Whether a folder is of the very key, for which another lock decides."""
        return self._key is not None and entry.name == f"{self._prefix}{_RESUMED}{self._key}"

    def _is_left(self, entry: os.DirEntry[str]) -> bool:
        """Whether a folder is what a run with another key left, and no run works in it."""
        if self._is_own(entry):
            return False
        lock = Lock()
        free = lock.acquire(Path(entry.path) / _LOCK)
        lock.release()
        return free

    def _temporary(self, part: str, name: str) -> Path:
        with writing(self._where):
            if self._root is None:
                # named before it is made, so that an interrupt in between leaves nothing unknown
                self._root = self._anchor / f"{self._prefix}{os.getpid()}-{secrets.token_hex(4)}"
                self._root.mkdir()
            path = self._root / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _install(self, files: list[str], obsolete: list[str]) -> None:
        assert self._root is not None
        out = self._root / "out"
        for name in files:
            _sync(out / name)
        for folder in [out, *(path for path in sorted(out.rglob("*")) if path.is_dir())]:
            _sync(folder)
        with _Undo() as undo:
            undo.make_folders(self.target.parent)
            if not self.single and not self.target.exists():
                out.rename(self.target)
            else:
                self._replace(out, files, undo)
                self._remove(out, [] if self.single else obsolete, undo)
            undo.keep()
        _sync(self.target.parent)

    def _replace(self, out: Path, files: list[str], undo: _Undo) -> None:
        folder = self.target.parent if self.single else self.target
        for number, name in enumerate(files):
            destination = folder / name
            if self.single:
                self._check_free(destination)
            undo.make_folders(destination.parent)
            undo.before_replacing(destination, out.parent / f"old-{number}")
            (out / name).replace(destination)
        _sync(folder)

    def _remove(self, out: Path, obsolete: list[str], undo: _Undo) -> None:
        for number, name in enumerate(obsolete):
            path = self.target / name
            if path.is_file():
                undo.before_replacing(path, out.parent / f"gone-{number}")
                path.unlink()


class Lock:
    """A lock on a file, which the system releases when the process ends, however it does."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def acquire(self, path: Path) -> bool:
        """Whether nobody else has it. Where the system knows no locks everybody has."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            import fcntl

            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            return True
        except OSError:
            self.release()
            return False
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class _Undo:
    """Takes back what was moved and made unless `keep` was reached."""

    def __init__(self) -> None:
        self._folders: list[Path] = []
        self._replaced: list[tuple[Path, Path | None]] = []
        self._kept = False

    def make_folders(self, folder: Path) -> None:
        lost = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(lost):
            self._folders.append(path)
            path.mkdir()

    def before_replacing(self, path: Path, copy: Path) -> None:
        there = os.path.lexists(path)
        if there:
            _second_name(path, copy)
        self._replaced.append((path, copy if there else None))

    def keep(self) -> None:
        self._kept = True

    def __enter__(self) -> _Undo:
        return self

    def __exit__(self, *_: object) -> None:
        if self._kept:
            return
        for path, copy in reversed(self._replaced):
            with suppress(OSError):
                copy.replace(path) if copy else path.unlink()
        for folder in reversed(self._folders):
            with suppress(OSError):
                folder.rmdir()


def _second_name(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy, follow_symlinks=False)
    except (OSError, NotImplementedError):
        if path.is_dir():
            raise failure(IsADirectoryError(0, "a folder is in the way"), path) from None
        shutil.copy2(path, copy, follow_symlinks=False)


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
