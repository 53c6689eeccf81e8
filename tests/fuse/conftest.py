"""Models that several tests only look at."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fuse.fusions import Fusions
    from fuse.tiny import Tiny


@pytest.fixture(scope="session")
def fusions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fusions]:
    """Fuses what is asked for once; that nobody has written into it is seen at the end."""
    from fuse.fusions import Fusions

    found = Fusions(lambda: Path(tmp_path_factory.mktemp("fused")))
    yield found
    found.assert_untouched()


@pytest.fixture(scope="session")
def tiny(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The base and the adapters of fixtures/tinyllama by name, of two layers."""
    from fuse.tiny import cut

    folder = tmp_path_factory.mktemp("tiny")
    return cache(lambda name: cut(fixtures / "tinyllama" / name, folder / name))
