"""One measurement in a process of its own: `python -m bench.worker NAME ARGS...` prints one number.

Start-up, warm-up and reading the inputs into the page cache are done before the clock starts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench import algebra, verifying
from bench.memory import peak
from bench.shapes import TENSORS

if TYPE_CHECKING:
    from bench.nf4_model import Cost

WORKERS = 2
SCALE = 1.0  # alpha / r = 2, times the weight 1/2
RANK = 16


def merge(method: str, warm_up: str, output: str, *inputs: str) -> float:
    """Seconds of combine(), from the first read to the last byte on disk."""
    _combine(method, [warm_up, warm_up], f"{output}-warm-up")
    _settle(inputs, output)
    return _timed(lambda: _combine(method, inputs, output))


def dora(base: str, output: str, *inputs: str) -> float:
    """Seconds of one thread that combine() takes of DoRAs and LoRAs with their base."""
    _combine("linear", inputs, f"{output}-warm-up", base=base, jobs=1)
    _settle([*inputs, base], output)
    return _worked(lambda: _combine("linear", inputs, output, base=base, jobs=1))


def dora_norms(base: str, *inputs: str) -> float:
    """The same of the arithmetic alone, with reading the base."""
    from bench.combining import norms_of

    torch.set_num_threads(1)
    folders = list(map(Path, inputs))
    norms_of(Path(base), folders)
    return _worked(lambda: norms_of(Path(base), folders))


def experts(output: str, *inputs: str) -> float:
    """Seconds of combine() of adapters of experts."""
    _combine("linear", inputs, f"{output}-warm-up")
    _settle(inputs, output)
    return _timed(lambda: _combine("linear", inputs, output))


def verify(method: str, warm_up: str, output: str, *inputs: str) -> float:
    """Seconds of verify of a merge, without a base."""
    for merged, sources in ((f"{output}-warm-up", [warm_up, warm_up]), (output, inputs)):
        _combine(method, sources, merged)
        verifying.verify(merged)
    _ready([*inputs, output])
    return _timed(lambda: verifying.verify(output))


def verify_base(warm_up: str, warm_up_adapter: str, output: str, base: str, *inputs: str) -> float:
    """Seconds of verify of a linear merge with its base, all that it can ask being asked."""
    merges = (f"{output}-warm-up", warm_up, [warm_up_adapter] * 2), (output, base, inputs)
    for merged, model, sources in merges:
        _combine("linear", sources, merged, base=model)
    verifying.verify(merges[0][0], warm_up)
    _ready([*inputs, output, base])
    return _timed(lambda: verifying.verify(output, base))


def forward(warm_up: str, base: str) -> float:
    """Seconds of loading a base and running it once."""
    verifying.forward(warm_up)
    _ready([base])
    return _timed(lambda: verifying.forward(base))


def bare(warm_up: str, *inputs: str) -> float:
    """Seconds of the same merge's algebra alone, from memory, without files."""
    _bare([warm_up, warm_up])()
    return _timed(_bare(inputs))


def copy(output: str, *inputs: str) -> float:
    """Seconds of copying the inputs' tensor files to the disk."""
    _settle(inputs, output)
    return _timed(lambda: _copy(inputs, Path(output)))


def peft(size: str) -> float:
    """Seconds of PEFT's SVD merge of two adapters of one size x size linear, from memory."""
    model = _peft_model(int(size))
    return _timed(
        lambda: model.add_weighted_adapter(
            ["default", "other"], [0.5, 0.5], "merged", combination_type="svd", svd_rank=RANK
        )
    )


def memory(output: str, *inputs: str) -> float:
    """MB of anonymous memory at the peak of a merge, above those when torch was imported."""
    return _memory_of(lambda: _combine("svd", inputs, output), output, inputs)


def memory_verify(output: str, base: str, *inputs: str) -> float:
    """MB of anonymous memory at the peak of verify --layerwise, above those when torch was imported."""
    command = [sys.executable, "-m", "adaptmerge", "combine", *inputs, "--base", base, "-o", output]
    _shell([*command, "--force"])
    return _peak_of(lambda: verifying.verify(output, base, layerwise=True))


def memory_forward(base: str) -> float:
    """The same of one forward whose weights are read when they are used."""
    return _peak_of(lambda: verifying.forward_layerwise(base))


def fuse(rounding: str, warm_up: str, warm_up_adapter: str, output: str, *inputs: str) -> float:
    """Seconds of fuse() for a base and an adapter, from the first read to the last byte on disk."""
    _fuse(rounding, [warm_up, warm_up_adapter], f"{output}-warm-up")
    _settle(inputs, output)
    with _dropped(output):
        return _timed(lambda: _fuse(rounding, inputs, output))


def copy_model(output: str, base: str) -> float:
    """Seconds of copying a model to the disk: cp -r, then sync."""
    _settle([base], output)
    with _dropped(output):
        return _timed(lambda: _shell(["cp", "-r", base, output], ["sync"]))


def fuse_peft(output: str, *inputs: str) -> float:
    """Seconds of loading a model, merging an adapter into it and saving it with PEFT."""
    import peft  # noqa: F401
    import transformers  # noqa: F401

    _settle(inputs, output)
    with _dropped(output):
        return _timed(lambda: _fuse_with_peft(inputs, output))


def memory_fuse(rounding: str, output: str, *inputs: str) -> float:
    """MB of anonymous memory at the peak of fuse(), above those when torch was imported."""
    return _memory_of(lambda: _fuse(rounding, inputs, output), output, inputs)


