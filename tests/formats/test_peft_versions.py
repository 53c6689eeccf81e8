"""Configs for older releases of PEFT: nothing that they do not know, nothing that means another thing.

That old releases load what is written and compute the same was checked by hand, with LoRA of different
ranks, DoRA, IA3 and VeRA: 0.4, 0.5, 0.6, 0.8, 0.9, 0.11 to 0.15, 0.18 and 0.21, error at most 1.2e-7 of the
adapter's effect.
"""

from __future__ import annotations

import dataclasses
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from adaptmerge.commands.combine import Options, combine
from adaptmerge.commands.recipe import load_recipe
from adaptmerge.errors import CannotStore, UsageError
from adaptmerge.formats.inputs import InputSpec
from adaptmerge.formats.peft.releases import FIELDS, RELEASES
from adaptmerge.formats.peft.tuner import all_tuners
from adaptmerge.formats.peft.versions import downgraded, family_since, fields_of, release_of

PLAIN = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "task_type": "CAUSAL_LM",
}
PATHS = ("model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.10.q_proj")
MIXED = {**PLAIN, "rank_pattern": {r"^model\.layers\.1\.q_proj": 4}}


def written(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def test_the_table_is_what_the_installed_peft_says() -> None:
    pytest.importorskip("peft")
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

    release = release_of(version("peft"))
    for family, config in CONFIGS.items():
        assert fields_of(family, release) == {f.name for f in dataclasses.fields(config)}, family


def test_every_family_that_is_written_is_in_the_table() -> None:
    assert not [t.peft_type for t in all_tuners() if t.writable and t.peft_type not in FIELDS]


@pytest.mark.parametrize("name", ["lora-r8-shakespeare", "ia3-shakespeare", "vera-r64-shakespeare"])
def test_every_release_knows_what_is_written_for_it(
    name: str, fixtures: Path, tmp_path: Path
) -> None:
    tiny = fixtures / "tinyllama"
    combine([InputSpec(str(tiny / name))], tmp_path / "out", Options(base=str(tiny / "base")))
    config = written(tmp_path / "out")
    checked = 0
    for release in RELEASES:
        found, problems = downgraded(config, release)
        known = fields_of(config["peft_type"], release)
        assert problems if not known else found.keys() <= known and not problems
        checked += bool(known)
    assert checked > 8


@pytest.mark.parametrize("release", ["0.4", "0.17", "0.18"])
def test_the_writer_writes_for_a_release(release: str, fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "tinyllama" / "lora-r8-shakespeare"
    combine([InputSpec(str(source))], tmp_path / "out", Options(version=release))
    config = written(tmp_path / "out")
    assert config.keys() <= fields_of("LORA", release)
    assert config.get("peft_version") == ("0.18" if release == "0.18" else None)


def test_a_patch_release_is_written_as_such(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "tinyllama" / "lora-r8-shakespeare"
    combine([InputSpec(str(source))], tmp_path / "out", Options(version="0.18.1"))
    assert written(tmp_path / "out")["peft_version"] == "0.18.1"


@pytest.mark.parametrize(
    ("fields", "release", "sentence"),
    [
        ({"use_dora": True}, "0.8", "use_dora of LORA, which is True: write it for 0.9 or later"),
        ({"lora_bias": True}, "0.13", "lora_bias"),
        ({"trainable_token_indices": [1]}, "0.14", "write it for 0.15 or later"),
        ({"rank_pattern": {"q": 4}}, "0.5", r"0.6 or later, or with one rank .*--ranks uniform"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "0.18", "swaps .* for 0.19 or later"),
        ({"init_lora_weights": "pissa_niter_4"}, "0.10", "'pissa': write it for 0.11 or later"),
        ({"peft_type": "MISS"}, "0.16", "does not know MISS: write it for 0.17 or later"),
        ({"peft_type": "BONE"}, "0.19", "no longer knows BONE, which 0.19 replaced by MISS"),
        ({"peft_type": "OFT"}, "0.15", "stores OFT in another form, as oft_r"),
        ({"peft_type": "OFT", "rank_pattern": {"q": 4}}, "0.16", "no longer knows .*before 0.15"),
        ({"peft_type": "PSOFT", "psoft_svd": "lowrank"}, "0.19", "without a seed"),
        ({"peft_type": "NEW"}, "0.21", "no release of peft up to 0.21 knows NEW"),
        ({"use_new": 1}, "0.21", "no release of peft up to 0.21 knows the config field use_new"),
    ],
)
def test_what_a_release_cannot_hold_is_said(
    fields: dict[str, Any], release: str, sentence: str
) -> None:
    base = PLAIN if "peft_type" not in fields else {"target_modules": ["q_proj"]}
    _, problems = downgraded({**base, **fields}, release)
    assert len(problems) == 1
    assert re.search(sentence, problems[0])


def test_all_problems_are_said_at_once() -> None:
    _, problems = downgraded({**PLAIN, "use_dora": True, "lora_bias": True}, "0.8")
    assert len(problems) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": False, "layer_replication": None, "loftq_config": {}, "exclude_modules": []},
        {"megatron_core": "megatron.core", "qalora_group_size": 16},
        {"eva_config": {"rho": 2.0}, "corda_config": {"cache_file": "x"}},
        {"peft_version": "0.21.2", "fan_in_fan_outward": False},
    ],
)
def test_what_is_unset_or_about_training_goes(fields: dict[str, Any]) -> None:
    found, problems = downgraded({**PLAIN, **fields}, "0.6")
    assert not problems
    assert found == PLAIN


def rank_before_0_15(config: dict[str, Any], path: str) -> int:
    """As those releases look it up: a pattern behind a dot, else the path itself."""
    table = config["rank_pattern"]
    key = next((key for key in table if re.match(rf".*\.{key}$", path)), path)
    found: int = table.get(key, config["r"])
    return found


@pytest.mark.parametrize("release", ["0.6", "0.13", "0.14"])
def test_patterns_hit_the_same_modules_in_older_releases(release: str) -> None:
    found, problems = downgraded(MIXED, release, PATHS)
    assert not problems
    assert [rank_before_0_15(MIXED, path) for path in PATHS] == [8, 8, 8]  # so it is respelled
    assert [rank_before_0_15(found, path) for path in PATHS] == [8, 4, 8]


def test_patterns_stay_as_they_are_from_0_15() -> None:
    assert downgraded(MIXED, "0.15", PATHS)[0]["rank_pattern"] == MIXED["rank_pattern"]


def test_a_path_that_ends_another_cannot_have_a_pattern_of_its_own() -> None:
    _, problems = downgraded(MIXED, "0.14", [*PATHS, f"vision.{PATHS[1]}"])
    assert len(problems) == 1 and f"for vision.{PATHS[1]} too" in problems[0]


def test_an_anchored_pattern_that_is_no_path_never_matched() -> None:
    _, problems = downgraded({**PLAIN, "alpha_pattern": {"^model.*q_proj": 4}}, "0.14")
    assert len(problems) == 1 and "never matches" in problems[0]


def test_suffixes_become_an_expression_where_they_were_matched_otherwise() -> None:
    found, _ = downgraded(PLAIN, "0.5")
    pattern = re.compile(found["target_modules"])
    assert all(pattern.fullmatch(path) for path in ("q_proj", "model.layers.0.v_proj"))
    assert not pattern.fullmatch("model.layers.0.seq_proj")
    assert downgraded(PLAIN, "0.6")[0]["target_modules"] == PLAIN["target_modules"]


@pytest.mark.parametrize("wrong", ["abc", "99.0", "0.3", "1.0", "0.2.1", "", "0.130"])
def test_a_wrong_version_is_wrong_usage(wrong: str, fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "tinyllama" / "lora-r8-shakespeare"
    with pytest.raises(UsageError, match=r"expected a release from 0\.4 to 0\.21"):
        combine([InputSpec(str(source))], tmp_path / "out", Options(version=wrong))
    with pytest.raises(UsageError, match=r"expected 0\.4 to 0\.21"):
        release_of(wrong)


def test_no_patch_release_has_letters() -> None:
    with pytest.raises(UsageError):
        release_of("0.13.x")


def test_other_formats_have_no_version(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "tinyllama" / "lora-r8-shakespeare"
    options = Options(version="0.13", target="native")
    with pytest.raises(UsageError, match="is not for native: leave it out"):
        combine([InputSpec(str(source))], tmp_path / "out", options)


def test_what_does_not_fit_is_not_written(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "tinyllama" / "lora-r4-dora-embed-cheaders"
    with pytest.raises(CannotStore, match="use_dora"):
        combine([InputSpec(str(source))], tmp_path / "out", Options(version="0.8"))
    assert not (tmp_path / "out").exists()


def test_every_family_has_a_first_release() -> None:
    for family in FIELDS:
        since = family_since(family)
        assert since is not None
        assert since == "0.3" or fields_of(family, since) >= {"peft_type", "task_type"}


@pytest.mark.parametrize(("text", "works"), [('"0.10"', True), ("0.10", False)])
def test_a_recipe_quotes_the_version(
    text: str, works: bool, fixtures: Path, tmp_path: Path
) -> None:
    """0.10 without quotes is the number 0.1 to YAML."""
    recipe = tmp_path / "recipe.yaml"
    source = fixtures / "tinyllama" / "lora-r8-shakespeare"
    recipe.write_text(f"inputs: [{source}]\npeft_version: {text}\n")
    if works:
        assert load_recipe(recipe).options().version == "0.10"
        return
    with pytest.raises(UsageError, match="peft_version: .*in quotes, such as '0.13'"):
        load_recipe(recipe)
