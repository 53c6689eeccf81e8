"""AdaMSS: adamss_A.N (r_N, r), adamss_B.N (rows, r_N) per cluster, adamss_newB (r, in or in + 1).

Which rows a cluster has is not stored: the base's weight is clustered again, as PEFT does when it loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adaptmerge.adapters.families.adamss import Adamss, clustered_rows
from adaptmerge.adapters.graph import Edit, Kind, Note, Site
from adaptmerge.adapters.weight_edits import Add, factor_of
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Spelling, Tuner
from adaptmerge.lazy import torch
from adaptmerge.tensors.dtypes import I64
from adaptmerge.tensors.refs import TensorRef, listed

ROWS = Note(
    Kind.ASSUMED,
    "which output rows a cluster has is not stored: they are found again by clustering the base's weights",
)


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    ups, downs = (_stack(parts, f"adamss_{side}.") for side in "BA")
    basis = parts["adamss_newB"]
    _check(ups, downs, basis)
    height, width = reading.shape(module)
    bias = reading.weight(module, "bias")
    if bias is not None and bias.shape != (height,):
        raise Malformed(f"the base has {height} outputs, but its bias has {list(bias.shape)}")
    if basis.shape[1] != width + (bias is not None):
        raise Malformed(
            f"adamss_newB has {basis.shape[1]} columns, but the base {width} inputs and "
            f"{'a' if bias is not None else 'no'} bias"
        )
    rows = _rows(reading, module, ups, basis.shape[0])
    seed = reading.setting("random_seed")
    spans = {"weight": (0, width), "bias": (width, width + 1)}
    return [
        Add(Site(module, param), Adamss(ups, downs, basis, rows, *spans[param], seed))
        for param in ("weight", "bias")
        if param == "weight" or bias is not None
    ]


def _stack(parts: Parts, name: str) -> tuple[TensorRef, ...]:
    count = sum(leaf.startswith(name) for leaf in parts)
    return tuple(parts[f"{name}{index}"] for index in range(max(count, 1)))


def _check(ups: Sequence[TensorRef], downs: Sequence[TensorRef], basis: TensorRef) -> None:
    ranks = [up.shape[1] for up in ups], [down.shape[0] for down in downs]
    if ranks[0] != ranks[1] or {down.shape[1] for down in downs} != {basis.shape[0]}:
        shapes = [[list(ref.shape) for ref in refs] for refs in (ups, downs)]
        raise Malformed(
            f"adamss_B {shapes[0]}, adamss_A {shapes[1]} and adamss_newB {list(basis.shape)} "
            "do not multiply"
        )


def _rows(reading: Reading, module: str, ups: Sequence[TensorRef], rank: int) -> TensorRef:
    """The rows of all clusters, found again; raises Malformed where they are not those of the file."""
    weight, bias = reading.matrix(module), reading.weight(module, "bias")
    assert weight is not None
    whole = weight.read()
    if bias is not None:
        whole = torch.cat([whole, bias.read()[:, None]], dim=1)
    try:
        found = clustered_rows(whole, rank, len(ups), reading.setting("random_seed"))
    except ImportError:
        raise Malformed(
            "finding the rows of its clusters again needs scikit-learn: pip install scikit-learn"
        ) from None
    sizes = [up.shape[0] for up in ups]
    if [len(cluster) for cluster in found] != sizes:
        raise Malformed(
            f"its clusters have {sizes} rows, but clustering this base gives "
            f"{[len(cluster) for cluster in found]}: was it trained on this base?"
        )
    if ROWS not in reading.notes:
        reading.notes.append(ROWS)
    rows = tuple(row for cluster in found for row in cluster)
    return listed(rows, (len(rows),), I64)


def _adamss(edit: Edit) -> Adamss:
    factor = factor_of(edit)
    assert isinstance(factor, Adamss)
    return factor


def tensors(edit: Edit) -> Parts:
    """Those of the weight; the bias shares them."""
    if edit.site.param != "weight":
        return {}
    found = _adamss(edit)
    ups = {f"adamss_B.{index}": ref for index, ref in enumerate(found.ups)}
    downs = {f"adamss_A.{index}": ref for index, ref in enumerate(found.downs)}
    return {**ups, **downs, "adamss_newB": found.basis}


def settings(edit: Edit) -> Mapping[str, Any]:
    return {"random_seed": _adamss(edit).seed}


def shared(edits: Sequence[Edit]) -> Spelling:
    """The largest rank and number of clusters; PEFT lowers them where a weight has less room."""
    found = [_adamss(edit) for edit in edits]
    fields = {
        "r": max(factor.basis.shape[0] for factor in found),
        "num_subspaces": max(len(factor.ups) for factor in found),
        "subspace_rank": max(up.shape[1] for factor in found for up in factor.ups),
    }
    return Spelling({}, fields)


TUNER = Tuner(
    "ADAMSS",
    summary="a low-rank delta per cluster of output rows",
    shapes={
        r"adamss_A\.\d+": "_own r",
        r"adamss_B\.\d+": "_rows _own",
        "adamss_newB": "r _width",
    },
    leaves=(r"adamss_A\.\d+", r"adamss_B\.\d+", "adamss_newB"),
    module=module,
    tensors=tensors,
    settings=settings,
    shared=shared,
    maths={"r": 100, "num_subspaces": 5, "subspace_rank": 1, "random_seed": 0},
    # ranks were chosen by these, and are in the shapes of what is stored
    training=frozenset(
        {"use_dynamic_rank", "svd_threshold", "use_asa", "asa_target_subspaces", "init_warmup"}
        | {"final_warmup", "mask_interval", "asa_importance_beta", "asa_uncertainty_beta"}
        | {"asa_schedule_exponent"}
    ),
    merges="exact sum",
)
