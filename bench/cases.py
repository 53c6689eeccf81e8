"""What is measured, and the rows of the table that follow from it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.combining import EXPERTS, LAYER
from bench.data import Data
from bench.shapes import BYTES, HIDDEN, SHAPES, TENSORS
from bench.worker import RANK, WORKERS

ROOT = Path(__file__).parent.parent
MERGED = ("linear", "svd")
ROUNDINGS = ("nearest", "adaptive")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much work the cases are."""

    layers: int = 32
    square: int = HIDDEN  # the sites that PEFT is compared on are square x square
    square_layers: int = 64  # with two such sites each
    adapters: int = 8
    file_layers: int = 384  # of the file to inspect that has many tensors: 1 GB at rank 16
    peft_rounds: int = 2
    rounds: int = 7
    model: str = "1.1B"  # that is fused into
    models: tuple[str, ...] = ("0.3B", "1.1B", "3B")  # for memory
    model_rounds: int = 5
    large_rounds: int = 3  # of the largest model
    verified: str = "0.3B"  # the model whose merges are verified
    layered: str = "8B-2"  # the one that verify reads layer by layer

    @property
    def file_bytes(self) -> int:
        """The size of the file to inspect, without its header."""
        return self.file_layers * RANK * BYTES * sum(map(sum, SHAPES.values()))


