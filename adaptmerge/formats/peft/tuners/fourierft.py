"""FourierFT: fourierft_spectrum (n,); places, scale and the number n are in the config."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from adaptmerge.adapters.families.fourierft import FourierFt
from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.formats.peft.additive import number
from adaptmerge.formats.peft.shared import seed
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    """n random places of the spectrum, the same for all weights of one shape."""
    spectrum = parts["fourierft_spectrum"]
    check_spectrum(reading, module, spectrum.shape, _count(reading, module))
    scale = float(number(reading, "scaling"))
    return [FourierFt(Site(module), spectrum, seed(reading, "random_loc_seed"), scale)]


def check_spectrum(reading: Reading, module: str, shape: tuple[int, ...], expected: Any) -> None:
    """Raises Malformed where the coefficients are not as many as the config or the weight allow."""
    if len(shape) != 1 or expected not in (None, shape[0]):
        raise Malformed(
            f"has coefficients of shape {list(shape)}, but by n_frequency there are {expected}: does "
            "the config belong to this file?"
        )
    weight = reading.matrix(module)
    if weight is not None and shape[0] > weight.count:
        raise Malformed(
            f"has {shape[0]} coefficients, more than the {weight.count} entries of the base's weight"
        )


def _count(reading: Reading, module: str) -> Any:
    """As PEFT looks it up in this family: by the end of the path after a dot, or by the whole path."""
    table = reading.config.raw.get("n_frequency_pattern") or {}
    found = (value for key, value in table.items() if re.match(rf".*\.{key}$", module))
    default = table.get(module, reading.setting("n_frequency"))
    return next(found, default)


def tensors(edit: FourierFt) -> Parts:
    return {"fourierft_spectrum": edit.spectrum}


def settings(edit: FourierFt) -> Mapping[str, Any]:
    count = edit.spectrum.count
    return {"n_frequency": count, "random_loc_seed": edit.seed, "scaling": edit.scale}


def finish(edits: Sequence[FourierFt], config: dict[str, Any]) -> dict[str, Any]:
    """Exceptions by whole paths without ^, which would match nothing here."""
    counts = {edit.site.module: edit.spectrum.count for edit in edits}
    others = {module: n for module, n in counts.items() if n != config["n_frequency"]}
    return {**config, "n_frequency_pattern": others}


TUNER = Tuner(
    "FOURIERFT",
    summary="the inverse Fourier transform of a few coefficients",
    shapes={
        "fourierft_spectrum": "n?",
    },
    leaves=("fourierft_spectrum",),
    module=module,
    tensors=tensors,
    settings=settings,
    finish=finish,
    maths={"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777},
    patterns={"n_frequency": "n_frequency_pattern"},
    bias_mode="fourier_only",
    as_lora="base",
    merges="as deltas, of which only the base tells the shape",
)
