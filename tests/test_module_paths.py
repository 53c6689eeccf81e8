from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adaptmerge.adapters.module_paths import (
    exact_suffixes,
    is_suffix,
    layer_index,
    natural_key,
    suffixes,
    unwrapped,
)
from adaptmerge.errors import did_you_mean
from adaptmerge.formats.inputs import unique_names

parts = st.sampled_from(["model", "layers", "0", "1", "10", "attn", "mlp", "q", "v", "proj"])
modules = st.lists(parts, min_size=1, max_size=5).map(".".join)
trees = st.sets(modules, min_size=1, max_size=14)


def selected(found: list[str], tree: set[str]) -> set[str]:
    return {module for module in tree if any(is_suffix(suffix, module) for suffix in found)}


def nameable(wanted: set[str], others: set[str]) -> bool:
    """Whether suffixes can tell them apart: no other module ends in a whole wanted one."""
    return not any(is_suffix(module, other) for module in wanted for other in others)


@given(data=st.data(), tree=trees)
def test_exact_suffixes_select_exactly_the_modules(data: st.DataObject, tree: set[str]) -> None:
    wanted = data.draw(st.sets(st.sampled_from(sorted(tree)), min_size=1))
    others = tree - wanted
    assume(nameable(wanted, others))
    found = exact_suffixes(wanted, others, None)
    assert selected(found, tree) == wanted


@given(data=st.data(), tree=trees)
def test_exact_suffixes_are_the_shortest_and_fewest(data: st.DataObject, tree: set[str]) -> None:
    """Every one is needed, and a shorter one would select too much.

    Suffixes nest like a tree, so the shortest safe ones are also the fewest.
    """
    wanted = data.draw(st.sets(st.sampled_from(sorted(tree)), min_size=1))
    others = tree - wanted
    found = exact_suffixes(wanted, others, None)
    assert len(set(found)) == len(found) <= len(wanted)
    for suffix in found:
        assert not any(is_suffix(other, suffix) for other in found if other != suffix)
        shorter = [s for s in suffixes(suffix) if s != suffix]
        assert all(any(is_suffix(s, other) for other in others) for s in shorter)


@given(data=st.data(), tree=trees, hidden=trees)
def test_without_the_base_only_promised_suffixes_are_shortened(
    data: st.DataObject, tree: set[str], hidden: set[str]
) -> None:
    """Modules that nobody has seen are selected only by what the inputs' own targets promise."""
    complete = data.draw(st.sets(parts, max_size=3))
    unseen = {m for m in hidden - tree if not any(is_suffix(known, m) for known in complete)}
    assume(nameable(tree, unseen))
    found = exact_suffixes(tree, (), complete)
    assert selected(found, tree) == tree
    assert not selected(found, unseen)


def test_exact_suffixes_do_not_depend_on_order() -> None:
    tree = [f"model.layers.{i}.{name}" for i in range(12) for name in ("attn.q", "attn.v", "mlp.q")]
    wanted = [module for module in tree if module.endswith(("attn.q", "v")) and "0" not in module]
    others = [module for module in tree if module not in wanted]
    expected = exact_suffixes(wanted, others, None)
    assert exact_suffixes(wanted[::-1], others[::-1], None) == expected
    assert exact_suffixes(set(wanted), set(others), None) == expected
    assert expected[0] == "1.attn.q"


@pytest.mark.parametrize(
    ("wanted", "others", "complete", "expected"),
    [
        (["l.0.q", "l.1.q"], ["l.0.v"], None, ["q"]),
        (["l.0.q", "l.1.q"], ["l.2.q"], None, ["0.q", "1.q"]),
        (["l.0.q"], ["l.10.q"], None, ["0.q"]),
        (["l.0.q", "l.1.q"], [], {"q"}, ["q"]),
        (["l.0.q", "l.1.q"], [], set(), ["l.0.q", "l.1.q"]),
        (["l.0.q", "l.1.q"], [], {"0.q"}, ["0.q", "l.1.q"]),
        (["a.enc.q"], ["a.dec.q"], None, ["enc.q"]),
        (["lm_head"], ["model.q"], None, ["lm_head"]),
    ],
)
def test_exact_suffixes(
    wanted: list[str], others: list[str], complete: set[str] | None, expected: list[str]
) -> None:
    assert exact_suffixes(wanted, others, complete) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("module.model.layers.0.q", "model.layers.0.q"),
        ("_orig_mod.model._fsdp_wrapped_module.layers.0.q", "model.layers.0.q"),
        ("model.layers.0._checkpoint_wrapped_module.mlp", "model.layers.0.mlp"),
        ("submodule.my_module.q", "submodule.my_module.q"),
        ("model.q", "model.q"),
    ],
)
def test_unwrapped(path: str, expected: str) -> None:
    assert unwrapped(path) == expected
    assert unwrapped(expected) == expected


@given(numbers=st.lists(st.integers(0, 10**6), min_size=1, unique=True))
def test_natural_order_is_by_number(numbers: list[int]) -> None:
    names = [f"run-2/checkpoint-{n}/x" for n in numbers]
    ordered = sorted(names, key=natural_key)
    assert ordered == [f"run-2/checkpoint-{n}/x" for n in sorted(numbers)]


@given(texts=st.lists(st.text(alphabet="ab.-0129", max_size=6)))
def test_natural_keys_compare(texts: list[str]) -> None:
    """Numbers and words in the same place must not clash."""
    ordered = sorted(texts, key=natural_key)
    assert all(natural_key(a) <= natural_key(b) for a, b in pairwise(ordered))


def test_natural_keys_of_other_digits() -> None:
    """A superscript counts as a digit for `isdigit`, but is no number."""
    assert sorted(["x²", "x2", "²", "x1"], key=natural_key) == ["x1", "x2", "x²", "²"]
    assert layer_index("model.².q") is None


@pytest.mark.parametrize(
    ("module", "index"),
    [("model.layers.7.mlp", 7), ("transformer.h.0.attn.c_attn", 0), ("lm_head", None)],
)
def test_layer_index(module: str, index: int | None) -> None:
    assert layer_index(module) == index


@given(names=st.lists(st.sampled_from(["a", "a-2", "b", "a-2-2"]), max_size=7))
def test_unique_names(names: list[str]) -> None:
    found = unique_names(names)
    assert len(set(found)) == len(found) == len(names)
    for position, name in enumerate(names):
        if name not in names[:position] and name not in found[:position]:
            assert found[position] == name


def test_did_you_mean() -> None:
    assert did_you_mean("liner", ["linear", "svd"]) == "did you mean 'linear'?"
    assert did_you_mean("zzz", ["linear", "svd"]) == "known: linear, svd"
