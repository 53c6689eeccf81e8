"""Is all that lies beside the tensors of a fused model what a fusion puts there, and each file's header?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from adaptmerge.commands.fuse.folder import documents
from adaptmerge.commands.fuse.plan import FusePlan
from adaptmerge.commands.fuse.report import FuseReport
from adaptmerge.commands.verify.checks import Check
from adaptmerge.commands.verify.files import is_prose
from adaptmerge.commands.verify.tables import entries
from adaptmerge.commands.verify.written import judged, unlike, unwritable
from adaptmerge.files.sniff import head
from adaptmerge.outputs.companions import CARD


def check_written(output: Path, plan: FusePlan, report: FuseReport) -> Check:
    """The check of configs, headers and files that go along, against those that would be written."""
    skipped = unwritable(report)
    if skipped is not None:
        return skipped
    beside = documents(plan)
    found = {name: held for name, held in beside.items() if not is_prose(name)}
    problems = [
        problem for name, held in found.items() for problem in unlike(name, held, output / name)
    ]
    problems += _headers(output, plan)
    written = {CARD, *beside, *(shard.name for shard in plan.shards)}
    problems += entries("files", report.files, written)
    return judged(problems, len(found) + len(plan.shards))


def _headers(output: Path, plan: FusePlan) -> Iterator[str]:
    """The files whose first bytes, which say what is in them, are others."""
    for shard in plan.shards:
        path = output / shard.name
        if not path.is_file():
            yield f"{shard.name} is missing"
        elif head(path, len(shard.header)) != shard.header:
            yield f"{shard.name}: its header is not what is written there"
