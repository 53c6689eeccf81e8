"""A fused model against base plus adapters: its files, its weights, and what the real model computes.

The adapters attached to the base, unmerged, are the reference; all runs are in float32, the stored
weights widened. Rounding the fused weights moves outputs, too: noise of the measured size in every fused
weight says by how much.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adaptmerge.adapters.graph import Adapter, Site
from adaptmerge.adapters.stored_edits import saved_module, trained_tokens
from adaptmerge.adapters.weight_edits import Add
from adaptmerge.algebra.factors import Rows, Term, whole_term
from adaptmerge.bases.base import GGUF
from adaptmerge.bases.open import open_base
from adaptmerge.commands.fuse.options import FuseOptions
from adaptmerge.commands.fuse.plan import FusePlan, plan_fusion
from adaptmerge.commands.fuse.report import FuseReport
from adaptmerge.commands.verify.base_names import names_alone, with_doubts
from adaptmerge.commands.verify.checks import FAIL, PASS, UNDECIDABLE, Check, Verdict, within
from adaptmerge.commands.verify.files import check_files
from adaptmerge.commands.verify.forward import NO_EFFECT, Bench, Comparison, compare
from adaptmerge.commands.verify.fused.figures import check_figures
from adaptmerge.commands.verify.fused.reference import reference
from adaptmerge.commands.verify.fused.weights import Looked, check_weights, look
from adaptmerge.commands.verify.fused.written import check_written
from adaptmerge.errors import InputError, UsageError, VerificationFailed
from adaptmerge.files.typed import built
from adaptmerge.formats.inputs import InputSpec
from adaptmerge.lazy import torch
from adaptmerge.parallel import Tell, untold
from adaptmerge.runtime.inputs import CannotRun
from adaptmerge.runtime.models import device_named, labels_of_heads, model_config
from adaptmerge.schemes.view import View, view_of
from adaptmerge.tensors.dtypes import F32

ARRIVED = 0.1  # by which the effect that outputs show may differ from all of it
ROOM = 3.0  # times the noise of rounding that outputs may differ by
# Entries of a config that other tools write as they like, and those of heads and dtypes, whose tensors
# are compared.
FREE = frozenset(
    ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
    + ("id2label", "label2id", "problem_type", "quantization_config")
)
TRUSTED = (
    "adaptmerge's own readers of the adapters (combine and verify them with their own library)"
)


def verify_fused(
    output: Path,
    base: str | Path | None,
    specs: Sequence[InputSpec],
    options: FuseOptions,
    report: FuseReport | None,
    *,
    device: str,
    layerwise: bool,
    tell: Tell = untold,
) -> Verdict:
    """The verdict on a fused model. report: what it says of itself; None for one of another tool."""
    if base is None:
        raise UsageError("a fused model is compared with its base: pass --base DIR")
    plan = plan_fusion(base, specs, options)
    fused = view_of(open_base(str(output)))
    adapters = {item.name: item.adapter for item in plan.inputs}
    checks = names_alone(adapters, plan.bases.on_disk)
    if report is not None:
        checks = [check_files(output, report.files), *_base(plan, report)]
    if any(check.status == FAIL and check.name == "base" for check in checks):
        return Verdict(output.name, checks, TRUSTED)
    found = look(plan, fused, tell)
    checks += [_config(plan, fused), check_weights(found, report)]
    if report is not None:
        checks += [check_figures(plan, found, report), check_written(output, plan, report)]
    checks.append(_forward(plan, fused, found, device, layerwise=layerwise, tell=tell))
    return Verdict(output.name, checks, TRUSTED)


def options_in(report: FuseReport, original: str | None = None) -> FuseOptions:
    """The options that a model was fused with, as its report says; original: where that model lies.

    Raises UsageError where it is needed and not given.
    """
    if report.base.get("original") and original is None:
        raise UsageError(
            "was fused with the original beside its base: pass --original DIR, what that was quantised from"
        )
    said = {name: value for name, value in report.options.items() if name != "weights"}
    said["allow"] = [*said["allow"], "base", "loss"]
    said["original"] = original if report.base.get("original") else None
    return built(FuseOptions, said, "options of the report")


def _base(plan: FusePlan, report: FuseReport) -> list[Check]:
    given, original = plan.bases.on_disk, plan.bases.original
    if report.base.get("fingerprint") != given.fingerprint:
        detail = f"{given.path.name} is not the base that was fused into (its fingerprint differs)"
        return [Check("base", FAIL, detail)]
    if original is not None and report.base.get("original") != original.fingerprint:
        detail = (
            f"{original.path.name} is not the original that was given (its fingerprint differs)"
        )
        return [Check("base", FAIL, detail)]
    fits = Check("base", PASS, f"{given.path.name} fits by fingerprint")
    return [with_doubts(fits, {item.name: item.adapter for item in plan.inputs}, given)]


def _config(plan: FusePlan, fused: View) -> Check:
    """Whether the config is the base's, but for what follows from the tensors: tied or not, how many
    layers, the vocabulary."""
    wanted = {**plan.bases.values.config, **plan.targets.config}
    free = FREE - plan.targets.config.keys()
    said = fused.on_disk.config
    wrong = [
        f"{key} is {said[key]!r}, expected {wanted[key]!r}"
        for key in sorted(wanted.keys() & said.keys())
        if said[key] != wanted[key] and key not in free and not key.endswith("_token_id")
    ]
    wrong += _labels(plan, fused)
    if wrong:
        return Check("config", FAIL, "; ".join(wrong))
    return Check("config", PASS, "fits the tensors")


def _labels(plan: FusePlan, fused: View) -> list[str]:
    """What is amiss with the labels that the config counts: a head has a row for each."""
    heads = [step.edit for step in plan.plan.steps if saved_module(step.edit)]
    if not heads or fused.on_disk.path.suffix == GGUF:
        return []
    config = model_config(fused.on_disk.path)
    count = labels_of_heads(config, plan.inputs[0].adapter.with_edits(heads))
    if count in (None, config.num_labels):
        return []
    return [f"config.json counts {config.num_labels} labels, but the head has {count} rows"]


@dataclass(frozen=True, slots=True)
class Noise:
    """Random entries of a given norm: what rounding may do to a matrix, as a factor."""

    shape: tuple[int, int]
    size: float
    seed: int

    def dense(self, rows: Rows = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        value = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        value *= self.size / max(float(value.norm()), 1e-300)
        return value[slice(*rows)] if rows else value

    def thin(self) -> list[Term]:
        return whole_term(self.dense())


def _noisy(adapter: Adapter, found: Looked, settled: Collection[Site]) -> Adapter:
    """The adapter with noise of the size of the rounding in every matrix but those that are settled."""
    sizes = [(f.matrix.site, f.matrix.shape, math.sqrt(f.measured.error)) for f in found.findings]
    noise = []
    for site, shape, size in [*sizes, *found.cast]:
        if size > 0 and 1 not in shape and site not in settled:
            seed = int.from_bytes(hashlib.sha256(str(site).encode()).digest()[:7], "big")
            noise.append(Add(site, Noise(shape, size, seed)))
    return adapter.with_edits((*adapter.edits, *noise))


def _forward(
    plan: FusePlan, fused: View, found: Looked, device: str, *, layerwise: bool, tell: Tell
) -> Check:
    """The fused model's outputs against the base's with the adapters attached."""
    name = device_named(device)
    against = reference(plan, fused)
    wanted = against.whole
    tokens = sorted({t for edit in wanted.edits for t in trained_tokens(edit)})
    try:
        # quantised weights are run as their values: live quantised layers are another code path
        streamed = layerwise or plan.view.scheme is not None
        bench = Bench.of(plan.view.values, name, streamed, tokens, tell)
        model = bench.model(wanted)
        noisy = _noisy(wanted, found, against.settled)
        y_base, y_ref, y_noisy = bench.run_each(model, (against.base, wanted, noisy))
        del model
        bench.loaded.clear()
        streams = layerwise or bool(bench.why) or fused.scheme is not None
        bench = replace(bench, base=fused.values, layerwise=streams)
        (y,) = _outputs(bench)
    except CannotRun as problem:
        return Check("forward", UNDECIDABLE, "; ".join(problem.problems))
    except (InputError, VerificationFailed) as problem:
        return Check("forward", FAIL, f"cannot be run: {'; '.join(problem.problems[:2])}")
    y_base = y_base if y_base.shape[-1] == y_ref.shape[-1] else torch.zeros_like(y_ref)
    if y.shape != y_ref.shape:
        return Check(
            "forward", FAIL, f"outputs are of shape {list(y.shape)}, expected {list(y_ref.shape)}"
        )
    noise = compare(y_noisy, y_ref, y_base, F32).error
    return _judge(compare(y, y_ref, y_base, F32), noise, _arrived(y, y_ref, y_base))


def _outputs(bench: Bench) -> list[torch.Tensor]:
    """What the fused model computes. Raises InputError where it computes nothing, as the base does."""
    try:
        return bench.run_each(bench.model(), (None,))
    except CannotRun as problem:
        raise InputError(problem.problems) from None


def _arrived(y: torch.Tensor, y_ref: torch.Tensor, y_base: torch.Tensor) -> float:
    """The part of the adapters' effect on outputs that the fused model shows: 1 is all of it."""
    effect = (y_ref - y_base).double()
    return float(((y - y_base).double() * effect).sum() / effect.square().sum())


