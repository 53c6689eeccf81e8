from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptmerge.adapters.graph import Key, Site
from adaptmerge.errors import UsageError
from adaptmerge.merging.weights import (
    SiteRule,
    Value,
    Weights,
    base_weights,
    check_pattern,
    is_checkpoint_schedule,
    parse_rule,
)

Q0 = Site("model.layers.0.self_attn.q_proj")
Q3 = Site("model.layers.3.self_attn.q_proj")
UP3 = Site("model.layers.3.mlp.up_proj")
HEAD = Site("lm_head")


def scheduled(schedule: str, count: int = 4) -> list[float]:
    names = [f"n{i}" for i in range(count)]
    found = base_weights(names, [None] * count, schedule, False)
    assert list(found) == names
    return list(found.values())


def at(rules: list[SiteRule], site: Site, kind: str = "add", layers: int = 4) -> float:
    return Weights({"a": 1.0, "b": 2.0}, tuple(rules)).at("a", site, kind, layers)


def rule(match: str, weight: Value, kind: str | None = None) -> SiteRule:
    return SiteRule(match, {"a": weight}, kind)


# Base weights


@given(count=st.integers(1, 9))
def test_no_weights_are_a_mean_or_a_sum(count: int) -> None:
    names = [f"n{i}" for i in range(count)]
    assert base_weights(names, [None] * count, None, False) == dict.fromkeys(names, 1 / count)
    assert base_weights(names, [None] * count, None, True) == dict.fromkeys(names, 1.0)


def test_an_input_without_a_weight_counts_one_beside_others() -> None:
    assert base_weights(["a", "b"], [0.5, None], None, False) == {"a": 0.5, "b": 1.0}
    assert base_weights(["a", "b"], [0.0, None], None, False) == {"a": 0.0, "b": 1.0}


def test_numbers() -> None:
    assert scheduled("0.5, -1,2e-1,0") == [0.5, -1.0, 0.2, 0.0]


@given(decay=st.floats(0, 0.99), count=st.integers(1, 8), seed=st.integers(0, 99))
def test_ema_is_the_running_average(decay: float, count: int, seed: int) -> None:
    values = [math.sin(seed + i) for i in range(count)]
    average = values[0]
    for value in values[1:]:
        average = decay * average + (1 - decay) * value
    weights = scheduled(f"ema:{decay!r}", count)
    assert sum(w * v for w, v in zip(weights, values, strict=True)) == pytest.approx(average)
    assert sum(weights) == pytest.approx(1)


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_last_is_the_mean_of_the_last(kept: int) -> None:
    assert scheduled(f"last:{kept}") == [0.0] * (4 - kept) + [1 / kept] * kept


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("1,2", "--weights has 2 numbers for 4 inputs: give one each"),
        ("1,2,3,4,5", "--weights has 5 numbers for 4 inputs"),
        ("1,2,x,4", "--weights: 'x' is not a finite number"),
        ("1,2,,4", "--weights: '' is not a finite number"),
        ("1,2,nan,4", "'nan' is not a finite number"),
        ("ema:1", "--weights ema:1: the decay is from 0 to below 1"),
        ("ema:-0.1", "the decay is from 0 to below 1"),
        ("ema:", "--weights ema: '' is not a finite number"),
        ("last:0", "there are 4 inputs, keep 1 to 4"),
        ("last:5", "there are 4 inputs, keep 1 to 4"),
        ("last:2.5", "last:2.5"),
        ("emma:0.9", "'emma:0.9' is not a finite number"),
    ],
)
def test_schedules_that_cannot_be_meant(schedule: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        scheduled(schedule)
    assert message in str(caught.value)


def test_weights_are_given_once() -> None:
    with pytest.raises(UsageError, match="both after the inputs and by --weights"):
        base_weights(["a", "b"], [1.0, None], "1,2", False)


def test_which_schedules_order_checkpoints() -> None:
    found = [is_checkpoint_schedule(s) for s in ("ema:0.9", "last:5", "1,2", "", None)]
    assert found == [True, True, False, False, False]


# Rules


def test_later_rules_win() -> None:
    rules = [rule("*", 5.0), rule("*.q_proj", 6.0), rule("layers.0.*", 7.0)]
    assert at(rules, HEAD) == 5.0
    assert at(rules, Q3) == 6.0
    assert at(rules, Q0) == 7.0
    assert at(rules[::-1], Q0) == 5.0


def test_a_rule_is_about_the_adapters_it_names() -> None:
    weights = Weights({"a": 1.0, "b": 2.0}, (SiteRule("*", {"b": 9.0}),))
    assert weights.at("a", Q0, "add", 4) == 1.0
    assert weights.at("b", Q0, "add", 4) == 9.0


@pytest.mark.parametrize(
    ("match", "sites"),
    [
        ("q_proj", [Q0, Q3]),
        ("self_attn.q_proj", [Q0, Q3]),
        ("model.layers.3.*", [Q3, UP3]),
        ("layers.[0-2].*", [Q0]),
        ("*mlp*", [UP3]),
        ("lm_head", [HEAD]),
        ("proj", []),
        ("Q_PROJ", []),
        ("re:layers\\.3\\.", [Q3, UP3]),
        ("re:^lm_head$", [HEAD]),
        ("re:proj", [Q0, Q3, UP3]),
        ("re:^proj", []),
    ],
)
def test_globs_and_regular_expressions(match: str, sites: list[Site]) -> None:
    found = [site for site in (Q0, Q3, UP3, HEAD) if SiteRule(match, {}).selects(site, "add")]
    assert found == sites


def test_a_module_means_its_parameters_and_a_parameter_has_a_path_of_its_own() -> None:
    bias = Site("model.layers.0.self_attn.q_proj", "bias")
    assert SiteRule("q_proj", {}).selects(bias, "add")
    assert not SiteRule("q_proj.bias", {}).selects(Q0, "add")
    assert SiteRule("q_proj.bias", {}).selects(bias, "add")


def test_kinds() -> None:
    rules = [rule("*", 3.0, "dora")]
    assert at(rules, Q0, "dora") == 3.0
    assert at(rules, Q0, "add") == 1.0


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [
        ((0.0, 3.0), [0.0, 1.0, 2.0, 3.0]),
        ((1.0, 0.0, 1.0), [1.0, 1 / 3, 1 / 3, 1.0]),
        ((7.0,), [7.0] * 4),
        ((0.0, 1.0, 2.0, 3.0), [0.0, 1.0, 2.0, 3.0]),
    ],
)
def test_gradients_are_spread_over_the_layers(
    gradient: tuple[float, ...], expected: list[float]
) -> None:
    sites = [Site(f"model.layers.{i}.q_proj") for i in range(4)]
    assert [at([rule("*", gradient)], s) for s in sites] == pytest.approx(expected)


