"""The command line of the fuzzer."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from fuzz import running, valid
from fuzz.cases import lay, numbered
from fuzz.judging import judged
from fuzz.running import Outcome

SEED = 1


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """A folder in memory if there is one, with nothing of it left afterwards unless it was named."""
    if given:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as found:
        yield Path(found)


@click.command()
@click.option("--cases", default=1000, show_default=True, help="How many.")
@click.option("--first", default=0, show_default=True, help="The number of the first one.")
@click.option("--seed", default=SEED, show_default=True, help="What all is drawn from.")
@click.option("--jobs", default=1, show_default=True, help="Processes.")
@click.option("--case", type=int, help="Only this one, and all that is known of it.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keep valid files here.")
@click.option("--keep", type=click.Path(path_type=Path), help="With --case: leave its files there.")
def main(
    cases: int,
    first: int,
    seed: int,
    jobs: int,
    case: int | None,
    folder: Path | None,
    keep: Path | None,
) -> None:
    """Run commands on changed files; exit code 1 if any fails as it should not."""
    os.environ.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with _folder(folder) as place:
        if case is not None:
            raise SystemExit(_show(seed, case, place, keep))
        numbers = range(first, first + cases)
        here = running.run_here(seed, numbers, place)
        results = running.run_beside(seed, numbers, place, jobs) if jobs > 1 else here
        summary = running.timed(_told(results, seed))
    click.echo("\n".join(summary.lines(seed)))
    raise SystemExit(bool(summary.failed))


def _told(results: Iterator[Outcome], seed: int) -> Iterator[Outcome]:
    """The same; a failure of a new kind is told at once."""
    seen: set[str] = set()
    for one in results:
        if one.failure is not None and one.failure.group not in seen:
            seen.add(one.failure.group)
            click.echo(f"case {one.number} of seed {seed}: {one.failure.group}", err=True)
        yield one


def _show(seed: int, number: int, folder: Path, keep: Path | None) -> int:
    """One case with the fewest changes, and what became of it."""
    valid.Store.root = folder / "valid"
    place = keep or folder / f"case-{number}"
    case = running.smallest(numbered(seed, number), folder / f"case-{number}")
    laid = lay(case, place)
    code, failure = judged(laid)
    if not keep:
        shutil.rmtree(place)
    click.echo(f"{case}\nfiles: {case.inputs}")
    click.echo("\n".join(f"changed: {said}" for said in laid.said))
    click.echo(f"adaptmerge {shlex.join(laid.line)}\nexit code {code}")
    click.echo(f"{failure.group}\n{failure.text}" if failure else "nothing is wrong")
    return int(failure is not None)
