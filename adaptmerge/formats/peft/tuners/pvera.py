"""PVeRA: VeRA with 2r rows in A and its inner vector, of which the first r are the mean."""

from __future__ import annotations

from collections.abc import Sequence

from adaptmerge.adapters.families.pvera import Pvera
from adaptmerge.adapters.graph import Edit
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Spelling, Tuner
from adaptmerge.formats.peft.tuners import vera

PVERA = vera.Style("pvera", Pvera, 2)


def read(reading: Reading) -> list[Edit]:
    """As VeRA. Raises Malformed for adapters that sample at inference, which no weight computes."""
    if reading.setting("sample_at_inference"):
        raise Malformed(
            "sample_at_inference is true: every forward of this adapter is random, and no weight "
            "computes that; set it to false in the config to read its mean"
        )
    return vera.read(reading, PVERA)


def tensors(edit: Edit) -> Parts:
    return vera.tensors(edit, PVERA)


def shared(edits: Sequence[Edit]) -> Spelling:
    return vera.shared(edits, PVERA)


TUNER = Tuner(
    "PVERA",
    summary="VeRA with random inner coordinates: its mean",
    shapes={
        "pvera_lambda_b": "out",
        "pvera_lambda_d": "n",
        "pvera_A": "n _in",
        "pvera_B": "_out r",
    },
    leaves=PVERA.leaves,
    read=read,
    tensors=tensors,
    shared=shared,
    maths={
        "r": 256,
        "projection_prng_key": 0,
        "save_projection": True,
        "sample_at_inference": False,
    },
    training=frozenset({"pvera_dropout", "d_initial", "generator_seed"}),
    bias_mode="pvera_only",
    as_lora="exact",
    merges="exact sum of the means",
)
