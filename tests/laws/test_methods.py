"""The contract of a merge method: every registered one runs through all of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import (
    MODULES,
    adapter,
    config_of,
    deltas,
    distance,
    keys_of,
    random_sides,
    same_bits,
    size,
    tensors_of,
    tree,
    weighted_sum,
    write,
)

from adaptmerge.algebra.fit import Budget
from adaptmerge.commands.combine import Options, combine
from adaptmerge.errors import InputError
from adaptmerge.formats.inputs import InputSpec
from adaptmerge.methods.method import Method
from adaptmerge.methods.registry import methods
from adaptmerge.outputs.report import Report

METHODS = [method for method in methods().values() if "add" in method.rules]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
counter = itertools.count()


def merged(
    paths: Sequence[Path], method: Method, weights: Sequence[float] | None = None, **options: Any
) -> tuple[Path, Report]:
    given = [None] * len(paths) if weights is None else list(weights)
    specs = [
        InputSpec(str(path), name=path.name, weight=weight)
        for path, weight in zip(paths, given, strict=True)
    ]
    output = paths[0].parent / f"merged-{next(counter)}"
    return output, combine(specs, output, Options(method=method.name, **options))


@every_method
@every_dtype
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"lora_alpha": 7}], ids=str)
def test_one_adapter_is_itself(
    method: Method, dtype: torch.dtype, config: dict[str, Any], tmp_path: Path
) -> None:
    one = write(tmp_path / "one", random_sides(1, dtype=dtype), **config)
    output, report = merged([one], method)
    assert same_bits(tensors_of(output), tensors_of(one))
    assert distance(deltas(output), deltas(one)) <= 1e-12 * size(deltas(one))
    assert report.totals.error == 0.0


@every_method
def test_two_copies_at_half_are_one(method: Method, tmp_path: Path) -> None:
    one, two = (adapter(tmp_path / name, seed=1, lora_alpha=3) for name in ("one", "two"))
    output, _ = merged([one, two], method)
    difference = distance(deltas(output), deltas(one)) / size(deltas(one))
    if method.promise is None:
        assert difference <= 1e-6
    else:
        assert difference > 0.05, "promises something of its own, but nothing shows it"
    if method.linear and method.reduce:
        assert same_bits(tensors_of(output), tensors_of(one))


@every_method
def test_order_is_free_up_to_rounding(method: Method, tmp_path: Path) -> None:
    paths = [adapter(tmp_path / f"a{seed}", seed) for seed in range(3)]
    weights = [0.5, -0.25, 1.5]
    found = [
        deltas(merged([paths[i] for i in order], method, [weights[i] for i in order])[0])
        for order in itertools.permutations(range(3))
    ]
    assert all(distance(found[0], other) <= 1e-5 * size(found[0]) for other in found[1:])


@pytest.mark.parametrize("method", [m for m in METHODS if m.linear], ids=lambda m: m.name)
@pytest.mark.parametrize("weights", [[0.7, 0.3, 1.0], [1.0, -1.0, 0.5], [-2.0, -0.1, 0.0]], ids=str)
@pytest.mark.parametrize("ranks", ["uniform", "per-site"])
def test_linear_methods_are_the_weighted_sum(
    method: Method, weights: list[float], ranks: str, tmp_path: Path
) -> None:
    """Different ranks, scales and targets."""
    more = (*MODULES, "model.layers.1.self_attn.v_proj")
    paths = [
        adapter(tmp_path / "a", 1, rank=2),
        write(tmp_path / "b", random_sides(2, 5, more), use_rslora=True),
        write(tmp_path / "c", random_sides(3, 1, more[1:]), lora_alpha=9),
    ]
    output, report = merged(paths, method, weights, ranks=ranks)
    truth = weighted_sum(paths, weights)
    assert distance(deltas(output), truth) <= 1e-6 * size(truth)
    assert report.totals.norm == pytest.approx(size(truth), rel=1e-4)
    if ranks == "uniform":
        config = config_of(output)
        assert (config["lora_alpha"], config["rank_pattern"]) == (config["r"], {})


def regauged(path: Path, folder: Path) -> Path:
    """The same deltas from other sides: B G and G^-1 A."""
    sides = {}
    for index, module in enumerate(MODULES):
        tensors = tensors_of(path)
        key = next(k for k in tensors if module in k and "lora_A" in k)
        a, b = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
        generator = torch.Generator().manual_seed(index)
        noise = torch.randn(len(a), len(a), generator=generator, dtype=torch.float64)
        gauge = torch.linalg.qr(noise).Q * torch.linspace(0.5, 2, len(a), dtype=torch.float64)
        sides[module] = (torch.linalg.solve(gauge, a).float().contiguous(), (b @ gauge).float())
    return write(folder, sides)


@every_method
@pytest.mark.parametrize("rank", [None, 2])
def test_gauge_invariance_is_as_declared(method: Method, rank: int | None, tmp_path: Path) -> None:
    one, two = (adapter(tmp_path / f"a{seed}", seed) for seed in (1, 2))
    other = regauged(one, tmp_path / "other")
    assert distance(deltas(one), deltas(other)) <= 1e-6 * size(deltas(one))
    options = {"budget": Budget(rank=rank)}
    first = deltas(merged([one, two], method, [0.6, 0.4], **options)[0])
    second = deltas(merged([other, two], method, [0.6, 0.4], **options)[0])
    difference = distance(first, second) / size(first)
    if method.gauge_invariant:
        assert difference < 1e-5
    else:
        assert difference > 0.05, "declared as not gauge invariant, but nothing shows it"


@every_method
def test_weight_zero_is_absence(method: Method, tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", 1)
    two = write(tmp_path / "two", random_sides(2, 6, (*MODULES, "model.layers.0.mlp.up_proj")))
    output, _ = merged([one, two], method, [1.0, 0.0])
    assert same_bits(tensors_of(output), tensors_of(one))
    output, _ = merged([two, one], method, [0.0, 1.0])
    assert same_bits(tensors_of(output), tensors_of(one))


@every_method
def test_a_negative_weight_negates(method: Method, tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", 1)
    output, _ = merged([one], method, [-0.5])
    expected = {module: -0.5 * delta for module, delta in deltas(one).items()}
    assert distance(deltas(output), expected) <= 1e-6 * size(expected)


def promised(method: Method, paths: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    """What the method means to give: the sum, or where it has its own promise what that is."""
    if method.promise is None:
        return weighted_sum(paths, weights)
    return deltas(merged(paths, method, weights)[0])


@every_method
@pytest.mark.parametrize(
    "budget",
    [
        Budget(rank=1),
        Budget(rank=4),
        Budget(energy=0.8),
        Budget(max_error=0.3),
        Budget(energy=0.8, rank=2),
        Budget(max_error=0.3, per_site=True),
    ],
    ids=lambda b: "-".join(f"{k}={getattr(b, k)}" for k in ("rank", "energy", "max_error")),
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_reported_error_is_the_true_one(
    method: Method, budget: Budget, dtype: str, tmp_path: Path
) -> None:
    paths, weights = (
        [adapter(tmp_path / f"a{seed}", seed, lora_alpha=5) for seed in (1, 2)],
        [0.6, 0.4],
    )
    truth = promised(method, paths, weights)
    output, report = merged(paths, method, weights, budget=budget, dtype=dtype)
    found = deltas(output)
    assert report.totals.error * report.totals.norm == pytest.approx(
        distance(found, truth), abs=2e-5 * size(truth)
    )
    assert report.totals.norm == pytest.approx(size(truth), rel=1e-4)
    for line in report.sites:
        delta = truth[line.module]
        stored = found.get(line.module, torch.zeros_like(delta))
        lost = float((stored - delta).norm())
        assert line.error * line.norm == pytest.approx(lost, abs=2e-5 * float(delta.norm()))
        assert budget.rank is None or (line.rank or 0) <= budget.rank
    if budget.max_error is not None and dtype == "fp32" and method.rank is None:
        assert report.totals.truncation <= budget.max_error


@every_method
def test_workers_do_not_change_a_byte(method: Method, tmp_path: Path) -> None:
    modules = [f"model.layers.{i}.mlp.up_proj" for i in range(12)]
    paths = [write(tmp_path / f"a{seed}", random_sides(seed, 3, modules)) for seed in (1, 2)]
    for budget in (Budget(), Budget(energy=0.9)):
        one, *others = (
            tree(merged(paths, method, budget=budget, jobs=jobs)[0]) for jobs in (1, 2, 5)
        )
        assert one.keys() >= {"adapter_config.json", "adapter_model.safetensors"}
        assert all(one == other for other in others)


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5]], ids=["one", "two"])
def test_values_that_are_not_finite_are_named(
    method: Method, bad: float, weights: list[float], tmp_path: Path
) -> None:
    sides = random_sides(1)
    sides[MODULES[1]][0][2, 3] = bad
    poisoned = write(tmp_path / "poisoned", sides)
    paths = [poisoned, adapter(tmp_path / "good", 2)][: len(weights)]
    before = tree(tmp_path)
    with pytest.raises(InputError) as caught:
        merged(paths, method, weights)
    assert f"{MODULES[1]}.lora_A.weight" in str(caught.value)
    assert "poisoned: " in str(caught.value)
    assert MODULES[0] not in str(caught.value)
    assert "--allow nonfinite" in str(caught.value)
    assert tree(tmp_path) == before


def test_nonfinite_values_can_be_allowed(tmp_path: Path) -> None:
    sides = random_sides(1)
    sides[MODULES[1]][0][2, 3] = float("nan")
    paths = [write(tmp_path / "poisoned", sides), adapter(tmp_path / "good", 2)]
    output, _ = merged(paths, methods()["linear"], allow=frozenset({"nonfinite"}))
    assert bool(torch.isnan(deltas(output)[MODULES[1]]).any())
    assert bool(torch.isfinite(deltas(output)[MODULES[0]]).all())


@every_method
@pytest.mark.parametrize("budget", [Budget(), Budget(rank=2)], ids=["exact", "rank"])
def test_rounding_makes_no_infinity_without_a_word(
    method: Method, budget: Budget, tmp_path: Path
) -> None:
    """float16 ends at 65504; the sum of these two is far beyond it, in float32 well within."""
    sides = [
        {m: (1e7 * up, 1e7 * down) for m, (up, down) in random_sides(s).items()} for s in (1, 2)
    ]
    paths = [write(tmp_path / f"a{seed}", found) for seed, found in enumerate(sides)]
    with pytest.raises(InputError) as caught:
        merged(paths, method, budget=budget, dtype="fp16")
    assert (
        f"{MODULES[0]}: values beyond the range of f16 would be infinite: use --dtype bf16"
        in str(caught.value)
    )
    output, _ = merged(paths, method, budget=budget, dtype="bf16")
    assert all(bool(delta.isfinite().all()) for delta in deltas(output).values())


def test_norms_that_float32_cannot_hold_are_right(tmp_path: Path) -> None:
    """Entries that it holds, of a delta whose squares it does not: what rounding loses is known as well."""
    sides = {m: (1e30 * up, 1e30 * down) for m, (up, down) in random_sides(1).items()}
    large = write(tmp_path / "large", sides)
    found = combine(large, tmp_path / "out", Options(dtype="bf16")).totals
    small = write(tmp_path / "small", random_sides(1))
    known = combine(small, tmp_path / "known", Options(dtype="bf16")).totals
    assert found.norm == pytest.approx(1e60 * known.norm)
    assert 1e-4 < found.error < 1e-2
    assert found.error == pytest.approx(known.error, rel=0.5)


def test_nan_in_a_tensor_that_passes_through(tmp_path: Path) -> None:
    """A DoRA magnitude is no part of the delta, and is checked all the same."""
    key = f"base_model.model.{MODULES[0]}.lora_magnitude_vector"
    magnitudes = {key.replace(MODULES[0], module): torch.ones(12) for module in MODULES}
    magnitudes[key][5] = float("nan")
    path = write(tmp_path / "dora", random_sides(1), tensors=magnitudes, use_dora=True)
    with pytest.raises(InputError, match="lora_magnitude_vector.* holds NaN or infinity"):
        merged([path], methods()["linear"])


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_energy_is_shared_by_all_sites(share: float, tmp_path: Path) -> None:
    """A site of no weight in the whole gets no rank; with per_site it keeps its own share."""
    large, small = random_sides(1, 4), random_sides(2, 4)
    sides = {MODULES[0]: large[MODULES[0]], MODULES[1]: tuple(1e-3 * s for s in small[MODULES[1]])}
    path = write(tmp_path / "a", sides)  # type: ignore[arg-type]
    method = methods()["linear"]
    _, shared = merged([path], method, [1.0], budget=Budget(energy=share))
    _, apart = merged([path], method, [1.0], budget=Budget(energy=share, per_site=True))
    assert [line.rank for line in shared.sites][1] == 0
    assert all(line.rank for line in apart.sites)


def test_identical_sides_are_stored_once(tmp_path: Path) -> None:
    one, two = random_sides(1, 4), random_sides(2, 4)
    frozen = {module: (one[module][0], two[module][1]) for module in one}
    paths = [write(tmp_path / "a", one), write(tmp_path / "b", frozen)]
    output, report = merged(paths, methods()["linear"], [0.9, 0.2])
    assert {line.rank for line in report.sites} == {4}
    truth = weighted_sum(paths, [0.9, 0.2])
    assert distance(deltas(output), truth) <= 1e-6 * size(truth)
    assert {line.rank for line in merged(paths, methods()["cat"])[1].sites} == {8}


def test_a_minus_a_is_empty_and_loads(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / name, 1) for name in ("a", "b")]
    output, report = merged(paths, methods()["linear"], [1.0, -1.0])
    assert {line.rank for line in report.sites} == {0}
    assert size(deltas(output)) == 0.0
    assert config_of(output)["r"] == 1  # PEFT has no rank 0


def test_verbatim_values(tmp_path: Path) -> None:
    """Without a budget A is stacked as it is, and B times weight and scale."""
    paths = [adapter(tmp_path / f"a{seed}", seed) for seed in (1, 2)]
    output, _ = merged(paths, methods()["linear"], [0.5, -1.0])
    found = tensors_of(output)
    for module in MODULES:
        sides = [random_sides(seed)[module] for seed in (1, 2)]
        expected = torch.cat([a for a, _ in sides]), torch.cat([sides[0][1], -2 * sides[1][1]], 1)
        a, b = keys_of({module: expected})
        assert torch.equal(found[a], expected[0])
        assert torch.equal(found[b], expected[1])


def test_properties_are_declared_consistently() -> None:
    for method in METHODS:
        assert method.summary
        assert "add" in method.rules
        assert not (method.linear and method.promise), "a linear method promises the sum"
