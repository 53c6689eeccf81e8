"""LoRA on parameters instead of modules (target_parameters): stacked experts, and matrices that are no
Linear's.

A holds the experts one after the other, (experts * r, in); the columns of B go through the experts first
and the ranks last, (out, r * experts). Several parameters of one module are nested: the one that the
module declares last is outermost, the others lie under as many base_layer. Until 0.18 PEFT took the last
axis of (experts, out, in) for the outputs, so that A and B changed sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adaptmerge.adapters.graph import Adapter, Edit, Kind, Layer, Note, Site
from adaptmerge.adapters.module_paths import exact_suffixes, is_suffix, suffixes
from adaptmerge.adapters.weight_edits import Add, factor_of
from adaptmerge.algebra.low_rank import LowRank, as_low_rank, low_rank
from adaptmerge.errors import CannotStore
from adaptmerge.formats.peft.config import PeftConfig
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading
from adaptmerge.tensors.dtypes import F32
from adaptmerge.tensors.refs import TensorRef, constant, join

NESTED = ".base_layer"
# Parameters of one module in the order in which modules declare them.
DECLARED = (
    *("weight", "gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "up_proj_bias"),
    *("down_proj", "down_proj_bias"),
)
SWAPPED_UNTIL = (0, 18)
LAYERS = ("experts", "parameter")  # what is spelled as a target parameter


@dataclass(frozen=True, slots=True)
class Target:
    """One adapted parameter: the sides as they are stored, and how many experts they are for."""

    module: str
    param: str
    down: TensorRef
    up: TensorRef
    rank: int
    scale: float

    @property
    def path(self) -> str:
        return f"{self.module}.{self.param}"

    @property
    def experts(self) -> int:
        return self.down.shape[0] // self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of one matrix, taken as PEFT takes it from 0.19 on."""
        return self.up.shape[0], self.down.shape[1]


def is_target(edit: Edit) -> bool:
    """Whether an edit is spelled as a target parameter."""
    return edit.site.layer.kind in LAYERS


def read(reading: Reading) -> list[Edit]:
    """The edits of target parameters; their modules are taken off the keys."""
    keys, edits = reading.keys, []
    for module, levels in _wrapped(reading).items():
        try:
            targets = _targets(reading, module, levels)
            edits += _edits(reading, targets)
        except Malformed as problem:
            keys.problems.append(f"{module}: {problem}")
        for name in levels:
            keys.modules.pop(name, None)
    lost = [name for name in keys.modules if name.endswith(NESTED)]
    keys.problems += [
        f"{name}: is nested, as several parameters of one module are, but the config has no "
        "target_parameters that say which"
        for name in lost
    ]
    return edits


def covers(config: PeftConfig, edits: Iterable[Edit]) -> frozenset[str]:
    """The target parameters of the config, all of which it promises to adapt."""
    adapted = {suffix for edit in edits if is_target(edit) for suffix in suffixes(_path(edit.site))}
    return frozenset(adapted.intersection(config.raw.get("target_parameters") or ()))


def _path(site: Site) -> str:
    return f"{site.module}.{site.param}"


def _wrapped(reading: Reading) -> dict[str, dict[str, Parts]]:
    """Module to what is stored for its parameters, the outermost first, by the module's nested name."""
    if not reading.config.raw.get("target_parameters"):
        return {}
    found: dict[str, dict[str, Parts]] = {}
    for name in sorted(reading.keys.modules, key=len):
        module = re.sub(rf"({re.escape(NESTED)})+$", "", name)
        found.setdefault(module, {})[name] = reading.keys.modules[name]
    return {m: levels for m, levels in found.items() if _is_wrapped(reading, m, levels)}


def _is_wrapped(reading: Reading, module: str, levels: Mapping[str, Parts]) -> bool:
    """Nested, or named by a target parameter with its module, or by one without that stacks experts."""
    config = reading.config
    if len(levels) > 1:
        return True
    if config.raw.get("target_modules") and not config.unselected([module]):
        return False
    names = _named(config, module)
    down = next(iter(levels.values())).get("lora_A")
    return any(
        specific or (down is not None and down.shape[0] != config.rank(f"{module}.{param}"))
        for param, specific in names.items()
    )


