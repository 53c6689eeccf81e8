"""Fusing on the workers of a Ray cluster: the bytes of a local run, also when workers or nodes die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fuse.models import fuse, llama_base
from peft_cases import CASES
from samples import tree

from adaptmerge.commands.fuse import FuseOptions
from adaptmerge.commands.fuse import fuse as fuse_with
from adaptmerge.formats.inputs import InputSpec

ray = pytest.importorskip("ray")
pytest.importorskip("peft")
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one worker each, on this machine."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    head = {**NODE, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=head)
    found.add_node(**NODE)
    ray.init(address=found.address, log_to_driver=False, logging_level="error")
    assert ray.cluster_resources()["CPU"] == 2
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base in many files, and an adapter."""
    folder = tmp_path_factory.mktemp("ray")
    base = llama_base(folder / "base", shard="100KB", num_hidden_layers=12, intermediate_size=1024)
    adapter = CASES["plain"].build(folder / "adapter", 1, target_modules=["q_proj", "v_proj"])
    return base, adapter


@pytest.fixture(scope="module")
def expected(
    inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes | None]:
    base, adapter = inputs
    out = tmp_path_factory.mktemp("local") / "out"
    fuse(base, [adapter], out, rounding="adaptive")
    assert len(list(out.glob("*.safetensors"))) > 12
    return tree(out)


def on_ray(inputs: tuple[Path, Path], output: Path, then: Callable[[int], None]) -> None:
    """Fuses on the cluster; `then` is told how many shards are finished."""
    base, adapter = inputs
    finished: list[int] = []

    def progress(done: int, total: int) -> None:
        finished.append(done)
        then(len(finished))

    options = FuseOptions(rounding="adaptive", executor="ray")
    fuse_with(str(base), [InputSpec(str(adapter))], output, options, progress)


def test_the_bytes_are_those_of_a_local_run(
    cluster: Any,
    inputs: tuple[Path, Path],
    expected: dict[str, bytes | None],
    tmp_path: Path,
) -> None:
    on_ray(inputs, tmp_path / "out", lambda count: None)
    assert tree(tmp_path / "out") == expected


def test_a_worker_that_dies_is_replaced(
    cluster: Any,
    inputs: tuple[Path, Path],
    expected: dict[str, bytes | None],
    tmp_path: Path,
) -> None:
    killed: list[int] = []

    def kill_one(count: int) -> None:
        if count == 2:
            killed.append(working(cluster))
            os.kill(killed[0], signal.SIGKILL)

    on_ray(inputs, tmp_path / "out", kill_one)
    assert killed
    assert tree(tmp_path / "out") == expected


def working(cluster: Any) -> int:
    """The process of a worker of this cluster that is at work on a shard."""
    parents = {
        info.process.pid
        for node in cluster.list_all_nodes()
        for info in node.all_processes["raylet"]
    }
    end = time.monotonic() + 20
    while time.monotonic() < end:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _is_at_work(entry, parents):
                return int(entry.name)
    raise AssertionError("no worker is at work")


def _is_at_work(entry: Path, parents: set[int]) -> bool:
    try:
        command = (entry / "cmdline").read_bytes()
        parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return False
    return parent in parents and command.startswith(b"ray::_remote")


def test_a_node_that_dies_is_done_without(
    cluster: Any,
    inputs: tuple[Path, Path],
    expected: dict[str, bytes | None],
    tmp_path: Path,
) -> None:
    (node,) = cluster.worker_nodes
    removed: list[int] = []

    def remove(count: int) -> None:
        if count == 2:
            cluster.remove_node(node, allow_graceful=False)
            removed.append(count)

    on_ray(inputs, tmp_path / "out", remove)
    assert removed
    assert tree(tmp_path / "out") == expected


def test_problems_come_back_as_they_are(
    cluster: Any, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """What a worker finds wrong with an input is a sentence, not a traceback of Ray."""
    import torch
    from safetensors.torch import load_file, save_file

    from adaptmerge.errors import InputError

    base = llama_base(tmp_path / "base", shard="60KB")
    for path in base.glob("*.safetensors"):
        tensors = load_file(path)
        name = "model.layers.1.self_attn.q_proj.weight"
        if name in tensors:
            tensors[name][0, 0] = torch.nan
            save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj.* holds NaN"):
        fuse(base, [inputs[1]], tmp_path / "out", executor="ray")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
