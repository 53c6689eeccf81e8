"""Weights that stay in 16 bits where quantising them would lose too much of an adapter.

All that is added to a quantised weight is settled once while planning, as it will be when it is written. Of
the sites that lose an adapter those that cost least are stored plainly, until none does, or the file has
grown by as much as it may.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from adaptmerge.algebra.linalg import one_thread_each
from adaptmerge.commands.fuse.anew import Anew
from adaptmerge.commands.fuse.options import FuseOptions
from adaptmerge.commands.fuse.pieces.layout import Recoded, Shard
from adaptmerge.commands.fuse.pieces.write import Line, Settings, settings_of
from adaptmerge.commands.fuse.report import KEPT, losses
from adaptmerge.errors import CannotMerge, UsageError
from adaptmerge.parallel import ordered
from adaptmerge.rounding.codes import CodedMatrix, choose_coded, requantise
from adaptmerge.rounding.matrix import Measured
from adaptmerge.runtime.linears import linear_layers
from adaptmerge.schemes.coded import CodedWeight, named, stands_alone
from adaptmerge.schemes.scheme import QUANT_CONFIG, Kept, schemes
from adaptmerge.schemes.view import View, running_dtype
from adaptmerge.tensors.dtypes import BF16, F16, DType

PLAIN_BYTES = 2


@dataclass(frozen=True)
class Plain:
    """Names of weights that stay in 16 bits, with the bytes that each costs; their dtype, and the entries
    of the config that say so."""

    growth: Mapping[str, int]
    dtype: DType
    config: Mapping[str, object]


def can_mix(view: View) -> bool:
    """Whether some layers of the base can be stored otherwise than others: each says how, or loaders leave
    those as they are that the config lists."""
    scheme = schemes().get(view.scheme or "")
    listed = scheme is not None and scheme.kept is not None and QUANT_CONFIG in view.on_disk.config
    return listed or _is_typed(view)


def _is_typed(view: View) -> bool:
    return view.scheme is not None and schemes()[view.scheme].typed


def plain(names: Sequence[str], shards: Sequence[Shard], view: View, anew: Anew | None) -> Plain:
    """The named weights as they are stored plainly instead of as the shards, or the base, have them.

    Raises CannotMerge where no other would be left.
    """
    if len(names) == len(anew.modules if anew else view.coded):
        raise CannotMerge(
            "every quantised layer would be stored in 16 bits: pass --quant bf16 (or no --quant), or a "
            "smaller --max-growth and --allow loss"
        )
    usual = F16 if _is_typed(view) else BF16
    dtype = anew.dtype if anew else running_dtype(view.on_disk.config) or usual
    growth = _growth(shards)
    return Plain(
        {name: growth.get(name) or _growth_of(view.coded[name]) for name in names},
        dtype if dtype in (BF16, F16) else usual,
        anew.config(names) if anew else _config(view, names),
    )


def _growth_of(weight: CodedWeight) -> int:
    """How many bytes more a coded weight of the base takes in 16 bits."""
    stored = sum(ref.nbytes for ref in weight.tensors.values())
    return PLAIN_BYTES * math.prod(weight.shape) - stored


def _config(view: View, names: Sequence[str]) -> dict[str, object]:
    if _is_typed(view):
        return {}
    layers = linear_layers(view.values.path)
    called = {view.values.locate(module): module for module in (*layers.quantised, *layers.kept)}
    modules = [name.removesuffix(".weight") for name in names]
    chosen = tuple(called.get(module, module) for module in modules)
    usual = tuple(m for m in layers.kept if f"{view.values.locate(m)}.weight" not in view.coded)
    how = schemes()[view.scheme or ""].kept
    assert how is not None
    before = view.on_disk.config[QUANT_CONFIG]
    return {QUANT_CONFIG: dict(how(before, Kept(usual, chosen)))}


def check_growth(share: float, view: View, anew: Anew | None) -> None:
    """Raises UsageError where nothing can be stored plainly."""
    if not share >= 0 or not math.isfinite(share):
        raise UsageError(f"--max-growth {100 * share:g}%: expected a percentage from 0% up")
    if not share:
        return
    if view.scheme is None and anew is None:
        raise UsageError("--max-growth: neither the base nor the output (--quant) is quantised")
    if not (anew.quantiser.mixed if anew else can_mix(view)):
        able = ", ".join(n for n, scheme in schemes().items() if scheme.kept or scheme.typed)
        name = anew.quantiser.name if anew else view.scheme
        raise UsageError(
            f"--max-growth: loaders of {name} quantise all layers or none; those of {able} can leave some "
            "as they are"
        )


def spared(shards: Sequence[Shard], options: FuseOptions) -> Sequence[str]:
    """The names of the weights to be stored plainly: those that were decided on, or that are now."""
    if options.plain is not None or not options.max_growth:
        return options.plain or ()
    settings, most = settings_of(options), options.max_loss
    coded_matrices = {name: one for shard in shards for name, one in _adapted(shard)}
    with one_thread_each(), ThreadPoolExecutor(settings.workers) as pool:
        work = partial(_settled, settings=settings)
        lines = list(ordered(pool, settings.workers, work, list(coded_matrices.items())))
    growth, left = _growth(shards), options.max_growth * sum(shard.nbytes for shard in shards)
    chosen: list[str] = []
    while (at := _next(lines, growth, left, most)) is not None:
        name = lines[at].tensor
        chosen.append(name)
        left -= growth[name]
        lines[at] = lines[at]._replace(measured=_exact(lines[at].measured))
    return sorted(chosen)


def _adapted(shard: Shard) -> list[tuple[str, CodedMatrix]]:
    """The coded weights that anything is added to, by the names that they have unpacked; none of a stack,
    which is stored in one way."""
    made = (one for one in shard.made if isinstance(one, CodedMatrix) and one.matrix.parts)
    return [(named(one.weight), one) for one in made if stands_alone(one.weight)]


def _settled(item: tuple[str, CodedMatrix], settings: Settings) -> Line:
    name, coded = item
    choice = choose_coded(coded, settings.rounding)
    done = requantise(coded, choice.rounding, settings.scales, settings.seed)
    return Line(name, coded.matrix, choice, done.measured, coded.weight)


def _growth(shards: Sequence[Shard]) -> dict[str, int]:
    """How many bytes more each coded weight takes in 16 bits, by the name that it has unpacked."""
    found: dict[str, int] = {}
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        for part in tensor.parts:
            if isinstance(part, Recoded):
                name = named(part.coded.weight)
                before = found.get(name, PLAIN_BYTES * math.prod(part.coded.weight.shape))
                found[name] = before - tensor.nbytes
    return found


def _exact(measured: Measured) -> Measured:
    """What is measured where nothing is lost."""
    inside = tuple(None if one is None else 0.0 for one in measured.inside)
    return replace(measured, error=0.0, inside=inside, inner=(0.0,) * len(measured.inner))


def _next(lines: Sequence[Line], growth: Mapping[str, int], left: float, most: float) -> int | None:
    """The line that is to be stored plainly next: of those that lose an adapter the smallest; where only
    sums over all do, the one with most of the error."""
    open_ = [
        i for i, line in enumerate(lines) if line.measured.error > 0 and growth[line.tensor] <= left
    ]
    losing = [i for i in open_ if _loses(lines[i].measured.gains, lines[i].measured.subs, most)]
    if losing:
        return min(losing, key=lambda i: (growth[lines[i].tensor], lines[i].tensor))
    totals = losses(lines)
    lost = {name for name, loss in totals.items() if _loses([loss.gain], [loss.sub], most)}
    shares = {i: _share(lines[i], lost) for i in open_}
    worst = max(shares, key=lambda i: (shares[i], lines[i].tensor), default=None)
    return worst if worst is not None and shares[worst] > 0 else None


def _loses(gains: Sequence[float | None], subs: Sequence[float | None], most: float) -> bool:
    small = any(gain is not None and gain < KEPT for gain in gains)
    return small or any(sub is not None and sub > most for sub in subs)


def _share(line: Line, lost: set[str]) -> float:
    """The squared error in the inputs' space of adapters that are lost over all; of those of full rank
    what has not arrived."""
    measured = line.measured
    return sum(
        max(0.0, -inner) if inside is None else inside
        for part, inside, inner in zip(
            line.matrix.parts, measured.inside, measured.inner, strict=True
        )
        if part.adapter in lost
    )
