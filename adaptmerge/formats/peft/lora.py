"""peft_type LORA: keys and config to edits. What the variants make of a pair is in lora_variants.py."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from adaptmerge.adapters.graph import Edit, Kind, Layer, Note, Site
from adaptmerge.algebra.factors import Leaf, Product
from adaptmerge.formats.peft import target_parameters
from adaptmerge.formats.peft.config import ASSUMED_SCALE, PeftConfig
from adaptmerge.formats.peft.initial import Initial, initial_pairs
from adaptmerge.formats.peft.lora_variants import SidePair, beside, edit_of, unequal
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading
from adaptmerge.tensors.refs import TensorRef

EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
LINEAR = ("lora_A", "lora_B")
INSIDE = ".base_layer.out_proj"  # where nn.MultiheadAttention keeps the second of its two pairs


def read(reading: Reading) -> list[Edit]:
    """The edits of a file, module by module."""
    config, notes = reading.config, reading.notes
    if config.r is None and reading.options.alpha is None:
        notes.append(Note(*ASSUMED_SCALE))
    edits = target_parameters.read(reading)
    initial = initial_pairs(reading)
    for module, parts in reading.keys.modules.items():
        try:
            edits += module_edits(reading, initial, module, parts)
        except ValueError as problem:
            reading.keys.problems.append(f"{module}: {problem}")
    if config.use_dora is False and any(edit.kind == "dora" for edit in edits):
        what = "DoRA magnitudes are stored though use_dora is not set: read as DoRA"
        notes.append(Note(Kind.ASSUMED, what))
    notes += [*reading.ignored(), *unread_biases(config, edits)]
    notes += unused_patterns(config, {edit.site.path for edit in edits})
    return edits


def unused_patterns(config: PeftConfig, sites: Iterable[str]) -> list[Note]:
    """A Note on patterns that match no module, as "^q_proj": PEFT matches whole paths or their ends."""
    tables = {"rank_pattern": config.ranks, "alpha_pattern": config.alphas}
    unused = [f"{n} {key!r}" for n, table in tables.items() for key in table.unused(sites)]
    if not unused:
        return []
    what = f"matches no adapted module, so it does nothing: {', '.join(unused)}"
    return [Note(Kind.INFO, what)]


def unread_biases(config: PeftConfig, edits: Sequence[Edit]) -> list[Note]:
    """A Note on biases that PEFT ignores, since its config does not say that they are there."""
    if not config.has_no_bias or all(edit.site.param != "bias" for edit in edits):
        return []
    what = "biases are stored though lora_bias is not set, which PEFT ignores: read as active"
    return [Note(Kind.ASSUMED, what)]


def module_edits(
    reading: Reading, initial: Initial | None, module: str, parts: Parts
) -> list[Edit]:
    """The edit of the weight, and the one of the bias where that is stored."""
    up, down, layer = sides(parts)
    rank = down.shape[0]
    site, owner = _place(reading, module, layer)
    _check_rank(reading.config, owner, parts, rank)
    if reading.config.use_dora and "lora_magnitude_vector" not in parts:
        raise Malformed("use_dora is set but no lora_magnitude_vector is stored")
    scale = reading.config.scale(owner, rank, reading.options.alpha)
    first = None if initial is None else initial.pair(module, up, down, scale)
    edits = [edit_of(reading, SidePair(site, up, down, scale, first, inner=owner != module), parts)]
    if "lora_B.bias" in parts:
        if owner != module or site.param != "weight":
            raise Malformed("lora_B.bias of nn.MultiheadAttention is not what PEFT computes with")
        bias = parts["lora_B.bias"]
        column = Product((Leaf(bias.reshape(bias.count, 1)),), scale)
        edits.append(beside(reading, Site(module, "bias", layer), column))
    return edits


def _place(reading: Reading, module: str, layer: Layer) -> tuple[Site, str]:
    """Where a pair acts, and the module that the config means by it."""
    modules = reading.keys.modules
    owner = module.removesuffix(INSIDE)
    if owner != module and owner in modules:
        return Site(f"{owner}.out_proj", "weight", layer), owner
    param = "in_proj_weight" if f"{module}{INSIDE}" in modules else "weight"
    return Site(module, param, layer), module


def sides(parts: Parts) -> tuple[TensorRef, TensorRef, Layer]:
    """(up, down) as canonical matrices (out, r) and (r, in), and the layer they are for; the down of a
    convolution keeps its kernel. Raises Malformed."""
    names = EMBEDDING if any(name in parts for name in EMBEDDING) else LINEAR
    missing = [name for name in names if name not in parts]
    if missing:
        raise Malformed(f"{' and '.join(missing)} is missing, found only {', '.join(parts)}")
    a, b = (parts[name] for name in names)
    if len(a.shape) != len(b.shape) or len(a.shape) < 2:
        raise Malformed(f"{names[0]} {list(a.shape)} and {names[1]} {list(b.shape)} are no pair")
    if len(a.shape) > 2 and math.prod(b.shape[2:]) != 1:
        raise Malformed(f"{names[1]} {list(b.shape)} has a kernel: expected 1x1")
    if names is EMBEDDING:
        if a.shape[0] != b.shape[1]:
            raise unequal(names, a.shape, b.shape)
        return a.T, b.T, Layer("embedding")
    if len(a.shape) == 2:
        return b, a, Layer("linear")
    return b.reshape(*b.shape[:2]), a, Layer("conv", a.shape[2:])


def _check_rank(config: PeftConfig, owner: str, parts: Parts, rank: int) -> None:
    expected = config.rank(owner)
    if expected is None or expected == rank:
        return
    name = EMBEDDING[0] if EMBEDDING[0] in parts else LINEAR[0]
    raise Malformed(
        f"{name} {list(parts[name].shape)} has rank {rank}, but the config says {expected}: is this "
        "config of another adapter?"
    )
