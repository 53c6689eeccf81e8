"""Oracle 1: every site of the output against what its report promises, in float64."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from adaptmerge.adapters.graph import Adapter, Edit, Key, key_of
from adaptmerge.adapters.weight_edits import factor_of
from adaptmerge.algebra.factors import Factor
from adaptmerge.algebra.forms import WeightedSum
from adaptmerge.algebra.linalg import noise_floor, one_thread_each
from adaptmerge.algebra.low_rank import as_low_rank
from adaptmerge.commands.verify.audit import Audit, Loss, auditor, unearned
from adaptmerge.commands.verify.checks import FAIL, PASS, Check, within
from adaptmerge.commands.verify.measure import Measured, measured
from adaptmerge.commands.verify.normed import on_weight
from adaptmerge.commands.verify.promise import (
    Projected,
    Promised,
    added_to,
    expected_edit,
    other_tensors,
    settings,
)
from adaptmerge.lazy import torch
from adaptmerge.outputs.report import Report
from adaptmerge.parallel import Tell, ordered, short_turns, untold, workers_default
from adaptmerge.tensors.compare import same_values
from adaptmerge.tensors.refs import TensorRef
from adaptmerge.tensors.walk import refs_of

TOLERANCE = 1e-5  # relative; float32 factors and their products stay well below
UNPROVEN = "sites that outputs do not judge"
SLACK = 0.01  # share by which a reported error may be off
NEAR = 1e-4  # relative: norms of computed values


class SiteFinding(NamedTuple):
    """What was found at one site. expected: the promised edit, truncated where the output is; None where
    nothing is left of it. size: of the stored delta. off: the error beyond what was reported."""

    problems: list[str]
    expected: Edit | None = None
    size: float = 0.0
    off: float = 0.0
    loss: Loss | None = None


def check_weights(
    report: Report, promised: Sequence[Promised], output: Adapter, tell: Tell = untold
) -> tuple[Check, list[Edit]]:
    """The check of all sites, and the promised edits for oracle 2: truncated where the output is."""
    stored = {key_of(edit): edit for edit in output.edits}
    problems = _twice(output) + _dtypes(report, promised, stored)
    audit = auditor(report)
    pairs = [(item, stored.pop(item.line.key, None)) for item in promised]
    found = list(_in_parallel(lambda pair: _site(*pair, audit), pairs, tell))
    losses = [one.loss for one in found if one.loss is not None]
    problems += [problem for one in found for problem in one.problems]
    unasked = [edit for edit in stored.values() if not _does_nothing(edit)]
    problems += [f"{edit.site}: is in the output, but in no input" for edit in unasked]
    problems += unearned(report, losses)
    if not problems and sum(one.size**2 for one in found) == 0.0 and _any_delta(promised):
        problems.append("the output has no effect at all")
    worst = [(one.off, item.line.site) for item, one in zip(promised, found, strict=True)]
    unproven = sum(_is_own_reference(item, edit) for item, edit in pairs)
    expected = [one.expected for one in found if one.expected is not None]
    return _check(problems, worst, unproven), expected


Pair = tuple[Promised, "Edit | None"]


def _in_parallel(
    look: Callable[[Pair], SiteFinding], pairs: Sequence[Pair], tell: Tell
) -> Iterator[SiteFinding]:
    """The findings in order, sites side by side."""
    workers = workers_default()
    with one_thread_each(), short_turns(), ThreadPoolExecutor(max_workers=workers) as pool:
        for count, found in enumerate(ordered(pool, workers, look, pairs)):
            tell(f"weights of {pairs[count][0].line.site}", count + 1, len(pairs))
            yield found


def _is_own_reference(item: Promised, edit: Edit | None) -> bool:
    """Whether a lossy form is the nearest of its kind: then outputs cannot judge it, its delta can."""
    stored = _stored(item, edit)
    return item.line.truncation > 0.0 and stored is not None and as_low_rank(stored) is None


def _does_nothing(edit: Edit) -> bool:
    """Whether it adds exactly zero, as the biases do that a format stores for all modules or none."""
    factor = factor_of(edit)
    return edit.kind == "add" and factor is not None and not bool(factor.dense().any())


def _twice(output: Adapter) -> list[str]:
    counts = Counter(key_of(edit) for edit in output.edits)
    return [f"{key}: is in the output {n} times" for key, n in counts.items() if n > 1]


def _dtypes(report: Report, promised: Sequence[Promised], stored: Mapping[Key, Edit]) -> list[str]:
    """What was computed is stored in the dtype that the report says, which sets the tolerances."""
    said = report.output["dtype"]
    fitted = [item.line for item in promised if item.line.action == "fit"]
    keys = [line.key for line in fitted]
    return [
        f"{line.site}: is stored as {ref.dtype}, reported was {said}"
        for line, key in zip(fitted, keys, strict=True)
        if key in stored
        for ref in refs_of(factor_of(stored[key]))
        if str(ref.dtype) != said
    ]


def _any_delta(promised: Sequence[Promised]) -> bool:
    """Whether there are only deltas, and one of them at least is no rounding noise."""
    if not all(item.terms for item in promised):
        return False
    return any(not _is_noise(item, measured(_whole(item), None)) for item in promised)


def _whole(item: Promised) -> WeightedSum:
    return WeightedSum(item.terms, item.terms[0][1].shape)


def _check(problems: list[str], worst: list[tuple[float, str]], unproven: int) -> Check:
    """The verdict, with the errors of all sites and how many of them outputs do not judge."""
    count = len(worst)
    numbers: dict[str, Any] = {
        "sites": count,
        "worst": [{"site": site, "error": off} for off, site in sorted(worst, reverse=True)[:5]],
    }
    if problems:
        shown = "; ".join(problems[:5]) + (
            f"; and {len(problems) - 5} more" if problems[5:] else ""
        )
        numbers = {**numbers, "problems": problems, UNPROVEN: unproven}
        return Check("weights", FAIL, shown, numbers)
    detail = f"{count} sites hold what was promised (in float64)"
    return Check("weights", PASS, detail, {**numbers, UNPROVEN: unproven})


def _site(item: Promised, edit: Edit | None, audit: Audit) -> SiteFinding:
    """One site of the output against its promise."""
    if item.by_value:
        return _value(item, edit)
    if not item.terms:
        return SiteFinding(_same_tensors(item, edit), item.edit)
    whole = _whole(item)
    stored = _stored(item, edit)
    if edit is None or stored is None:
        return _absent(item, whole, audit)
    if stored.shape != whole.shape:
        problem = f"{item.line.site}: stored {stored.shape}, promised {whole.shape}"
        return SiteFinding([problem], off=1.0)
    whole, stored = _on_weight(item, whole, stored)
    found = measured(whole, stored, item.weight)
    problems = [] if item.weight is not None else _same_tensors(item, edit)
    problems += _error(item, found)
    more, loss = audit(item, whole, stored, found)
    off = abs(found.apart.relative - item.line.error)
    return SiteFinding(
        [*problems, *more], _expected(item, whole, stored), found.apart.right, off, loss
    )


def _on_weight(item: Promised, whole: WeightedSum, stored: Factor) -> tuple[WeightedSum, Factor]:
    """Both with what norms the base's weight taken apart."""
    if item.weight is None:
        return whole, stored
    *factors, last = on_weight([*(factor for _, factor in whole.terms), stored], item.weight)
    by = [weight for weight, _ in whole.terms]
    return WeightedSum(tuple(zip(by, factors, strict=True)), whole.shape), last


