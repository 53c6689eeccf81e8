"""`python -m bench.trained TEXTS`: what trained adapters keep when they are fused into quantised bases.

TEXTS is a folder with shakespeare.txt, perl.txt, cheaders.txt and python.txt, 60,000 characters or more of
each, that the adapters of fixtures/tinyllama were not trained on. Prints the table of
docs/quantised-evidence.md: the part of an adapter's benefit in bits per byte that is left, unmerged being 100,
by fuse(), and by adding the delta to dequantised weights and quantising the sum anew, as PEFT does.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from adaptmerge.fuse import FuseOptions, fuse
from adaptmerge.inputs import InputSpec
from adaptmerge.quantised import open_values
from bench.table import markdown

TINY = Path("fixtures/tinyllama")
ADAPTERS = {
    "shakespeare": "lora-r8-shakespeare",
    "perl": "lora-r8-perl",
    "cheaders": "lora-r8-cheaders",
}
OTHER = "python"  # text that no adapter was trained on
RATIOS = (0.1, 0.03, 0.01)
WINDOW = 256  # tokens
GROUP = 32  # columns that share a scale, of the int4 grid with zero points
LOSSY = FuseOptions(allow=frozenset({"loss", "base"}))
Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Bits:
    """The negative log likelihood of every window of a text, in bits, and the bytes of the text."""

    windows: torch.Tensor
    nbytes: int

    @property
    def per_byte(self) -> float:
        return float(self.windows.sum()) / self.nbytes


@dataclass(frozen=True)
class Kept:
    """The part of a benefit that is left, and its standard error over windows."""

    part: float
    error: float

    def __str__(self) -> str:
        return f"{100 * self.part:.1f} ± {100 * self.error:.1f}"


def kept(base: Bits, beside: Bits, fused: Bits) -> Kept:
    """How much of what an adapter does beside its base a fused model does."""
    benefit = base.windows - beside.windows
    part = float((base.windows - fused.windows).sum() / benefit.sum())
    apart = (base.windows - fused.windows) - part * benefit
    count = len(apart)
    return Kept(part, math.sqrt(count) * float(apart.std()) / abs(float(benefit.sum())))


class Judge:
    """The tiny Llama with any weights, and texts to try it on."""

    def __init__(self, texts: Path) -> None:
        from tokenizers import Tokenizer
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(TINY / "base").float().eval()
        tokenizer = Tokenizer.from_file(str(TINY / "base" / "tokenizer.json"))
        self._texts: dict[str, tuple[torch.Tensor, int]] = {}
        for name in (*ADAPTERS, OTHER):
            ids = tokenizer.encode((texts / f"{name}.txt").read_text(encoding="utf-8")).ids
            whole = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
            self._texts[name] = whole, len(tokenizer.decode(whole.flatten().tolist()).encode())

    def bits(self, weights: Weights, text: str) -> Bits:
        """What the text costs a model with these weights."""
        self._model.load_state_dict(weights, strict=False)
        windows, nbytes = self._texts[text]
        found = []
        with torch.no_grad():
            for part in windows.split(16):
                logits = self._model(part).logits[:, :-1].log_softmax(-1)
                chosen = logits.gather(2, part[:, 1:, None])[..., 0]
                found.append(-chosen.sum(1) / math.log(2))
        return Bits(torch.cat(found).double(), nbytes)


def deltas(name: str) -> dict[str, torch.Tensor]:
    """alpha / r B A of a LoRA, by the names of the weights."""
    folder = TINY / ADAPTERS[name]
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, down in tensors.items():
        if key.endswith("lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            up = tensors[key.replace("lora_A", "lora_B")]
            found[f"{module}.weight"] = config["lora_alpha"] / config["r"] * (up @ down)
    return found


def weight_for(base: Weights, delta: Weights, ratio: float) -> float:
    """What an adapter counts so that |dW| / |W| is a ratio over all its sites."""
    size = sum(float(base[name].square().sum()) for name in delta) ** 0.5
    return ratio * size / sum(float(d.square().sum()) for d in delta.values()) ** 0.5


def anew(kind: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A weight quantised by the library of a grid with scales of its own, and dequantised."""
    if kind in ("nf4", "nf4,double", "fp4", "int8"):
        from adaptmerge.schemes.bitsandbytes.codes import round_trip

        return lambda weight: round_trip(weight.half() if kind == "int8" else weight, kind)
    if kind == "int4 g32":
        return _int4
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    return lambda weight: torch.from_numpy(
        gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), number), number).copy()
    )


