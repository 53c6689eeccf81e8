"""LN tuning: ln_tuning_layers.weight and .bias, the trained parameters of norms themselves."""

from __future__ import annotations

from adaptmerge.adapters.families.ln_tuning import LnTuning
from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner
from adaptmerge.tensors.refs import TensorRef

LEAF = "ln_tuning_layers"


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    found = {"bias" if leaf.endswith(".bias") else "weight": ref for leaf, ref in parts.items()}
    for param, ref in found.items():
        _check(ref, param, reading.weight(module, param))
    return [LnTuning(Site(module, param), ref) for param, ref in found.items()]


def _check(ref: TensorRef, param: str, base: TensorRef | None) -> None:
    if len(ref.shape) != 1:
        raise Malformed(
            f"{LEAF}.{param} has shape {list(ref.shape)}: expected the vector of a norm; other modules "
            "stored whole belong in modules_to_save"
        )
    if base is not None and base.shape != ref.shape:
        raise Malformed(f"{LEAF}.{param} has {ref.count} values, but the base has {base.count}")


def tensors(edit: LnTuning) -> Parts:
    return {f"{LEAF}.{edit.site.param}": edit.value}


TUNER = Tuner(
    "LN_TUNING",
    summary="norm weights and biases, stored whole",
    shapes={
        r"ln_tuning_layers(\.bias)?": "n *",
    },
    leaves=(LEAF,),
    module=module,
    tensors=tensors,
    as_lora="never",
    merges="as deltas from the base's values",
)
