"""Oracles 2 and 3: outputs of the real model with the result, against the promise and the own library.

Errors are relative to the adapter's effect, |y - y_ref| / |y_ref - y_base|: relative to the outputs they
would look small even for an adapter that was never applied.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from adaptmerge import runtime
from adaptmerge.adapters.graph import Adapter, Site
from adaptmerge.adapters.weight_edits import WeightEdit, delta_on
from adaptmerge.bases.base import Base
from adaptmerge.commands.verify.checks import FAIL, PASS, SKIPPED, UNDECIDABLE, Check, within
from adaptmerge.formats.format import Format
from adaptmerge.formats.inputs import Input
from adaptmerge.lazy import torch
from adaptmerge.merging.resolve import WHOLE
from adaptmerge.tensors.dtypes import DType

FIXED = {"F64": 1e-5, "F32": 1e-5, "F16": 2e-3, "BF16": 2e-2}
NOISE = 16.0  # |y| eps this many times over is the noise of a forward pass
BLIND = 0.25  # a tolerance above this share of the effect decides nothing
NO_EFFECT = 1e-7  # relative to the outputs


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two outputs compared, relative to the effect of the adapter."""

    error: float
    largest: float
    effect: float
    tolerance: float
    divergence: float
    agreement: float

    def numbers(self) -> dict[str, float]:
        return {
            "relative_error": self.error,
            "max_error": self.largest,
            "effect": self.effect,
            "tolerance": self.tolerance,
            "kl": self.divergence,
            "top1_agreement": self.agreement,
        }


@dataclass(frozen=True)
class Bench:
    """A base model and inputs to run it on; `model()` gives a fresh one, `run` the outputs."""

    base: Base
    device: str
    layerwise: bool
    inputs: Mapping[str, Any]

    @classmethod
    def of(cls, base: Base, device: str, layerwise: bool, tokens: Sequence[int] = ()) -> Bench:
        """`tokens` are some that the inputs should have: those that were trained."""
        inputs = runtime.example_inputs(base.config, first=tokens)
        placed = {name: value.to(device) for name, value in inputs.items()}
        return cls(base, device, layerwise, placed)

    def model(self, adapter: Adapter | None = None) -> Any:
        """The base in float32, whole or streamed layer by layer, with places for an adapter's heads."""
        if self.layerwise:
            return runtime.stream_model(self.base, device=self.device)
        return runtime.load_model(self.base.path, self.device, adapter=adapter)

    def run(self, model: Any, adapter: Adapter | None = None) -> torch.Tensor:
        """Outputs of the model, with the adapter attached if one is given."""
        if adapter is None:
            return runtime.outputs_of(model, self.inputs)
        with runtime.attach(model, adapter):
            return runtime.outputs_of(model, self.inputs)


class Forward(NamedTuple):
    """A check of outputs, and those that it compared with: the reference's and the base's."""

    check: Check
    y_ref: torch.Tensor
    y_base: torch.Tensor


def check_forward(bench: Bench, expected: Adapter, output: Adapter, dtype: DType) -> Forward:
    """The check of the output read by adaptmerge."""
    model = bench.model(expected)
    y_base, y_ref, y = runtime.outputs_of_each(model, bench.inputs, (None, expected, output))
    y_base = y_base if y_base.shape[-1] == y_ref.shape[-1] else torch.zeros_like(y_ref)
    if y.shape != y_ref.shape:
        detail = f"outputs are of shape {list(y.shape)}, promised were {list(y_ref.shape)}"
        return Forward(Check("forward", FAIL, detail), y_ref, y_base)
    check = judge("forward", compare(y, y_ref, y_base, dtype))
    return Forward(check, y_ref, y_base)


def compare(y: torch.Tensor, y_ref: torch.Tensor, y_base: torch.Tensor, dtype: DType) -> Comparison:
    """y against y_ref relative to |y_ref - y_base|."""
    y, y_ref, y_base = _aligned([v.detach().double().cpu() for v in (y, y_ref, y_base)])
    effect = float((y_ref - y_base).norm())
    apart = float((y - y_ref).norm())
    size = float(y_ref.norm())
    eps = torch.finfo(torch.float32).eps
    noise = NOISE * eps * size / effect if effect else float("inf")
    return Comparison(
        error=apart / effect if effect else float("inf"),
        largest=float((y - y_ref).abs().max()),
        effect=effect / size if size else 0.0,
        tolerance=max(FIXED.get(dtype.name, 1e-5), noise),
        divergence=_divergence(y, y_ref),
        agreement=float((y.argmax(-1) == y_ref.argmax(-1)).double().mean()),
    )