def _expected(item: Promised, whole: WeightedSum, stored: Factor) -> Edit:
    """The promised edit, cut to the directions that are stored where the report says that it was cut."""
    if not item.line.truncation > 0.0:
        return expected_edit(item, whole)
    cut = stored if as_low_rank(stored) is None else Projected(whole, stored)
    return expected_edit(item, cut)


def _stored(item: Promised, edit: Edit | None) -> Factor | None:
    """What the stored edit adds: its factor, or on the base where that is the promise."""
    if edit is None or item.weight is None:
        return factor_of(edit) if edit else None
    return added_to(item.weight, [edit])


def _missing(item: Promised) -> str:
    return f"{item.line.site}: was promised and is not in the output"


def _absent(item: Promised, whole: WeightedSum, audit: Audit) -> SiteFinding:
    """A site without a stored delta is right only when the promise is that nothing is left of it."""
    found = measured(whole, None, item.weight)
    if item.line.rank != 0 or other_tensors(item.edit) or not _nothing_left(item, found):
        return SiteFinding([_missing(item)], expected_edit(item, whole), off=1.0)
    problems, loss = audit(item, whole, None, found)
    return SiteFinding(problems, loss=loss)


def _nothing_left(item: Promised, found: Measured) -> bool:
    """Whether all of the delta was truncated, as reported, or inputs cancel up to rounding."""
    return abs(item.line.error - 1.0) <= TOLERANCE or _is_noise(item, found)


