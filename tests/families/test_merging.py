"""Merges within and across families: in PEFT, against base + the weighted sum of PEFT's merges."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families.cases import LINEARS, QV, FamilyCase
from peft_cases import logits
from samples import config_of
from torch import Tensor

from adaptmerge import runtime
from adaptmerge.algebra import moved
from adaptmerge.algebra.weight_rows import WeightRows
from adaptmerge.bases.open import open_base
from adaptmerge.commands.combine import Options, combine
from adaptmerge.commands.verify import Questions, verify
from adaptmerge.errors import AdaptmergeError, CannotMerge
from adaptmerge.formats.inputs import InputSpec, open_input

pytest.importorskip("peft")
LORA = FamilyCase("m_lora", "LoraConfig", {"target_modules": LINEARS, "r": 3, "lora_alpha": 5})
DORA = FamilyCase(
    "m_dora", "LoraConfig", {"target_modules": LINEARS, "r": 4, "lora_alpha": 6, "use_dora": True}
)
DORA_QV = FamilyCase(
    "m_dora_qv", "LoraConfig", {"target_modules": QV, "r": 2, "lora_alpha": 6, "use_dora": True}
)
LORA_QV = FamilyCase("m_lora_qv", "LoraConfig", {"target_modules": QV, "r": 2, "lora_alpha": 5})
LOHA = FamilyCase("m_loha", "LoHaConfig", {"target_modules": LINEARS, "r": 2, "alpha": 3})
VERA = FamilyCase("m_vera", "VeraConfig", {"target_modules": QV, "r": 6})
HRA = FamilyCase("m_hra", "HRAConfig", {"target_modules": QV, "r": 4})
OUT_IA3 = FamilyCase("m_ia3_out", "IA3Config", {"target_modules": QV, "feedforward_modules": []})
IA3 = FamilyCase(
    "m_ia3", "IA3Config", {"target_modules": LINEARS, "feedforward_modules": ["down_proj"]}
)
BIASED_IA3 = FamilyCase(
    "m_ia3_b",
    "IA3Config",
    {"target_modules": [*QV, "down_proj"], "feedforward_modules": ["down_proj"]},
    model="qwen2",
)
BIASED_LORA = FamilyCase(
    "m_lora_b", "LoraConfig", {"target_modules": QV, "r": 3, "lora_alpha": 5}, model="qwen2"
)


class Stage:
    """Adapters on one base, built by PEFT, and what PEFT says each adds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cache  # noqa: B019 - as long as the module's tests
    def base(self, case: FamilyCase) -> Path:
        return case.save_base(self.folder / f"base-{case.model}")

    @cache  # noqa: B019
    def adapter(self, case: FamilyCase, seed: int) -> Path:
        return case.build(self.folder / f"{case.name}-{seed}", seed)

    @cache  # noqa: B019
    def added(self, case: FamilyCase, seed: int) -> dict[str, Tensor]:
        before = case.base_model().double().state_dict()
        after = case.merged(self.adapter(case, seed))
        return {name: after[name] - before[name] for name in before}

    def expected(self, parts: list[tuple[FamilyCase, int, float]]) -> Tensor:
        case = parts[0][0]
        model = case.base_model().double()
        state = copy.deepcopy(model.state_dict())
        for part, seed, weight in parts:
            for name, value in self.added(part, seed).items():
                state[name] += weight * value
        model.load_state_dict(state)
        return logits(model, case.inputs())

    def combine(self, parts: list[tuple[FamilyCase, int, float]], out: Path, **options: Any) -> Any:
        specs = [
            InputSpec(str(self.adapter(case, seed)), f"a{n}", weight)
            for n, (case, seed, weight) in enumerate(parts)
        ]
        return combine(specs, out, Options(**options))

    def error(self, case: FamilyCase, outputs: Tensor, expected: Tensor) -> float:
        effect = (expected - case.plain()).norm()
        assert effect > 1e-3 * expected.norm()
        return float((outputs - expected).norm() / effect)

    def run(self, case: FamilyCase, out: Path) -> Tensor:
        adapter = open_input(InputSpec(str(out)), open_base(str(self.base(case)))).adapter
        model = case.base_model().double()
        with runtime.attach(model, adapter):
            return logits(model, case.inputs())


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


