"""`python -m bench`: every case once per round, then the table.

The goals are for the full sizes on two idle cores; nothing fails when one is missed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from bench import machine, ratios, table
from bench.cases import FULL, QUICK, ROOT, Case, cases, rows
from bench.data import Data

FOLDER = ROOT / "build" / "bench"


def main() -> None:
    """Measures and prints."""
    asked = _arguments()
    sizes = QUICK if asked.quick else FULL
    with _workspace(keep=asked.keep) as data:
        selected = _selected(cases(data, sizes), asked.only)
        described = machine.describe(data.folder)
        samples = _rounds(selected, asked.rounds or sizes.rounds)
    units = {case.name: case.unit for case in selected}
    cells = ratios.lines(rows(sizes), samples, units)
    print("\n".join(f"- {key}: {value}" for key, value in described.items()), end="\n\n")
    print(table.markdown(cells) if asked.markdown else table.plain(cells))
    if asked.json:
        found = {"machine": described, "sizes": asdict(sizes), "units": units, "samples": samples}
        asked.json.write_text(json.dumps(found, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure speed and memory."
    )
    parser.add_argument("--rounds", type=int, help=f"{FULL.rounds} by default")
    parser.add_argument("--quick", action="store_true", help="small sizes: goals do not apply")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="measure these cases only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    parser.add_argument("--keep", action="store_true", help="keep the data in build/bench")
    return parser.parse_args()


def _selected(found: Sequence[Case], only: Sequence[str] | None) -> list[Case]:
    names = [case.name for case in found]
    unknown = sorted(set(only or ()) - set(names))
    if unknown:
        raise SystemExit(f"--only {unknown[0]}: expected some of {', '.join(names)}")
    return [case for case in found if not only or case.name in only]


@contextmanager
def _workspace(*, keep: bool) -> Iterator[Data]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        yield Data(FOLDER)
    finally:
        if not keep:
            shutil.rmtree(FOLDER)


def _rounds(selected: Sequence[Case], count: int) -> dict[str, list[float]]:
    """Samples of each case. Rounds are interleaved: what disturbs the machine hits all cases."""
    samples: dict[str, list[float]] = {case.name: [] for case in selected}
    for number in range(count):
        for case in selected:
            if case.most is None or number < case.most:
                samples[case.name].append(case.measure())
                _say(f"round {number + 1} of {count}", case, samples[case.name][-1])
    return samples


def _say(where: str, case: Case, value: float) -> None:
    print(f"{where}: {case.name} {value:.4g} {case.unit}", file=sys.stderr)


if __name__ == "__main__":
    main()
