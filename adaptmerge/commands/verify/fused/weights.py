"""Is a fused model what its report, or the base and adapters that are named, say it is?

Every tensor is looked at. What nothing touched must be the base's own bits; what was fused is compared with
weight plus delta by their plain definition in float64: bit for bit where it was rounded to nearest, by
the certificate (gain, sub, error), computed anew from the files, where it was not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from adaptmerge.adapters.graph import Site
from adaptmerge.algebra.by_rows import distance
from adaptmerge.algebra.factors import Leaf
from adaptmerge.algebra.linalg import one_thread_each
from adaptmerge.bases.base import Base
from adaptmerge.commands.fuse.pieces.layout import Fused, Recoded, Tensor
from adaptmerge.commands.fuse.plan import FusePlan
from adaptmerge.commands.fuse.report import FusedSite, FuseReport, and_error, percent
from adaptmerge.commands.verify.checks import FAIL, PASS, Check, within
from adaptmerge.commands.verify.fused.agreement import (
    DOUBLE,
    EXACT,
    MEASURED,
    TIES,
    Finding,
    compare_coded,
    compare_stored,
)
from adaptmerge.parallel import Tell, ordered, untold, workers_default
from adaptmerge.rounding.error_feedback import NEAREST
from adaptmerge.rounding.matrix import PIECE, Matrix
from adaptmerge.schemes.coded import named
from adaptmerge.schemes.view import View
from adaptmerge.tensors.compare import same_values
from adaptmerge.tensors.dtypes import DType
from adaptmerge.tensors.refs import TensorRef

AGREES = 1e-3  # by which a gain computed anew may differ from the reported one
SHOWN = 3
KEPT, LOST = 0.9, 0.25  # a gain and a sub that models of other tools must reach
SHARE, ERROR = "the share of {} that arrived", "the error of {} in the inputs that it reads"
ROUNDED, COMPUTED = 4.0, 0.02  # their error: at most so much of the grid's own, and of the delta


class Cast(NamedTuple):
    """A matrix that is only written in another dtype, and how far that is from the base's."""

    site: Site
    shape: tuple[int, int]
    apart: float


@dataclass
class Looked:
    """All that was found in the tensors of a fused model."""

    findings: list[Finding] = field(default_factory=list)
    copied: int = 0
    cast: list[Cast] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def look(plan: FusePlan, view: View, tell: Tell = untold) -> Looked:
    """Every tensor of a fused model against what the plan says of it."""
    fused = view.on_disk
    found = Looked()
    tensors = [tensor for shard in plan.shards for tensor in shard.tensors]
    with one_thread_each(), ThreadPoolExecutor(workers_default()) as pool:
        work = partial(_look_at, view=view)
        for count, one in enumerate(ordered(pool, workers_default(), work, tensors)):
            tell(f"weights of {tensors[count].name}", count + 1, len(tensors))
            found.findings += one.findings
            found.copied += one.copied
            found.cast += one.cast
            found.problems += one.problems
    known = {tensor.name for tensor in tensors}
    if not fused.tensors.keys() <= known:
        extra = sorted(name for name in fused.tensors.keys() - known if not _is_copy(name, fused))
        found.problems += [
            f"{name}: is stored, and neither base nor adapters have it" for name in extra
        ]
    return found


def _is_copy(name: str, fused: Base) -> bool:
    """Whether a tensor is stored a second time, under the name of what it is tied to."""
    return any(name in names for names in fused.tied)


def _look_at(tensor: Tensor, view: View) -> Looked:
    fused = view.on_disk
    module, _, param = tensor.name.rpartition(".")
    stored = fused.tensors.get(tensor.name)
    if stored is None:
        stored = fused.parameter(Site(module, param))
    if stored is None:
        return Looked(problems=[f"{tensor.name}: is missing"])
    if stored.shape != tensor.shape:
        what = f"has shape {list(stored.shape)}, expected {list(tensor.shape)}"
        return Looked(problems=[f"{tensor.name}: {what}"])
    found = Looked()
    for part, ref in zip(tensor.parts, _parts(tensor, stored), strict=True):
        if isinstance(part, Recoded):
            _look_at_packed(tensor.name, part, view, found)
            continue
        if isinstance(part, Fused):
            found.findings.append(compare_stored(tensor.name, part, ref))
            continue
        found.copied += part.ref.dtype == ref.dtype
        if not same_values(_cast(part.ref, ref.dtype), ref):
            found.problems.append(f"{tensor.name}: {_why_not_copied(tensor.name, ref)}")
        elif part.ref.dtype != ref.dtype and len(ref.shape) == 2:
            shape = ref.shape[0], ref.shape[1]
            off = distance(Leaf(part.ref), Leaf(ref), PIECE).apart
            found.cast.append(Cast(Site(module, param), shape, off))
    return found


def _look_at_packed(name: str, part: Recoded, view: View, found: Looked) -> None:
    """A quantised matrix is looked at once, with its codes."""
    stored = view.coded.get(named(part.coded.weight))
    if stored is None:
        found.problems.append(f"{name}: is not quantised as in the base")
    elif part.leads:
        found.findings.append(compare_coded(name, part.coded, stored))


def _parts(tensor: Tensor, stored: TensorRef) -> Iterator[TensorRef]:
    """The stored values of each part of a tensor."""
    if len(tensor.parts) == 1:
        yield stored
        return
    for expert in range(len(tensor.parts)):
        yield stored.slice(0, expert, expert + 1).reshape(*stored.shape[1:])


def _cast(ref: TensorRef, dtype: DType) -> TensorRef:
    return ref if ref.dtype == dtype else ref.cast(dtype)


