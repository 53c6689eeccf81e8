"""Settings for every test: reproducible examples, one BLAS thread, no network."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from budgets import Budgets
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from families.built import BuiltCases
    from fuse.fusions import Fusions
    from fuse.tiny import Tiny

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ADAPTMERGE_DEBUG", "1")  # what nothing foresaw is raised

settings.register_profile(
    "thorough",  # 100 examples, as hypothesis has it
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("quick", settings.get_profile("thorough"), max_examples=30)
settings.load_profile("quick")

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Budgets(fatal=bool(os.environ.get("CHECK_TIMES"))))


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look at it again and again."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    beside_each_other(items)
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and not has_device():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or MPS device"))


def beside_each_other(items: list[pytest.Item]) -> None:
    """Tests of one case of a family follow each other, so that it is built once, by one process."""
    first: dict[object, int] = {}
    places: dict[pytest.Item, int] = {}
    for number, item in enumerate(items):
        places[item] = number
        if "built" in getattr(item, "fixturenames", ()) and hasattr(item, "callspec"):
            places[item] = first.setdefault(item.callspec.params.get("name"), number)
    items.sort(key=places.__getitem__)


def has_device() -> bool:
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """Nothing waits for the disk: that it would is of use when power fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of checked-in adapters, bases and recordings."""
    return ROOT / "fixtures"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuiltCases:
    """The cases of families by name, each built once where its tests follow each other."""
    from families.built import Built
    from families.cases import all_cases

    @lru_cache(maxsize=4)
    def build(name: str) -> Built:
        return Built(all_cases()[name], tmp_path_factory.mktemp(name))

    return build


@pytest.fixture(scope="session")
def fusions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fusions]:
    """Fuses what is asked for once; that nobody has written into it is seen at the end."""
    from fuse.fusions import Fusions

    found = Fusions(lambda: tmp_path_factory.mktemp("fused"))
    yield found
    found.assert_untouched()


@pytest.fixture(scope="session")
def tiny(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The base and the adapters of fixtures/tinyllama by name, of two layers."""
    from fuse.tiny import cut

    folder = tmp_path_factory.mktemp("tiny")
    return cache(lambda name: cut(fixtures / "tinyllama" / name, folder / name))
