"""RandLoRA: randlora_lambda (r, n) and randlora_gamma (n, min(out, in)) around shared random bases.

The bases lie at base_model.randlora_A and _B and, saying the same, at every module.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from adaptmerge.adapters.families.randlora import RandBases, RandLora
from adaptmerge.adapters.graph import Edit, Kind, Note, Site
from adaptmerge.errors import CannotStore
from adaptmerge.formats.peft.additive import integer, number
from adaptmerge.formats.peft.read import each_module
from adaptmerge.formats.peft.shared import seed, uncut
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Spelling, Tuner
from adaptmerge.tensors.compare import same_values
from adaptmerge.tensors.refs import TensorRef, bounded, computed

SHORT, LONG = "randlora_A", "randlora_B"
WEIGHTS, COLUMNS = "randlora_lambda", "randlora_gamma"


def read(reading: Reading) -> list[Edit]:
    """Bases read once, or drawn again; the copies at the modules are compared with them."""
    short, long = (reading.shared(name) for name in (SHORT, LONG))
    if not reading.setting("save_projection"):
        if short is not None or long is not None:
            raise Malformed(
                f"{SHORT} and {LONG} are stored, but save_projection is false, so that PEFT would draw "
                "others: set it to true in the config"
            )
        short, long = _drawn(reading)
    if short is None or long is None:
        raise Malformed(
            f"base_model.{SHORT} and _B are not both stored, but save_projection is true: set it to "
            "false in the config if they are to be drawn again from projection_prng_key"
        )
    _check_copies(reading, {SHORT: short, LONG: long})
    return each_module(reading, partial(_edit, short=short, long=long))


def _drawn(reading: Reading) -> tuple[TensorRef, TensorRef]:
    if reading.options.base is None:
        raise Malformed(
            "save_projection is false: the random bases are drawn again from a seed, in sizes that "
            "only the base tells: pass --base DIR"
        )
    small, large = _sizes([reading.shape(module) for module in reading.keys.modules])
    found = (name for name in ("very_sparse", "sparse") if reading.setting(name))
    style = next(found, "dense")
    if style == "dense":
        what = "the random bases are drawn again in bfloat16, as PEFT does where the device has it"
        reading.notes.append(Note(Kind.ASSUMED, what))
    key, rank = seed(reading, "projection_prng_key"), integer(reading, "r")
    nodes = [RandBases(key, rank, small, large, style, side) for side in ("short", "long")]
    first, second = (bounded(computed(node, shared=True)) for node in nodes)
    return first, second


def _sizes(shapes: Collection[Sequence[int]]) -> tuple[int, int]:
    """The smaller and the larger of what the largest outputs and inputs need."""
    outs, widths = zip(*shapes, strict=True)
    return min(max(outs), max(widths)), max(max(outs), max(widths))


def _check_copies(reading: Reading, bases: Mapping[str, TensorRef]) -> None:
    """Takes the modules' copies off; those that differ from the shared bases are problems.

    PEFT keeps one tensor for all, so one look at the ends of a copy tells a damaged file.
    """
    for module, parts in reading.keys.modules.items():
        for name, base in bases.items():
            copy = parts.pop(name, None)
            if copy is not None and not _same_ends(copy, base):
                reading.keys.problems.append(
                    f"{module}: its copy of {name} is not base_model.{name}, which PEFT keeps for all "
                    "modules: save the adapter again"
                )


def _same_ends(copy: TensorRef, base: TensorRef) -> bool:
    if copy.shape != base.shape or copy.dtype != base.dtype:
        return False
    last = copy.shape[0] - 1
    return all(
        same_values(copy.slice(0, row, row + 1), base.slice(0, row, row + 1)) for row in (0, last)
    )


def _edit(
    reading: Reading, module: str, parts: Parts, short: TensorRef, long: TensorRef
) -> list[Edit]:
    weights, columns = parts[WEIGHTS], parts[COLUMNS]
    rank, small = integer(reading, "r"), columns.shape[-1]
    count = -(-small // rank)
    if (weights.shape, columns.shape) != ((rank, count), (count, small)):
        raise Malformed(
            f"{WEIGHTS} has shape {list(weights.shape)} and {COLUMNS} {list(columns.shape)}, but r = "
            f"{rank} makes them {[rank, count]} and {[count, small]}"
        )
    weight = reading.matrix(module)
    fits = weight is None or (min(weight.shape) == small and max(weight.shape) <= long.shape[0])
    if not fits or short.shape[0] != rank or long.shape[1] < count or short.shape[2] < small:
        raise Malformed(
            f"{COLUMNS} is for the smaller side {small} of a weight, but the base has "
            f"{list(weight.shape) if weight else 'any'} there and the bases have {list(short.shape)} "
            f"and {list(long.shape)}: are they of another adapter?"
        )
    alpha = float(number(reading, "randlora_alpha"))
    shape = () if weight is None else weight.shape
    sites = len(reading.keys.modules)
    return [RandLora(Site(module), short, long, weights, columns, alpha, shape, sites)]


def tensors(edit: RandLora) -> Parts:
    return {WEIGHTS: edit.weights, COLUMNS: edit.columns}


def settings(edit: RandLora) -> Mapping[str, Any]:
    alpha = int(edit.alpha) if edit.alpha.is_integer() else edit.alpha
    return {"r": edit.weights.shape[0], "randlora_alpha": alpha}


def shared(edits: Sequence[RandLora]) -> Spelling:
    """The bases, once for all and once per module; none where PEFT draws them again."""
    short = uncut((edit.short for edit in edits), SHORT)
    long = uncut((edit.long for edit in edits), LONG)
    if any(edit.sites != len(edits) for edit in edits):
        short, long = _cut(edits, short, long)
    node = long.source
    if isinstance(node, RandBases) and not (short.steps or long.steps):
        return Spelling({}, _fields(node))
    owners = ("base_model", *(edit.site.module for edit in edits))
    stored = {f"{owner}.{n}": ref for owner in owners for n, ref in ((SHORT, short), (LONG, long))}
    return Spelling(stored, {"save_projection": True})


def _cut(
    edits: Sequence[RandLora], short: TensorRef, long: TensorRef
) -> tuple[TensorRef, TensorRef]:
    """As large as these modules need, without which PEFT does not load them."""
    if not all(edit.shape for edit in edits):
        raise CannotStore(
            "RANDLORA's bases are as large as the largest weights, which only the base tells once "
            "modules are left out or joined: pass --base DIR"
        )
    small, large = _sizes([edit.shape for edit in edits])
    count = -(-small // short.shape[0])
    return short.slice(2, 0, small), long.slice(0, 0, large).slice(1, 0, count)


def _fields(node: RandBases) -> Mapping[str, Any]:
    """What makes PEFT draw the bases again."""
    return {
        "projection_prng_key": node.seed,
        "save_projection": False,
        "sparse": node.style == "sparse",
        "very_sparse": node.style == "very_sparse",
    }


TUNER = Tuner(
    "RANDLORA",
    summary="a weighted sum of fixed random low-rank matrices, of full rank",
    shapes={
        "randlora_lambda": "r n",
        "randlora_gamma": "n _small",
        "randlora_A": "r 1 _small",
        "randlora_B": "_large n r",
    },
    leaves=(SHORT, LONG, WEIGHTS, COLUMNS),
    read=read,
    tensors=tensors,
    settings=settings,
    shared=shared,
    maths={
        "r": 32,
        "randlora_alpha": 640,
        "projection_prng_key": 0,
        "save_projection": True,
        "sparse": False,
        "very_sparse": False,
    },
    training=frozenset({"randlora_dropout"}),
    bias_mode="randlora_only",
    as_lora="base",
    merges="as deltas, of which only the base tells the shape",
)
