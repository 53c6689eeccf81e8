"""Command lines for a folder of inputs: each command with some options, of which few cannot be meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

Line = list[str]
ODD = 0.06  # of the values of options that cannot be meant


class Values(NamedTuple):
    """Values of an option, and others that it does not take; none for a switch."""

    good: tuple[Any, ...] = ()
    odd: tuple[Any, ...] = ()


def of(*good: Any, odd: tuple[Any, ...] = ()) -> Values:
    return Values(good, odd)


Options = dict[str, Values]
SWITCH = Values()
ALLOWED = "base,nonfinite,approximate,labels"
READING: Options = {"--values": SWITCH, "--json": SWITCH}
STORING: Options = {
    "--to": of("peft", "native", "native", odd=("gguf", "adapterhub", "pefft")),
    "--dtype": of("bf16", "fp16", "fp32", odd=("int8",)),
    "--ranks": of("per-site", "uniform"),
    "--peft-version": of("0.11", "0.17", odd=("0.5", "9", "x")),
    "--experts": of("fused", "per-expert"),
    "--strict": SWITCH,
    "--force": SWITCH,
    "--jobs": of(1, 2, odd=(0,)),
    "--dry-run": SWITCH,
    "--json": SWITCH,
}
WRITING: Options = {
    **STORING,
    "--as": of("lora", odd=("dora",)),
    "--allow": of("base", "nonfinite", "approximate", "labels", ALLOWED, ALLOWED, odd=("x",)),
}
BUDGET: Options = {
    "--rank": of(1, 2, 4, 64, odd=(0, -1, 10**12)),
    "--energy": of(0.5, 0.99, 1, odd=(0, "nan")),
    "--max-error": of(0.5, 0.01, 0, odd=(1, "inf")),
    "--per-site": SWITCH,
}
MERGING: Options = {
    "--method": of("linear", "cat", "svd", "peft-linear", "product", odd=("ia3-linear", "ties")),
    "--weights": of(
        "1,1", "0.7,0.3", "ema:0.9", odd=("last:2", "0,0", "-1,1", "nan,1", "1e308,1e308")
    ),
    "--sum": SWITCH,
    "--site": of(
        "*q_proj:a=0.3", "re:.*[02].*:a=1,b=-1", odd=("*@add:b=0", "*:x=1", "[:a=1", "re:(:a=1")
    ),
    "--heads": of("a", "average", "concat", "separate", "drop", odd=("lm_head=a", "error", "x")),
}
FUSING: Options = {
    **MERGING,
    "--dtype": WRITING["--dtype"],
    "--rounding": of("nearest", "stochastic", "adaptive", "auto", odd=("up",)),
    "--quant": of(
        "same", "nf4", "nf4,double", "int8", "bf16", odd=("fp32", "int8-channel", "int4-g128")
    ),
    "--scales": of("solve", "only", "keep"),
    "--trained-on": of("quantised", "nf4", odd=("original", "int8", "x")),
    "--max-growth": of("5%", "0%", odd=("x", "nan%")),
    "--seed": of(0, 7, odd=(-1, 2**70)),
    **dict.fromkeys(("--keep-tied", "--strict", "--force", "--dry-run", "--json"), SWITCH),
    "--jobs": of(1, 2),
}
EXTRACTING: Options = {
    "--embeddings": of("lora", "full", "skip"),
    "--vectors": of("full", "skip"),
    **BUDGET,
    **STORING,
}


def some_of(options: Options, random: Random) -> Line:
    """Mostly none to three of these options."""
    line: Line = []
    for name in random.sample(
        sorted(options), min(random.choice((0, 0, 1, 1, 2, 3)), len(options))
    ):
        good, odd = options[name]
        values = odd if odd and random.random() < ODD else good
        line += [name, str(random.choice(values))] if values else [name]
    return line


class Inputs:
    """The files of a folder that commands may name: what lay there before anything was changed."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder = folder
        self.source = source
        self.names = sorted(path.name for path in source.iterdir())

    def path(self, stem: str) -> str | None:
        """The file or folder of this name, without its suffix."""
        found = [name for name in self.names if Path(name).stem == stem]
        return str(self.folder / found[0]) if found else None

    @property
    def adapters(self) -> list[str]:
        return [path for stem in ("a", "b") if (path := self.path(stem))]

    @property
    def outputs(self) -> list[str]:
        return [path for stem in ("merged", "fused", "extracted") if (path := self.path(stem))]

    @property
    def readable(self) -> list[str]:
        """All that are adapters."""
        return [*self.adapters, *(path for path in self.outputs if not path.endswith("fused"))]

    def base(self, random: Random, likely: float) -> Line:
        base = self.path("base")
        return ["--base", base] if base and random.random() < likely else []

    def output(self, random: Random, *suffixes: str) -> Line:
        return ["-o", str(self.folder / f"out{random.choice(suffixes)}")]

    def named_by(self, output: str) -> Line:
        """Where the inputs lie now that a report names."""
        report = json.loads(
            (self.source / Path(output).name / "adaptmerge.json").read_text("utf-8")
        )
        paths = {one["name"]: self.path(one["name"]) for one in report["inputs"]}
        pairs = [f"{name}={path}" for name, path in paths.items() if path]
        return [part for pair in pairs for part in ("--input", pair)]


