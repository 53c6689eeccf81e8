"""Where shards are written: by this process one after the other, or by the workers of a Ray cluster.

A job is data and writes one file on a file system that all workers see; its bytes are the same wherever it
runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from adaptmerge.commands.fuse.pieces.journal import Record
from adaptmerge.commands.fuse.pieces.layout import Shard
from adaptmerge.commands.fuse.pieces.write import Advance, Settings, write_shard
from adaptmerge.errors import AdaptmergeError, MissingExtra


class Job(NamedTuple):
    """A shard and where to write it."""

    shard: Shard
    path: Path
    beside: Path  # for what is temporary
    settings: Settings


class Executor(Protocol):
    """Where shards are written."""

    def __call__(self, jobs: Sequence[Job], progress: Advance) -> Iterator[tuple[Job, Record]]:
        """Writes the shards in any order, each with its record as soon as it is finished. Raises what the
        one that fails raises."""


def _written(job: Job, progress: Advance) -> Record:
    """Writes a shard and returns its record."""
    done = write_shard(job.shard, job.path, job.beside, job.settings, progress)
    choices = tuple(line.choice for line in done.lines)
    return Record(done.sha256, choices, tuple(line.measured for line in done.lines))


def local(jobs: Sequence[Job], progress: Advance) -> Iterator[tuple[Job, Record]]:
    """One shard after the other; the work inside each is parallel."""
    for job in jobs:
        yield job, _written(job, progress)


def on_ray(jobs: Sequence[Job], progress: Advance) -> Iterator[tuple[Job, Record]]:
    """Shards on the workers of a Ray cluster, as they finish; a worker that dies is replaced and its shard
    written anew."""
    try:
        import ray
    except ImportError:
        raise MissingExtra("ray", "ray") from None
    if not ray.is_initialized():
        ray.init(address="auto", log_to_driver=False, logging_level="error")
    remote = ray.remote(num_cpus=1, max_retries=3)(_remote)
    waiting = {remote.remote(job): job for job in jobs}
    while waiting:
        done, _ = ray.wait(list(waiting), num_returns=1)
        job = waiting.pop(done[0])
        try:
            record = ray.get(done[0])
        except ray.exceptions.RayTaskError as problem:
            cause = problem.cause
            raise cause if isinstance(cause, AdaptmergeError) else problem from None
        progress(job.shard.nbytes)
        yield job, record


def _remote(job: Job) -> Record:
    """A job as a worker runs it, one thread each."""
    return _written(job._replace(settings=job.settings._replace(workers=1)), lambda _: None)


EXECUTORS: dict[str, Executor] = {"local": local, "ray": on_ray}
