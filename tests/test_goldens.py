"""What commands write, byte for byte: as recorded where no matrices are multiplied, and by any workers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from console import ACCEPT
from goldens import PORTABLE, RECORDED, hashes_of

COMPARED = (  # extract reads what bf16 writes
    ("svd", "linear", "dora", "families"),
    ("adaptive", "copied"),
    ("bf16", "extract"),
)
SAID = ("adaptmerge.json", ".report.json", "README.md")  # norms and errors are computed


def tensors_and_configs(found: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in found.items() if not name.endswith(SAID)}


def test_files_are_as_recorded(tmp_path: Path) -> None:
    found = tensors_and_configs(hashes_of(tmp_path, PORTABLE, jobs=1))
    if ACCEPT:
        RECORDED.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert found == json.loads(RECORDED.read_text(encoding="utf-8"))


@pytest.mark.parametrize("names", COMPARED, ids="-".join)
def test_four_workers_write_what_one_writes(names: Sequence[str], tmp_path: Path) -> None:
    from goldens import COMMANDS

    commands = {name: COMMANDS[name] for name in names}
    one, four = tmp_path / "one", tmp_path / "four"
    one.mkdir()
    four.mkdir()
    found = hashes_of(one, commands, jobs=1)
    assert len(found) > len(commands)
    assert hashes_of(four, commands, jobs=4) == found
