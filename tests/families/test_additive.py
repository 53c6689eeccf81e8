"""LoHa and its neighbours: files that contradict themselves, former spellings, and exact identities."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.cases import FamilyCase
from families.cases_additive import CASES
from peft_cases import logits
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptmerge import runtime
from adaptmerge.adapters.graph import Adapter
from adaptmerge.adapters.weight_edits import WeightEdit, delta_on, factor_of
from adaptmerge.bases.open import open_base
from adaptmerge.commands.combine import Options, combine
from adaptmerge.errors import InputError
from adaptmerge.formats.inputs import InputSpec, open_input
from adaptmerge.formats.peft.tuners.lokr import split_of

pytest.importorskip("peft")

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Tensors = dict[str, Tensor]


def named(name: str) -> FamilyCase:
    return next(case for case in CASES if case.name == name)


def edited(folder: Path, tensors: Callable[[Tensors], Tensors], **fields: Any) -> Path:
    """The adapter with its tensors and fields of its config changed."""
    changed = {
        key: value.contiguous() for key, value in tensors(load_file(folder / WEIGHTS)).items()
    }
    save_file(changed, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))
    return folder


def same(tensors: Tensors) -> Tensors:
    return tensors


def without(leaf: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(leaf)}


def cut(leaf: str, axis: int = 0) -> Callable[[Tensors], Tensors]:
    """One entry less along an axis."""
    return lambda tensors: {
        k: v.narrow(axis, 0, v.shape[axis] - 1) if k.endswith(leaf) else v
        for k, v in tensors.items()
    }


MALFORMED: list[tuple[str, Callable[[Tensors], Tensors], dict[str, Any], str]] = [
    ("loha", without("w1_b"), {}, "hada_w1_b is missing, found only hada_w1_a, hada_w2_a"),
    ("loha", same, {"r": 5}, "r is 3 by the stored shapes, but 5 by the config"),
    ("loha", cut("w2_a"), {}, r"shapes \(64, 64\) and \(63, 64\) differ"),
    ("loha_conv_cores", same, {"use_effective_conv2d": False}, "use_effective_conv2d is not set"),
    ("loha_conv_cores", without("hada_t2"), {}, "hada_t2 is missing"),
    ("lokr", without("lokr_w1"), {}, "lokr_w1_a is missing"),
    ("lokr", same, {"r": 2}, "r is 3 by the stored shapes, but 2 by the config"),
    ("adalora", same, {"init_r": 12}, "lora_A has rank 6, but init_r is 12"),
    ("adalora_pruned", same, {"rank_pattern": None}, "lora_A has rank 3, but init_r is 6"),
    (
        "adalora_pruned",
        same,
        {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [1, 0]}},
        r"rank_pattern has \[1, 0\]: expected a list of true and false",
    ),
    (
        "adalora_pruned",
        same,
        {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True] * 3}},
        "rank_pattern has 3 entries, but init_r is 6",
    ),
    ("adalora", same, {"layer_replication": [[0, 2]]}, "field layer_replication is"),
    ("adalora", cut("lora_E"), {}, "do not multiply"),
    ("miss", same, {"r": 4}, "r is 8 by the stored shapes, but 4 by the config"),
    ("miss", same, {"init_weights": "bat"}, r"bat block has shape \[8, 64\]"),
    ("miss", same, {"init_weights": "maxi"}, "expected true, false, bat or mini"),
    ("miss", cut("miss_block", 1), {}, "a block for 63 outputs does not fit"),
    ("miss_mini", same, {"mini_r": 2}, "mini_r is 4 by the stored shapes, but 2"),
    ("miss_bat", cut("miss_block"), {}, "7 blocks of 8 do not fit"),
    ("delora", without("delora_w_norm"), {}, "delora_w_norm is missing"),
    ("delora", cut("delora_w_norm"), {}, "do not multiply"),
    ("gralora_hybrid", same, {"hybrid_r": 0}, "hybrid_r is 3 by the stored shapes, but 0"),
    ("gralora", same, {"gralora_k": 3}, "gralora_k is 2 by the stored shapes, but 3"),
    ("gralora", cut("gralora_A", 2), {}, "are no pair of k parts"),
    ("c3a", same, {"block_size": 4}, "block_size is 8 by the stored shapes, but 4"),
    ("shira", same, {"r": 3}, "values are stored, but r = 3 on a weight of"),
    ("shira", cut("shira_indices", 1), {}, "a place for every value"),
    ("supertuning", without("indices"), {}, "supertuning_indices is missing"),
    ("supertuning", same, {"r": 4}, "supertuning_lora_B is missing"),
    ("supertuning_supra", same, {"r": 4}, "r is 3 by the stored shapes, but 4"),
    ("hira", same, {"r": 4}, "r is 3 by the stored shapes, but 4 by the config"),
    ("hira", cut("hira_B"), {}, r"is for a weight of \[63, 96\], but the base has \[64, 96\]"),
    ("supertuning_supra", cut("lora_A.weight", 1), {}, "but the base has"),
    ("loha", same, {"alpha": "7"}, "alpha is '7': expected a number"),
    ("lokr", same, {"r": 0}, "r is 3 by the stored shapes, but 0"),
    ("lokr_whole", same, {"r": 0}, "r is 0: expected a whole number of at least 1"),
    (
        "delora",
        same,
        {"rank_pattern": [3]},
        r"rank_pattern is \[3\]: expected an object of patterns",
    ),
    ("c3a", same, {"block_size_pattern": {"(": 8}}, r"'\(' is no regular expression"),
    ("hira", cut("hira_B", 1), {}, "its sides have ranks 3 and 2"),
]


@pytest.mark.parametrize(("name", "change", "fields", "says"), MALFORMED)
def test_what_contradicts_itself_is_refused(
    name: str,
    change: Callable[[Tensors], Tensors],
    fields: dict[str, Any],
    says: str,
    tmp_path: Path,
) -> None:
    case = named(name)
    path = edited(case.build(tmp_path / "adapter"), change, **fields)
    base = open_base(str(case.save_base(tmp_path / "base")))
    with pytest.raises(InputError, match=says):
        open_input(InputSpec(str(path)), base)


def run(case: FamilyCase, adapter: Adapter) -> Tensor:
    model = case.base_model().double()
    with runtime.attach(model, adapter):
        return logits(model, case.inputs())


@pytest.mark.parametrize("name", ["miss", "miss_remainder", "miss_bat", "miss_bias"])
def test_bone_is_miss_by_its_former_name(name: str, tmp_path: Path) -> None:
    """Block and formulas are those of PEFT 0.15; what is written is MISS, which newer ones load."""
    case = named(name)
    path = case.build(tmp_path / "adapter")
    truth = case.truth(path)
    bias = json.loads((path / CONFIG).read_text())["bias"].replace("MiSS", "Bone")
    fields = {"peft_type": "BONE", "bias": bias, "miss_dropout": None, "mini_r": None}
    edited(path, lambda t: {k.replace("miss", "bone"): v for k, v in t.items()}, **fields)
    adapter = open_input(InputSpec(str(path)), None).adapter
    assert any("written as MISS" in note.what for note in adapter.notes)
    assert torch.allclose(run(case, adapter), truth)
    combine([InputSpec(str(path))], tmp_path / "out", Options())
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["peft_type"] == "MISS"
    assert torch.allclose(case.truth(tmp_path / "out"), truth)


def test_places_stored_as_floats_are_places(tmp_path: Path) -> None:
    """SHiRA files from Windows."""
    case = named("shira")
    path = case.build(tmp_path / "adapter")
    truth = case.truth(path)
    edited(path, lambda t: {k: v.float() for k, v in t.items()})
    assert torch.allclose(run(case, open_input(InputSpec(str(path)), None).adapter), truth)


def test_places_that_are_not_stored_are_noted(tmp_path: Path) -> None:
    path = named("supertuning_found").build(tmp_path / "adapter")
    notes = open_input(InputSpec(str(path)), None).adapter.notes
    assert [note.kind for note in notes] == ["assumed"]


def test_sizes_are_split_as_peft_splits_them() -> None:
    from peft.tuners.lokr.layer import factorization

    for size in (1, 2, 3, 12, 32, 96, 97, 128, 360, 4096, 11008, 151936):
        for factor in (-1, 1, 2, 3, 4, 5, 8, 16, 100, 2 * size):
            assert split_of(size, factor) == factorization(size, factor)


LOW_RANK = [
    ("loha", 9),
    ("loha_conv_cores", 9),
    ("lokr", 24),
    ("lokr_line_cores", 8),
    ("adalora", 6),
    ("adalora_empty", 6),
    ("miss", 8),
    ("miss_mini_remainder", 7),
    ("delora", 3),
    ("gralora", 12),
    ("gralora_hybrid", 11),
]


@pytest.mark.parametrize(("name", "rank"), LOW_RANK)
def test_what_is_of_low_rank_is_so_in_its_thin_form(name: str, rank: int, tmp_path: Path) -> None:
    """No site needs more than the rank that the construction bounds, and thin and dense agree."""
    case = named(name)
    base = open_base(str(case.save_base(tmp_path / "base")))
    adapter = open_input(InputSpec(str(case.build(tmp_path / "adapter"))), base).adapter
    for edit in adapter.edits:
        weight = base.weight(edit.site)
        assert isinstance(edit, WeightEdit)
        assert weight is not None
        factor = delta_on([edit], weight)
        terms = factor.thin()
        assert sum(term.up.shape[1] for term in terms) <= rank
        dense = factor.dense()
        again = sum(t.up.double() @ t.down.double() * t.scale for t in terms)
        assert (dense - again).norm() <= 1e-6 * dense.norm()
        assert torch.allclose(factor.dense((3, 5)), dense[3:5], rtol=0, atol=1e-14)


def test_an_additive_family_says_its_shape_without_the_base(tmp_path: Path) -> None:
    path = named("gralora").build(tmp_path / "adapter")
    adapter = open_input(InputSpec(str(path)), None).adapter
    shapes = {e.site.module: f.shape for e in adapter.edits if (f := factor_of(e)) is not None}
    assert shapes["model.layers.0.self_attn.v_proj"] == (32, 64)
    assert shapes["model.layers.1.mlp.down_proj"] == (64, 96)
