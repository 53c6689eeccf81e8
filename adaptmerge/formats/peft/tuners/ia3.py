"""IA3 (Liu et al. 2022): learned scales of a module's outputs, or of its inputs for feed-forward ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from adaptmerge.adapters.graph import Edit, Layer, Site
from adaptmerge.adapters.module_paths import is_suffix
from adaptmerge.adapters.weight_edits import Scale
from adaptmerge.formats.peft.tuner import Parts, Reading, Tuner
from adaptmerge.tensors.refs import TensorRef


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    """ia3_l is (out, 1) and scales weight and bias, or (1, in) and scales the input side; of a
    convolution it is (1, n, 1, 1) for both, and only the config says which."""
    vector = parts["ia3_l"]
    layer = Layer("conv", vector.shape[2:]) if len(vector.shape) > 2 else Layer()
    flat = vector.reshape(vector.count)
    if _scales_inputs(reading, module, vector):
        return [Scale(Site(module, layer=layer), flat, "in")]
    return [Scale(Site(module, layer=layer), flat), Scale(Site(module, "bias"), flat)]


def _scales_inputs(reading: Reading, module: str, vector: TensorRef) -> bool:
    if len(vector.shape) == 2:
        return vector.shape[0] == 1 and vector.count > 1
    listed = reading.setting("feedforward_modules") or []
    if isinstance(listed, str):
        return re.fullmatch(listed, module) is not None
    return any(is_suffix(name, module) for name in listed)


def tensors(edit: Scale) -> Parts:
    """The vector as PEFT shapes it; the bias shares the weight's."""
    if edit.site.param != "weight":
        return {}
    count = edit.vector.count
    kernel = edit.site.layer.kernel
    if kernel:
        return {"ia3_l": edit.vector.reshape(1, count, *(1 for _ in kernel))}
    return {"ia3_l": edit.vector.reshape(*((count, 1) if edit.side == "out" else (1, count)))}


def finish(edits: Sequence[Scale], config: dict[str, Any]) -> dict[str, Any]:
    """Modules whose inputs are scaled must be named exactly as in target_modules."""
    inputs = {edit.site.module for edit in edits if edit.side == "in"}
    outputs = {edit.site.module for edit in edits} - inputs
    targets = config["target_modules"]
    if isinstance(targets, str) or any(
        _selects(t, inputs) and _selects(t, outputs) for t in targets
    ):
        targets = sorted(inputs | outputs)
    forward = [target for target in targets if _selects(target, inputs)]
    return {**config, "target_modules": targets, "feedforward_modules": forward}


def _selects(target: str, modules: Iterable[str]) -> bool:
    return any(is_suffix(target, module) for module in modules)


TUNER = Tuner(
    "IA3",
    summary="diag(l) W or W diag(l)",
    shapes={
        "ia3_l": "_out 1 | 1 _n *",
    },
    leaves=("ia3_l",),
    module=module,
    tensors=tensors,
    finish=finish,
    maths={"feedforward_modules": None},
    training=frozenset({"init_ia3_weights"}),
    as_lora="base",
    merges="linear in the deviation from 1",
)