def _judge(found: Comparison, noise: float, arrived: float) -> Check:
    allowed = max(found.tolerance, ROOM * noise)
    numbers = {**found.numbers(), "rounding_noise": noise, "arrived": arrived, "tolerance": allowed}
    if not found.effect > NO_EFFECT:
        return Check("forward", FAIL, "the adapters have no effect on the outputs", numbers)
    detail = f"error {found.error:.2e} of the effect, {100 * arrived:.3g} % of which is there"
    if noise > found.tolerance:
        detail += f"; rounding the weights explains {noise:.1e}"
    if not within(found.error, allowed):
        return Check("forward", FAIL, f"{detail}; tolerance {allowed:.1e}", numbers)
    off = abs(arrived - 1)
    if noise <= 1.0 and not within(off, max(ARRIVED, noise / 2)):
        return Check("forward", FAIL, detail, numbers)
    if noise <= 1.0 and not within(off, ARRIVED):
        what = f"{detail}, which may and may not be why so little or much of it is there"
        return Check("forward", UNDECIDABLE, what, numbers)
    if not within(noise, 1.0):
        what = f"rounding the weights moves the outputs by {noise:.2g} of the effect, which hides any error"
        return Check("forward", UNDECIDABLE, what, numbers)
    return Check("forward", PASS, detail, numbers)