def _named(config: PeftConfig, module: str) -> dict[str, bool]:
    """Parameters that the config may mean in a module, and whether it says the module, too."""
    found: dict[str, bool] = {}
    for target in config.raw.get("target_parameters") or ():
        owner, _, param = target.rpartition(".")
        if not owner or is_suffix(owner, module):
            found[param] = found.get(param, False) or bool(owner)
    return found


def _targets(reading: Reading, module: str, levels: Mapping[str, Parts]) -> list[Target]:
    """The parameters of one module, the outermost first. Raises Malformed."""
    params = _params(reading, module, len(levels))
    pairs = zip(params, levels.values(), strict=True)
    return [_target(reading, module, param, parts) for param, parts in pairs]


def _params(reading: Reading, module: str, count: int) -> list[str]:
    names = _named(reading.config, module)
    base = reading.options.base
    if base is not None and base.locate(module) is not None:
        names = {p: s for p, s in names.items() if _in_base(reading, module, p)}
    specific = [param for param, said in names.items() if said]
    for found in (specific, list(names)):
        if len(found) == count and (count == 1 or set(found) <= set(DECLARED)):
            return sorted(found, key=lambda p: DECLARED.index(p) if count > 1 else 0, reverse=True)
    raise Malformed(
        f"tensors of {count} parameters are stored here, nested by the order in which the module declares "
        f"them, and target_parameters names {', '.join(sorted(names)) or 'none'}: which is which is not "
        f"known{'' if base else '; pass --base DIR'}"
    )


def _in_base(reading: Reading, module: str, param: str) -> bool:
    base = reading.options.base
    sites = (Site(module, param), Site(module, param, expert=0))
    return base is not None and any(base.parameter(site) is not None for site in sites)


def _target(reading: Reading, module: str, param: str, parts: Parts) -> Target:
    missing = [name for name in ("lora_A", "lora_B") if name not in parts]
    if missing:
        raise Malformed(f"{' and '.join(missing)} is missing, found only {', '.join(parts)}")
    other = sorted(set(parts) - {"lora_A", "lora_B"})
    if other:
        raise Malformed(f"{other[0]} is stored, which PEFT has for no parameter ({param})")
    down, up, config = parts["lora_A"], parts["lora_B"], reading.config
    rank = config.rank(f"{module}.{param}") or down.shape[0]
    if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1]:
        raise Malformed(f"lora_A {list(down.shape)} and lora_B {list(up.shape)} are no pair")
    if down.shape[0] % rank:
        raise Malformed(
            f"lora_A {list(down.shape)} of {param} has not a multiple of the config's rank {rank} rows: "
            "is this config of another adapter?"
        )
    scale = config.scale(f"{module}.{param}", rank, reading.options.alpha)
    return Target(module, param, down, up, rank, scale)


def _edits(reading: Reading, targets: Sequence[Target]) -> list[Edit]:
    swapped = _swapped(reading, [target for target in targets if target.experts > 1])
    if swapped:
        what = "written by peft before 0.19, which swapped the sides of experts: read so"
        reading.notes.append(Note(Kind.INFO, what, site=targets[0].path))
    return [edit for target in reversed(targets) for edit in _of_target(reading, target, swapped)]


def _of_target(reading: Reading, target: Target, swapped: bool) -> list[Edit]:
    base, count = reading.options.base, target.experts
    stored = base.parameter(Site(target.module, target.param)) if base else None
    if count == 1 and (stored is None or len(stored.shape) != 3):
        site = Site(target.module, target.param, Layer("parameter"))
        return [Add(site, low_rank(target.up, target.down, target.scale))]
    layer = Layer("experts", stacked=count)
    edits: list[Edit] = []
    for expert, (up, down) in enumerate(_cut(target.up, target.down, count)):
        sides = (down.T, up.T) if swapped else (up, down)
        site = Site(target.module, target.param, layer, expert)
        edits.append(Add(site, low_rank(*sides, target.scale)))
    return edits