def _is_noise(item: Promised, found: Measured) -> bool:
    """Whether inputs cancel up to what float32 resolves of their sizes (not of the sum's)."""
    return found.apart.left <= noise_floor(_whole(item).shape, torch.float32, found.sizes)


def _error(item: Promised, found: Measured) -> list[str]:
    """The measured error must be the reported one."""
    apart, size = found.apart, found.base
    if item.line.rank == 0 and apart.right == 0.0 and _is_noise(item, found):
        return []
    if size is not None and apart.left <= TOLERANCE * size:
        return (
            []
            if within(apart.apart, TOLERANCE * size)
            else [f"{item.line.site}: is not what is left"]
        )
    allowed = max(TOLERANCE, SLACK * item.line.error)
    if within(abs(apart.relative - item.line.error), allowed):
        return []
    return [
        f"{item.line.site}: is {apart.relative:.2e} of the delta away from what was promised, "
        f"reported was {item.line.error:.2e}"
    ]


def _same_tensors(item: Promised, edit: Edit | None) -> list[str]:
    """Magnitudes, vectors and stored values must be the inputs' own, bit for bit."""
    if edit is None:
        return [_missing(item)]
    theirs, said = other_tensors(edit), settings(edit)
    wrong = [name for name, value in settings(item.edit).items() if said.get(name) != value]
    wrong += [
        name
        for name, ref in other_tensors(item.edit).items()
        if name not in theirs or not _equal(ref, theirs[name])
    ]
    return [f"{item.line.site}: {name} differs from the input's" for name in wrong]


def _equal(a: Any, b: Any) -> bool:
    if hasattr(a.source, "store"):
        return bool(a.count == b.count and _squares(a, b.reshape(*a.shape)) <= 2 * _rounding(a, b))
    if same_values(a, b):
        return True
    shapes = [tuple(size for size in ref.shape if size != 1) for ref in (a, b)]
    return shapes[0] == shapes[1] and torch.equal(
        a.read().double().flatten(), b.read().double().flatten()
    )


def _value(item: Promised, edit: Edit | None) -> SiteFinding:
    """Computed tensors, all of them against the definition."""
    if edit is None:
        return SiteFinding([_missing(item)], item.edit, off=1.0)
    wanted, found = other_tensors(item.edit), other_tensors(edit)
    pairs = [(ref, found[name]) for name, ref in wanted.items() if name in found]
    alike = settings(edit) == settings(item.edit) and len(pairs) == len(wanted)
    if not alike or any(a.shape != b.shape for a, b in pairs):
        shapes = f"{[list(ref.shape) for ref in found.values()]}"
        promised = f"{[list(ref.shape) for ref in wanted.values()]}"
        problem = f"{item.line.site}: has shapes {shapes}, promised were {promised}"
        return SiteFinding([problem], item.edit, off=1.0)
    apart = math.sqrt(sum(_squares(a, b) for a, b in pairs))
    size = math.sqrt(sum(_moved(a) for a, _ in pairs)) or 1.0
    room = math.sqrt(sum(_rounding(a, b) for a, b in pairs))
    off = apart / size
    as_said = within(abs(off - item.line.error), max(TOLERANCE, SLACK * item.line.error))
    if item.line.norm and not within(abs(item.line.norm - size), NEAR * size):
        problem = f"{item.line.site}: the norm is {size:.6g}, reported was {item.line.norm:.6g}"
        return SiteFinding([problem], item.edit, off=off)
    if as_said and within(apart, room + TOLERANCE * size):
        return SiteFinding([], item.edit, off=off)
    problem = f"{item.line.site}: value is {off:.2e} away from what was promised"
    return SiteFinding([problem], item.edit, off=off)


def _moved(ref: TensorRef) -> float:
    """The squared distance of what was promised from what does nothing."""
    neutral = getattr(ref.source, "neutral", 0.0)
    return float((ref.read().double() - neutral).square().sum())


def _rounding(meant: TensorRef, stored: TensorRef) -> float:
    """The most, squared, that the stored dtype can have changed."""
    if not stored.dtype.is_float:
        return 0.0
    eps = float(torch.finfo(stored.dtype.torch).eps)
    return float((meant.read().double() * eps).square().sum())


def _squares(a: TensorRef, b: TensorRef) -> float:
    return float((a.read().double() - b.read().double()).square().sum())