def _why_not_copied(name: str, stored: TensorRef) -> str:
    tied = " (is it tied to an embedding that changed?)" if stored.name != name else ""
    return f"differs from what base and adapters store{tied}"


def check_weights(found: Looked, report: FuseReport | None) -> Check:
    """The check of all tensors; with a report also against what it says of rounding."""
    said = {(site.tensor, site.site): site for site in report.sites} if report else {}
    problems = list(found.problems)
    for finding in found.findings:
        key = (finding.tensor, str(finding.matrix.site))
        line = said.pop(key, None)
        if report is not None and line is None:
            problems.append(f"{key[1]}: the report does not know that it was fused")
        problems += _judged(finding, line)
    problems += [f"{site}: was reported to be fused, and is not" for _, site in said]
    numbers = _numbers(found)
    if problems:
        shown = "; ".join(problems[:SHOWN])
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        return Check("weights", FAIL, shown + more, {**numbers, "problems": problems})
    return Check("weights", PASS, _sentence(found), numbers)


def _numbers(found: Looked) -> dict[str, object]:
    counts = Counter(finding.how for finding in found.findings)
    return {
        "matrices": len(found.findings),
        "copied": found.copied,
        "agreement": dict(counts),
        "near_ties": sum(f.apart for f in found.findings if f.how == TIES),
    }


def _sentence(found: Looked) -> str:
    counts = Counter(finding.how for finding in found.findings)
    ties = sum(f.apart for f in found.findings if f.how == TIES)
    words = {
        EXACT: "{} matrices bit for bit",
        TIES: f"{{}} but for {ties} near ties",
        DOUBLE: "{} rounded twice (first the delta, then the sum, as PEFT merges)",
        MEASURED: "{} by their certificate",
    }
    parts = [text.format(counts[how]) for how, text in words.items() if counts[how]]
    if found.copied:
        parts.append(f"{found.copied} tensors are the base's own bits")
    if found.cast:
        parts.append(f"{len(found.cast)} matrices are only cast")
    return ", ".join(parts)


def _judged(finding: Finding, line: FusedSite | None) -> list[str]:
    """What is wrong with one matrix."""
    site, measured = finding.matrix.site, finding.measured
    if finding.how in (EXACT, TIES):
        return []
    gains = dict(zip(_adapters(finding.matrix), measured.gains, strict=True))
    diagnosis = _diagnosis(gains)
    if diagnosis:
        return [f"{site}: {diagnosis}"]
    if line is not None and line.rounding == NEAREST:
        return [f"{site}: {finding.apart} entries are not the nearest to weight plus delta"]
    if line is not None:
        return _unlike(finding, line)
    return _too_far(finding) if finding.how == MEASURED else []


def _adapters(matrix: Matrix) -> list[str]:
    return [part.adapter for part in matrix.parts]


def _diagnosis(gains: dict[str, float | None]) -> str | None:
    """What a gain that is far from 1 tells of how a model was made."""
    for name, gain in gains.items():
        if gain is None or abs(gain - 1) < 1 - KEPT:
            continue
        if not math.isfinite(gain):
            return f"what is there of {name} is no finite number: are weights NaN or infinite?"
        if abs(gain) < 1 - KEPT:
            return f"{name} is not in it ({percent(round(gain, 4))} of it arrived)"
        if abs(gain - round(gain)) < 0.1 and round(gain) == 2:
            return f"{name} is in it twice ({percent(gain)} of it arrived)"
        return f"{name} is in it {gain:.3g} times: is its scale (alpha / r) right?"
    return None


def _agree(now: float | None, then: float | None) -> bool:
    """Whether two measures are alike, or both unknown."""
    if now is None or then is None:
        return now is then
    return within(abs(now - then), AGREES)


def _unlike(finding: Finding, line: FusedSite) -> list[str]:
    """Where the certificate is not the reported one."""
    measured, names = finding.measured, _adapters(finding.matrix)
    problems = []
    for name, gain, sub in zip(names, measured.gains, measured.subs, strict=True):
        before = line.gain.get(name), line.sub.get(name)
        for what, now, then in ((SHARE, gain, before[0]), (ERROR, sub, before[1])):
            if not _agree(now, then):
                problems.append(
                    f"{line.site}: {what.format(name)} is {_shown(now)}, reported was {_shown(then)}"
                )
    error = math.sqrt(measured.error)
    if not within(abs(error - line.error), 0.01 * line.error + 1e-9 * line.weight_norm):
        problems.append(f"{line.site}: error is {error:.4g}, reported was {line.error:.4g}")
    return problems


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _too_far(finding: Finding) -> list[str]:
    """A model of another tool may round as it likes, but must hold what the adapters add."""
    measured = finding.measured
    far = [
        f"{finding.matrix.site}: {percent(gain, 'an unknown part')} of {name} arrived{and_error(sub)}"
        for name, gain, sub in zip(
            _adapters(finding.matrix), measured.gains, measured.subs, strict=True
        )
        if not (gain is None or gain >= KEPT) or not (sub is None or within(sub, LOST))
    ]
    if not finding.matrix.parts:
        far = [f"{finding.matrix.site}: {finding.apart} entries differ from what is promised"]
    size, weight, delta = (math.sqrt(x) for x in (measured.error, measured.weight, measured.delta))
    if not far and not within(size, ROUNDED * finding.grid * weight + COMPUTED * delta):
        far = [
            f"{finding.matrix.site}: is further from weight plus delta than rounding explains "
            f"({size / max(weight, 1e-300):.1e} of the weight): was something else fused, too?"
        ]
    return far
