"""VeRA: two vectors per site around matrices A and B that all sites share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adaptmerge.edits import Add, factor_of
from adaptmerge.families.vera import Vera
from adaptmerge.files.refs import TensorRef
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Spelling, Tuner
from adaptmerge.graph import Edit, Kind, Note, Site


def read(reading: Reading) -> list[Edit]:
    """Each site takes the first rows of B and the first columns of A, as PEFT slices them."""
    down, up = reading.shared("vera_A"), reading.shared("vera_B")
    if down is None or up is None:
        raise Malformed(
            "vera_A and vera_B are not stored (save_projection was off): adapters whose projections "
            "must be regenerated are not read yet"
        )
    if reading.options.base is None:
        what = (
            f"input widths are not stored: all modules are taken to have {down.shape[1]}; "
            "with --base the real ones are used"
        )
        reading.notes.append(Note(Kind.ASSUMED, what))
    return [_edit(reading, m, p, down, up) for m, p in reading.keys.modules.items()]


def _edit(reading: Reading, module: str, parts: Parts, down: TensorRef, up: TensorRef) -> Edit:
    weight = reading.weight(module)
    width = down.shape[1] if weight is None else weight.shape[1]
    outer, inner = parts["vera_lambda_b"], parts["vera_lambda_d"]
    factor = Vera(up.slice(0, 0, outer.count), outer, down.slice(1, 0, width), inner)
    return Add(Site(module), factor)


def _vera(edit: Edit) -> Vera:
    factor = factor_of(edit)
    assert isinstance(factor, Vera)
    return factor


def tensors(edit: Edit) -> Parts:
    return {"vera_lambda_b": _vera(edit).up_scale, "vera_lambda_d": _vera(edit).down_scale}


def shared(edits: Sequence[Edit]) -> Spelling:
    """The whole matrices, once."""
    first = _vera(edits[0])
    whole = {"vera_A": first.down, "vera_B": first.up}
    refs = {
        f"base_model.{name}": replace(ref, shape=ref.source.shape, steps=(), shared=False)
        for name, ref in whole.items()
    }
    return Spelling(refs, {"r": first.up_scale.shape and first.down_scale.count})


TUNER = Tuner(
    "VERA",
    summary="diag(b) B diag(d) A, B and A shared by all sites",
    leaves=("vera_lambda_b", "vera_lambda_d"),
    read=read,
    tensors=tensors,
    shared=shared,
    maths={"r": 256, "projection_prng_key": 0, "save_projection": True},
    training=frozenset({"vera_dropout", "d_initial"}),
    bias_mode="vera_only",
    as_lora="exact",
    merges="exact sum; a rank-r LoRA where A and B are the same",
)
