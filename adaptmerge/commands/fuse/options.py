"""What a user may ask of a fusion, and which of it cannot be asked together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adaptmerge.commands.fuse.on_base.provenance import ORIGINAL, QUANTISED, TRAINED_ON
from adaptmerge.errors import InputError, UsageError, did_you_mean
from adaptmerge.formats.inputs import InputSpec
from adaptmerge.merging.prepare import Merging, check_merging
from adaptmerge.rounding.error_feedback import ADAPTIVE, ROUNDINGS
from adaptmerge.rounding.floats import AUTO
from adaptmerge.rounding.scales import ONLY, SCALES, SOLVE
from adaptmerge.schemes.scheme import quantisers
from adaptmerge.schemes.view import View
from adaptmerge.tensors import dtypes

ALLOWABLE = ("base", "nonfinite", "approximate", "labels", "loss")
SAME = "same"  # as the base is quantised
WIDE = ("bf16", "fp16", "fp32")  # dequantised
SMOOTHED = ("awq", "compressed-tensors")  # schemes that may move scales into the layer before


@dataclass(frozen=True, slots=True)
class FuseOptions(Merging):
    """What a user may ask of a fusion; see the command line's help for each."""

    dtype: str | None = None
    rounding: str = AUTO
    quant: str = SAME
    scales: str = SOLVE
    trained_on: str | None = None
    original: str | None = None
    calibration: str | None = None  # a text, or a file of moments
    keep_tied: bool = False
    max_loss: float = 0.25
    max_growth: float = 0.0  # a share of the bytes of the output
    plain: tuple[str, ...] | None = None  # weights that stay in 16 bits; None: see max_growth
    seed: int = 0
    strict: bool = False
    force: bool = False
    jobs: int | None = None
    executor: str = "local"


def check_options(specs: Sequence[InputSpec], options: FuseOptions) -> None:
    """Raises UsageError for what no base would allow."""
    missing = "no adapter was given: name at least one after the base"
    check_merging(specs, options, ALLOWABLE, missing)
    choices: dict[str, tuple[str | None, Sequence[str]]] = {
        "--rounding": (options.rounding, (AUTO, *ROUNDINGS)),
        "--trained-on": (options.trained_on, TRAINED_ON),
        "--dtype": (options.dtype, tuple(dtypes.SPELLINGS)),
        "--executor": (options.executor, ("local", "ray")),
        "--scales": (options.scales, SCALES),
    }
    for name, (given, known) in choices.items():
        if given is not None and given not in known:
            raise UsageError(f"{name} {given}: expected {', '.join(known)}")
    quants = (SAME, *WIDE, *quantisers())
    if options.quant not in quants:
        raise UsageError(f"--quant {options.quant}: {did_you_mean(options.quant, quants)}")
    if options.scales == ONLY and options.rounding not in (AUTO, ADAPTIVE):
        raise UsageError(
            f"--scales {ONLY} rounds no codes: leave out --rounding {options.rounding}"
        )


def _as_quant(dtype: str) -> str:
    """A dtype as --quant spells it."""
    meant = dtypes.SPELLINGS[dtype]
    return next(word for word in WIDE if dtypes.SPELLINGS[word] == meant)


def check_view(view: View, options: FuseOptions) -> None:
    """Raises where the options are not for this base, or it holds no weights."""
    base = view.values
    if view.scheme is None and options.quant in WIDE:
        raise UsageError(f"--quant {options.quant}: the base is not quantised: say --dtype")
    if view.stored_as and options.quant in quantisers():
        raise UsageError(
            f"--quant {options.quant}: a GGUF model stays one: say {', '.join(WIDE)}, or give the "
            "model that it was made of"
        )
    if view.scheme is not None and options.dtype and options.quant == SAME:
        raise UsageError(
            f"--dtype {options.dtype}: the base is quantised, and its scales have their dtype: say --quant "
            f"{_as_quant(options.dtype)} to store its weights dequantised"
        )
    if view.scheme is None and options.trained_on == QUANTISED:
        raise UsageError(
            f"--trained-on {QUANTISED}: the base is not: say nf4, nf4,double, fp4 or int8"
        )
    if options.original and (view.scheme is None or options.trained_on != ORIGINAL):
        raise UsageError(
            f"--original {options.original}: is for --trained-on {ORIGINAL} and a quantised base"
        )
    if view.scheme in SMOOTHED and options.trained_on == ORIGINAL and not options.original:
        raise UsageError(
            f"--trained-on {ORIGINAL}: the inputs of {view.scheme} layers may be scaled (smoothing), which "
            "only the original weights tell: say --original DIR"
        )
    if view.scheme is not None and options.trained_on not in (None, QUANTISED, ORIGINAL):
        raise UsageError(f"--trained-on {options.trained_on}: the base is quantised already")
    if not base.tensors:
        raise InputError("holds no weights to fuse into", where=str(base.path))
