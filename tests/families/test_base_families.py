"""Families on the base: files that contradict themselves or it, old spellings, and ranks of deltas."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.cases import QV, FamilyCase
from families.cases_base import CASES
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptmerge.adapters.families import rotation
from adaptmerge.adapters.families.oft import Oft
from adaptmerge.adapters.graph import Adapter
from adaptmerge.adapters.weight_edits import delta_on
from adaptmerge.algebra.factors import rank_bound
from adaptmerge.bases.base import Base
from adaptmerge.bases.open import open_base
from adaptmerge.commands.combine import Options, combine
from adaptmerge.errors import CannotStore, InputError
from adaptmerge.formats.inputs import InputSpec, open_input

pytest.importorskip("peft")

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Tensors = dict[str, Tensor]
Change = Callable[[Tensors], Tensors]


def named(name: str) -> FamilyCase:
    return next(case for case in CASES if case.name == name)


def edited(folder: Path, change: Change, fields: dict[str, Any]) -> Path:
    """The adapter with its tensors and config changed; a field that is ... is taken out."""
    changed = {
        key: value.contiguous() for key, value in change(load_file(folder / WEIGHTS)).items()
    }
    save_file(changed, folder / WEIGHTS)
    config = {**json.loads((folder / CONFIG).read_text()), **fields}
    config = {name: value for name, value in config.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def same(tensors: Tensors) -> Tensors:
    return tensors


def without(leaf: str) -> Change:
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(leaf)}


def cut(leaf: str, axis: int = 0, left: int = -1) -> Change:
    """Fewer entries along an axis."""
    return lambda tensors: {
        k: v.narrow(axis, 0, v.shape[axis] + left if left < 0 else left) if leaf in k else v
        for k, v in tensors.items()
    }


def stacked(leaf: str) -> Change:
    """One more axis."""
    return lambda tensors: {k: v[..., None] if leaf in k else v for k, v in tensors.items()}


MALFORMED: list[tuple[str, Change, dict[str, Any], str]] = [
    ("oft", cut("oft_R"), {}, "3 blocks of 16 do not fill the base's 64 inputs"),
    ("oft", cut("oft_R", 1), {}, "119 values fill no skew-symmetric block"),
    ("oft", same, {"block_share": True}, "has 4 blocks, but block_share says that there is one"),
    ("oft", same, {"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms is 0: expected"),
    ("boft", without("boft_s"), {}, "boft_s is missing, found only boft_R"),
    ("boft", cut("boft_R", 3), {}, r"boft_R has shape \[1, 8, 8, 7\]: expected"),
    ("boft", cut("boft_R", 1), {}, r"is for 64 outputs and 56 inputs, the base has \[64, 64\]"),
    ("boft_3_factors", cut("boft_R", 1), {}, "3 butterfly factors do not divide 15 blocks of 4"),
    ("hra", same, {"r": 5}, "has rank 4, but the config says 5"),
    ("hra", cut("hra_u"), {}, "is for 63 inputs, but the base has 64"),
    ("hra", stacked("hra_u"), {}, r"hra_u has shape \[64, 4, 1\]"),
    ("road_1", same, {"variant": "road_3"}, "variant is 'road_3': expected one of road_1"),
    ("road_1", same, {"variant": "road_2"}, "is for 32 outputs, but the base has 64"),
    ("road_1", same, {"group_size": 7}, "group_size is 7: expected an even number"),
    ("road_1", same, {"group_size": 48}, "which give no outputs in groups of 48"),
    ("road_1", without("road_alpha"), {}, "road_alpha is missing"),
    ("glora", same, {"config_A_B": "matrix"}, "config_A_B is 'matrix': expected one of lora"),
    ("glora", without("glora_A.Xu"), {}, "glora_A.Xu is missing"),
    ("glora", without("glora_E.zeros"), {}, "glora_E.X is missing"),
    ("glora_bias_vector_vector_vector", cut("glora_C"), {}, "glora_C is for 63 inputs"),
    ("osf", cut("V_low"), {}, r"shapes \[64, 32\], \[32\], \[31, 64\], which do not multiply"),
    ("osf", cut("U_low"), {}, r"is for a weight of \[63, 64\], the base has \[64, 64\]"),
    ("psoft", same, {"r": 5}, r"has rank 6, magnitudes \[6, 6\], but the config says 5"),
    ("psoft", cut("vector_a"), {}, r"has rank 6, magnitudes \[6, 5\]"),
    ("psoft", same, {"psoft_svd": "other"}, "psoft_svd is 'other': expected full or lowrank"),
    ("psoft", same, {"ab_svd_init": "x"}, "ab_svd_init is 'x': expected psoft_init or pissa_init"),
    ("psoft", same, {"psoft_orth": False}, r"has shape \[15\], but psoft_orth is False"),
    ("psoft_series", same, {"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms is 0"),
    ("psoft", without("vector_b"), {}, "psoft_R.vector_b is missing"),
    ("psoft_outer", same, {"psoft_mag_b": False}, "vector_b' belongs to nothing this format knows"),
    ("peanut", same, {"act_fn": "nothing"}, "act_fn is 'nothing', which transformers"),
    ("peanut", cut("peanut_B", 1), {}, "expected \\(r, out\\) and \\(out, r\\)"),
    ("peanut_1_relu", same, {"depth": 2}, "peanut_encoders.1 is missing"),
    ("peanut_1_relu", same, {"depth": 0}, "belongs to nothing this format knows"),
    ("deft", same, {"decomposition_method": "svd"}, "decomposition_method is 'svd': expected"),
    ("deft", same, {"r": 6}, "has rank 4, but the config says 6"),
    ("deft", cut("deft_R"), {}, "deft_P has rank 4, but deft_R 3"),
    ("deft", same, {"para": True}, "belongs to nothing this format knows"),
    ("deft_para", same, {"para": False}, "deft_R is missing"),
    ("frod", without("frod_V.self_attn_q_proj"), {}, "save the adapter with save_projection=True"),
    ("frod", cut("lambda_s_values"), {}, "91 couplings, but its category 96 and 92"),
    ("frod", without("frod_lambda_l"), {}, "frod_lambda_l is missing, found only frod_lambda_s"),
    ("frod", cut("frod_V.", 1), {}, r"has shape \[96, 95\], but frod_s_size is \[96, 96\]"),
    ("adamss", without("adamss_A.0"), {}, "adamss_A.0 is missing"),
    ("adamss", cut("adamss_A.1", 1), {}, "do not multiply"),
    ("adamss", cut("adamss_B.1"), {}, "was it trained on this base?"),
    (
        "adamss",
        cut("newB", 1),
        {},
        "adamss_newB has 63 columns, but the base 64 inputs and no bias",
    ),
    ("beft", stacked("beft_bias"), {}, r"beft_bias has shape \[1, 64, 1\]: expected \(1, out\)"),
    ("beft", cut("beft_bias", 1), {}, "is for 63 outputs, but the base has 64"),
    ("ln_tuning", stacked("ln_tuning"), {}, "expected the vector of a norm"),
    (
        "ln_tuning",
        cut("ln_tuning"),
        {},
        "ln_tuning_layers.weight has 63 values, but the base has 64",
    ),
]


@pytest.mark.parametrize(("name", "change", "fields", "message"), MALFORMED)
def test_malformed_files_are_refused(
    name: str, change: Change, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    case = named(name)
    path = edited(case.build(tmp_path / "adapter"), change, fields)
    base = open_base(str(case.save_base(tmp_path / "base")))
    with pytest.raises(InputError, match=message):
        open_input(InputSpec(str(path)), base)


def opened(case: FamilyCase, folder: Path, **fields: Any) -> tuple[Adapter, Base]:
    path = edited(case.build(folder / "adapter"), same, fields)
    base = open_base(str(case.save_base(folder / "base")))
    return open_input(InputSpec(str(path)), base).adapter, base


@pytest.mark.parametrize(
    ("version", "last", "assumed"), [("0.21.2", 1.0, 0), ("0.17.1", 2.0, 0), (None, 2.0, 1)]
)
def test_the_series_of_oft_before_peft_018(
    version: str | None, last: float, assumed: int, tmp_path: Path
) -> None:
    """peft 0.16 and 0.17 counted the last power of Q twice, and did not write their version."""
    case = named("oft")
    adapter, _ = opened(case, tmp_path, peft_version=version if version else ...)
    assert {edit.last for edit in adapter.edits if isinstance(edit, Oft)} == {last}
    assert sum("peft_version" in note.what for note in adapter.notes) == assumed
    combine([InputSpec(str(tmp_path / "adapter"))], tmp_path / "out", Options())
    again = open_input(InputSpec(str(tmp_path / "out")), None).adapter
    assert {edit.last for edit in again.edits if isinstance(edit, Oft)} == {last}


def test_oft_on_patches_is_refused(tmp_path: Path) -> None:
    """An untrained one already changes what PEFT computes."""
    case = FamilyCase("x", "OFTConfig", {"target_modules": ["conv"], "oft_block_size": 3}, "conv")
    with pytest.raises(InputError, match="turns the inputs of a 3x3 convolution"):
        opened(case, tmp_path)
    quiet = FamilyCase("y", "OFTConfig", case.options, "conv", randomise=lambda model: None)
    truth = quiet.truth(quiet.build(tmp_path / "quiet"))
    assert (truth - quiet.plain()).norm() > 0.1 * quiet.plain().norm()


def test_blocks_that_no_config_can_give_are_not_written(tmp_path: Path) -> None:
    q = FamilyCase("q", "OFTConfig", {"target_modules": ["q_proj"], "oft_block_size": 8})
    v = FamilyCase("v", "OFTConfig", {"target_modules": ["v_proj"], "oft_block_size": 16})
    specs = [InputSpec(str(c.build(tmp_path / c.name)), c.name) for c in (q, v)]
    with pytest.raises(CannotStore, match="OFT has one block size or one number of blocks"):
        combine(specs, tmp_path / "out", Options(base=str(q.save_base(tmp_path / "base"))))
    assert not (tmp_path / "out").exists()


def test_boft_keeps_the_factors_that_peft_forgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its CUDA extension PEFT makes one factor of three, and cannot load the file."""
    from peft.tuners.boft import layer

    case = named("boft_3_factors")
    adapter, _ = opened(case, tmp_path)
    assert {edit.blocks.shape[0] for edit in adapter.edits} == {3}  # type: ignore[attr-defined]
    monkeypatch.setattr(layer, "_FBD_CUDA", False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        FamilyCase.loaded(case, tmp_path / "adapter")


LOW_RANK = [
    ("hra", 4),
    ("hra_conv", 4),
    ("hra_gs", 4),
    ("psoft", 6),
    ("peanut", 4),
    ("peanut_2_gelu", 4),
    ("deft", 4),
    ("deft_para_qr", 4),
    ("adamss", 6),
]


@pytest.mark.parametrize(("name", "rank"), LOW_RANK)
def test_deltas_on_the_base_that_have_a_low_rank_say_so(
    name: str, rank: int, tmp_path: Path
) -> None:
    adapter, base = opened(named(name), tmp_path)
    for site, edits in adapter.sites().items():
        weight = base.weight(site)
        assert weight is not None
        factor = delta_on(edits, weight)
        assert rank_bound(factor) <= rank
        before = weight.read().double()
        after = edits[0].apply(before)  # type: ignore[attr-defined]
        assert (factor.dense() - (after - before)).norm() < 1e-12 * before.norm()


@pytest.mark.parametrize("name", ["hra", "hra_conv", "psoft", "deft", "peanut", "adamss"])
def test_they_become_loras_of_that_rank(name: str, tmp_path: Path) -> None:
    case = named(name)
    path, base = case.build(tmp_path / "adapter"), case.save_base(tmp_path / "base")
    combine([InputSpec(str(path))], tmp_path / "out", Options(base=str(base), form="lora"))
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == dict(LOW_RANK)[name]
    truth = case.truth(path)
    error = (case.truth(tmp_path / "out") - truth).norm() / (truth - case.plain()).norm()
    assert error < 2e-6 or name == "deft" and error < 1e-5


def test_glora_whose_bias_takes_up_the_weight_needs_the_base(tmp_path: Path) -> None:
    path = named("glora_bias_lora_lora_constant").build(tmp_path / "adapter")
    with pytest.raises(InputError, match="pass --base DIR"):
        open_input(InputSpec(str(path)), None)
    path = named("glora_bias_constant_none_vector").build(tmp_path / "other")
    assert len(open_input(InputSpec(str(path)), None).adapter.edits) == 2 * 6


def test_adamss_needs_the_base_and_scikit_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = named("adamss")
    path = case.build(tmp_path / "adapter")
    with pytest.raises(InputError, match="pass --base DIR"):
        open_input(InputSpec(str(path)), None)
    base = open_base(str(case.save_base(tmp_path / "base")))
    for name in ("sklearn", "sklearn.cluster"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="pip install scikit-learn"):
        open_input(InputSpec(str(path)), base)


def test_psoft_says_that_signs_are_recomputed(tmp_path: Path) -> None:
    adapter, _ = opened(named("psoft"), tmp_path)
    assert sum("other signs" in note.what for note in adapter.notes) == 1


def test_coft_is_the_projection_of_what_is_stored(tmp_path: Path) -> None:
    adapter, _ = opened(named("oft_coft"), tmp_path)
    edit = adapter.edits[0]
    assert isinstance(edit, Oft)
    like = torch.zeros(1, dtype=torch.float64)
    turned = Oft(edit.site, edit.vectors, radius=edit.radius).rotation(like)
    norms = rotation.inverse_cayley(turned).flatten(1).norm(dim=1)
    assert norms.max() == pytest.approx(0.5 / edit.vectors.shape[0] ** 0.5)


def test_frod_without_its_projection_is_refused(tmp_path: Path) -> None:
    case = FamilyCase(
        "f", "FrodConfig", {"target_modules": QV, "progressbar": False, "save_projection": False}
    )
    with pytest.raises(InputError, match="eigenvectors that must be found again"):
        opened(case, tmp_path)
