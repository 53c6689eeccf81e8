"""PEANuT: peanut_A (r, out), peanut_B (out, r), peanut_encoders.N and peanut_decoders.N (r, r)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptmerge.adapters.families.peanut import Peanut
from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner
from adaptmerge.tensors.refs import TensorRef


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    name = reading.setting("act_fn")
    if not _is_activation(name):
        raise Malformed(f"act_fn is {name!r}, which transformers {_version()} does not know")
    first, last = parts["peanut_A"], parts["peanut_B"]
    if first.shape != last.shape[::-1]:
        raise Malformed(
            f"peanut_A has shape {list(first.shape)} and peanut_B {list(last.shape)}: "
            "expected (r, out) and (out, r)"
        )
    depth = reading.setting("depth")
    encoders, decoders = (
        _stack(parts, f"peanut_{side}", depth) for side in ("encoders", "decoders")
    )
    scale = float(reading.setting("scaling"))
    return [Peanut(Site(module), first, encoders, decoders, last, name, scale)]


def _stack(parts: Parts, name: str, depth: int) -> tuple[TensorRef, ...]:
    return tuple(parts[f"{name}.{index}"] for index in range(depth))


def _is_activation(name: object) -> bool:
    from transformers.activations import ACT2FN

    return name in ACT2FN


def _version() -> str:
    import transformers

    return str(transformers.__version__)


def tensors(edit: Peanut) -> Parts:
    stacks = {"peanut_encoders": edit.encoders, "peanut_decoders": edit.decoders}
    inner = {f"{n}.{i}.weight": ref for n, refs in stacks.items() for i, ref in enumerate(refs)}
    return {"peanut_A.weight": edit.first, "peanut_B.weight": edit.last, **inner}


def settings(edit: Peanut) -> Mapping[str, Any]:
    return {
        "r": edit.first.shape[0],
        "depth": len(edit.encoders),
        "act_fn": edit.activation,
        "scaling": edit.scale,
    }


TUNER = Tuner(
    "PEANUT",
    summary="a delta computed from W by a small network",
    shapes={
        "peanut_A": "r out",
        "peanut_B": "out r",
        r"peanut_(en|de)coders\.\d+": "r r",
    },
    leaves=("peanut_A", "peanut_B", r"peanut_encoders\.\d+", r"peanut_decoders\.\d+"),
    module=module,
    tensors=tensors,
    settings=settings,
    maths={"r": 32, "depth": 0, "act_fn": "relu", "scaling": 1.0},
    as_lora="base",
    merges="as deltas, with the base",
)