def memory_fuse_peft(output: str, *inputs: str) -> float:
    """The same of PEFT's way."""
    return _memory_of(lambda: _fuse_with_peft(inputs, output), output, inputs)


def nf4_site(out: str, width: str, rank: str) -> float:
    """Seconds of fusing into one NF4 matrix, from memory."""
    from bench import sites

    return sites.adaptive(int(out), int(width), int(rank))


def nf4_codes(out: str, width: str) -> float:
    """Seconds of our nearest NF4 codes of a matrix, from memory."""
    from bench import sites

    return sites.nearest(int(out), int(width))


def nf4_bitsandbytes(out: str, width: str) -> float:
    """The same of bitsandbytes' own."""
    from bench import sites

    return sites.bitsandbytes(int(out), int(width))


def nf4_model(jobs: str, output: str, *inputs: str) -> float:
    """Seconds of the command that fuses into a whole NF4 model, with its start."""
    return _nf4_model(jobs, output, inputs).seconds


def memory_nf4_model(jobs: str, output: str, *inputs: str) -> float:
    """MB of anonymous memory at its peak, all of it."""
    return _nf4_model(jobs, output, inputs).peak / 1e6


def _nf4_model(jobs: str, output: str, inputs: Sequence[str]) -> Cost:
    from bench import nf4_model

    _settle(inputs, output)
    base, adapter = inputs
    return nf4_model.fused(base, adapter, Path(output), int(jobs))


def _memory_of(work: Callable[[], object], output: str, inputs: Sequence[str]) -> float:
    _settle(inputs, output)
    with _dropped(output):
        return _peak_of(work)


def _peak_of(work: Callable[[], object]) -> float:
    with peak() as most:
        before = most[0]
        work()
    return (most[0] - before) / 1e6


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _worked(work: Callable[[], object]) -> float:
    """Seconds of processor time."""
    start = time.process_time()
    work()
    return time.process_time() - start


def _combine(
    method: str,
    inputs: Sequence[str],
    output: str,
    base: str | None = None,
    jobs: int = WORKERS,
) -> None:
    # imported here: memory() counts what that takes
    from adaptmerge.commands.combine import Options, combine
    from adaptmerge.formats.inputs import InputSpec

    specs = [InputSpec(source) for source in inputs]
    options = Options(method=method, jobs=jobs, force=True, base=base)
    combine(specs, Path(output), options)


def _fuse(rounding: str, inputs: Sequence[str], output: str) -> None:
    from adaptmerge.commands.fuse import FuseOptions, fuse
    from adaptmerge.formats.inputs import InputSpec

    base, *adapters = inputs
    options = FuseOptions(
        rounding=rounding, jobs=WORKERS, force=True, allow=frozenset({"loss"}), total=True
    )
    fuse(base, [InputSpec(source) for source in adapters], Path(output), options)


def _fuse_with_peft(inputs: Sequence[str], output: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    base, adapter = inputs
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)


def _shell(*commands: Sequence[str]) -> None:
    for command in commands:
        subprocess.run(command, check=True)


def _bare(inputs: Sequence[str]) -> Callable[[], None]:
    from safetensors.torch import load_file

    # cloned: the file is mapped, and reading it is no algebra
    loaded = [load_file(Path(source) / TENSORS) for source in inputs]
    tensors = [{name: value.clone() for name, value in found.items()} for found in loaded]
    return lambda: algebra.merge_all(tensors, scale=SCALE, rank=RANK, workers=WORKERS)


def _copy(inputs: Sequence[str], output: Path) -> None:
    output.mkdir()
    for number, source in enumerate(inputs):
        target = output / str(number)
        shutil.copyfile(Path(source) / TENSORS, target)
        _sync(target)
    _sync(output)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _peft_model(size: int):  # type: ignore[no-untyped-def]
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(size, size, bias=False))
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(layer, config)
    model.add_adapter("other", config)
    return model


def _settle(inputs: Sequence[str], output: str) -> None:
    """The same state for all: no output, nothing waiting to be written, inputs in the page cache."""
    shutil.rmtree(output, ignore_errors=True)
    _ready(inputs)


def _ready(inputs: Sequence[str]) -> None:
    for path in [path for source in inputs for path in Path(source).glob("*.safetensors")]:
        with path.open("rb") as file:
            while file.read(1 << 20):
                pass
    os.sync()


@contextmanager
def _dropped(output: str) -> Iterator[None]:
    """Removes the output at the end: models are large."""
    try:
        yield
    finally:
        shutil.rmtree(output, ignore_errors=True)


MEASURES: dict[str, Callable[..., float]] = {
    "merge": merge,
    "dora": dora,
    "dora-norms": dora_norms,
    "experts": experts,
    "verify": verify,
    "verify-base": verify_base,
    "forward": forward,
    "bare": bare,
    "copy": copy,
    "peft": peft,
    "memory": memory,
    "memory-verify": memory_verify,
    "memory-forward": memory_forward,
    "fuse": fuse,
    "copy-model": copy_model,
    "fuse-peft": fuse_peft,
    "memory-fuse": memory_fuse,
    "memory-fuse-peft": memory_fuse_peft,
    "nf4-site": nf4_site,
    "nf4-codes": nf4_codes,
    "nf4-bitsandbytes": nf4_bitsandbytes,
    "nf4-model": nf4_model,
    "memory-nf4-model": memory_nf4_model,
}

if __name__ == "__main__":
    print(MEASURES[sys.argv[1]](*sys.argv[2:]))