def _aligned(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The last positions that all of them have: virtual tokens make outputs longer at the front."""
    if min(value.ndim for value in outputs) < 3:
        return list(outputs)
    shortest = min(value.shape[1] for value in outputs)
    return [value[:, -shortest:] for value in outputs]


def _divergence(y: torch.Tensor, y_ref: torch.Tensor) -> float:
    """Mean KL(reference || result) of the softmax over the last axis, in nats."""
    ours, theirs = torch.log_softmax(y, -1), torch.log_softmax(y_ref, -1)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def judge(name: str, found: Comparison) -> Check:
    """pass, fail or undecidable: noise that hides the effect never passes."""
    numbers = found.numbers()
    if not found.effect > NO_EFFECT:
        return Check(name, FAIL, "the adapter has no effect on the outputs of the base", numbers)
    if found.tolerance > BLIND:
        detail = f"noise of {found.tolerance:.2g} of the effect hides any error"
        return Check(name, UNDECIDABLE, detail, numbers)
    detail = f"error {found.error:.2e} of the effect, tolerance {found.tolerance:.1e}"
    return Check(name, PASS if within(found.error, found.tolerance) else FAIL, detail, numbers)


def installed(form: Format) -> bool:
    """Whether the format's own library can be asked."""
    return form.oracle is not None and importlib.util.find_spec(form.oracle.package) is not None


def check_native_output(bench: Bench, result: Input, ours: Forward, dtype: DType) -> Check:
    """The output loaded and run by its format's own library, against the reference."""
    oracle, path = result.format.oracle, result.path
    assert oracle is not None
    name = f"forward in {oracle.package}"
    model = bench.model(result.adapter)

    def ask() -> Check:
        y = oracle.forward(model, path, bench.inputs)
        return judge(name, compare(y, ours.y_ref, ours.y_base, dtype))

    return _guarded(name, ask)


def check_native_inputs(bench: Bench, inputs: Sequence[Input]) -> list[Check]:
    """Our reading of every input against its own library's deltas, where that is installed."""
    checks = []
    for item in inputs:
        oracle = item.format.oracle
        if oracle is not None and installed(item.format):
            name = f"input {item.name} in {oracle.package}"
            checks.append(_guarded(name, partial(_reading, name, bench, item)))
    return checks


def _guarded(name: str, ask: Callable[[], Check]) -> Check:
    """The library's own refusal is a finding, not a crash."""
    try:
        return ask()
    except Exception as problem:  # noqa: BLE001 - any failure of a foreign library
        return Check(name, FAIL, f"the library cannot load it: {type(problem).__name__}: {problem}")


def _reading(name: str, bench: Bench, item: Input) -> Check:
    assert item.format.oracle is not None
    model = bench.model(item.adapter)
    adapter = runtime.as_built(model, item.adapter)
    theirs = item.format.oracle.deltas(model, item.path)
    ours = {
        str(site): delta_on(edits, weight)
        for site, edits in _weight_edits(adapter)
        if (weight := bench.base.weight(site)) is not None
    }
    if not theirs or item.spec.alpha is not None:
        return Check(name, SKIPPED, "the library has no deltas to compare with")
    problems = [f"{site}: read by one of the two only" for site in sorted(set(ours) ^ set(theirs))]
    worst = 0.0
    for module in sorted(set(ours) & set(theirs)):
        mine = ours[module].dense()
        delta = theirs[module].to(mine)
        off = float((mine - delta).norm()) / (float(delta.norm()) or 1.0)
        worst = max(worst, off) if math.isfinite(off) else math.inf
        if not within(off, FIXED["F32"]):
            problems.append(f"{module}: read {off:.2e} away from the library's delta")
    if problems:
        return Check(name, FAIL, "; ".join(problems[:3]), {"worst": worst, "problems": problems})
    return Check(name, PASS, f"{len(theirs)} deltas are read alike", {"worst": worst})


def _weight_edits(adapter: Adapter) -> Iterator[tuple[Site, list[Any]]]:
    """The edits that act on weights of modules and experts, by site; parameters stored whole aside."""
    for site, edits in adapter.sites().items():
        acting = [edit for edit in edits if isinstance(edit, WeightEdit) and edit.kind not in WHOLE]
        if acting and (site.param == "weight" or site.expert is not None):
            yield site, acting
