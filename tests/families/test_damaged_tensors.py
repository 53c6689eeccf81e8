"""Every tensor of every family in another shape or dtype: refused in a sentence, or computed with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import console
import pytest
from damage import CHANGES, damaged
from families.built import Built, BuiltCases
from families.cases import all_cases
from safetensors.torch import load_file, save_file
from strategies import random_ref
from tiers import first_of
from torch import Tensor

from adaptmerge.adapters.families.bdlora import BlockDiagonal
from adaptmerge.adapters.families.hra import Hra
from adaptmerge.adapters.families.unilora import UniSide
from adaptmerge.adapters.graph import Site
from adaptmerge.adapters.weight_edits import Dora, share_of
from adaptmerge.algebra.factors import Misshapen
from adaptmerge.algebra.low_rank import low_rank

WEIGHTS = "adapter_model.safetensors"


def codes(found: Built, folder: Path, step: int) -> set[int]:
    """The exit codes of comparing an adapter with itself, each time with a tensor changed."""
    shutil.copytree(found.path, folder / "a")
    seen = set()
    for said, tensors in islice(damaged(load_file(found.path / WEIGHTS)), 0, None, step):
        save_file(tensors, folder / "a" / WEIGHTS)
        outcome = console.run("diff", str(folder / "a"), str(found.path), "--base", str(found.base))
        seen.add(outcome.code)
        refused = outcome.code == 1 and outcome.stderr.startswith("error: ")
        assert refused or outcome.code in (0, 3), said
    return seen


@pytest.mark.parametrize("name", ["adalora", "frod", "glora"])
def test_a_changed_tensor_is_refused_or_computed_with(
    name: str, built: BuiltCases, tmp_path: Path
) -> None:
    assert 1 in codes(built(name), tmp_path, 11)


@pytest.mark.slow
@pytest.mark.parametrize("name", all_cases())
def test_each_changed_tensor_is_refused_or_computed_with(
    name: str, built: BuiltCases, tmp_path: Path
) -> None:
    assert 1 in codes(built(name), tmp_path, 1)


def refusals_of(found: Built, folder: Path, change: Callable[[Tensor], Tensor]) -> None:
    """Compares an adapter with itself on its base, every matrix of which is changed."""
    shutil.copytree(found.base, folder / "base")
    weights = {path: load_file(path) for path in (folder / "base").glob("*.safetensors")}
    for path, tensors in weights.items():
        turned = {name: change(v) if v.ndim > 1 else v for name, v in tensors.items()}
        save_file({name: value.clone() for name, value in turned.items()}, path)
    given = (str(found.path), str(found.path), "--base", str(folder / "base"))
    outcome = console.run("diff", *given)
    assert outcome.code == 0 or outcome.stderr.startswith("error: "), outcome.stderr


@pytest.mark.parametrize("change", ["one axis", "no axis"])
@pytest.mark.parametrize(
    "name", first_of(all_cases(), lambda _: 0, ("oft", "moe_mixtral", "glora"))
)
def test_a_base_without_matrices_ends_in_a_sentence(
    name: str, change: str, built: BuiltCases, tmp_path: Path
) -> None:
    refusals_of(built(name), tmp_path, CHANGES[change])


@pytest.mark.parametrize("name", ["adamss_bert", "road_2"])
def test_tensors_that_only_a_bias_has_are_looked_at(
    name: str, built: BuiltCases, tmp_path: Path
) -> None:
    """A native file may hold other tensors for a bias than for the weight that it shares them with."""
    found, out = built(name), tmp_path / "out"
    given = ("combine", str(found.path), "-o", str(out), "--to", "native")
    assert console.run(*given, "--base", str(found.base)).code == 0
    tensors = load_file(out / "tensors.safetensors")
    shared = json.loads((out / "graph.json").read_text(encoding="utf-8"))
    bias = next(e for e in shared["adapters"]["default"]["edits"] if e["site"]["param"] == "bias")
    ref = next(ref for ref in reversed(tensors) if json.dumps(ref) in json.dumps(bias))
    tensors["other"] = tensors[ref][None, None].clone()
    text = json.dumps(shared).replace(json.dumps(bias), json.dumps(bias).replace(ref, "other"))
    (out / "graph.json").write_text(text, encoding="utf-8")
    save_file(tensors, out / "tensors.safetensors")
    outcome = console.run("inspect", str(out))
    assert outcome.code == 1
    assert "its tensors are not those of" in outcome.stderr


@pytest.mark.parametrize(("name", "change"), [("boft", "one row more"), ("randlora", "turned")])
def test_what_was_made_on_another_base_does_not_go_into_this(
    name: str, change: str, built: BuiltCases, tmp_path: Path
) -> None:
    """A native file says what an edit is; whether the base has such a weight shows when they meet."""
    found, out = built(name), tmp_path / "out"
    given = ("combine", str(found.path), "-o", str(out), "--to", "native")
    assert console.run(*given, "--base", str(found.base)).code == 0
    shutil.copytree(found.base, tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    weight = next(n for n in tensors if "down_proj" in n)
    save_file({**tensors, weight: CHANGES[change](tensors[weight]).contiguous()}, path)
    lossy = ("--allow", "base,loss", "--max-loss", "100", "-o", str(tmp_path / "fused"))
    outcome = console.run("fuse", str(tmp_path / "base"), str(out), *lossy)
    assert outcome.code == 1
    assert outcome.stderr.startswith("error: ")


def test_what_norms_or_reflects_another_base_says_so() -> None:
    weight = random_ref(1, 6, 5)
    normed = Dora(Site("m"), low_rank(random_ref(2, 6, 2), random_ref(3, 2, 7)), random_ref(4, 6))
    reflected = Hra(Site("m"), random_ref(5, 7, 2), orthogonalise=True)
    asked = (lambda: share_of(normed, weight), lambda: reflected.on(weight).dense())
    for ask in asked:
        with pytest.raises(Misshapen, match=r"of the adapter does not fit .*of shape \[6, 5\]"):
            ask()


def test_places_and_scales_of_other_shapes_do_not_go_together() -> None:
    with pytest.raises(Misshapen, match=r"\[2, 3\] and \[96\] do not go together"):
        UniSide(random_ref(1, 4), random_ref(2, 2, 3), random_ref(3, 96))


def test_sides_of_blocks_are_matrices() -> None:
    with pytest.raises(Misshapen, match="no two matrices in 2 blocks"):
        BlockDiagonal(random_ref(1, 4), random_ref(2, 2, 4), 1.0, "down", 2)