Parts = list[tuple[FamilyCase, int, float]]
WITHOUT_BASE: dict[str, tuple[Parts, str]] = {
    "loha and loha": ([(LOHA, 1, 0.6), (LOHA, 2, 0.7)], "LORA"),
    "loha and lora": ([(LOHA, 1, 0.6), (LORA, 2, -0.5)], "LORA"),
    "half a loha": ([(LOHA, 1, 0.5)], "LORA"),
    "ia3 and ia3": ([(IA3, 1, 0.6), (IA3, 2, 0.9)], "IA3"),
    "half an ia3": ([(IA3, 1, 0.5)], "IA3"),
    "ia3 with biases": ([(BIASED_IA3, 1, 0.6), (BIASED_IA3, 2, 0.9)], "IA3"),
}
WITH_BASE: dict[str, tuple[Parts, str]] = {
    "vera and vera": ([(VERA, 1, 0.6), (VERA, 2, 0.7)], "LORA"),
    "vera and loha": ([(VERA, 1, 0.6), (LOHA, 2, 0.7)], "LORA"),
    "dora and dora": ([(DORA, 1, 0.6), (DORA, 2, 0.7)], "LORA"),
    "dora and lora": ([(DORA, 1, 0.6), (LORA, 2, 0.7)], "LORA"),
    "dora on some and lora": ([(DORA_QV, 1, 1.0), (LORA, 2, 0.7)], "LORA"),
    "dora, lora and ia3": ([(DORA_QV, 1, 0.6), (LORA, 2, 0.7), (OUT_IA3, 1, 0.4)], "LORA"),
    "half a dora": ([(DORA, 1, 0.5)], "LORA"),
    "reflections and lora": ([(HRA, 1, 0.5), (LORA, 2, 0.5)], "LORA"),
}
BY_BUDGET: dict[str, tuple[Parts, dict[str, Any]]] = {
    "ia3 as lora": ([(IA3, 1, 1.0)], {"form": "lora"}),
    "ia3 and lora": ([(IA3, 1, 0.5), (LORA, 2, 0.5)], {}),
    "dora as lora": ([(DORA, 1, 1.0)], {"form": "lora"}),
    "biased ia3 and lora": ([(BIASED_IA3, 1, 0.5), (BIASED_LORA, 2, 0.5)], {}),
}


def verified(stage: Stage, parts: Parts, out: Path) -> None:
    """The verifier agrees, from the inputs' files."""
    inputs = {f"a{n}": str(stage.adapter(case, seed)) for n, (case, seed, _) in enumerate(parts)}
    verdict = verify(out, Questions(base=str(stage.base(parts[0][0])), inputs=inputs))
    failed = [(c.name, c.detail) for c in verdict.checks if c.status == "fail"]
    assert not failed


@pytest.mark.parametrize("name", WITHOUT_BASE)
def test_sums_that_need_no_base(name: str, stage: Stage, tmp_path: Path) -> None:
    parts, family = WITHOUT_BASE[name]
    report = stage.combine(parts, tmp_path / "out", dtype="fp32")
    case = parts[0][0]
    assert config_of(tmp_path / "out")["peft_type"] == family
    assert stage.error(case, case.truth(tmp_path / "out"), stage.expected(parts)) < 2e-6
    assert report.totals.error < 1e-6
    verified(stage, parts, tmp_path / "out")


@pytest.mark.parametrize("name", WITH_BASE)
def test_exact_sums_on_a_base(name: str, stage: Stage, tmp_path: Path) -> None:
    parts, family = WITH_BASE[name]
    case = parts[0][0]
    base = str(stage.base(case))
    report = stage.combine(parts, tmp_path / "out", dtype="fp32", base=base)
    assert config_of(tmp_path / "out")["peft_type"] == family
    assert stage.error(case, case.truth(tmp_path / "out"), stage.expected(parts)) < 2e-6
    assert report.totals.error < 1e-6
    verified(stage, parts, tmp_path / "out")


@pytest.mark.parametrize("name", BY_BUDGET)
def test_what_has_full_rank_asks_for_a_budget_or_is_kept_whole(
    name: str, stage: Stage, tmp_path: Path
) -> None:
    parts, options = BY_BUDGET[name]
    case = parts[0][0]
    options = {**options, "base": str(stage.base(case)), "dtype": "fp32"}
    with pytest.raises(CannotMerge, match="--rank"):
        stage.combine(parts, tmp_path / "refused", **options)
    from adaptmerge.algebra.fit import Budget

    stage.combine(parts, tmp_path / "all", budget=Budget(energy=1.0), **options)
    expected = stage.expected(parts)
    assert stage.error(case, case.truth(tmp_path / "all"), expected) < 1e-5
    stage.combine(parts, tmp_path / "native", target="native", **options)
    assert stage.error(case, stage.run(case, tmp_path / "native"), expected) < 1e-6
    verified(stage, parts, tmp_path / "native")
    report = stage.combine(parts, tmp_path / "cut", budget=Budget(rank=8), **options)
    assert 0.01 < report.totals.error < 1
    assert stage.error(case, case.truth(tmp_path / "cut"), expected) > 0.01
    verified(stage, parts, tmp_path / "cut")


