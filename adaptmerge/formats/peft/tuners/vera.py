"""VeRA: two vectors per site around matrices A and B that all sites share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from adaptmerge.adapters.families.seeded import KaimingPair
from adaptmerge.adapters.families.vera import Vera
from adaptmerge.adapters.graph import Edit, Kind, Note, Site
from adaptmerge.adapters.weight_edits import Add, factor_of
from adaptmerge.formats.peft.additive import integer
from adaptmerge.formats.peft.read import each_module
from adaptmerge.formats.peft.shared import seed, uncut
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Spelling, Tuner
from adaptmerge.tensors.refs import TensorRef, bounded, computed


class Style(NamedTuple):
    """What VeRA and PVeRA do not have in common: the beginning of names, the factor, rows of A per rank."""

    name: str
    factor: Any
    rows: int

    @property
    def leaves(self) -> tuple[str, str]:
        return f"{self.name}_lambda_b", f"{self.name}_lambda_d"


VERA = Style("vera", Vera, 1)


def read(reading: Reading, style: Style = VERA) -> list[Edit]:
    """Each site takes the first rows of B and the first columns of A, as PEFT slices them."""
    down, up = _projections(reading, style)
    if reading.options.base is None:
        what = (
            f"input widths are not stored: all modules are taken to have {down.shape[1]}; "
            "with --base the real ones are used"
        )
        reading.notes.append(Note(Kind.ASSUMED, what))
    return each_module(reading, partial(_edit, style=style, down=down, up=up))


def _projections(reading: Reading, style: Style) -> tuple[TensorRef, TensorRef]:
    """A (rows * r, in) and B (out, r): stored, or drawn again from the seed."""
    names = f"{style.name}_A", f"{style.name}_B"
    down, up = map(reading.shared, names)
    if not reading.setting("save_projection"):
        if down is not None or up is not None:
            raise Malformed(
                f"{' and '.join(names)} are stored, but save_projection is false, so that PEFT would "
                "draw others: set it to true in the config"
            )
        return _drawn(reading, style)
    if down is None or up is None:
        raise Malformed(
            f"{' and '.join(names)} are not both stored, but save_projection is true: set it to false "
            "in the config if they are to be drawn again from projection_prng_key"
        )
    return down, up


def _drawn(reading: Reading, style: Style) -> tuple[TensorRef, TensorRef]:
    """Drawn as large as the largest modules need: first A, then B."""
    modules = reading.keys.modules
    if reading.options.base is None:
        raise Malformed(
            "save_projection is false: the shared matrices are drawn again from a seed, in sizes that "
            "only the base tells: pass --base DIR"
        )
    shapes = [reading.shape(module) for module in modules]
    rank, key = integer(reading, "r"), seed(reading, "projection_prng_key")
    shape_down = style.rows * rank, max(width for _, width in shapes)
    shape_up = max(out for out, _ in shapes), rank
    pair = [KaimingPair(key, shape_down, shape_up, side) for side in ("down", "up")]
    down, up = (bounded(computed(node, shared=True)) for node in pair)
    return down, up


def _edit(
    reading: Reading, module: str, parts: Parts, style: Style, down: TensorRef, up: TensorRef
) -> list[Edit]:
    outer, inner = (parts[leaf] for leaf in style.leaves)
    weight = reading.matrix(module)
    width = down.shape[1] if weight is None else weight.shape[1]
    rank = style.rows * up.shape[1]
    if (inner.count, down.shape[0]) != (rank, rank):
        raise Malformed(
            f"{style.leaves[1]} has {inner.count} values and A {down.shape[0]} rows, but B has "
            f"{up.shape[1]} columns, so expected {rank}"
        )
    if outer.count > up.shape[0] or width > down.shape[1]:
        raise Malformed(
            f"is for a weight of {[outer.count, width]}, but the shared matrices reach only "
            f"{[up.shape[0], down.shape[1]]}: are they of another adapter?"
        )
    sliced = up.slice(0, 0, outer.count), down.slice(1, 0, width)
    return [Add(Site(module), style.factor(sliced[0], outer, sliced[1], inner))]


def tensors(edit: Edit, style: Style = VERA) -> Parts:
    factor: Any = factor_of(edit)
    return dict(zip(style.leaves, (factor.up_scale, factor.down_scale), strict=True))


def shared(edits: Sequence[Edit], style: Style = VERA) -> Spelling:
    """The matrices, once; none where PEFT will draw the same again for just these modules."""
    factors: list[Any] = [factor_of(edit) for edit in edits]
    up = uncut((factor.up for factor in factors), f"{style.name}_B")
    down = uncut((factor.down for factor in factors), f"{style.name}_A")
    rows, columns = max(f.up.shape[0] for f in factors), max(f.down.shape[1] for f in factors)
    source, fields = up.source, {"r": up.shape[1]}
    if isinstance(source, KaimingPair) and (rows, columns) == (up.shape[0], down.shape[1]):
        drawn = {"projection_prng_key": source.seed, "save_projection": False}
        return Spelling({}, {**fields, **drawn})
    # PEFT loads them only if they are as large as the largest of these modules needs.
    cut = {"A": down.slice(1, 0, columns), "B": up.slice(0, 0, rows)}
    stored = {f"base_model.{style.name}_{side}": ref for side, ref in cut.items()}
    return Spelling(stored, {**fields, "save_projection": True})


TUNER = Tuner(
    "VERA",
    summary="diag(b) B diag(d) A, B and A shared by all sites",
    shapes={
        "vera_lambda_b": "out",
        "vera_lambda_d": "n",
        "vera_A": "n _in",
        "vera_B": "_out r",
    },
    leaves=VERA.leaves,
    read=read,
    tensors=tensors,
    shared=shared,
    maths={"r": 256, "projection_prng_key": 0, "save_projection": True},
    training=frozenset({"vera_dropout", "d_initial"}),
    bias_mode="vera_only",
    as_lora="exact",
    merges="exact sum; a rank-r LoRA where A and B are the same",
)
