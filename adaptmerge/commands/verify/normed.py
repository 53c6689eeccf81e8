"""What edits that norm rows add to a base's weight, by their definition, in one pass over the weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from adaptmerge.adapters.weight_edits import Effect, RowNorming, norms_rows
from adaptmerge.algebra.factors import Diag, Factor, Leaf, Product, Sum
from adaptmerge.algebra.forms import LEFT, Form, form_of
from adaptmerge.algebra.linalg import in_float64
from adaptmerge.lazy import torch
from adaptmerge.tensors.held import Held
from adaptmerge.tensors.refs import TensorRef, computed


class Ground(NamedTuple):
    """What forms meet of a weight: |W|^2 of each row, and W down^T of stacked downs."""

    squares: torch.Tensor
    met: torch.Tensor


def ground(weight: TensorRef, down: torch.Tensor) -> Ground:
    """One pass over the weight, some rows at a time."""
    squares = down.new_empty(weight.shape[0])
    met = down.new_empty(weight.shape[0], len(down))
    for rows, block in in_float64(weight.shape, lambda *span: weight.slice(0, *span).read()):
        squares[rows] = torch.linalg.vector_norm(block, dim=1).square()
        torch.mm(block, down.T, out=met[rows])
    return Ground(squares, met)


def share(edit: RowNorming, form: Form, met: Ground) -> torch.Tensor | None:
    """c = m / |W + delta| of each row, `met` having the columns of its own down; None where the delta takes
    away nearly all of a row."""
    up, down = form.up, form.down
    inside = ((up @ (down @ down.T)) * up).sum(1)
    squared = met.squares + 2 * (met.met * up).sum(1) + inside
    if not bool((squared >= LEFT * (met.squares + inside)).all()):
        return None
    return edit.magnitude.read().double().flatten() / squared.sqrt()


def on_weight(factors: Sequence[Factor], weight: TensorRef) -> list[Factor]:
    """The same factors, with what DoRAs add as rows of the weight and a thin rest, where that can be."""
    found = [_dora_in(factor) for factor in factors]
    doras = [
        (edit, form)
        for edit in found
        if edit is not None and (form := form_of(edit.factor)) is not None
    ]
    if not doras:
        return list(factors)
    met = ground(weight, torch.cat([form.down for _, form in doras]))
    widths = [form.up.shape[1] for _, form in doras]
    columns = dict(
        zip((id(edit) for edit, _ in doras), torch.split(met.met, widths, 1), strict=True)
    )
    forms = {id(edit): form for edit, form in doras}
    return [
        factor
        if edit is None or id(edit) not in columns
        else _stretched(edit, factor, forms[id(edit)], Ground(met.squares, columns[id(edit)]))
        for edit, factor in zip(found, factors, strict=True)
    ]


def _dora_in(factor: Factor) -> RowNorming | None:
    """The only edit of an effect, if it norms rows."""
    if isinstance(factor, Effect) and len(factor.edits) == 1:
        (edit,) = factor.edits
        if norms_rows(edit) and len(factor.weight.shape) == 2:
            return edit
    return None


def _stretched(edit: RowNorming, factor: Factor, form: Form, met: Ground) -> Factor:
    """diag(c - 1) W + diag(c) delta."""
    assert isinstance(factor, Effect)
    by = share(edit, form, met)
    if by is None:
        return factor
    less, more = (Diag(computed(Held(value))) for value in (by - 1.0, by))
    return Sum((Product((less, Leaf(factor.weight))), Product((more, edit.factor))))