def test_without_the_base_what_depends_on_it_is_refused(stage: Stage, tmp_path: Path) -> None:
    for parts in (WITH_BASE["dora and lora"][0], BY_BUDGET["ia3 and lora"][0]):
        with pytest.raises(AdaptmergeError, match="--base"):
            stage.combine(parts, tmp_path / "out")
    with pytest.raises(AdaptmergeError, match="--base"):
        stage.combine([(HRA, 1, 1.0)], tmp_path / "out", form="lora")


def test_doras_without_the_base_are_approximated_only_when_allowed(
    stage: Stage, tmp_path: Path
) -> None:
    parts = [(DORA, 1, 0.4), (DORA, 2, 0.6)]
    with pytest.raises(AdaptmergeError, match="--base"):
        stage.combine(parts, tmp_path / "refused")
    report = stage.combine(parts, tmp_path / "out", dtype="fp32", allow=frozenset({"approximate"}))
    assert any(note.kind == "approximated" for note in report.notes)
    error = stage.error(DORA, DORA.truth(tmp_path / "out"), stage.expected(parts))
    assert 1e-4 < error < 0.5


def test_ranks_of_a_dora_sum_add_up(stage: Stage, tmp_path: Path) -> None:
    parts, _ = WITH_BASE["dora, lora and ia3"]
    stage.combine(parts, tmp_path / "out", base=str(stage.base(LORA)), ranks="per-site")
    config = config_of(tmp_path / "out")
    assert config["use_dora"] is True
    assert config["r"] <= 2 + 3