@given(
    gradient=st.lists(st.floats(-5, 5), min_size=1, max_size=6).map(tuple),
    layers=st.integers(1, 40),
    data=st.data(),
)
def test_gradients_stay_between_their_numbers(
    gradient: tuple[float, ...], layers: int, data: st.DataObject
) -> None:
    layer = data.draw(st.integers(0, layers - 1))
    found = at([rule("*", gradient)], Site(f"h.{layer}.x"), layers=layers)
    assert min(gradient) - 1e-12 <= found <= max(gradient) + 1e-12
    if layer == layers - 1 > 0:
        assert found == gradient[-1]
    if layer == 0:
        assert found == gradient[0]


def test_a_site_outside_the_layers_takes_the_first_number() -> None:
    assert at([rule("*", (4.0, 9.0))], HEAD) == 4.0
    assert at([rule("*", (4.0, 9.0))], Q0, layers=1) == 4.0


def test_unknown_names_and_idle_rules_are_refused_together() -> None:
    weights = Weights(
        {"sql": 1.0}, (SiteRule("q_proj", {"sq": 1.0}), SiteRule("nope", {"sql": 1.0}))
    )
    with pytest.raises(UsageError) as caught:
        weights.check([Key(Q0, "add")])
    assert caught.value.problems == (
        "site rule 'q_proj' names 'sq': did you mean 'sql'?",
        "site rule 'nope' selects no site; a site is model.layers.0.self_attn.q_proj",
    )
    with pytest.raises(UsageError, match="selects no site"):
        Weights({"a": 1.0}, (rule("q_proj", 1.0, "dora"),)).check([Key(Q0, "add")])
    Weights({"a": 1.0}, (rule("q_proj", 1.0),)).check([Key(Q0, "add")])


@pytest.mark.parametrize(
    ("match", "selected"),
    [
        ("layers.3", ["attention", "mlp"]),
        ("layers.3:mlp", ["mlp"]),
        ("*:attention", ["attention"]),
        ("model.layers.*:mlp", ["mlp"]),
        ("re::(mlp|attention)$", ["attention", "mlp"]),
        ("layers.3:cross", []),
    ],
)
def test_a_place_of_a_layer_is_part_of_what_a_pattern_sees(match: str, selected: list[str]) -> None:
    rule = parse_rule(f"{match}@bottleneck:a=1")
    assert rule.match == match
    sites = [Site("model.layers.3", place=place) for place in ("attention", "mlp")]
    assert [site.place for site in sites if rule.selects(site, "bottleneck")] == selected


# Spelling


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q_proj:a=1", SiteRule("q_proj", {"a": 1.0})),
        (
            "layers.[0-7].*attn*:sql=1,chat=0",
            SiteRule("layers.[0-7].*attn*", {"sql": 1.0, "chat": 0.0}),
        ),
        ("*:a=[0, 0.5,1],b=-2", SiteRule("*", {"a": (0.0, 0.5, 1.0), "b": -2.0})),
        ("q_proj@dora:a=1e-3", SiteRule("q_proj", {"a": 0.001}, "dora")),
        ("re:layers\\.(0|1)\\.:a=1", SiteRule("re:layers\\.(0|1)\\.", {"a": 1.0})),
        ("re:(?:q|v)_proj$:my-sql.2=1", SiteRule("re:(?:q|v)_proj$", {"my-sql.2": 1.0})),
    ],
)
def test_rules_as_text(text: str, expected: SiteRule) -> None:
    assert parse_rule(text) == expected


@pytest.mark.parametrize(
    "text", ["", "q_proj", "q_proj:", "q_proj:a", "q_proj:a=", ":a=1", "q:a=1,,b=2", "q:a=[1"]
)
def test_rules_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="expected PATTERN:NAME=WEIGHT"):
        parse_rule(text)


@pytest.mark.parametrize("text", ["q:a=x", "q:a=nan", "q:a=[1,inf]", "q:a=[]"])
def test_rules_with_numbers_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="is not a finite number"):
        parse_rule(text)


def test_regular_expressions_are_checked() -> None:
    check_pattern("(")  # a glob
    with pytest.raises(UsageError, match=r"'re:\(' is no regular expression: "):
        parse_rule("re:(:a=1")