def _int4(weight: torch.Tensor) -> torch.Tensor:
    """Minimum and maximum of every 32 columns in 15 steps, as GPTQ and AWQ store it."""
    runs = weight.view(len(weight), -1, GROUP)
    low, high = runs.amin(2, True).clamp(max=0), runs.amax(2, True).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(0, 15)
    codes = ((runs / scale).round() + zero).clamp(0, 15)
    return ((codes - zero) * scale).view(weight.shape)


def bases(folder: Path) -> Iterator[tuple[str, Path]]:
    """The tiny Llama in every grid, as its own tools store it, by name."""
    from tests.fuse.made_models import KINDS, quantised_base
    from tests.oracles import llama_cpp

    for kind in KINDS:
        yield kind, quantised_base(TINY / "base", folder / kind.replace(",", "-"), kind)
    from tests.fuse.smoothed import smoothed_base

    yield "int4 g32", smoothed_base(TINY / "base", folder / "awq", "awq", smooth=False)
    for kind in ("Q4_0", "Q8_0"):
        blocks = {"blk": kind, "token_embd": "F32", "output": "F32"}
        yield kind, llama_cpp.model(TINY / "base", folder / f"{kind}.gguf", blocks)


def values(source: Path) -> dict[str, torch.Tensor]:
    """What the weights of a base stand for, in float32."""
    return {name: ref.read().float() for name, ref in open_values(str(source)).tensors.items()}


def fused(source: Path, weights: Mapping[str, float], output: Path) -> dict[str, torch.Tensor]:
    """The values of a base with adapters fused in."""
    specs = [InputSpec(str(TINY / ADAPTERS[n]), n, weight) for n, weight in weights.items()]
    fuse(str(source), specs, output, LOSSY)
    return values(output)


def summed(base: Weights, weights: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Weights with deltas beside them."""
    found = dict(base)
    for name, weight in weights.items():
        for key, delta in deltas(name).items():
            found[key] = found[key] + weight * delta
    return found


def requantised(
    base: Weights, beside: Weights, again: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Changed weights quantised anew."""
    return {name: value if value is base[name] else again(value) for name, value in beside.items()}


def cells(judge: Judge, kind: str, source: Path, folder: Path) -> Iterator[Sequence[str]]:
    """A line for every choice of adapters and ratio."""
    base = values(source)
    choices: list[tuple[str, ...]] = [(name,) for name in ADAPTERS]
    choices += [("perl", "cheaders"), tuple(ADAPTERS)]
    for ratio in RATIOS:
        for names in choices:
            weights = {name: weight_for(base, deltas(name), ratio) for name in names}
            beside = summed(base, weights)
            output = folder / f"{kind}-{ratio}-{'+'.join(names)}".replace(",", "-")
            ours, theirs = fused(source, weights, output), requantised(base, beside, anew(kind))
            yield _line(judge, kind, ratio, names, base, beside, theirs, ours)


def _line(
    judge: Judge,
    kind: str,
    ratio: float,
    names: Sequence[str],
    base: Weights,
    beside: Weights,
    theirs: Weights,
    ours: Weights,
) -> Sequence[str]:
    parts, bits = [], []
    for text in names:
        before, after = judge.bits(base, text), judge.bits(beside, text)
        new, old = judge.bits(ours, text), judge.bits(theirs, text)
        parts.append((kept(before, after, old), kept(before, after, new)))
        bits.append(" / ".join(f"{one.per_byte:.4f}" for one in (before, after, old, new)))
    off = judge.bits(ours, OTHER).per_byte - judge.bits(beside, OTHER).per_byte
    return (
        kind,
        f"{ratio:g}",
        " + ".join(names),
        ", ".join(bits),
        ", ".join(str(old) for old, _ in parts),
        ", ".join(str(new) for _, new in parts),
        f"{off:+.4f}",
    )


HEADS = ("grid", "ratio", "adapters", "bits per byte: base / unmerged / requantised / fuse")
HEADS += ("requantised keeps, %", "fuse keeps, %", f"{OTHER}: bits per byte from unmerged")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m bench.trained", description=__doc__)
    parser.add_argument("texts", type=Path)
    judge = Judge(parser.parse_args().texts)
    with tempfile.TemporaryDirectory() as folder:
        found: list[Sequence[str]] = []
        for kind, source in bases(Path(folder)):
            lines = list(cells(judge, kind, source, Path(folder)))
            found += lines
            print(markdown([HEADS, *lines], range(3, len(HEADS))), flush=True)


if __name__ == "__main__":
    main()