def _sources(inputs: Inputs, random: Random) -> Line:
    """Adapters, some with a weight or what no config says."""
    weight = random.choice(("", "", ":0.5", ":1", ":-1"))
    alpha = random.choice(("?alpha=8", "?alpha=0", "?alpha=x")) if random.random() < ODD else ""
    sources = [f"{Path(path).stem}={path}{weight}{alpha}" for path in inputs.adapters]
    return sources[: random.choice((1, 2, 2, 2))]


def inspect(inputs: Inputs, random: Random) -> Line:
    chosen = inputs.readable
    options = some_of(READING, random)
    return [*random.sample(chosen, min(2, len(chosen))), *options, *inputs.base(random, 0.4)]


def convert(inputs: Inputs, random: Random) -> Line:
    chosen = random.choice(inputs.readable)
    options = some_of({**BUDGET, **WRITING}, random)
    out = inputs.output(random, "", "", ".safetensors", ".gguf")
    return [chosen, *out, *options, *inputs.base(random, 0.5)]


def combine(inputs: Inputs, random: Random) -> Line:
    options = some_of({**BUDGET, **WRITING, **MERGING}, random)
    out = inputs.output(random, "", "", "", ".safetensors")
    return [*_sources(inputs, random), *out, *options, *inputs.base(random, 0.5)]


def diff(inputs: Inputs, random: Random) -> Line:
    own = {"--tolerance": of(1e-5, 0, odd=("nan",)), "--all": SWITCH, "--json": SWITCH}
    options = some_of(own, random)
    both = random.choices(inputs.readable, k=2)
    return [*both, *options, *inputs.base(random, 0.5)]


def explain(inputs: Inputs, random: Random) -> Line:
    sites = ("*", "*", "*", "q_proj", "*q_proj", "nothing", "[")
    options = some_of({"--json": SWITCH}, random)
    return [random.choice(inputs.outputs), random.choice(sites), *options]


def extract(inputs: Inputs, random: Random) -> Line:
    base, tuned = inputs.path("base"), inputs.path("tuned") or inputs.path("fused")
    options = some_of(EXTRACTING, random)
    rank = [] if random.random() < 0.1 else ["--rank", "2"]
    return [str(base), str(tuned), *inputs.output(random, ""), *rank, *options]


def fuse(inputs: Inputs, random: Random) -> Line:
    lenient = ["--allow", "base,loss", "--max-loss", "100"] if random.random() < 0.7 else []
    options = some_of(FUSING, random)
    moments = inputs.path("moments")
    if moments and random.random() < 0.7:
        options += ["--calibration", moments]
    out = inputs.output(random, "")
    return [str(inputs.path("base")), *_sources(inputs, random), *out, *lenient, *options]


def verify(inputs: Inputs, random: Random) -> Line:
    output = random.choice(inputs.outputs)
    options = some_of({"--layerwise": SWITCH, "--json": SWITCH}, random)
    junit = ["--junit", str(inputs.folder / "junit.xml")] if random.random() < 0.1 else []
    more = [*inputs.named_by(output), *options, *junit, *inputs.base(random, 0.6)]
    return [output, *more, "--device", "cpu"]


def run(inputs: Inputs, random: Random) -> Line:
    options = some_of(dict.fromkeys(("--force", "--dry-run", "--json"), SWITCH), random)
    options += ["--locked"] if random.random() < ODD else []
    return [str(inputs.path("recipe")), *inputs.output(random, ""), *options]


def calibrate(inputs: Inputs, random: Random) -> Line:
    own = {
        "--tokens": of(128, 256, odd=(0,)),
        "--rank": of(4, 0, odd=(-1, 10**9)),
        "--json": SWITCH,
    }
    out = ["-o", str(inputs.folder / "out.safetensors")]
    text = inputs.path("text")
    return [str(inputs.path("base")), str(text), *out, *some_of(own, random)]


def _has(*stems: str) -> Callable[[Inputs], bool]:
    return lambda inputs: all(inputs.path(stem) for stem in stems)


COMMANDS: dict[str, tuple[Callable[[Inputs, Random], Line], Callable[[Inputs], bool], int]] = {
    # the command line, the inputs that it is for, and how often it is chosen
    "inspect": (inspect, lambda inputs: bool(inputs.adapters), 5),
    "convert": (convert, lambda inputs: bool(inputs.adapters), 5),
    "combine": (combine, lambda inputs: bool(inputs.adapters), 5),
    "diff": (diff, lambda inputs: bool(inputs.adapters), 3),
    "fuse": (fuse, _has("base", "a"), 4),
    "run": (run, _has("recipe"), 2),
    "explain": (explain, lambda inputs: bool(inputs.outputs), 3),
    "verify": (verify, lambda inputs: bool(inputs.outputs), 7),
    "extract": (
        extract,
        lambda inputs: _has("base", "tuned")(inputs) or _has("base", "fused")(inputs),
        4,
    ),
    "calibrate": (calibrate, _has("base", "text"), 3),
}


def line(inputs: Inputs, random: Random) -> Line:
    """A command that fits, with options."""
    fit = {name: often for name, (_, fits, often) in COMMANDS.items() if fits(inputs)}
    (name,) = random.choices(list(fit), list(fit.values()))
    return [name, *COMMANDS[name][0](inputs, random)]