FULL = Sizes()
QUICK = Sizes(
    layers=4,
    square=512,
    square_layers=8,
    adapters=4,
    file_layers=24,
    peft_rounds=1,
    rounds=3,
    model="0.3B",
    models=("0.3B",),
    model_rounds=1,
    verified="tiny",
    layered="tiny",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One number that is measured in every round, or in the first `most`."""

    name: str
    unit: str
    measure: Callable[[], float]
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: a case compared with another one, which `against` says in words."""

    title: str
    case: str
    against: str
    reference: str
    goal: str
    faster: bool = False  # the ratio is reference / case


def cases(data: Data, sizes: Sizes) -> list[Case]:
    """All cases, in the order of a round."""
    return [
        *_merges(data, sizes),
        *_verifying(data, sizes),
        *_memory(data, sizes),
        *_commands(data, sizes),
        *_fusing(data, sizes),
        *_fusing_memory(data, sizes),
        *_nf4(sizes),
        *_nf4_model(data, sizes),
    ]


def rows(sizes: Sizes) -> list[Row]:
    """The table, as far as it does not depend on measured values."""
    few, some, many = _depths(sizes)
    site = f"{sizes.square}x{sizes.square}"
    start, copied = "starting Python", ("copying the inputs", "experts-copy")
    gigabytes = f"{sizes.file_bytes / 1e9:.2f}"
    usual, extreme = (f"{14 * layers:,} tensors" for layers in (sizes.layers, sizes.file_layers))
    return [
        Row(f"`svd`, {many} layers", "svd", "its bare algebra", "bare", "< 2.5 s"),
        Row(f"`linear`, {many} layers", "linear", "copying the inputs", "copy", "<= 2 x"),
        Row(f"`linear` of 2 DoRA and a LoRA, {LAYER}", "dora", "its norms", "dora-norms", "-"),
        Row(f"`linear`, 2 layers of {EXPERTS} experts", "experts", *copied, "-"),
        Row(f"`svd`, one {site} site", "site", "PEFT", "peft", ">= 2000 x faster", faster=True),
        Row(f"memory, {some} layers", f"memory-{some}", f"{few} layers", f"memory-{few}", "1 x"),
        Row(
            f"memory, {many} layers",
            f"memory-{many}",
            f"{few} layers",
            f"memory-{few}",
            "1 x, < 300 MB",
        ),
        Row(
            f"memory, {sizes.adapters} adapters",
            "memory-adapters",
            "2 adapters",
            f"memory-{few}",
            "+ a site's working set",
        ),
        Row(f"`inspect`, {gigabytes} GB, {usual}", "inspect", start, "python", "< 0.4 s"),
        Row(f"`inspect`, {gigabytes} GB, {extreme}", "inspect-many", start, "python", "< 0.4 s"),
        Row("`--help`", "help", start, "python", "< 0.25 s"),
        *_verifying_rows(sizes),
        *_fusing_rows(sizes),
        *_nf4_rows(sizes),
        *_nf4_model_rows(sizes),
    ]


def _verifying_rows(sizes: Sizes) -> list[Row]:
    sites, size = 7 * sizes.layers, sizes.verified
    loaded = "loading the base and a forward", "forward", "<= 4 x"
    layered = f"memory, `verify --layerwise`, {sizes.layered}"
    return [
        *(
            Row(f"`verify`, `{method}`, {sites} sites", f"verify-{method}", *against, "<= 3 x")
            for method in MERGED
            for against in [("`combine`", method)]
        ),
        Row(f"`verify --base`, `linear`, {size}", "verify-base", *loaded),
        Row(f"`verify --base`, two DoRA, {size}", "verify-dora", *loaded),
        Row(layered, "memory-verify", "a forward, layer by layer", "memory-forward", "<= 1.5 x"),
    ]


def _fusing_rows(sizes: Sizes) -> list[Row]:
    peft, first, *others = "PEFT", *sizes.models

    def fuse(kind: str) -> str:
        return f"`fuse` {kind}, {sizes.model}"

    def memory(kind: str, size: str, against: str, reference: str, goal: str) -> Row:
        title = f"memory, `fuse` {kind}, {size}"
        return Row(title, f"memory-{kind}-{size}", against, reference, goal)

    nearest, adaptive = (fuse(kind) for kind in ROUNDINGS)
    return [
        Row(nearest, "fuse-nearest", "`cp -r` and `sync`", "fuse-copy", "<= 1.3 x"),
        Row(nearest, "fuse-nearest", peft, "fuse-peft", ">= 2 x faster", faster=True),
        Row(adaptive, "fuse-adaptive", "nearest", "fuse-nearest", "<= 1.5 x"),
        *(memory(kind, sizes.model, peft, "memory-peft", "< 0.17 x") for kind in ROUNDINGS),
        *(
            memory(kind, size, first, f"memory-{kind}-{first}", "1 x")
            for kind in ROUNDINGS
            for size in others
        ),
    ]


def _nf4_rows(sizes: Sizes) -> list[Row]:
    size, theirs = sizes.square, "bitsandbytes' codes"
    return [
        Row(f"NF4 site, {size}x{size}", "nf4-site", theirs, "nf4-bitsandbytes", "<= 1.0 x"),
        Row(
            "NF4 codes, nearest",
            *("nf4-codes", theirs, "nf4-bitsandbytes", ">= 5 x faster"),
            faster=True,
        ),
        *(
            Row(f"NF4 site, {out}x{width}, rank {rank}", name, "rank 16", "nf4-site", goal)
            for name, (out, width, rank), goal in _nf4_others(size)
        ),
    ]


def _nf4_model_rows(sizes: Sizes) -> list[Row]:
    title, memory = f"`fuse` into NF4, {sizes.model}", "memory-nf4-model"
    two, one = f"{memory}-{WORKERS}", f"{memory}-1"
    return [
        Row(title, "nf4-model", "into bfloat16, adaptive", "fuse-adaptive", "-"),
        Row(f"memory, {title}, {WORKERS} jobs", two, "one job", one, "< 1 GB"),
    ]


def _nf4_others(size: int) -> list[tuple[str, tuple[int, int, int], str]]:
    """Sites that are compared with a square one of rank 16: case, (out, in, rank), goal."""
    half, wide = size // 2, size * 7 // 2
    return [
        ("nf4-half", (size, half, 16), "0.5 x"),
        ("nf4-wide", (size, wide, 16), "3.5 x, < 2 s"),
        ("nf4-rank-8", (size, size, 8), "linear"),
        ("nf4-rank-32", (size, size, 32), "linear"),
        ("nf4-rank-64", (size, size, 64), "linear"),
    ]


def _depths(sizes: Sizes) -> tuple[int, int, int]:
    return sizes.layers // 4, sizes.layers // 2, sizes.layers


def _merges(data: Data, sizes: Sizes) -> list[Case]:
    def inputs() -> list[str]:
        return data.adapters(2, sizes.layers)

    def three() -> list[str]:
        return [*data.doras(2), data.adapters(3, 1)[2]]

    def warm_up() -> str:
        return data.adapters(1, 1)[0]

    def merge(method: str) -> float:
        return _worker("merge", method, warm_up(), data.output(method), *inputs())

    def site() -> float:
        found = data.squares(2, sizes.square_layers, sizes.square)
        seconds = _worker("merge", "svd", warm_up(), data.output("site"), *found)
        return seconds / (2 * sizes.square_layers)

    return [
        Case("svd", "s", partial(merge, "svd")),
        Case("bare", "s", lambda: _worker("bare", warm_up(), *inputs())),
        Case("linear", "s", partial(merge, "linear")),
        Case("copy", "s", lambda: _worker("copy", data.output("copy"), *inputs())),
        Case("dora", "s", lambda: _worker("dora", data.layer(), data.output("dora"), *three())),
        Case("dora-norms", "s", lambda: _worker("dora-norms", data.layer(), *three())),
        Case("experts", "s", lambda: _worker("experts", data.output("experts"), *data.experts(2))),
        Case("experts-copy", "s", lambda: _worker("copy", data.output("copy"), *data.experts(2))),
        Case("site", "s", site),
        Case("peft", "s", lambda: _worker("peft", str(sizes.square)), most=sizes.peft_rounds),
    ]


def _verifying(data: Data, sizes: Sizes) -> list[Case]:
    size, most = sizes.verified, sizes.large_rounds

    def weights(method: str) -> float:
        inputs = data.adapters(1, 1)[0], data.output(f"verify-{method}")
        return _worker("verify", method, *inputs, *data.adapters(2, sizes.layers))

    def base(name: str, adapter: Callable[[str, int], str]) -> float:
        inputs = data.model("tiny"), adapter("tiny", 0), data.output(name), data.model(size)
        return _worker("verify-base", *inputs, *(adapter(size, seed) for seed in range(2)))

    def memory() -> float:
        inputs = [data.model_adapter(sizes.layered, seed) for seed in range(2)]
        output = data.output("memory-verify")
        return _worker("memory-verify", output, data.model(sizes.layered), *inputs)

    forward = partial(_worker, "forward")
    layered = partial(_worker, "memory-forward")
    return [
        *(Case(f"verify-{method}", "s", partial(weights, method)) for method in MERGED),
        Case("verify-base", "s", partial(base, "verify-base", data.model_adapter), most),
        Case("verify-dora", "s", partial(base, "verify-dora", data.model_dora), most),
        Case("forward", "s", lambda: forward(data.model("tiny"), data.model(size)), most),
        Case("memory-verify", "MB", memory, most),
        Case("memory-forward", "MB", lambda: layered(data.model(sizes.layered)), most),
    ]


def _memory(data: Data, sizes: Sizes) -> list[Case]:
    def peak(adapters: int, layers: int) -> float:
        return _worker("memory", data.output("memory"), *data.adapters(adapters, layers))

    few = _depths(sizes)[0]
    return [
        *(Case(f"memory-{n}", "MB", partial(peak, 2, n)) for n in _depths(sizes)),
        Case("memory-adapters", "MB", partial(peak, sizes.adapters, few)),
    ]


def _fusing(data: Data, sizes: Sizes) -> list[Case]:
    def inputs(size: str) -> list[str]:
        return [data.model(size), data.model_adapter(size)]

    def fuse(kind: str) -> float:
        output = data.output(f"fuse-{kind}")
        return _worker("fuse", kind, *inputs("tiny"), output, *inputs(sizes.model))

    def copy() -> float:
        return _worker("copy-model", data.output("fuse-copy"), data.model(sizes.model))

    def peft() -> float:
        return _worker("fuse-peft", data.output("fuse-peft"), *inputs(sizes.model))

    most = sizes.model_rounds
    return [
        *(Case(f"fuse-{kind}", "s", partial(fuse, kind), most) for kind in ROUNDINGS),
        Case("fuse-copy", "s", copy, most),
        Case("fuse-peft", "s", peft, most),
    ]


def _fusing_memory(data: Data, sizes: Sizes) -> list[Case]:
    def inputs(size: str) -> list[str]:
        return [data.output("fuse-memory"), data.model(size), data.model_adapter(size)]

    def fuse(kind: str, size: str) -> float:
        return _worker("memory-fuse", kind, *inputs(size))

    def peft() -> float:
        return _worker("memory-fuse-peft", *inputs(sizes.model))

    most = dict.fromkeys(sizes.models, sizes.model_rounds) | {sizes.models[-1]: sizes.large_rounds}
    return [
        *(
            Case(f"memory-{kind}-{size}", "MB", partial(fuse, kind, size), most[size])
            for kind in ROUNDINGS
            for size in sizes.models
        ),
        Case("memory-peft", "MB", peft, sizes.large_rounds),
    ]


def _nf4(sizes: Sizes) -> list[Case]:
    def measure(kind: str, *sides: int) -> float:
        return _worker(kind, *map(str, sides))

    size, most = sizes.square, sizes.model_rounds
    return [
        Case("nf4-bitsandbytes", "s", partial(measure, "nf4-bitsandbytes", size, size), most),
        Case("nf4-codes", "s", partial(measure, "nf4-codes", size, size), most),
        Case("nf4-site", "s", partial(measure, "nf4-site", size, size, RANK), most),
        *(
            Case(name, "s", partial(measure, "nf4-site", *sides), most)
            for name, sides, _ in _nf4_others(size)
        ),
    ]


def _nf4_model(data: Data, sizes: Sizes) -> list[Case]:
    size, most = sizes.model, sizes.large_rounds

    def measure(kind: str, jobs: int) -> float:
        inputs = data.nf4_model(size), data.nf4_model_adapter(size)
        return _worker(kind, str(jobs), data.output(kind), *inputs)

    memory = "memory-nf4-model"
    return [
        Case("nf4-model", "s", partial(measure, "nf4-model", WORKERS), most),
        *(Case(f"{memory}-{n}", "MB", partial(measure, memory, n), most) for n in (1, WORKERS)),
    ]


def _commands(data: Data, sizes: Sizes) -> list[Case]:
    def inspect(layers: int) -> float:
        rank = RANK * sizes.file_layers // layers
        file = Path(data.large(layers, rank)) / TENSORS
        return _wall("-m", "adaptmerge", "inspect", str(file))

    return [
        Case("inspect", "s", partial(inspect, sizes.layers)),
        Case("inspect-many", "s", partial(inspect, sizes.file_layers)),
        Case("help", "s", lambda: _wall("-m", "adaptmerge", "--help")),
        Case("python", "s", lambda: _wall("-c", "pass")),
    ]


def _worker(name: str, *arguments: str) -> float:
    """The number that a measurement in a process of its own prints."""
    return float(_run("-m", "bench.worker", name, *arguments).split()[-1])


def _wall(*arguments: str) -> float:
    """Seconds from starting Python with these arguments to its end."""
    start = time.perf_counter()
    _run(*arguments)
    return time.perf_counter() - start


def _run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"python {' '.join(arguments)} failed with exit code {done.returncode}")
    return done.stdout