def test_a_dora_sum_looks_at_each_weight_once(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the norms of each DoRA, those of the sum, and what the result is off; nowhere at all of it."""
    looks: list[str] = []
    own = WeightRows._look

    def look(self: WeightRows, directions: Tensor) -> None:
        looks.append(self.weight.name)
        own(self, directions)

    def dense(*factors: object) -> None:
        raise AssertionError("looked at densely")

    monkeypatch.setattr(WeightRows, "_look", look)
    monkeypatch.setattr(WeightRows, "moved", dense)
    monkeypatch.setattr(moved, "distance", dense)
    parts = [(DORA_QV, 1, 0.6), (DORA_QV, 2, 0.3), (LORA_QV, 3, 0.5)]
    stage.combine(parts, tmp_path / "out", base=str(stage.base(LORA)), dtype="fp32")
    weights = [n for n in LORA.base_model().state_dict() if re.search(r"[qv]_proj\.weight$", n)]
    assert sorted(looks) == sorted(weights)


def test_vera_that_shares_its_matrices_keeps_their_rank(stage: Stage, tmp_path: Path) -> None:
    """(B * C) A has rank r, not 2 r."""
    parts, _ = WITH_BASE["vera and vera"]
    stage.combine(parts, tmp_path / "out", base=str(stage.base(VERA)))
    assert config_of(tmp_path / "out")["r"] == 6


@pytest.mark.parametrize(("method", "worst"), [("ia3-linear", 1e-6), ("product", 1e-6)])
def test_other_rules_for_ia3(method: str, worst: float, stage: Stage, tmp_path: Path) -> None:
    """Against vectors computed by hand, and PEFT's own rule for ia3-linear."""
    from safetensors.torch import load_file

    paths = [stage.adapter(IA3, seed) for seed in (1, 2)]
    weights = (0.5, 0.75)
    parts: Parts = [(IA3, 1, 0.5), (IA3, 2, 0.75)]
    stage.combine(parts, tmp_path / "out", method=method, dtype="fp32")
    one, two, out = (
        load_file(path / "adapter_model.safetensors") for path in (*paths, tmp_path / "out")
    )
    for key in one:
        if method == "product":
            meant = one[key].double() ** weights[0] * two[key].double() ** weights[1]
        else:
            meant = weights[0] * one[key].double() + weights[1] * two[key].double()
        assert float((out[key] - meant).norm() / meant.norm()) < worst
    verified(stage, parts, tmp_path / "out")


def test_ia3_linear_is_pefts(stage: Stage, tmp_path: Path) -> None:
    model: Any = IA3.loaded(stage.adapter(IA3, 1))
    model.load_adapter(stage.adapter(IA3, 2), "two")
    model.add_weighted_adapter(["default", "two"], [0.5, 0.75], "sum")
    model.set_adapter("sum")
    truth = logits(model.double(), IA3.inputs())
    stage.combine(
        [(IA3, 1, 0.5), (IA3, 2, 0.75)], tmp_path / "out", method="ia3-linear", dtype="fp32"
    )
    assert stage.error(IA3, IA3.truth(tmp_path / "out"), truth) < 1e-6
    assert torch.isfinite(truth).all()


def test_vera_that_stays_vera_is_the_nearest_one(stage: Stage, tmp_path: Path) -> None:
    parts: Parts = [(VERA, 1, 0.6), (VERA, 2, 0.7)]
    base = str(stage.base(VERA))
    report = stage.combine(parts, tmp_path / "out", base=base, form="vera")
    assert config_of(tmp_path / "out")["peft_type"] == "VERA"
    assert 0.01 < report.totals.error < 1
    apart = {
        name: float(
            (value - stage.added(VERA, 1)[name] * 0.6 - stage.added(VERA, 2)[name] * 0.7).norm()
        )
        for name, value in added_by(VERA, tmp_path / "out").items()
    }
    whole = sum(line.norm**2 for line in report.sites) ** 0.5
    assert sum(v**2 for v in apart.values()) ** 0.5 / whole == pytest.approx(
        report.totals.error, rel=1e-4
    )
    verified(stage, parts, tmp_path / "out")


def added_by(case: FamilyCase, path: Path) -> dict[str, Tensor]:
    before = case.base_model().double().state_dict()
    after = case.merged(path)
    return {name: after[name] - before[name] for name in before}


ROTATIONS: dict[str, FamilyCase] = {
    "hra": HRA,
    "oft": FamilyCase(
        "m_oft",
        "OFTConfig",
        {"target_modules": QV, "oft_block_size": 8, "use_cayley_neumann": False},
    ),
    "boft": FamilyCase("m_boft", "BOFTConfig", {"target_modules": QV, "boft_block_size": 8}),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_meet_half_way(name: str, stage: Stage, tmp_path: Path) -> None:
    """The merge of a rotation with itself is itself; the mean of two is as far from one as the other."""
    case = ROTATIONS[name]
    same: Parts = [(case, 1, 0.25), (case, 1, 0.75)]
    stage.combine(same, tmp_path / "same", dtype="fp32")
    once = stage.expected([(case, 1, 1.0)])
    assert stage.error(case, case.truth(tmp_path / "same"), once) < 2e-5
    parts: Parts = [(case, 1, 0.5), (case, 2, 0.5)]
    stage.combine(parts, tmp_path / "mean", dtype="fp32")
    verified(stage, parts, tmp_path / "mean")
    assert config_of(tmp_path / "mean")["peft_type"] == name.partition("_")[0].upper()
    mean = added_by(case, tmp_path / "mean")
    for key, value in stage.added(case, 1).items():
        other = stage.added(case, 2)[key]
        near, far = float((mean[key] - value).norm()), float((mean[key] - other).norm())
        if name != "boft" and float(value.norm()):
            assert near == pytest.approx(far, rel=0.2)
            assert near < float((value - other).norm())


@pytest.mark.parametrize("name", ROTATIONS)
def test_half_of_a_rotation_twice_is_the_whole(name: str, stage: Stage, tmp_path: Path) -> None:
    case = ROTATIONS[name]
    stage.combine([(case, 1, 0.5)], tmp_path / "half", dtype="fp32")
    combine(
        [InputSpec(str(tmp_path / "half"), "h", 2.0)], tmp_path / "whole", Options(dtype="fp32")
    )
    once = stage.expected([(case, 1, 1.0)])
    half = case.truth(tmp_path / "half")
    assert stage.error(case, half, once) > 0.1
    assert stage.error(case, case.truth(tmp_path / "whole"), once) < 5e-5


def test_on_request_rotations_are_summed_as_deltas(stage: Stage, tmp_path: Path) -> None:
    parts: Parts = [(HRA, 1, 0.5), (HRA, 2, 0.7)]
    options = {"base": str(stage.base(HRA)), "form": "lora", "dtype": "fp32"}
    stage.combine(parts, tmp_path / "out", **options)
    assert config_of(tmp_path / "out")["r"] <= 8
    assert stage.error(HRA, HRA.truth(tmp_path / "out"), stage.expected(parts)) < 2e-6
    verified(stage, parts, tmp_path / "out")


def test_half_turns_have_no_mean_and_are_summed_on_request(stage: Stage, tmp_path: Path) -> None:
    """I - 2 U U^T has the eigenvalue -1: no way round is the shortest."""
    options = {"target_modules": QV, "r": 4, "apply_GS": True}
    case = FamilyCase("m_hra_gs", "HRAConfig", options)
    parts: Parts = [(case, 1, 0.5), (case, 2, 0.7)]
    with pytest.raises(CannotMerge, match="eigenvalue -1.*--as lora"):
        stage.combine(parts, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    base = str(stage.base(case))
    stage.combine(parts, tmp_path / "out", base=base, form="lora", dtype="fp32")
    assert stage.error(case, case.truth(tmp_path / "out"), stage.expected(parts)) < 2e-6
