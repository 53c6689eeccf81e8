"""A case of a family built once for all tests that only read it: the `built` of tests/conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from families.cases import FamilyCase
from torch import Tensor


class Built:
    """PEFT's adapter and its base on the disk, and what PEFT computes with them."""

    def __init__(self, case: FamilyCase, folder: Path) -> None:
        self.case = case
        self.base = case.save_base(folder / "base")
        self.path = case.build(folder / "adapter")

    @cached_property
    def truth(self) -> Tensor:
        return self.case.truth(self.path)

    @cached_property
    def merged(self) -> dict[str, Tensor]:
        return self.case.merged(self.path)


BuiltCases = Callable[[str], Built]
