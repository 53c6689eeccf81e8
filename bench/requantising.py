"""`python -m bench.requantising`: what docs/quantised-merging.md measured of quantising anew, as markdown.

An adapter merged into a layer in full precision that is quantised in the same step: with nearest codes, as
bitsandbytes has them for the sum, and as fuse() does it. The figures depend on no speed.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from adaptmerge.bases.open import open_base
from adaptmerge.commands.fuse import FuseOptions, fuse
from adaptmerge.formats.inputs import InputSpec
from adaptmerge.rounding.error_feedback import ADAPTIVE, NEAREST
from adaptmerge.schemes.coded import dequantised
from adaptmerge.schemes.view import view_of
from bench.shapes import TENSORS, write_config
from bench.table import markdown

ROWS, WIDTH, RANK = 1024, 4096, 16
HEAD, HEADS, VOCABULARY, SPREAD = 32, 4, 32, 0.02
PREFIX = "model.layers.0"
SITE = f"{PREFIX}.mlp.gate_proj"
RATIOS = (1e-3, 1e-2)
SCHEMES = (
    "nf4",
    "nf4,double",
    "fp4",
    "int8",
    "int4-g128",
    "int8-channel",
    "fp8-channel",
    "gptq-int4-g128",
)


def main() -> None:
    """Measures and prints."""
    heads = [
        "--quant",
        "ratio",
        "merged, then quantised: gain / sub",
        "fuse: gain / sub",
        r"error / \|W\|",
        "merged, then quantised",
    ]
    lines = [heads]
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = make_base(Path(folder) / "base"), make_adapter(Path(folder) / "adapter")
        for scheme in SCHEMES:
            for ratio in RATIOS:
                plain, kept = (
                    measured(base, adapter, ratio, scheme, rounding, Path(folder) / "out")
                    for rounding in (NEAREST, ADAPTIVE)
                )
                cells = [said(plain), said(kept), f"{kept[2]:.3f}", f"{plain[2]:.3f}"]
                lines.append([scheme, f"{ratio:.0e}", *cells])
    print(markdown(lines, range(1, len(heads))))


def said(found: tuple[float, float, float]) -> str:
    return f"{found[0]:.3f} / {found[1]:.1e}"


def make_base(folder: Path) -> Path:
    """A Llama of one layer in bfloat16 with a standard deviation of 0.02."""
    random = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens": (VOCABULARY, WIDTH),
        "lm_head": (VOCABULARY, WIDTH),
        f"{PREFIX}.self_attn.q_proj": (HEADS * HEAD, WIDTH),
        f"{PREFIX}.self_attn.k_proj": (HEAD, WIDTH),
        f"{PREFIX}.self_attn.v_proj": (HEAD, WIDTH),
        f"{PREFIX}.self_attn.o_proj": (WIDTH, HEADS * HEAD),
        SITE: (ROWS, WIDTH),
        f"{PREFIX}.mlp.up_proj": (ROWS, WIDTH),
        f"{PREFIX}.mlp.down_proj": (WIDTH, ROWS),
    }
    found = {n: torch.randn(shape, generator=random) * SPREAD for n, shape in shapes.items()}
    for name in (f"{PREFIX}.input_layernorm", f"{PREFIX}.post_attention_layernorm", "model.norm"):
        found[name] = torch.ones(WIDTH)
    folder.mkdir(parents=True)
    tensors = {f"{name}.weight": value.bfloat16() for name, value in found.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": ROWS,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_adapter(folder: Path) -> Path:
    """A float32 LoRA of one matrix, as large as it."""
    random = torch.Generator().manual_seed(1)
    down = torch.randn(RANK, WIDTH, generator=random)
    up = torch.randn(ROWS, RANK, generator=random)
    size = float((up.double() @ down.double()).norm())
    key = f"base_model.model.{SITE}"
    up *= SPREAD * math.sqrt(ROWS * WIDTH) / size
    folder.mkdir(parents=True)
    tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    write_config(folder, RANK, {SITE.removeprefix(f"{PREFIX}."): (ROWS, WIDTH)}, alpha=RANK)
    return folder


def measured(
    base: Path, adapter: Path, ratio: float, scheme: str, rounding: str, output: Path
) -> tuple[float, float, float]:
    """gain, sub and |error| / |W| of what was written, by the plain definitions in float64."""
    shutil.rmtree(output, ignore_errors=True)
    options = FuseOptions(quant=scheme, rounding=rounding, allow=frozenset({"loss"}))
    fuse(str(base), [InputSpec(str(adapter), weight=ratio)], output, options)
    sides = load_file(adapter / TENSORS)
    key = f"base_model.model.{SITE}"
    down = sides[f"{key}.lora_A.weight"].double()
    delta = ratio * sides[f"{key}.lora_B.weight"].double() @ down
    weight = load_file(base / "model.safetensors")[f"{SITE}.weight"].double()
    packed = view_of(open_base(str(output))).coded[f"{SITE}.weight"]
    error = dequantised(packed, (0, ROWS)).double() - weight - delta
    basis, _ = torch.linalg.qr(down.T)
    size = float(delta.norm())
    gain = 1 + float((error * delta).sum()) / size**2
    return gain, float((error @ basis).norm()) / size, float(error.norm() / weight.norm())


if __name__ == "__main__":
    main()
