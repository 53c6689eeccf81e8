"""Does a report say more than its options allow? What was lost must be rounding, or asked for and optimal.

Without this a report could excuse any damage by calling it truncation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptmerge.algebra.by_rows import row_ranges
from adaptmerge.algebra.factors import Factor
from adaptmerge.algebra.fit import Budget
from adaptmerge.algebra.forms import form_of
from adaptmerge.algebra.linalg import noise_floor, thin_spectrum
from adaptmerge.algebra.low_rank import LowRank, as_low_rank
from adaptmerge.commands.verify.checks import within
from adaptmerge.commands.verify.extracted import is_extraction
from adaptmerge.commands.verify.files import is_digest
from adaptmerge.commands.verify.measure import Measured, in_coordinates
from adaptmerge.commands.verify.promise import Promised
from adaptmerge.errors import AdaptmergeError
from adaptmerge.lazy import torch
from adaptmerge.merging.resolve import WHOLE
from adaptmerge.methods.registry import method_named
from adaptmerge.outputs.report import Report, SiteLine
from adaptmerge.tensors.dtypes import BY_NAME, SPELLINGS

TOLERANCE = 1e-5  # of the delta, as for the deltas themselves
PROBES = 8  # random vectors that look for what a truncation should have kept
MEASURED = 1e-4  # relative: norms, which a merge has from float32 products
NEAR = 0.02  # share of a loss that directions found at random may be off by
NUMBERS = ("norm", "truncation", "rounding", "error")
FIELDS: Mapping[str, tuple[str, ...]] = {
    "options": ("weights", "rules", "heads", "budget", "dtype", "form", "allow"),
    "output": ("dtype", "ranks"),
    "totals": (),
}
INPUT_FIELDS = ("name", "source", "revision", "alpha", "sha256")


def malformed(report: Report) -> list[str]:
    """What a report lacks that a verification reads."""
    problems = [
        f"{part} has no {name}"
        for part, names in FIELDS.items()
        for name in names
        if not isinstance(table := getattr(report, part), Mapping) or name not in table
    ]
    problems += [
        f"an input has no {name}"
        for item in report.inputs
        for name in INPUT_FIELDS
        if not isinstance(item, Mapping) or name not in item
    ]
    problems += [
        f"files has {digest!r} for {name}"
        for name, digest in (report.files or {}).items()
        if not is_digest(digest)
    ]
    problems += _malformed_options(report)
    base: Any = report.base
    if not (base is None or isinstance(base, Mapping)):
        problems.append(f"the base is {base!r}")
    if problems:
        return problems
    known = set(report.options["weights"])
    if known != {item["name"] for item in report.inputs}:
        problems.append(f"the weights are not those of its inputs ({', '.join(sorted(known))})")
    if str(report.output["dtype"]).upper() not in BY_NAME:
        problems.append(f"the dtype is {report.output['dtype']!r}")
    kinds = {*method_named(report.method).rules, *WHOLE}
    problems += [
        f"{line.site}: kind is {line.kind!r}"
        for line in report.sites
        if line.action != "pass" and line.kind not in kinds
    ]
    return problems + [p for line in report.sites for p in _malformed_line(line)]


def _malformed_options(report: Report) -> list[str]:
    """What of the options is none that could be asked for."""
    said = report.options if isinstance(report.options, Mapping) else {}
    allow, heads = said.get("allow", []), said.get("heads")
    right = {
        "dtype": said.get("dtype") in (None, *SPELLINGS),
        "form": said.get("form") is None or isinstance(said["form"], str),
        "allow": isinstance(allow, list) and all(isinstance(word, str) for word in allow),
        "heads": heads is None or isinstance(heads, (str, Mapping)),
        "rules": isinstance(said.get("rules", []), list),
        "budget": _is_budget(said.get("budget")),
    }
    return [f"{name} is {said.get(name)!r}" for name, is_right in right.items() if not is_right]


def _is_budget(said: Any) -> bool:
    try:
        Budget(**said)
    except (TypeError, ValueError, AdaptmergeError):
        return False
    return True


def _malformed_line(line: SiteLine) -> list[str]:
    wrong = [name for name in NUMBERS if not _is_number(getattr(line, name))]
    if not (isinstance(line.weights, Mapping) and all(map(_is_number, line.weights.values()))):
        wrong.append("weights")
    return [f"{line.site}: {name} is {getattr(line, name)!r}" for name in wrong]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not math.isinf(value)


@dataclass(frozen=True, slots=True)
class Loss:
    """What one site lost: `apart` of `size`, of which `room` may be rounding; `capped` sites were cut
    to the rank cap."""

    line: SiteLine
    apart: float
    size: float
    room: float
    capped: bool

    @property
    def excess(self) -> float:
        """The loss that is no rounding."""
        if within(self.apart, self.room):
            return 0.0
        return self.apart if math.isfinite(self.apart) else math.inf


def loss_of(report: Report, item: Promised, stored: Factor | None, found: Measured) -> Loss:
    """What a site lost, and what of it its dtype explains."""
    apart = found.apart
    pair = None if stored is None else as_low_rank(stored)
    cap = _cap(report, item)
    rank = pair.rank if pair is not None else item.line.rank or 0
    floor = noise_floor(item.terms[0][1].shape, torch.float32, found.sizes)
    ranks = max(1, sum(item.line.ranks_in.values()))
    room = TOLERANCE * apart.left + math.sqrt(ranks) * floor + _rounding(report, stored, found)
    if found.base is not None:  # magnitudes and sides are rounded relative to the base, too
        room += _eps(report) * found.base
    capped = cap is not None and rank >= cap
    return Loss(item.line, apart.apart, apart.left, room, capped)


def misstated(loss: Loss) -> list[str]:
    """What the line of a site says of its norm and its rounding that was measured otherwise."""
    line, problems = loss.line, list[str]()
    if not within(abs(line.norm - loss.size), MEASURED * loss.size + loss.room):
        problems.append(f"{line.site}: the norm is {loss.size:.6g}, reported was {line.norm:.6g}")
    if not within(line.rounding, loss.room):
        problems.append(f"{line.site}: rounding explains {loss.room:.3g}, not {line.rounding:.3g}")
    return problems


def _cap(report: Report, item: Promised) -> int | None:
    """The rank cap of a site: that of the budget, or the method's own."""
    caps = [_budget(report).rank]
    own = method_named(report.method).rank
    if own is not None and item.line.action == "fit":
        full = min(item.terms[0][1].shape)
        ranks = [rank for rank in item.line.ranks_in.values() if rank < full]
        caps.append(own(ranks or list(item.line.ranks_in.values()) or [1]))
    return min((cap for cap in caps if cap is not None), default=None)


