"""Oracle 2: outputs of the real model with the result, against those with what was promised.

Errors are relative to the adapter's effect, |y - y_ref| / |y_ref - y_base|: relative to the outputs they
would look small even for an adapter that was never applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from adaptmerge import runtime
from adaptmerge.adapters.graph import Adapter, Edit
from adaptmerge.adapters.weight_edits import delta_of, norms_rows
from adaptmerge.bases.base import Base
from adaptmerge.commands.verify.checks import FAIL, PASS, UNDECIDABLE, Check, within
from adaptmerge.errors import AdaptmergeError, VerificationFailed
from adaptmerge.lazy import torch
from adaptmerge.parallel import Tell, untold
from adaptmerge.runtime.inputs import first_line, out_of_memory
from adaptmerge.runtime.memory import why_streamed
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
    """A base model and inputs to run it on; `model()` gives it, `run` the outputs."""

    base: Base
    device: str
    layerwise: bool
    inputs: Mapping[str, Any]
    tell: Tell = untold
    why: str = ""
    loaded: dict[tuple[str, str], Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        base: Base,
        device: str,
        layerwise: bool,
        tokens: Sequence[int] = (),
        tell: Tell = untold,
    ) -> Bench:
        """`tokens` are some that the inputs should have: those that were trained. A base that does not fit
        into the memory that is free is streamed, too, and `why` says so."""
        why = "" if layerwise else why_streamed(base, device)
        inputs = runtime.inputs_for(base.path, tokens)
        placed = {name: value.to(device) for name, value in inputs.items()}
        return cls(base, device, layerwise or bool(why), placed, tell, why)

    def model(self, adapter: Adapter | None = None) -> Any:
        """The base in float32 with places for an adapter's heads: modules of its own, around weights that
        models of adapters share which leave these alone."""
        if self.layerwise or (adapter is not None and not all(map(_shares, adapter.edits))):
            return self.fresh_model(adapter)
        key = str(self.base.path), self.device
        if key not in self.loaded:
            self.loaded[key] = self.fresh_model()
        return runtime.twin(self.loaded[key])

    def fresh_model(self, adapter: Adapter | None = None) -> Any:
        """The base in float32, whole or streamed layer by layer, with weights of its own."""
        self.tell(f"loading {self.base.path.name}", 0, 0)
        if self.layerwise:
            return runtime.stream_model(self.base, device=self.device)
        return runtime.load_model(self.base.path, self.device, adapter=adapter)

    def run_each(self, model: Any, adapters: Sequence[Adapter | None]) -> list[torch.Tensor]:
        """Outputs of the model with each adapter (None: none). Raises CannotRun where it has none without,
        either, and VerificationFailed where it has some."""
        try:
            with runtime.watched(model, self.tell):
                return runtime.outputs_of_each(model, self.inputs, adapters)
        except AdaptmergeError:
            raise
        except Exception as problem:
            why = runtime.ran(model, self.inputs)
            if why is None and not out_of_memory(problem):
                sentence = "the base computes outputs, but with the result it does not"
                raise VerificationFailed(f"{sentence}: {first_line(problem)}") from None
            raise runtime.CannotRun(why or first_line(problem)) from None

    def run(self, model: Any, adapter: Adapter | None = None) -> torch.Tensor:
        """Outputs of the model, with the adapter attached if one is given."""
        if adapter is None:
            return runtime.outputs_of(model, self.inputs)
        with runtime.attach(model, adapter):
            return runtime.outputs_of(model, self.inputs)


def _shares(edit: Edit) -> bool:
    """Whether a library that loads it has no reason to change weights of the base, or to make new ones."""
    return delta_of(edit) is not None or norms_rows(edit)


class Forward(NamedTuple):
    """A check of outputs, and those that it compared with: the reference's and the base's.

    idle: whether no module that is changed took part in them.
    """

    check: Check
    y_ref: torch.Tensor
    y_base: torch.Tensor
    idle: bool = False


def check_forward(bench: Bench, expected: Adapter, output: Adapter, dtype: DType) -> Forward:
    """The check of the output read by adaptmerge."""
    model = bench.model(expected)
    with runtime.called(model, expected) as places:
        y_base, y_ref, y = bench.run_each(model, (None, expected, output))
    idle = bool(places) and not any(places.values())
    y_base = y_base if y_base.shape[-1] == y_ref.shape[-1] else torch.zeros_like(y_ref)
    if y.shape != y_ref.shape:
        detail = f"outputs are of shape {list(y.shape)}, promised were {list(y_ref.shape)}"
        return Forward(Check("forward", FAIL, detail), y_ref, y_base)
    check = judge("forward", compare(y, y_ref, y_base, dtype), idle=idle)
    if bench.why:
        check = replace(check, detail=f"{check.detail}; {bench.why}")
    return Forward(check, y_ref, y_base, idle)


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


def judge(name: str, found: Comparison, *, idle: bool = False) -> Check:
    """pass, fail or undecidable: noise that hides the effect never passes, nor does an adapter all of whose
    modules are `idle`."""
    numbers = found.numbers()
    if idle:
        detail = "no module that it changes takes part in the model's outputs for these inputs"
        return Check(name, UNDECIDABLE, detail, numbers)
    if not found.effect > NO_EFFECT:
        return Check(name, FAIL, "the adapter has no effect on the outputs of the base", numbers)
    if found.tolerance > BLIND:
        detail = f"noise of {found.tolerance:.2g} of the effect hides any error"
        return Check(name, UNDECIDABLE, detail, numbers)
    detail = f"error {found.error:.2e} of the effect, tolerance {found.tolerance:.1e}"
    return Check(name, PASS if within(found.error, found.tolerance) else FAIL, detail, numbers)
