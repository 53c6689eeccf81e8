"""`python -m bench.gpu`: verify on an accelerator and on the CPU: the same verdicts, and their times.

A merge, a DoRA and a model fused into NF4, of random weights that are made first; `make gpu-check` runs it
after the tests of devices. Without an accelerator it says what was left out; --device cpu runs all of it on
small models, where both columns are of the CPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from adaptmerge.commands.combine import Options, combine
from adaptmerge.commands.fuse import FuseOptions, fuse
from adaptmerge.commands.verify import PASS, Questions, Verdict, verify
from adaptmerge.formats.inputs import InputSpec
from adaptmerge.runtime.models import device_named
from bench.machine import describe
from bench.models import make_model, make_model_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LARGE, MIDDLE, SMALL = "1.1B", "0.3B", "tiny"
SKIPPED = (
    "verify of a merge, of a DoRA and of a model fused into NF4 on CUDA or MPS",
    f"times of verify for a random model of {LARGE} on both",
)


class Row(NamedTuple):
    """What was verified, and the verdict and seconds on the CPU and on the device."""

    what: str
    size: str
    cpu: tuple[Verdict, float]
    device: tuple[Verdict, float]

    @property
    def same(self) -> bool:
        """Whether both pass, by the same checks."""
        ours, theirs = ([(c.name, c.status) for c in v.checks] for v, _ in (self.cpu, self.device))
        return ours == theirs and self.cpu[0].status == self.device[0].status == PASS


def merged(folder: Path) -> Path:
    """Two LoRAs in one."""
    specs = [InputSpec(str(folder / name), name) for name in ("a", "b")]
    combine(specs, folder / "out", Options(base=str(folder / "base")))
    return folder / "out"


def dora(folder: Path) -> Path:
    """Two DoRAs in one."""
    for name in ("a", "b"):
        _add_magnitudes(folder / name, folder / "base")
    return merged(folder)


def nf4(folder: Path) -> Path:
    """A LoRA in weights that are quantised anew."""
    lenient = FuseOptions(quant="nf4", max_loss=100.0, allow=frozenset({"base", "loss"}))
    fuse(str(folder / "base"), [InputSpec(str(folder / "a"), "a")], folder / "out", lenient)
    return folder / "out"


def _add_magnitudes(adapter: Path, base: Path) -> None:
    """The norms of the base's rows, a little longer, as magnitudes."""
    values: dict[str, torch.Tensor] = {}
    for path in base.glob("*.safetensors"):
        values |= {name: value for name, value in load_file(path).items() if value.ndim == 2}
    tensors = load_file(adapter / WEIGHTS)
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        norms = values[f"{module.removeprefix('base_model.model.')}.weight"].float().norm(dim=1)
        tensors[f"{module}.lora_magnitude_vector"] = 1.05 * norms
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    said = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    text = json.dumps({**said, "use_dora": True})
    (adapter / CONFIG).write_text(text, encoding="utf-8")


def measure(what: str, make: Callable[[Path], Path], size: str, device: str) -> Row:
    """One kind of output verified on the CPU and on the device."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(folder / "base", size=size)
        for name, scale in (("a", 0.02), ("b", 0.03)):
            make_model_adapter(folder / name, size=size, scale=scale)
        output = make(folder)
        verdicts = [_timed(output, folder, on) for on in ("cpu", device)]
    return Row(what, size, *verdicts)


def _timed(output: Path, folder: Path, device: str) -> tuple[Verdict, float]:
    start = time.perf_counter()
    verdict = verify(output, Questions(base=str(folder / "base"), device=device))
    return verdict, time.perf_counter() - start


def lines(rows: list[Row], device: str) -> list[str]:
    """A table in Markdown."""
    found = [f"| verify | model | cpu | {device} | verdicts |", "| --- | --- | ---: | ---: | --- |"]
    for row in rows:
        seconds = " | ".join(f"{one[1]:.1f} s" for one in (row.cpu, row.device))
        verdict = "the same" if row.same else "DIFFERENT"
        found.append(f"| {row.what} | {row.size} | {seconds} | {verdict} |")
    return found


def main() -> None:
    """Measures and prints; exit code 1 where a verdict is not that of the CPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    asked = parser.parse_args()
    device = device_named(asked.device)
    if device == "cpu" and asked.device == "auto":
        print("no accelerator here; skipped for lack of one:", *SKIPPED, sep="\n- ")
        return
    large, middle = (SMALL, SMALL) if device == "cpu" else (LARGE, MIDDLE)
    print(*(f"- {name}: {what}" for name, what in describe(Path.cwd()).items()), sep="\n")
    if device.startswith("cuda"):
        print(f"- device: {torch.cuda.get_device_name(device)}")
    kinds = (("a merge", merged, large), ("a DoRA", dora, middle), ("fused NF4", nf4, middle))
    rows = [measure(what, make, size, device) for what, make, size in kinds]
    print(*lines(rows, device), sep="\n")
    for row in rows:
        if not row.same:
            print(row.what, *row.cpu[0].checks, *row.device[0].checks, sep="\n  ")
    raise SystemExit(not all(row.same for row in rows))


if __name__ == "__main__":
    main()
