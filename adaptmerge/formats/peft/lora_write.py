"""Writing LoRA and DoRA: two sides per site, one rank and scale or patterns of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, cast

from adaptmerge.edits import Add, Dora, ReplaceRows
from adaptmerge.factors import Factor, LowRank, Product, as_low_rank
from adaptmerge.files.refs import TensorRef, constant
from adaptmerge.formats.peft.config import exactly
from adaptmerge.formats.peft.tuner import Spelling
from adaptmerge.graph import Adapter, Edit, Site
from adaptmerge.registry import WriteOptions

Tensors = dict[str, TensorRef]


def write(adapter: Adapter, options: WriteOptions) -> Spelling:
    """The deltas of an adapter, lowered for up and down."""
    return Spelling(_tensors(adapter), _config(adapter))


def is_bias(edit: Edit) -> bool:
    """Whether an edit is a LoRA's own bias delta."""
    return edit.kind == "add" and edit.site.param == "bias"


def _low_rank(factor: Factor) -> LowRank:
    found = as_low_rank(factor)
    assert found is not None, "lowered for a target that stores up and down"
    return found


def _tensors(adapter: Adapter) -> Tensors:
    has_bias = any(is_bias(edit) for edit in adapter.edits)
    tensors: Tensors = {}
    for edit in adapter.edits:
        match edit:
            case Add(site=Site(param="bias"), factor=factor):
                tensors[f"{edit.site.module}.lora_B.bias"] = _bias(factor)
            case Add(factor=factor) | Dora(factor=factor):
                tensors |= _sides(edit.site, _low_rank(factor))
                if has_bias:
                    tensors.setdefault(*_no_bias(edit.site, factor))
                if isinstance(edit, Dora):
                    tensors[f"{edit.site.module}.lora_magnitude_vector"] = edit.magnitude
    return tensors


def _sides(site: Site, pair: LowRank) -> Tensors:
    path, rank = site.module, pair.rank
    if site.layer.kind == "embedding":
        return {f"{path}.lora_embedding_A": pair.up.T, f"{path}.lora_embedding_B": pair.down.T}
    up, down = pair.up, pair.down
    if site.layer.kind == "conv":
        kernel = site.layer.kernel
        up = up.reshape(up.shape[0], rank, *(1 for _ in kernel))
        down = down.reshape(rank, down.shape[1] // math.prod(kernel), *kernel)
    return {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}


def _bias(factor: Factor) -> TensorRef:
    """The vector of a bias delta, which the run settles as one column."""
    while isinstance(factor, Product):
        factor = factor.parts[0]
    ref = cast("Any", factor).ref
    return cast("TensorRef", ref.reshape(ref.count))


def _no_bias(site: Site, factor: Factor) -> tuple[str, TensorRef]:
    dtype = _low_rank(factor).up.dtype
    return f"{site.module}.lora_B.bias", constant(0.0, (factor.shape[0],), dtype)


def _config(adapter: Adapter) -> dict[str, Any]:
    pairs = {
        edit.site.module: _low_rank(edit.factor)
        for edit in adapter.edits
        if isinstance(edit, (Add, Dora)) and edit.site.param == "weight"
    }
    return {
        "lora_dropout": 0.0,
        **_ranks(pairs),
        "lora_bias": any(is_bias(edit) for edit in adapter.edits),
        "trainable_token_indices": _token_indices(adapter),
        "use_dora": any(edit.kind == "dora" for edit in adapter.edits),
        "use_rslora": False,
    }


def _ranks(pairs: Mapping[str, LowRank]) -> dict[str, Any]:
    """r and alpha of the commonest rank and scale; the others as patterns of full module paths."""
    ranks = {module: pair.rank for module, pair in pairs.items()}
    alphas = {module: pair.scale * pair.rank for module, pair in pairs.items()}
    rank, alpha = _commonest(ranks.values(), 1), _commonest(alphas.values(), 1.0)
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {exactly(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {exactly(m): _plain(a) for m, a in alphas.items() if a != alpha},
    }


def _commonest(values: Iterable[Any], default: Any) -> Any:
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], -value)) if counts else default


def _plain(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha


def _token_indices(adapter: Adapter) -> dict[str, list[int]] | None:
    rows = [edit for edit in adapter.edits if isinstance(edit, ReplaceRows)]
    return {edit.site.module: list(edit.rows) for edit in rows} or None
