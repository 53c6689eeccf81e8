"""LoRA and DoRA: keys and config to edits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from adaptmerge.edits import Add, Dora
from adaptmerge.factors import Leaf, Product, low_rank
from adaptmerge.files.refs import TensorRef
from adaptmerge.formats.peft.config import ASSUMED_SCALE, PeftConfig
from adaptmerge.formats.peft.keys import Keys
from adaptmerge.formats.peft.tuner import Parts, Reading
from adaptmerge.graph import Edit, Kind, Layer, Note, Site
from adaptmerge.registry import ReadOptions


def read(reading: Reading) -> list[Edit]:
    """The edits of a LoRA or DoRA file, module by module."""
    keys, config, options, notes = reading.keys, reading.config, reading.options, reading.notes
    if config.r is None and options.alpha is None:
        notes.append(Note(*ASSUMED_SCALE))
    edits: list[Edit] = []
    for module, parts in keys.modules.items():
        edits += _module(keys, config, options, module, parts)
    if config.use_dora is False and any(edit.kind == "dora" for edit in edits):
        notes.append(
            Note(
                Kind.ASSUMED, "DoRA magnitudes are stored though use_dora is not set: read as DoRA"
            )
        )
    notes += unread_by_peft(config, edits)
    return edits


def unread_by_peft(config: PeftConfig, edits: Sequence[Edit]) -> list[Note]:
    """Tensors that PEFT ignores, since its config does not say that they are there; they are read."""
    added = [edit.site for edit in edits if edit.kind in ("add", "dora")]
    lost = config.unselected(site.module for site in added)
    notes = []
    if lost:
        what = f"target_modules selects {len(lost)} stored sites not, which PEFT ignores: read as active"
        notes.append(Note(Kind.ASSUMED, what, site=lost[0]))
    if config.has_no_bias and any(site.param == "bias" for site in added):
        what = "biases are stored though lora_bias is not set, which PEFT ignores: read as active"
        notes.append(Note(Kind.ASSUMED, what))
    return notes


def _module(
    keys: Keys, config: PeftConfig, options: ReadOptions, module: str, parts: Parts
) -> list[Edit]:
    problems = _module_problems(config, module, parts)
    if problems:
        keys.problems += problems
        return []
    up, down, layer = _sides(parts)
    rank = down.shape[0]
    scale = config.scale(module, rank, options.alpha)
    site = Site(module, "weight", layer)
    factor = low_rank(up, down, scale)
    edits: list[Edit] = []
    if "lora_magnitude_vector" in parts:
        edits.append(Dora(site, factor, parts["lora_magnitude_vector"]))
    else:
        edits.append(Add(site, factor))
    if "lora_B.bias" in parts:
        bias = parts["lora_B.bias"]
        column = Product((Leaf(bias.reshape(bias.count, 1)),), scale)
        edits.append(Add(Site(module, "bias", layer), column))
    return edits


def _sides(parts: Parts) -> tuple[TensorRef, TensorRef, Layer]:
    """(up, down) as canonical matrices (out, r) and (r, in), and the layer they are for."""
    if "lora_embedding_A" in parts:
        return parts["lora_embedding_A"].T, parts["lora_embedding_B"].T, Layer("embedding")
    up, down = parts["lora_B"], parts["lora_A"]
    if len(down.shape) == 2:
        return up, down, Layer("linear")
    rank, kernel = down.shape[0], down.shape[2:]
    flat = down.reshape(rank, math.prod(down.shape[1:]))
    return up.reshape(up.shape[0], rank), flat, Layer("conv", kernel)


def _module_problems(config: PeftConfig, module: str, parts: Parts) -> list[str]:
    pair = (
        ("lora_embedding_A", "lora_embedding_B")
        if "lora_embedding_A" in parts or ("lora_embedding_B" in parts)
        else ("lora_A", "lora_B")
    )
    missing = [name for name in pair if name not in parts]
    if missing:
        return [f"{module}: {' and '.join(missing)} is missing, found only {', '.join(parts)}"]
    a, b = parts[pair[0]], parts[pair[1]]
    if len(a.shape) != len(b.shape) or len(a.shape) < 2:
        return [f"{module}: {pair[0]} {list(a.shape)} and {pair[1]} {list(b.shape)} are no pair"]
    if len(a.shape) > 2 and math.prod(b.shape[2:]) != 1:
        return [f"{module}: {pair[1]} {list(b.shape)} has a kernel: expected 1x1"]
    if a.shape[0] != b.shape[1]:
        return [_rank_mismatch(module, pair, a, b)]
    expected = config.rank(module)
    if expected is not None and expected != a.shape[0]:
        return [
            f"{module}: {pair[0]} {list(a.shape)} has rank {a.shape[0]}, but the config says "
            f"{expected}: is this config of another adapter?"
        ]
    if config.use_dora and "lora_magnitude_vector" not in parts:
        return [f"{module}: use_dora is set but no lora_magnitude_vector is stored"]
    return []


def _rank_mismatch(module: str, pair: tuple[str, str], a: TensorRef, b: TensorRef) -> str:
    if len(a.shape) > 2 and b.shape[1] and a.shape[0] % b.shape[1] == 0:
        return f"{module}: a LoRA on a grouped convolution ({list(b.shape)}) is not read yet"
    return (
        f"{module}: {pair[0]} {list(a.shape)} has rank {a.shape[0]} and {pair[1]} {list(b.shape)} "
        f"has rank {b.shape[1]}: they must be equal"
    )
