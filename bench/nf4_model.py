"""`python -m bench.nf4_model`: the memory and time of fusing into a whole NF4 model with the command line.

Memory is all of the command's RssAnon at its peak: Python, torch and our own modules count.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from adaptmerge.schemes.bitsandbytes.codes import BLOCK, NF4, quantise_4bit
from bench.memory import SAMPLING, anonymous
from bench.models import SIZES, config, drawn, make_model_adapter, shapes

ROOT = Path(__file__).parent.parent
SCALE = 0.005  # of an adapter's factors: its deltas are a hundredth of the weights
# What transformers writes for a model that was loaded with load_in_4bit and nf4
QUANTISATION = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}


class Cost(NamedTuple):
    """Wall time and the peak of RssAnon (bytes) of a command."""

    seconds: float
    peak: int


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m bench.nf4_model", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1.1B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = str(make_nf4_model(Path(folder) / "base", size=asked.size))
        adapter = str(make_model_adapter(Path(folder) / "lora", size=asked.size, scale=SCALE))
        output = Path(folder) / "out"
        costs = [fused(base, adapter, output, asked.jobs) for _ in range(asked.rounds)]
        stored = sum(path.stat().st_size for path in Path(base).iterdir())
    said = ", ".join(f"{o.seconds:.1f} s {o.peak / 1e6:.0f} MB" for o in costs)
    print(f"{asked.size}, {stored / 1e6:.0f} MB of NF4, --jobs {asked.jobs}: {said}")
    seconds, peaks = zip(*costs, strict=True)
    print(f"median {median(seconds):.1f} s, most RssAnon {max(peaks) / 1e6:.0f} MB")


def make_nf4_model(folder: Path, *, size: str) -> Path:
    """A Llama of that size as transformers saves it from bitsandbytes: linears of layers in NF4, all else
    in bfloat16, in one file."""
    folder.mkdir(parents=True)
    generator, linears = torch.Generator().manual_seed(0), shapes(size)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in drawn(size, generator):
        linear = any(name.endswith(f".{end}.weight") for end in linears)
        tensors |= _nf4(name, value) if linear else {name: value.to(torch.bfloat16)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = {**config(SIZES[size]), "quantization_config": QUANTISATION}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def _nf4(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, absmax = quantise_4bit(value, NF4)
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16"}
    text = json.dumps({**state, "shape": list(value.shape)}).encode()
    return {
        name: (codes[0::2] << 4 | codes[1::2])[:, None],
        f"{name}.absmax": absmax,
        f"{name}.quant_map": torch.tensor(NF4),
        f"{name}.quant_state.bitsandbytes__nf4": torch.frombuffer(
            bytearray(text), dtype=torch.uint8
        ),
    }


def fused(base: str, adapter: str, output: Path, jobs: int) -> Cost:
    """The cost of `adaptmerge fuse`, from starting Python to its end, the output removed afterwards."""
    shutil.rmtree(output, ignore_errors=True)
    command = [
        "fuse",
        base,
        adapter,
        "-o",
        str(output),
        "--jobs",
        str(jobs),
        "--allow",
        "loss",
        "--json",
    ]
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(
        [sys.executable, "-m", "adaptmerge", *command], cwd=ROOT, stdout=subprocess.DEVNULL
    ) as running:
        while running.poll() is None:
            peak = max(peak, anonymous(running.pid))
            time.sleep(SAMPLING)
    seconds = time.perf_counter() - start
    shutil.rmtree(output, ignore_errors=True)
    if running.returncode:
        raise SystemExit(f"adaptmerge {' '.join(command)} failed: {running.returncode}")
    return Cost(seconds, peak)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the rows of one site have it
    main()
