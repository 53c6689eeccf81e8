"""No family and no config field of the installed PEFT is unknown here."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from adaptmerge.formats.peft.tuner import COMMON, Tuner, all_tuners, families, tuner_of

pytest.importorskip("peft")

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

# Read from files of older releases; the installed one no longer has them.
FORMER = {"BONE"}
FAMILIES = sorted(member.value for member in PeftType)


def fields(family: str) -> dict[str, Any]:
    """The config fields of a family with PEFT's defaults."""
    found = dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[family])
    return {f.name: _default(f) for f in found if f.init}


def _default(found: dataclasses.Field[Any]) -> Any:
    if found.default_factory is not dataclasses.MISSING:
        return found.default_factory()
    return None if found.default is dataclasses.MISSING else found.default


def tuner_for(family: str) -> Tuner:
    found = tuner_of(family)
    if found is None:
        pytest.fail(f"{family} has no adaptmerge/formats/peft/tuners/{family.lower()}.py")
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_tuner(family: str) -> None:
    found = tuner_for(family)
    assert found.peft_type == family
    assert found.module is not None or found.read is not None
    assert found.summary and (found.merges or found.refused)
    assert found.as_lora in {"itself", "exact", "svd", "base", "never"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_config_field_is_classified(family: str) -> None:
    found = tuner_for(family)
    known = COMMON | found.maths.keys() | found.training | set(found.patterns.values())
    unknown = sorted(fields(family).keys() - known)
    assert not unknown, f"say in maths, training or patterns of {family} what these are: {unknown}"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_is_classified_twice(family: str) -> None:
    found = tuner_for(family)
    twice = sorted(found.maths.keys() & found.training)
    assert not twice, f"either maths or training: {twice}"


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_peft(family: str) -> None:
    """Empty ones are alike; fields of older releases have no default any more."""
    truth = fields(family)
    ours = {name: value for name, value in tuner_for(family).maths.items() if name in truth}
    wrong = {n: (v, truth[n]) for n, v in ours.items() if (v or None) != (truth[n] or None)}
    assert not wrong, f"field: (here, in peft): {wrong}"


def test_no_tuner_is_of_an_unknown_family() -> None:
    known = {family.lower() for family in (*FAMILIES, *FORMER)}
    assert set(families()) <= known
    assert all(tuner.peft_type.lower() in known for tuner in all_tuners())