def _budget(report: Report) -> Budget:
    return Budget(**report.options["budget"])


def _eps(report: Report) -> float:
    return float(torch.finfo(BY_NAME[str(report.output["dtype"]).upper()].torch).eps)


def _rounding(report: Report, stored: Factor | None, found: Measured) -> float:
    """The most that rounding the stored sides to their dtype can have changed."""
    if stored is None:
        return 0.0
    info = torch.finfo(BY_NAME[str(report.output["dtype"]).upper()].torch)
    pair = as_low_rank(stored)
    if pair is None:
        return info.eps * found.apart.right + info.tiny * math.sqrt(math.prod(stored.shape))
    ups, downs = found.columns or _columns(pair)
    rows, columns = stored.shape
    tiny = abs(pair.scale) * math.sqrt(rows) * downs.sum() + math.sqrt(columns) * ups.sum()
    return info.eps * float((ups * downs).sum()) + info.tiny * info.eps * float(tiny)


def _columns(pair: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    """The norms of the columns of up, scaled, and of the rows of down."""
    up, down = pair.up.read().double(), pair.down.read().double()
    return abs(pair.scale) * up.norm(dim=0), down.norm(dim=1)


def unearned(report: Report, losses: Sequence[Loss]) -> list[str]:
    """Losses beyond rounding that no budget allows."""
    budget = _budget(report)
    near = (
        report.options.get("form") is not None
    )  # a family that holds no sum: the nearest of its kind
    fixed = [
        loss
        for loss in losses
        if loss.excess
        and not _may_be_cut(budget, loss)
        and not (near and loss.line.action == "value")
    ]
    problems = [
        f"{loss.line.site}: {loss.excess / (loss.size or 1.0):.2e} of the delta is lost, which no "
        "budget allows"
        for loss in fixed
    ]
    if not budget.spectral:
        return problems
    allowed = math.sqrt(budget.allowed_loss)
    if budget.per_site:
        return problems + [
            f"{loss.line.site}: more is lost than the budget allows"
            for loss in losses
            if not loss.capped and not within(loss.excess, allowed * loss.size + loss.room)
        ]
    lost = math.sqrt(sum(loss.excess**2 for loss in losses if not loss.capped))
    whole = math.sqrt(sum(loss.size**2 for loss in losses))
    if not within(lost, allowed * whole + sum(loss.room for loss in losses)):
        problems.append("more is lost over all sites than the budget allows")
    return problems


def _may_be_cut(budget: Budget, loss: Loss) -> bool:
    """Whether this site may have been truncated at all."""
    is_matrix = loss.line.action == "fit" and loss.line.param != "bias"
    return is_matrix and (budget.spectral or budget.rank is not None or loss.capped)


def not_optimal(report: Report, item: Promised, whole: Factor, stored: Factor, loss: Loss) -> bool:
    """Whether a site cut by a rank alone lost more than the smallest directions: the rest must be
    orthogonal to what is stored, and no larger in any direction than the least that was kept."""
    cap, pair = _cap(report, item), as_low_rank(stored)
    if not loss.excess or cap is None or pair is None or _budget(report).spectral:
        return False
    if not math.isfinite(loss.excess):  # NaN has no spectrum
        return True
    up, down = pair.up.read().double() * pair.scale, pair.down.read().double()
    kept: list[float] = thin_spectrum(up, down)[0].tolist()
    least = kept[cap - 1] if len(kept) >= cap else 0.0
    form = form_of(whole)
    if form is not None:
        whole, up, down = in_coordinates(form, up, down)
    beside, largest = _rest(whole, up, down)
    angle = exact = loss.room + torch.finfo(pair.up.dtype.torch).eps * len(kept) * loss.size
    if is_extraction(report):  # of whose directions one side is exact for the other, which is found
        angle += NEAR * loss.apart
    near = within(min(beside), 4 * exact) and within(max(beside), 4 * angle)
    return not (near and within(largest, least + angle))


def _rest(whole: Factor, up: torch.Tensor, down: torch.Tensor) -> tuple[tuple[float, float], float]:
    """What of whole - up @ down lies in the space of `up` and in that of `down`, and a lower bound of its
    norm in its largest direction, from two passes over its rows."""
    left, right = _basis(up), _basis(down.T)
    seeded = torch.Generator().manual_seed(0)
    count = min(PROBES, *whole.shape)
    start = torch.randn(whole.shape[1], count, generator=seeded, dtype=torch.float64)
    probes, largest, beside = torch.linalg.qr(start).Q, 0.0, (0.0, 0.0)
    for _ in range(2):
        below = torch.zeros(left.shape[1], whole.shape[1], dtype=torch.float64)
        turned, squared = torch.zeros_like(probes), 0.0
        for rows in row_ranges(whole):
            rest = whole.dense(rows) - up[slice(*rows)] @ down
            below += left[slice(*rows)].T @ rest
            squared += float((rest @ right).square().sum())
            turned += rest.T @ (rest @ probes)
        beside = float(below.norm()), math.sqrt(squared)
        largest = math.sqrt(float(torch.linalg.matrix_norm(probes.T @ turned, 2)))
        probes = torch.linalg.qr(turned).Q
    return beside, largest


def _basis(columns: torch.Tensor) -> torch.Tensor:
    basis: torch.Tensor = torch.linalg.qr(columns[:, columns.any(dim=0)]).Q
    return basis


Audit = Callable[[Promised, Factor, "Factor | None", Measured], tuple[list[str], Loss]]


def auditor(report: Report) -> Audit:
    """Looks at one site at a time: what is amiss, and what it lost, for `unearned` in the end."""

    def audit(
        item: Promised, whole: Factor, stored: Factor | None, found: Measured
    ) -> tuple[list[str], Loss]:
        loss = loss_of(report, item, stored, found)
        cut = stored is None and loss.excess and not _budget(report).spectral
        problems = misstated(loss)
        if cut or (stored is not None and not_optimal(report, item, whole, stored, loss)):
            problems.append(f"{item.line.site}: what was cut off is not what matters least")
        return problems, loss

    return audit
