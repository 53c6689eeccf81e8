"""WaveFT: waveft_spectrum (n,); places, scale, wavelet and the number n are in the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptmerge.adapters.families.waveft import FILTERS, WaveFt
from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.formats.peft.additive import number
from adaptmerge.formats.peft.shared import seed
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner
from adaptmerge.formats.peft.tuners.fourierft import check_spectrum

DEFAULT = "db1"


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    """With proportional_parameters n follows from the weights' sizes: then the file's own n is taken."""
    spectrum = parts["waveft_spectrum"]
    proportional = reading.setting("proportional_parameters")
    expected = None if proportional else reading.setting("n_frequency", module)
    check_spectrum(reading, module, spectrum.shape, expected)
    scale, key = float(number(reading, "scaling")), seed(reading, "random_loc_seed")
    return [WaveFt(Site(module), spectrum, key, scale, _wavelet(reading))]


def _wavelet(reading: Reading) -> str:
    if not reading.setting("use_idwt"):
        return ""
    name = reading.setting("wavelet_family")
    if name not in FILTERS:
        raise Malformed(
            f"wavelet_family is {name!r}, with which PEFT's own forward fails: expected one of "
            f"{', '.join(FILTERS)}"
        )
    return str(name)


def tensors(edit: WaveFt) -> Parts:
    return {"waveft_spectrum": edit.spectrum}


def settings(edit: WaveFt) -> Mapping[str, Any]:
    return {
        "n_frequency": edit.spectrum.count,
        "proportional_parameters": False,  # as the pattern has every module's own number
        "random_loc_seed": edit.seed,
        "scaling": edit.scale,
        "use_idwt": bool(edit.wavelet),
        "wavelet_family": edit.wavelet or DEFAULT,
    }


TUNER = Tuner(
    "WAVEFT",
    summary="the inverse wavelet transform of a few coefficients",
    shapes={
        "waveft_spectrum": "n?",
    },
    leaves=("waveft_spectrum",),
    module=module,
    tensors=tensors,
    settings=settings,
    maths={
        "n_frequency": 2592,
        "scaling": 25.0,
        "random_loc_seed": 777,
        "wavelet_family": DEFAULT,
        "use_idwt": True,
        "proportional_parameters": False,
    },
    patterns={"n_frequency": "n_frequency_pattern"},
    bias_mode="waveft_only",
    as_lora="base",
    merges="as deltas, of which only the base tells the shape",
)
