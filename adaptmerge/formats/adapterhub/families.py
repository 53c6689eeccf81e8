"""Each AdapterHub family as edits: the formulas of the library's forward, without its quirks."""

from __future__ import annotations

from dataclasses import replace

from adaptmerge.adapters.activation_edits import Bottleneck, Gated
from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.adapters.weight_edits import Add, Scale
from adaptmerge.algebra.factors import Leaf, Product
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.formats.adapterhub.config import PLACES, READ, Config
from adaptmerge.formats.adapterhub.keys import BOTTLENECK_LEAVES, FUSED, SHARED, Keys, Parts


def _read_lora(keys: Keys, config: Config) -> list[Edit]:
    """(alpha / r) B A."""
    edits: list[Edit] = []
    for module, parts in _pairs(keys, config, ("lora_A", "lora_B")).items():
        edits.append(Add(Site(module), low_rank(parts["lora_B"], parts["lora_A"], config.scale)))
    return edits


def _read_gated(keys: Keys, config: Config) -> list[Edit]:
    """gate * B A, without alpha / r."""
    edits: list[Edit] = []
    leaves = ("lora_A", "lora_B", "gate.weight", "gate.bias")
    for module, parts in _pairs(keys, config, leaves).items():
        gate, bias, width = parts["gate.weight"], parts["gate.bias"], parts["lora_A"].shape[1]
        if gate.shape != (1, width) or bias.shape != (1,):
            keys.problems.append(
                f"{module}: the gate has shapes {list(gate.shape)} and {list(bias.shape)}: "
                f"expected [1, {width}] and [1]"
            )
            continue
        factor = low_rank(parts["lora_B"], parts["lora_A"])
        edits.append(Gated(Site(module), factor, gate, bias))
    return edits


def _pairs(keys: Keys, config: Config, leaves: tuple[str, ...]) -> dict[str, Parts]:
    """The modules whose lora_A is (r, in) and lora_B (out, r), with the config's r."""
    r, found = config.fields["r"], {}
    for module, parts in _unfused(keys, leaves).items():
        a, b = parts["lora_A"].shape, parts["lora_B"].shape
        if len(a) == len(b) == 2 and a[0] == b[1] == r:
            found[module] = parts
        else:
            keys.problems.append(
                f"{module}: lora_A {list(a)} and lora_B {list(b)} are no pair of rank {r}"
            )
    return found


def _unfused(keys: Keys, leaves: tuple[str, ...]) -> dict[str, Parts]:
    fused = [module for module in keys.loras if module.rpartition(".")[2] in FUSED]
    for module in fused:
        keys.problems.append(
            f"{module}: adapts parts of a fused projection, which is not read yet (read: {READ}, "
            "on modules of their own)"
        )
        del keys.loras[module]
    return keys.take(keys.loras, leaves)


def _read_ia3(keys: Keys, config: Config) -> list[Edit]:
    """(W x + b) * (alpha l), for feed-forward modules, too."""
    edits: list[Edit] = []
    for module, parts in _unfused(keys, ("lora_B",)).items():
        column = parts["lora_B"]
        if len(column.shape) != 2 or column.shape[1] != 1:
            keys.problems.append(
                f"{module}: lora_B has shape {list(column.shape)}: an IA3 vector is [out, 1]"
            )
            continue
        vector = column.reshape(column.count).scaled(float(config.fields["alpha"]))
        edits += [Scale(Site(module), vector), Scale(Site(module, "bias"), vector)]
    return edits


def _read_vera(keys: Keys, config: Config) -> list[Edit]:
    """(alpha / r) vera_B B vera_D A, with B and A shared by all modules."""
    shared = keys.loras.pop(SHARED, {})
    if shared.keys() != {"lora_A", "lora_B"}:
        keys.problems.append(f"expected lora_A and lora_B under {SHARED}, found {sorted(shared)}")
        return []
    if not keys.fits(SHARED, shared):
        return []
    a, b = (Leaf(replace(shared[leaf], shared=True)) for leaf in ("lora_A", "lora_B"))
    edits: list[Edit] = []
    for module, parts in _unfused(keys, ("vera_B", "vera_D")).items():
        outer, inner = Leaf(parts["vera_B"]), Leaf(parts["vera_D"])
        try:
            edits.append(Add(Site(module), Product((outer, b, inner, a), config.scale)))
        except ValueError as problem:
            keys.problems.append(f"{module}: {problem}")
    return edits


def _read_bottleneck(keys: Keys, config: Config) -> list[Edit]:
    """h + scaling * up(act(down(s))), s the block's sum with the residual, or its output h."""
    found = keys.take(keys.bottlenecks, BOTTLENECK_LEAVES)
    edits = [_bottleneck(keys, config, path, parts) for path, parts in found.items()]
    return [edit for edit in edits if edit is not None]


def _bottleneck(keys: Keys, config: Config, path: str, parts: Parts) -> Edit | None:
    layer, place = _place(path, config.model_type)
    down, down_bias, up, up_bias = (parts[leaf] for leaf in BOTTLENECK_LEAVES)
    shapes = [ref.shape for ref in (down, down_bias, up, up_bias)]
    width, hidden = down_bias.count, up_bias.count
    if layer is None:
        keys.problems.append(f"{path}: is no place of a bottleneck in a {config.model_type} layer")
    elif shapes != [(width, hidden), (width,), (hidden, width), (hidden,)]:
        keys.problems.append(f"{path}: shapes {[list(shape) for shape in shapes]} do not fit")
    else:
        source = "sum" if config.fields.get("original_ln_before") else "output"
        scale, activation = float(config.fields.get("scaling", 1.0)), config.activation
        site = Site(layer, place=place)
        return Bottleneck(site, down, down_bias, up, up_bias, activation, source, scale)
    return None


def _place(path: str, model_type: str) -> tuple[str | None, str]:
    for place, pattern in PLACES[model_type].items():
        match = pattern.fullmatch(path)
        if match:
            return match[1], place
    return None, ""


READERS = {
    "LoRA": _read_lora,
    "gated LoRA": _read_gated,
    "IA3": _read_ia3,
    "VeRA": _read_vera,
    "bottleneck": _read_bottleneck,
}