def _cut(up: TensorRef, down: TensorRef, count: int) -> list[tuple[TensorRef, TensorRef]]:
    """(out, r) and (r, in) of each expert."""
    rank, (rows, _) = down.shape[0] // count, up.shape
    cube = up.reshape(rows, rank, count)
    return [
        (cube.slice(2, e, e + 1).reshape(rows, rank), down.slice(0, e * rank, (e + 1) * rank))
        for e in range(count)
    ]


def _swapped(reading: Reading, targets: Sequence[Target]) -> bool:
    """Whether A and B of experts lie as PEFT had them until 0.18. Raises Malformed if nothing tells."""
    if not targets:
        return False
    for evidence in (_by_base, _by_version, _by_sides):
        found = evidence(reading, targets)
        if found is not None:
            return found
    version = reading.config.raw.get("peft_version") or "an unknown version"
    names = " and ".join(target.param for target in targets)
    raise Malformed(
        f"{names} was written by peft {version}; until 0.18 it swapped inputs and outputs of experts, and "
        f"these shapes do not tell: {reading.advice}"
    )


def _by_base(reading: Reading, targets: Sequence[Target]) -> bool | None:
    base = reading.options.base
    if base is None:
        return None
    fits = set()
    for target in targets:
        weight = base.weight(Site(target.module, target.param, expert=0))
        if weight is None or len(weight.shape) != 2 or weight.shape[0] == weight.shape[1]:
            continue
        turned = base.is_transposed(Site(target.module, target.param, expert=0))
        fits.add(not turned and target.shape == weight.shape[::-1])
    return fits.pop() if len(fits) == 1 else None


def _by_version(reading: Reading, targets: Sequence[Target]) -> bool | None:
    """From 0.19 on nothing is swapped; before, all but the modules that declare is_transposed."""
    found = re.match(r"(\d+)\.(\d+)\.\d+$", str(reading.config.raw.get("peft_version") or ""))
    if found is None:
        return None
    if (int(found[1]), int(found[2])) > SWAPPED_UNTIL:
        return False
    base = reading.options.base
    site = Site(targets[0].module, targets[0].param, expert=0)
    return None if base is None or base.parameter(site) is None else not base.is_transposed(site)


def _by_sides(reading: Reading, targets: Sequence[Target]) -> bool | None:
    """Gate and up together have as many outputs as down has inputs twice."""
    shapes = {target.param: target.shape for target in targets}
    if not {"gate_up_proj", "down_proj"} <= set(shapes):
        return None
    (wide, hidden), (out, inner) = shapes["gate_up_proj"], shapes["down_proj"]
    fits = {False: (wide, hidden) == (2 * inner, out), True: (hidden, wide) == (2 * out, inner)}
    return next((way for way, does in fits.items() if does and not fits[not way]), None)


def tensors(edits: Sequence[Edit]) -> dict[str, TensorRef]:
    """Both sides of every target parameter by their keys without base_model.model."""
    found: dict[str, TensorRef] = {}
    by_module: dict[str, dict[str, LowRank]] = {}
    for (module, param), pair in _stacks(edits).items():
        by_module.setdefault(module, {})[param] = pair
    for module, pairs in by_module.items():
        for depth, param in enumerate(_outermost_first(module, list(pairs))):
            name = module + NESTED * depth
            found[f"{name}.lora_A.weight"] = pairs[param].down
            found[f"{name}.lora_B.weight"] = pairs[param].up
    return found


def _outermost_first(module: str, params: list[str]) -> list[str]:
    unknown = sorted(set(params) - set(DECLARED))
    if len(params) > 1 and unknown:
        raise CannotStore(
            f"the order in which {module} declares {' and '.join(params)} is not known, by which "
            "peft nests them"
        )
    return sorted(params, key=lambda p: DECLARED.index(p) if len(params) > 1 else 0, reverse=True)


def pairs(edits: Sequence[Edit]) -> dict[str, LowRank]:
    """The sides of one matrix of each target parameter, padded to their common rank, by its path."""
    return {
        f"{module}.{param}": _levelled(list(found.values()))[0]
        for (module, param), found in _gathered(edits).items()
    }


