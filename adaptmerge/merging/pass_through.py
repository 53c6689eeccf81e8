"""Which edits pass through a merge as they are stored: those of one input alone, at weight 1, in a form and
dtype that the target holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adaptmerge.adapters.graph import Edit
from adaptmerge.adapters.weight_edits import factor_of, family_of
from adaptmerge.algebra.factors import Expanded, Factor, rank_bound
from adaptmerge.algebra.fit import Budget
from adaptmerge.merging.request import Request
from adaptmerge.merging.resolve import LORA, WHOLE, Weighed
from adaptmerge.merging.storable import stored_scale
from adaptmerge.methods.method import Member
from adaptmerge.tensors.walk import refs_of


@dataclass(frozen=True, slots=True)
class PassThrough:
    """How edits of a merge may pass: sides times a number with that one scale (None: each with its own),
    others in the forms of one family ("": none)."""

    request: Request
    scale: float | None
    family: str

    @classmethod
    def of(cls, weighed: Sequence[Weighed], request: Request) -> PassThrough:
        return cls(request, _shared_scale(weighed, request), _kept_family(weighed, request))

    def allows(self, members: Sequence[Member]) -> bool:
        """Whether what meets at a site stays as it is."""
        if not _is_alone(members) or members[0].made_of:
            return False
        edit, request = members[0].edit, self.request
        factor = factor_of(edit)
        if factor is None or (self.family and family_of(edit) == self.family):
            return True
        if not request.stores.low_rank:
            return _is_kept(factor, request)
        scale = _passing_scale(members, request)
        return scale is not None and self.scale in (None, scale)


def _shared_scale(weighed: Sequence[Weighed], request: Request) -> float | None:
    """The one scale that lets every site pass as it is; None: sites may pass with their own."""
    if request.stores.scale == "site":
        return None
    factored = [members for _, members in weighed if factor_of(members[0].edit) is not None]
    passing = {_passing_scale(members, request) for members in factored}
    shared = passing.pop() if len(passing) == 1 and request.stores.scale == "adapter" else None
    return 1.0 if shared is None else shared


def _kept_family(weighed: Sequence[Weighed], request: Request) -> str:
    """The family whose own forms the result keeps, when all of it passes in them; else ""."""
    kept = [members for group, members in weighed if group.kind not in WHOLE]
    edits = [members[0].edit for members in kept]
    factors = [factor for edit in edits if (factor := factor_of(edit)) is not None]
    if not all(map(_is_alone, kept)) or not request.budget.unlimited or request.form is not None:
        return ""
    families = {family_of(edit) for edit in edits}
    family = families.pop() if len(families) == 1 else ""
    if family == LORA and not any(map(_is_special, edits)):
        return ""  # plain pairs may still be given one scale
    bare = not any(_is_recast(factor, request) for factor in factors)
    return family if bare and family in request.stores.families else ""


def _is_alone(members: Sequence[Member]) -> bool:
    return len(members) == 1 and members[0].weight == 1.0


def _is_special(edit: Edit) -> bool:
    """Whether an edit is more than sides times a number."""
    factor = factor_of(edit)
    return factor is None or isinstance(factor, Expanded)


def _passing_scale(members: Sequence[Member], request: Request) -> float | None:
    """The stored scale of a lone member at weight 1 that need not be refitted, else None."""
    factor = factor_of(members[0].edit)
    if factor is None or not _is_alone(members) or not _is_kept(factor, request):
        return None
    return stored_scale(factor)


def _is_kept(factor: Factor, request: Request) -> bool:
    """Whether neither rank nor dtype of a factor has to change."""
    return not (_is_over_budget(factor, request.budget) or _is_recast(factor, request))


def _is_over_budget(factor: Factor, budget: Budget) -> bool:
    return budget.spectral or (budget.rank is not None and rank_bound(factor) > budget.rank)


def _is_recast(factor: Factor, request: Request) -> bool:
    """Whether stored values are not in the dtype asked for, or in none that the target stores; indices
    have their own."""
    return any(
        ref.dtype != (request.dtype or ref.dtype) or ref.dtype.name not in request.stores.dtypes
        for ref in refs_of(factor)
        if ref.dtype.is_float
    )
