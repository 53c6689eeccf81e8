"""The contract of every family: read, run, written back, in the native format, as a delta; PEFT judges."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.built import Built, BuiltCases
from families.cases import FamilyCase, all_cases, family
from peft_cases import logits
from safetensors.torch import load_file
from tiers import first_of
from torch import Tensor

from adaptmerge import runtime
from adaptmerge.adapters.graph import Adapter
from adaptmerge.adapters.weight_edits import WeightEdit, delta_on
from adaptmerge.algebra.fit import Budget
from adaptmerge.bases.base import Base
from adaptmerge.bases.open import open_base
from adaptmerge.commands.combine import Options, combine
from adaptmerge.formats.inputs import InputSpec, open_input
from adaptmerge.formats.peft.tuner import tuner_of

pytest.importorskip("peft")


# Variants of which the writer has a branch of its own.
WRITTEN = {
    *("adalora_empty", "c3a_patterns", "deft_wide", "loha_conv_cores", "lokr_line_cores"),
    *(
        "lokr_line_whole",
        "oft_coft_shared",
        "psoft_rounds",
        "psoft_series_bound",
        "vera_gpt2_drawn",
    ),
    *("lora_bd", "lora_kasa"),
}


def thrifty(names: Iterable[str], also: Collection[str] = ()) -> list[Any]:
    """The first case of each family on each model; `make test-full` runs the variants, too."""
    return first_of(names, family, also)


class Setting:
    """A case that was built: PEFT's adapter, its base, PEFT's outputs."""

    def __init__(self, built: Built) -> None:
        self.built, self.case = built, built.case
        self.base_folder, self.path = built.base, built.path
        self.base: Base = open_base(str(built.base))

    def read(self, path: Path) -> Adapter:
        return open_input(InputSpec(str(path)), self.base).adapter

    def run(self, adapter: Adapter) -> Tensor:
        model = self.case.base_model().double()
        with runtime.attach(model, adapter):
            return logits(model, self.case.inputs())

    def error(self, outputs: Tensor) -> float:
        """Relative to the adapter's effect; virtual tokens make PEFT's outputs longer at the front."""
        plain, truth = self.case.plain(), self.built.truth
        last = truth[:, -plain.shape[1] :] if plain.ndim == 3 else truth
        effect = (last - plain).norm()
        assert effect > 1e-3 * plain.norm(), "the adapter does nothing: no proof"
        return float((outputs - truth).norm() / effect)


@pytest.fixture
def setting(built: BuiltCases) -> Callable[[str], Setting]:
    return lambda name: Setting(built(name))


@pytest.mark.parametrize("name", all_cases())
def test_read_and_attached_it_computes_what_peft_computes(
    name: str, setting: Callable[[str], Setting]
) -> None:
    found = setting(name)
    adapter = found.read(found.path)
    assert found.error(found.run(adapter)) < found.case.tolerance


@pytest.mark.parametrize("name", thrifty(all_cases(), WRITTEN))
def test_written_back_it_is_the_same_file_and_loads_in_peft(
    name: str, setting: Callable[[str], Setting], tmp_path: Path
) -> None:
    found = setting(name)
    out = tmp_path / "out"
    combine([InputSpec(str(found.path))], out, Options(base=str(found.base_folder)))
    before, after = (load_file(p / "adapter_model.safetensors") for p in (found.path, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((p / "adapter_config.json").read_text()) for p in (found.path, out)]
    assert configs[0]["peft_type"] == configs[1]["peft_type"]
    assert found.error(found.case.truth(out)) < 1e-9


@pytest.mark.parametrize("name", thrifty(all_cases()))
def test_without_hints_it_is_written_the_same(
    name: str, setting: Callable[[str], Setting], tmp_path: Path
) -> None:
    """The config is a spelling: what it says of the maths is in the edits."""
    found = setting(name)
    native, out = tmp_path / "native", tmp_path / "out"
    options = Options(base=str(found.base_folder), target="native")
    combine([InputSpec(str(found.path))], native, options)
    graph = json.loads((native / "graph.json").read_text())
    for adapter in graph["adapters"].values():
        adapter["hints"] = {"peft": {"task_type": found.case.task or None}}
    (native / "graph.json").write_text(json.dumps(graph))
    combine([InputSpec(str(native))], out, Options(base=str(found.base_folder), target="peft"))
    assert found.error(found.case.truth(out)) < 1e-9


@pytest.mark.parametrize("name", thrifty(all_cases()))
def test_the_native_format_holds_it(
    name: str, setting: Callable[[str], Setting], tmp_path: Path
) -> None:
    found = setting(name)
    out = tmp_path / "out.safetensors"
    options = Options(base=str(found.base_folder), target="native")
    combine([InputSpec(str(found.path))], out, options)
    assert found.error(found.run(found.read(out))) < found.case.tolerance


@pytest.mark.parametrize(
    "name", thrifty((n for n, case in all_cases().items() if case.merges), {"lora_embedding"})
)
def test_its_delta_is_what_peft_merges(name: str, setting: Callable[[str], Setting]) -> None:
    """Dense, by definition, and in its thin form."""
    found = setting(name)
    before = found.case.base_model().double().state_dict()
    after = found.built.merged
    checked = 0
    for site, edits in found.read(found.path).sites().items():
        weight = found.base.weight(site)
        if weight is None or not all(isinstance(edit, WeightEdit) for edit in edits):
            continue
        factor = delta_on(edits, weight)
        key = next(k for k in before if k.endswith(f"{site.module}.{site.param}"))
        moved = after[key] - before[key]
        moved = moved if site.expert is None else moved[site.expert]
        turned = found.base.is_transposed(site) and moved.ndim == 2
        moved = (moved.T if turned else moved).reshape(factor.shape)
        assert moved.norm() > 0
        assert (factor.dense() - moved).norm() < found.case.tolerance * moved.norm()
        thin = sum(t.up.double() @ t.down.double() * t.scale for t in factor.thin())
        assert (thin - moved).norm() < max(1e-5, found.case.tolerance) * moved.norm()
        checked += 1
    assert checked


def _as_lora(case: FamilyCase) -> bool:
    """Whether PEFT can hold what it adds as a plain LoRA, and tells us what that is."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

    types = {config.__name__: kind.value for kind, config in CONFIGS.items()}
    tuner = tuner_of(types[case.config])
    assert tuner is not None
    return case.merges and tuner.as_lora != "never"


@pytest.mark.parametrize("name", thrifty(n for n, case in all_cases().items() if _as_lora(case)))
def test_as_lora_it_computes_the_same_in_peft(
    name: str, setting: Callable[[str], Setting], tmp_path: Path
) -> None:
    """Every singular value kept: exact whatever the family stores."""
    found = setting(name)
    options = Options(
        base=str(found.base_folder), form="lora", budget=Budget(energy=1.0), dtype="fp32"
    )
    combine([InputSpec(str(found.path))], tmp_path / "out", options)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["use_dora"]) == ("LORA", False)
    assert found.error(found.case.truth(tmp_path / "out")) < max(1e-5, found.case.tolerance)