def settings(edits: Sequence[Edit], adapter: Adapter) -> dict[str, Any]:
    """Config fields: paths that select the parameters and no others; no module unless some are adapted."""
    paths = list(dict.fromkeys(_path(edit.site) for edit in edits))
    if not paths:
        return {}
    return {
        "target_parameters": exact_suffixes(paths, (), adapter.covers),
        "target_modules": [],
    }


Stacks = dict[tuple[str, str], LowRank]


def _gathered(edits: Sequence[Edit]) -> dict[tuple[str, str], dict[int, LowRank]]:
    """The low-rank pair of each expert of each parameter."""
    found: dict[tuple[str, str], dict[int, LowRank]] = {}
    for edit in edits:
        factor = factor_of(edit)
        pair = None if factor is None else as_low_rank(factor)
        assert pair is not None, "lowered for a target that stores up and down"
        here = found.setdefault((edit.site.module, edit.site.param), {})
        here[edit.site.expert or 0] = pair
    return found


def _stacks(edits: Sequence[Edit]) -> Stacks:
    """Both sides of each parameter as PEFT stores them; experts without a delta get zeros."""
    counts = {(e.site.module, e.site.param): e.site.layer.stacked or 1 for e in edits}
    return {key: _stack(found, counts[key]) for key, found in _gathered(edits).items()}


def _stack(found: Mapping[int, LowRank], count: int) -> LowRank:
    if max(found) >= count:
        raise CannotStore(f"expert {max(found)} is adapted, but there are only {count} experts")
    levelled = dict(zip(found, _levelled(list(found.values())), strict=True))
    first = next(iter(levelled.values()))
    blank = LowRank(_zeros(first.up), _zeros(first.down), first.scale)
    experts = [levelled.get(expert, blank) for expert in range(count)]
    if count == 1:
        return experts[0]
    return _uncut(experts) or _joined(experts)


def _joined(experts: Sequence[LowRank]) -> LowRank:
    (rows, rank), count = experts[0].up.shape, len(experts)
    cube = join([pair.up.reshape(rows, rank, 1) for pair in experts], axis=2)
    down = join([pair.down for pair in experts], axis=0)
    return LowRank(cube.reshape(rows, rank * count), down, experts[0].scale)


def _uncut(experts: Sequence[LowRank]) -> LowRank | None:
    """The stored sides whose cuts these are, read in one go; None if they are none."""
    up, down = (_source(ref) for ref in (experts[0].up, experts[0].down))
    count = len(experts)
    if len(up.shape) != 2 or len(down.shape) != 2 or down.shape[0] % count:
        return None
    if up.shape[1] != down.shape[0]:
        return None
    is_whole = _cut(up, down, count) == [(pair.up, pair.down) for pair in experts]
    return LowRank(up, down, experts[0].scale) if is_whole else None


def _source(ref: TensorRef) -> TensorRef:
    return replace(ref, shape=ref.source.shape, dtype=ref.source.dtype, steps=())


def _levelled(found: Sequence[LowRank]) -> list[LowRank]:
    """The same deltas with one rank, one scale and one dtype."""
    rank = max(pair.rank for pair in found)
    if len({pair.scale for pair in found}) > 1:
        found = [LowRank(pair.up.scaled(pair.scale), pair.down, 1.0) for pair in found]
    padded = [
        LowRank(_padded(p.up, rank, axis=1), _padded(p.down, rank, axis=0), p.scale) for p in found
    ]
    if len({ref.dtype for pair in padded for ref in (pair.up, pair.down)}) == 1:
        return padded
    widest = max((ref.dtype for p in padded for ref in (p.up, p.down)), key=lambda d: d.bits)
    wide = widest if widest.bits >= F32.bits else F32
    return [LowRank(pair.up.cast(wide), pair.down.cast(wide), pair.scale) for pair in padded]


def _padded(ref: TensorRef, rank: int, axis: int) -> TensorRef:
    shape = list(ref.shape)
    shape[axis] = rank - ref.shape[axis]
    if not shape[axis]:
        return ref
    zeros = constant(0.0, tuple(shape), ref.dtype)
    return join([ref, zeros] if ref.shape[axis] else [zeros], axis)


def _zeros(ref: TensorRef) -> TensorRef:
    return constant(0.0, ref.shape, ref.dtype)
