"""Writing a set of files or nothing: everything is staged beside the target, then moved at once."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from adaptmerge.errors import OutputError
from adaptmerge.files.commit import BEFORE, OUT, install, take_back
from adaptmerge.files.disk import writing
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

    is_orphan: of a file beside a single one whether it is what an output without its main file left.
    """

    def __init__(
        self,
        target: Path,
        *,
        force: bool,
        inputs: Sequence[Path],
        single: bool = False,
        key: str | None = None,
        is_orphan: Callable[[Path], bool] = lambda _: False,
    ) -> None:
        """Check the target, touching only what killed runs left behind: what they moved is taken back.

        Raises OutputError when it exists (unless `force`), is of the wrong kind, overlaps an input,
        or cannot be written.
        """
        self.given, self.target = target, target.resolve()
        self.force, self.single = force, single
        self._inputs = [path.resolve() for path in inputs]
        self._key, self._is_orphan = key, is_orphan
        self._check_inputs()
        with writing(self._where):
            self._take_back_killed()
        self._check_free(target)
        self._check_kind()
        self._anchor = self._writable_anchor()
        self._root: Path | None = None
        self._lock = None if key is None else Lock()
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
        return self._temporary(OUT, name)

    def scratch(self, name: str) -> Path:
        """Where to write a file that is needed only until the commit."""
        return self._temporary("scratch", name)

    def staged(self) -> dict[str, Path]:
        """The files that a commit would move now, by name."""
        out = self._root / OUT if self._root else None
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
        for name in sorted(set(files) - {main}) if self.single else ():
            self._check_companion(self.target.parent / name)
        if main not in files:
            raise ValueError(f"{main!r} was not staged")
        files.sort(key=lambda name: (name == main, name))
        with writing(self._where):
            gone = sorted(set(obsolete) - set(files))
            assert self._root is not None
            install(self._root, self.target, files, gone, single=self.single)
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
        if os.path.lexists(self.target) or not self._is_orphan(path):
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

    def _take_back_killed(self) -> None:
        """What was there before a run that was killed while it moved files is there again."""
        for place in (self.target.parent, self.target):
            for left in self._leftovers(place):
                if _is_abandoned(left) and not take_back(left, self.target, single=self.single):
                    raise OutputError(
                        f"{left / BEFORE} is what was here before a run that was killed, and something "
                        "else is here now: move or delete one of them",
                        where=self._where,
                    )

    def _leftovers(self, place: Path) -> list[Path]:
        """The temporary folders of other runs with this target."""
        if not place.is_dir():
            return []
        found = [entry for entry in os.scandir(place) if entry.name.startswith(self._prefix)]
        return [Path(entry.path) for entry in found if entry.is_dir(follow_symlinks=False)]

    def _remove_leftovers(self) -> None:
        own = f"{self._prefix}{_RESUMED}{self._key}"
        for left in self._leftovers(self._anchor):
            if left.name == own and self._key is not None:
                continue
            if _is_abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
            elif _is_resumable(left):
                raise OutputError(_BUSY, where=self._where)

    def _temporary(self, part: str, name: str) -> Path:
        with writing(self._where):
            if self._root is None:
                # named before it is made, so that an interrupt in between leaves nothing unknown
                self._root = self._anchor / f"{self._prefix}{os.getpid()}-{secrets.token_hex(4)}"
                self._root.mkdir()
            path = self._root / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
        return path


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


def _is_resumable(left: Path) -> bool:
    """Whether a temporary folder is one that a later run may take up."""
    return left.name.rpartition(_MARK)[2].startswith(_RESUMED)


def _is_abandoned(left: Path) -> bool:
    """Whether no run works in a temporary folder any more."""
    if _is_resumable(left):
        lock = Lock()
        free = lock.acquire(left / _LOCK)
        lock.release()
        return free
    owner = left.name.rpartition(_MARK)[2].partition("-")[0]
    return owner.isdecimal() and not _alive(int(owner))


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
