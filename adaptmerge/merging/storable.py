"""What the target can store: checked before anything is computed, and exact rewriting afterwards."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TypeGuard

from adaptmerge.adapters.graph import Adapter, Edit
from adaptmerge.adapters.weight_edits import factor_of, family_of, refitted
from adaptmerge.algebra.factors import Factor, Leaf, Product
from adaptmerge.algebra.low_rank import as_low_rank, low_rank
from adaptmerge.formats.format import Stores
from adaptmerge.tensors.refs import TensorRef, constant, join
from adaptmerge.tensors.walk import refs_of


def unstorable(edits: Iterable[Edit], stores: Stores, target: str) -> list[str]:
    """One sentence per reason why the target cannot hold these edits."""
    listed = list(edits)
    problems = [
        f"{target} has no place for {kind} edits ({_sites(listed, kind)})"
        for kind in sorted({e.kind for e in listed if not _is_own(e, stores)} - stores.kinds)
    ]
    families = {family_of(edit) for edit in listed if edit.kind != "rows"} & stores.families
    if len(families) > 1 and stores.one_family:
        problems.append(f"{target} cannot hold {' and '.join(sorted(families))} in one file")
    layers = {edit.site.layer.kind for edit in listed if factor_of(edit) is not None}
    problems += [
        f"{target} has no place for {kind} layers" for kind in sorted(layers - stores.layers)
    ]
    params = {edit.site.param for edit in listed if factor_of(edit) is not None}
    params -= params if stores.params is None else stores.params
    problems += [f"{target} has no place for {p} deltas" for p in sorted(params)]
    mixed = sorted({edit.kind for edit in listed} & stores.exclusive)
    if len(mixed) > 1:
        problems.append(_exclusion(listed, mixed, target))
    return problems


def _exclusion(edits: Sequence[Edit], mixed: Sequence[str], target: str) -> str:
    plain = [edit for edit in edits if edit.kind == "add"]
    beside = [str(edit.site) for edit in plain if edit.site.param == "bias"]
    if beside and len(beside) == len(plain):
        others = " and ".join(kind for kind in mixed if kind != "add")
        return f"{target} has no place for a delta of {beside[0]} beside {others} edits: pass --as lora"
    return f"{target} cannot hold {' and '.join(mixed)} edits in one file"


def _is_own(edit: Edit, stores: Stores) -> bool:
    return family_of(edit) in stores.families


def _sites(edits: Sequence[Edit], kind: str) -> str:
    sites = [str(edit.site) for edit in edits if edit.kind == kind]
    return sites[0] if len(sites) == 1 else f"{sites[0]} and {len(sites) - 1} more"


def stored_scale(factor: Factor) -> float | None:
    """The scale of a factor that is stored sides times one number; None for any other factor."""
    pair = as_low_rank(factor)
    if pair is not None:
        return pair.scale
    return factor.scale if _is_column(factor) else None


def _is_column(factor: Factor) -> TypeGuard[Product]:
    return (
        isinstance(factor, Product)
        and len(factor.parts) == 1
        and isinstance(factor.parts[0], Leaf)
        and factor.shape[1] == 1
    )


def as_storable(adapter: Adapter, stores: Stores) -> Adapter:
    """The settled adapter as the target stores it: one rank for all where it has only one.

    Padding with zero rows and columns is exact. Sites of rank 0 are left out, unless all are or they
    hold something else (magnitudes, a bias beside them): then one zero rank keeps them loadable.
    """
    ranks = {edit.site: _rank(edit) for edit in adapter.edits if _rank(edit) is not None}
    if not ranks or not stores.low_rank:
        return adapter
    most = max(rank or 0 for rank in ranks.values())
    if most == 0:
        return adapter.with_edits(_padded(edit, 1) for edit in adapter.edits)
    beside = {edit.site.module for edit in adapter.edits if _is_vector(edit)}
    kept = [edit for edit in adapter.edits if _rank(edit) != 0 or _holds_more(edit, beside)]
    return adapter.with_edits(
        _padded(edit, most if stores.one_rank else _rank(edit) or 1) for edit in kept
    )


def _is_vector(edit: Edit) -> bool:
    factor = factor_of(edit)
    return factor is not None and _is_column(factor)


def _holds_more(edit: Edit, beside: Collection[str]) -> bool:
    """Whether an edit of rank 0 still matters: by other tensors of its own, or a vector beside it."""
    own = set(refs_of(factor_of(edit)))
    return edit.site.module in beside or any(ref not in own for ref in refs_of(edit))


def _rank(edit: Edit) -> int | None:
    factor = factor_of(edit)
    pair = None if factor is None else as_low_rank(factor)
    return None if pair is None else pair.rank


def _padded(edit: Edit, rank: int) -> Edit:
    factor = factor_of(edit)
    pair = None if factor is None else as_low_rank(factor)
    if pair is None or pair.rank == rank:
        return edit
    more = rank - pair.rank
    up = _extended(pair.up, more, axis=1)
    return refitted(edit, low_rank(up, _extended(pair.down, more, axis=0), pair.scale))


def _extended(ref: TensorRef, more: int, axis: int) -> TensorRef:
    zeros = list(ref.shape)
    zeros[axis] = more
    padding = constant(0.0, tuple(zeros), ref.dtype)
    return join([ref, padding] if ref.shape[axis] else [padding], axis)
