"""The contract of an edit, run for every class of the built-in edits by its being defined there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import pytest
import torch

from adaptmerge.adapters import activation_edits, stored_edits, weight_edits
from adaptmerge.adapters.activation_edits import Bottleneck, Gated
from adaptmerge.adapters.graph import Layer, Site
from adaptmerge.adapters.stored_edits import Opaque, Replace, ReplaceRows
from adaptmerge.adapters.weight_edits import Add, Dora, Scale, factor_of
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.tensors.dtypes import F32
from adaptmerge.tensors.refs import TensorRef, listed
from adaptmerge.tensors.walk import refs_of

OUT, IN, RANK = 6, 5, 2
SITE = Site("model.layers.3.mlp.up_proj")
BESIDE = Site("model.layers.3", place="mlp")


def ref(*shape: int, seed: int = 0) -> TensorRef:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return listed(tuple(values.flatten().tolist()), shape, F32)


def factor(out: int = OUT, width: int = IN) -> Any:
    return low_rank(ref(out, RANK, seed=1), ref(RANK, width, seed=2), 0.5)


EXAMPLES: dict[type, Callable[[], Any]] = {
    Add: lambda: Add(SITE, factor()),
    Dora: lambda: Dora(SITE, factor(), ref(OUT, seed=3)),
    Scale: lambda: Scale(SITE, ref(OUT, seed=4)),
    Replace: lambda: Replace(SITE, ref(OUT, IN, seed=5)),
    ReplaceRows: lambda: ReplaceRows(SITE, (1, 4), ref(2, IN, seed=6)),
    Bottleneck: lambda: Bottleneck(
        BESIDE, ref(3, IN), ref(3, seed=1), ref(IN, 3, seed=2), ref(IN, seed=3), "relu"
    ),
    Gated: lambda: Gated(SITE, factor(), ref(1, IN, seed=4), ref(1, seed=5)),
    Opaque: lambda: Opaque(SITE, "router", "routes every token", (ref(OUT, IN, seed=6),)),
}
CLASSES = [
    c
    for module in (weight_edits, stored_edits, activation_edits)
    for c in vars(module).values()
    if isinstance(c, type)
    and c.__module__ == module.__name__
    and is_dataclass(c)
    and hasattr(c, "kind")
]
WEIGHT = [c for c in CLASSES if hasattr(c, "apply")]
ACTIVATION = [c for c in CLASSES if hasattr(c, "forward")]


def test_every_edit_is_here_and_is_of_one_sort() -> None:
    assert set(CLASSES) == set(EXAMPLES)
    assert set(WEIGHT) | set(ACTIVATION) | {Opaque} == set(CLASSES)
    assert not set(WEIGHT) & set(ACTIVATION)
    assert len({c.kind for c in CLASSES}) == len(CLASSES)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_edit_is_hashable_data(kind: type) -> None:
    assert EXAMPLES[kind]() == EXAMPLES[kind]()
    assert hash(EXAMPLES[kind]()) == hash(EXAMPLES[kind]())
    assert list(refs_of(EXAMPLES[kind]()))


@pytest.mark.parametrize("kind", WEIGHT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_apply_changes_values_and_nothing_else(kind: type, dtype: torch.dtype) -> None:
    weight = torch.randn(OUT, IN, dtype=dtype, generator=torch.Generator().manual_seed(9))
    before = weight.clone()
    edited = EXAMPLES[kind]().apply(weight)
    assert torch.equal(weight, before)
    assert edited.shape == weight.shape
    assert edited.dtype == weight.dtype
    assert not torch.equal(edited, weight)


@pytest.mark.parametrize("kind", WEIGHT)
def test_a_delta_is_what_apply_adds(kind: type) -> None:
    """Where an edit claims a delta, it is apply(W) - W for every W; where it does not, it depends on W."""
    edit = EXAMPLES[kind]()
    one, two = torch.randn(OUT, IN).double(), torch.randn(OUT, IN).double()
    moved = edit.apply(one) - one, edit.apply(two) - two
    delta = edit.delta()
    if delta is None:
        assert not torch.allclose(*moved)
    else:
        assert torch.allclose(moved[0], delta.dense())
        assert torch.allclose(moved[1], delta.dense())


@pytest.mark.parametrize("kind", ACTIVATION)
def test_forward_changes_outputs_of_the_same_shape(kind: type) -> None:
    inputs = torch.randn(2, 4, IN)
    width = OUT if factor_of(EXAMPLES[kind]()) is not None else IN
    outputs, residual = torch.randn(2, 4, width), torch.randn(2, 4, width)
    changed = EXAMPLES[kind]().forward(inputs, outputs, residual)
    assert changed.shape == outputs.shape
    assert not torch.equal(changed, outputs)


def test_dora_of_its_own_norms_is_the_plain_delta() -> None:
    weight = torch.randn(OUT, IN).double()
    moved = weight + factor().dense()
    norms = listed(tuple(moved.norm(dim=1).tolist()), (OUT,), F32)
    edited = Dora(SITE, factor(), norms).apply(weight)
    assert torch.allclose(edited, moved, rtol=1e-6)


def test_dora_on_an_embedding_norms_columns() -> None:
    site = Site("embed", "weight", Layer("embedding"))
    weight = torch.randn(OUT, IN).double()
    edited = Dora(site, factor(), ref(IN, seed=3)).apply(weight)
    assert torch.allclose(edited.norm(dim=0), ref(IN, seed=3).read().double().abs())


def test_scale_on_the_input_side_scales_columns() -> None:
    weight = torch.randn(OUT, IN).double()
    edited = Scale(SITE, ref(IN, seed=4), "in").apply(weight)
    assert torch.allclose(edited, weight * ref(IN, seed=4).read().double())
