"""Experts: how PEFT packs them, since when, both layouts of them, and names of other versions."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families.cases import FamilyCase
from families.cases_moe import DOWN, GATE_UP, moe
from peft_cases import logits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adaptmerge import runtime
from adaptmerge.adapters.experts import FUSED, in_layout
from adaptmerge.adapters.graph import Adapter, Site
from adaptmerge.adapters.module_paths import other_versions
from adaptmerge.algebra.fit import Budget
from adaptmerge.bases.base import Base
from adaptmerge.bases.open import open_base
from adaptmerge.commands.combine import Options, combine
from adaptmerge.commands.fuse import fuse
from adaptmerge.commands.verify import FAIL, PASS, Questions, verify
from adaptmerge.errors import AdaptmergeError, CannotMerge, InputError, UsageError
from adaptmerge.formats.inputs import InputSpec, open_input
from adaptmerge.merging.weights import SiteRule
from adaptmerge.tensors import refs
from adaptmerge.tensors.dtypes import F32
from adaptmerge.tensors.refs import constant
from adaptmerge.tensors.spans import read_span

pytest.importorskip("peft")
PREFIX = "base_model.model."
EXPERTS = 3
QWEN = ("qwen2_moe", "qwen3_moe")
HIDDEN, INNER = 64, {"mixtral": 96, **dict.fromkeys(QWEN, 40)}
BLOCK = {"mixtral": "block_sparse_moe", **dict.fromkeys(QWEN, "mlp")}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LEAVES = {"mixtral": ("w1", "w3", "w2"), **dict.fromkeys(QWEN, PROJECTIONS)}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def random(*shape: int) -> Tensor:
    return 0.2 * torch.randn(shape)


def save(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "target_modules": []}
    save_file(
        {PREFIX + key: value.contiguous() for key, value in tensors.items()}, folder / WEIGHTS
    )
    (folder / CONFIG).write_text(json.dumps({**plain, **config}))
    return folder


def per_expert(
    folder: Path,
    model: str = "mixtral",
    only: Callable[[str], bool] = bool,
    more: Mapping[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """An adapter as transformers 4 had experts: one linear layer for each matrix."""
    ranks = config.get("rank_pattern", {})
    torch.manual_seed(4)
    tensors: dict[str, Tensor] = {}
    for layer in range(2):
        for expert in range(EXPERTS):
            for leaf in LEAVES[model]:
                path = f"model.layers.{layer}.{BLOCK[model]}.experts.{expert}.{leaf}"
                wide = (HIDDEN, INNER[model])
                out, inner = wide if leaf == LEAVES[model][2] else wide[::-1]
                rank = ranks.get(leaf, 2)
                pair = {"lora_A.weight": random(rank, inner), "lora_B.weight": random(out, rank)}
                if only(path):
                    tensors |= {f"{path}.{side}": value for side, value in pair.items()}
    tensors |= more or {}
    return save(folder, tensors, **{"target_modules": list(LEAVES[model]), **config})


def read(path: Path, base: Base | None = None) -> Adapter:
    return open_input(InputSpec(str(path)), base).adapter


def run(case: FamilyCase, adapter: Adapter) -> Tensor:
    model = case.base_model().double()
    with runtime.attach(model, adapter):
        return logits(model, case.inputs())


def error(case: FamilyCase, found: Tensor, truth: Tensor) -> float:
    plain = case.plain()
    effect = (truth - plain).norm()
    assert effect > 1e-3 * plain.norm(), "the adapter does nothing: no proof"
    return float((found - truth).norm() / effect)


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    return {str(edit.site): edit.factor.dense() for edit in adapter.edits}  # type: ignore[attr-defined]


def close(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.allclose(left[key], right[key], rtol=1e-6, atol=1e-9) for key in left
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    models = ("mixtral", *QWEN, "gpt_oss")
    folders = {m: moe(m, m).save_base(tmp_path_factory.mktemp(m)) for m in models}
    return {model: open_base(str(folder)) for model, folder in folders.items()}


# how PEFT packs experts


@pytest.mark.parametrize("model", ["mixtral", "gpt_oss"])
def test_rows_go_by_expert_and_columns_by_rank(model: str, tmp_path: Path) -> None:
    """B read as (out, experts, r) gives other numbers, as other tools do it."""
    path = moe("packing", model).build(tmp_path)
    stored, found = load_file(path / WEIGHTS), deltas(read(path))
    key = f"{PREFIX}model.layers.0.mlp.experts.base_layer"
    a, b = (stored[f"{key}.lora_{side}.weight"].double() for side in "AB")
    down, up = a.reshape(EXPERTS, 3, -1), b.reshape(b.shape[0], 3, EXPERTS)
    wrong = b.reshape(b.shape[0], EXPERTS, 3)
    for expert in range(EXPERTS):
        delta = found[f"model.layers.0.mlp.experts.gate_up_proj[{expert}]"]
        assert torch.allclose(delta, 8 / 3 * up[:, :, expert] @ down[expert])
        assert not torch.allclose(delta, 8 / 3 * wrong[:, expert] @ down[expert])


def test_sides_that_experts_share_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [moe("reads", "mixtral").build(tmp_path / str(n), seed=n) for n in (1, 2)]
    reads: list[tuple[str, int, int]] = []

    def recorded(path: str, offset: int, nbytes: int) -> Tensor:
        reads.append((path, offset, nbytes))
        return read_span(path, offset, nbytes)

    monkeypatch.setattr(refs, "read_span", recorded)
    specs = [InputSpec(str(path), f"a{n}", 0.5) for n, path in enumerate(paths)]
    combine(specs, tmp_path / "out", Options())
    for path in paths:
        held = sum(value.nbytes for value in load_file(path / WEIGHTS).values())
        found = [read for read in reads if Path(read[0]).parent == path]
        assert len(found) == len(set(found))
        assert 0 < sum(nbytes for *_, nbytes in found) <= held


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_name_parameters(rslora: bool, tmp_path: Path) -> None:
    """Ranks and alphas by expressions on parameters; stored per site they come back bit for bit."""
    case = moe(
        "patterns",
        use_rslora=rslora,
        rank_pattern={"experts.down_proj": 5},
        alpha_pattern={r"layers\.1\.mlp\.experts\.gate_up_proj": 3},
    )
    path = case.build(tmp_path / "adapter")
    assert error(case, run(case, read(path)), case.truth(path)) < 1e-9
    combine([InputSpec(str(path))], tmp_path / "same", Options(ranks="per-site"))
    before, after = (load_file(folder / WEIGHTS) for folder in (path, tmp_path / "same"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    combine([InputSpec(str(path))], tmp_path / "uniform", Options())
    for out in ("same", "uniform"):
        assert error(case, case.truth(tmp_path / out), case.truth(path)) < 1e-6


def test_what_is_not_adapted_is_not_promised(tmp_path: Path) -> None:
    """Without one of the layers the written config must name the parameters that are left."""
    path = moe("layers").build(tmp_path / "adapter")
    name = read(path).name
    options = Options(rules=(SiteRule("layers.1.mlp.experts*", {name: 0.0}),))
    combine([InputSpec(str(path))], tmp_path / "out", options)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert sorted(config["target_parameters"]) == [
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.mlp.experts.gate_up_proj",
    ]
    assert config["target_modules"] == []


def test_experts_that_a_budget_empties_keep_their_place(tmp_path: Path) -> None:
    path = moe("empty").build(tmp_path / "adapter")
    tensors = load_file(path / WEIGHTS)
    for key, value in tensors.items():
        if ".lora_B." in key:
            value.view(value.shape[0], 3, EXPERTS)[:, :, -1] = 0
    save_file(tensors, path / WEIGHTS)
    budget = Budget(energy=0.999999, per_site=True)
    combine([InputSpec(str(path))], tmp_path / "out", Options(budget=budget))
    out = load_file(tmp_path / "out" / WEIGHTS)
    assert all(value.shape[0] % EXPERTS == 0 for key, value in out.items() if ".lora_A." in key)
    case = moe("empty")
    assert error(case, case.truth(tmp_path / "out"), case.truth(path)) < 1e-2


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("mixtral", {}),
        ("gpt_oss", {"ranks": "per-site"}),
        ("mixtral", {"budget": Budget(energy=0.9)}),
        ("qwen2_moe", {"budget": Budget(energy=0.9), "ranks": "per-site"}),
        ("mixtral", {"method": "cat"}),
    ],
)
def test_merges_of_experts_keep_what_they_promise(
    model: str, options: dict[str, Any], tmp_path: Path, bases: dict[str, Base]
) -> None:
    """Expert by expert; PEFT itself merges no target parameters."""
    case = moe("merges", model, target_modules=["q_proj"])
    paths = [case.build(tmp_path / str(seed), seed) for seed in range(2)]
    specs = [InputSpec(str(path), weight=w) for path, w in zip(paths, (0.7, -0.4), strict=True)]
    combine(specs, tmp_path / "out", Options(**options))
    found = deltas(read(tmp_path / "out"))
    first, second = (deltas(read(path)) for path in paths)
    assert found.keys() == first.keys()
    if "budget" not in options:
        for site, delta in found.items():
            expected = 0.7 * first[site] - 0.4 * second[site]
            assert torch.allclose(delta, expected, rtol=1e-4, atol=1e-5)
    verdict = verify(tmp_path / "out", Questions(base=str(bases[model].path)))
    assert {"weights": "PASS", "forward": "PASS"}.items() <= {
        check.name: check.status.upper() for check in verdict.checks
    }.items()
    assert not [check for check in verdict.checks if check.status == FAIL], verdict.checks


def test_formats_without_a_place_for_experts_say_so(tmp_path: Path, bases: dict[str, Base]) -> None:
    path = moe("gguf").build(tmp_path / "adapter")
    options = Options(base=str(bases["mixtral"].path), target="gguf")
    with pytest.raises(AdaptmergeError, match="gguf has no place for (experts|down_proj)"):
        combine([InputSpec(str(path))], tmp_path / "out.gguf", options)


@pytest.mark.parametrize("model", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_experts_are_streamed_from_either_layout(model: str, bases: dict[str, Base]) -> None:
    case = moe("stream", model)
    streamed = runtime.stream_model(bases[model])
    plain = logits(case.base_model(), case.inputs())
    assert torch.allclose(logits(streamed, case.inputs()), plain, atol=1e-5)


# files of peft before 0.19


def old_file(folder: Path, sizes: tuple[int, int], only: str = "", **config: Any) -> Path:
    """What 0.18 wrote: (experts, out, in) taken as (experts, in, out)."""
    torch.manual_seed(5)
    hidden, inner = sizes
    name = "model.layers.0.mlp.experts"
    tensors = {
        f"{name}.base_layer.lora_A.weight": random(2 * EXPERTS, 2 * inner),
        f"{name}.base_layer.lora_B.weight": random(hidden, 2 * EXPERTS),
        f"{name}.lora_A.weight": random(2 * EXPERTS, hidden),
        f"{name}.lora_B.weight": random(inner, 2 * EXPERTS),
    }
    if only == GATE_UP:
        tensors = {k.replace(".base_layer", ""): v for k, v in tensors.items() if "base" in k}
    elif only == DOWN:
        tensors = {k: v for k, v in tensors.items() if "base" not in k}
    targets = [only] if only else [GATE_UP, DOWN]
    return save(folder, tensors, **{"target_parameters": targets, **config})


OLD = {"peft_version": "0.18.1"}


@pytest.mark.parametrize(
    ("sizes", "only", "config", "with_base"),
    [
        ((64, 96), "", OLD, False),
        ((64, 96), "", {}, False),  # the two sides tell
        ((64, 96), GATE_UP, {}, True),
        ((64, 96), DOWN, OLD, True),
    ],
)
def test_old_files_have_their_sides_swapped(
    sizes: tuple[int, int],
    only: str,
    config: dict[str, Any],
    with_base: bool,
    tmp_path: Path,
    bases: dict[str, Base],
) -> None:
    path = old_file(tmp_path / "old", sizes, only, **config)
    adapter = read(path, bases["mixtral"] if with_base else None)
    assert any("before 0.19" in note.what for note in adapter.notes)
    stored, found = load_file(path / WEIGHTS), deltas(adapter)
    param = (only or DOWN).rpartition(".")[2]
    key = f"{PREFIX}model.layers.0.mlp.experts"
    a, b = (stored[f"{key}.lora_{side}.weight"].double() for side in "AB")
    down, up = a.reshape(EXPERTS, 2, -1), b.reshape(b.shape[0], 2, EXPERTS)
    for expert in range(EXPERTS):
        delta = 5 / 2 * (up[:, :, expert] @ down[expert]).T
        assert torch.allclose(found[f"model.layers.0.mlp.experts.{param}[{expert}]"], delta)


def test_old_files_are_written_as_peft_reads_them_now(
    tmp_path: Path, bases: dict[str, Base]
) -> None:
    path, case = old_file(tmp_path / "old", (64, 96), **OLD), moe("old")
    combine([InputSpec(str(path))], tmp_path / "new", Options())
    assert error(case, case.truth(tmp_path / "new"), run(case, read(path))) < 1e-9


@pytest.mark.parametrize(
    ("sizes", "only", "config"),
    [
        ((64, 96), GATE_UP, {}),
        ((64, 96), DOWN, OLD),
        ((64, 64), DOWN, {"peft_version": "0.19.0.dev0"}),
    ],
)
def test_nothing_is_guessed_of_old_files(
    sizes: tuple[int, int], only: str, config: dict[str, Any], tmp_path: Path
) -> None:
    path = old_file(tmp_path / "old", sizes, only, **config)
    with pytest.raises(InputError, match=r"swapped inputs and outputs.*pass --base DIR"):
        read(path)


def test_square_experts_go_by_the_version(tmp_path: Path) -> None:
    """From 0.19 on a file is as it is."""
    shape = {"lora_A.weight": random(6, 8), "lora_B.weight": random(8, 6)}
    name = "model.layers.0.mlp.experts"
    tensors = {f"{name}.{side}": value for side, value in shape.items()}
    path = save(tmp_path, tensors, target_parameters=[DOWN], peft_version="0.19.0")
    up, down = shape["lora_B.weight"].double(), shape["lora_A.weight"].double()
    expected = 5 / 2 * up.reshape(8, 2, 3)[:, :, 1] @ down.reshape(3, 2, 8)[1]
    assert torch.allclose(deltas(read(path))[f"{name}.down_proj[1]"], expected)


# both layouts


def converted_by_peft(case: FamilyCase, path: Path) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    state: dict[str, Tensor] = get_peft_model_state_dict(
        case.loaded(path), save_embedding_layers=False
    )
    return state


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe"])
def test_per_expert_adapters_compute_what_peft_makes_of_them(
    model: str, tmp_path: Path, bases: dict[str, Base]
) -> None:
    """PEFT fuses them when it loads them; so does attaching them, and --experts fused, bit for bit."""
    case, path = moe("v4", model), per_expert(tmp_path / "v4", model)
    truth = case.truth(path)
    assert error(case, run(case, read(path)), truth) < 1e-9
    options = Options(base=str(bases[model].path), experts="fused", ranks="per-site")
    combine([InputSpec(str(path))], tmp_path / "fused", options)
    theirs, ours = converted_by_peft(case, path), load_file(tmp_path / "fused" / WEIGHTS)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key].float(), ours[key]) for key in theirs)
    assert error(case, case.truth(tmp_path / "fused"), truth) < 1e-9


def test_what_peft_fails_to_convert_is_active_here(tmp_path: Path, bases: dict[str, Base]) -> None:
    """PEFT's table leaves out qwen2_moe itself, whose experts it then ignores."""
    case, path = moe("qwen2", "qwen2_moe"), per_expert(tmp_path / "v4", "qwen2_moe")
    assert torch.equal(case.truth(path), case.plain())
    options = Options(base=str(bases["qwen2_moe"].path), experts="fused")
    combine([InputSpec(str(path))], tmp_path / "fused", options)
    assert error(case, run(case, read(path)), case.truth(tmp_path / "fused")) < 1e-9


@pytest.mark.parametrize("model", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_fused_adapters_go_back_to_one_module_per_matrix(
    model: str, tmp_path: Path, bases: dict[str, Base]
) -> None:
    """What PEFT cannot do: exact, and of the rank that it had."""
    case = moe("back", model)
    path = case.build(tmp_path / "fused")
    options = Options(base=str(bases[model].path), experts="per-expert")
    combine([InputSpec(str(path))], tmp_path / "v4", options)
    out = load_file(tmp_path / "v4" / WEIGHTS)
    assert len(out) == 2 * EXPERTS * 3 * 2
    assert all(value.shape[0] == 3 for key, value in out.items() if ".lora_A." in key)
    config = json.loads((tmp_path / "v4" / CONFIG).read_text())
    assert "target_parameters" not in config
    assert all(target.endswith(LEAVES[model]) for target in config["target_modules"])
    fused, parts = deltas(read(path)), deltas(read(tmp_path / "v4"))
    gate, up, down = LEAVES[model]
    for expert in range(EXPERTS):
        name = f"model.layers.0.{BLOCK[model]}.experts.{expert}"
        both = torch.cat([parts[f"{name}.{gate}"], parts[f"{name}.{up}"]])
        one = fused[f"model.layers.0.mlp.experts.gate_up_proj[{expert}]"]
        # the same numbers, but products of other shapes: sums of 3 terms in float64; float32 has 1e-7
        assert (both - one).norm() < 1e-14 * one.norm()
        one = fused[f"model.layers.0.mlp.experts.down_proj[{expert}]"]
        assert (parts[f"{name}.{down}"] - one).norm() < 1e-14 * one.norm()
    assert error(case, run(case, read(tmp_path / "v4")), case.truth(path)) < 1e-9
    if model != "qwen2_moe":
        assert error(case, case.truth(tmp_path / "v4"), case.truth(path)) < 1e-9


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe"])
def test_several_edits_of_one_experts_matrix_add_up(model: str, tmp_path: Path) -> None:
    """Also where the other part of the stacked parameter has fewer of them."""
    case, gate = moe("twice", model), LEAVES[model][0]
    once = read(per_expert(tmp_path / "v4", model))
    twice = once.with_edits(
        edit for edit in once.edits for _ in range(2 if edit.site.module.endswith(gate) else 3)
    )
    factors = {edit.site: edit.factor.dense() for edit in once.edits}  # type: ignore[attr-defined]
    fused = in_layout(twice, FUSED, None).sites()
    for name, layer in itertools.product(range(EXPERTS), range(2)):
        block = f"model.layers.{layer}.{BLOCK[model]}.experts.{name}"
        own = [factors[Site(f"{block}.{leaf}")] for leaf in LEAVES[model]]
        both = Site(f"model.layers.{layer}.mlp.experts", "gate_up_proj", expert=name)
        down = Site(f"model.layers.{layer}.mlp.experts", "down_proj", expert=name)
        assert torch.allclose(_sum(fused[both]), torch.cat([2 * own[0], 3 * own[1]]))
        assert torch.allclose(_sum(fused[down]), 3 * own[2])
    assert error(case, run(case, in_layout(once, FUSED, None)), run(case, once)) < 1e-9


def _sum(edits: list[Any]) -> Tensor:
    return sum((edit.factor.dense() for edit in edits), torch.zeros(()))


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe"])
def test_a_fused_model_with_a_module_for_each_expert_is_verified_by_its_outputs(
    model: str, tmp_path: Path
) -> None:
    """What rounding did is added to the adapter's edits, and never takes their place."""
    case = moe("verified", model, target_modules=["q_proj"])
    base, adapter = case.save_base(tmp_path / "base"), case.build(tmp_path / "adapter")
    assert any(".experts.0." in name for name in load_file(base / "model.safetensors"))
    fuse(str(base), [InputSpec(str(adapter))], tmp_path / "out")
    verdict = verify(tmp_path / "out", Questions(base=str(base), device="cpu"))
    (check,) = [check for check in verdict.checks if check.name == "forward"]
    assert check.status == PASS, check
    assert check.numbers["rounding_noise"] < 1e-4


def test_routers_and_shared_experts_stay_modules(tmp_path: Path, bases: dict[str, Base]) -> None:
    """Only what is numbered is one of the experts (PEFT takes shared ones for them, too)."""
    router, shared = "model.layers.0.mlp.gate", "model.layers.1.mlp.shared_expert.down_proj"
    more = {
        f"{router}.lora_A.weight": random(2, HIDDEN),
        f"{router}.lora_B.weight": random(EXPERTS, 2),
        f"{shared}.lora_A.weight": random(2, 56),
        f"{shared}.lora_B.weight": random(HIDDEN, 2),
    }
    targets = [*PROJECTIONS, "gate"]
    path = per_expert(tmp_path / "v4", "qwen2_moe", more=more, target_modules=targets)
    options = Options(base=str(bases["qwen2_moe"].path), experts="fused")
    combine([InputSpec(str(path))], tmp_path / "fused", options)
    found = deltas(read(tmp_path / "fused"))
    assert [name for name in found if "[" not in name] == [router, shared]
    case = moe("shared", "qwen2_moe")
    assert error(case, run(case, read(path)), run(case, read(tmp_path / "fused"))) < 1e-9


def test_routers_of_old_adapters_load_as_peft_renames_them(
    tmp_path: Path, bases: dict[str, Base]
) -> None:
    router = "model.layers.0.block_sparse_moe.gate"
    more = {
        f"{router}.lora_A.weight": random(2, HIDDEN),
        f"{router}.lora_B.weight": random(EXPERTS, 2),
    }
    targets = [*LEAVES["mixtral"], "gate"]
    path, case = per_expert(tmp_path / "v4", more=more, target_modules=targets), moe("router")
    options = Options(base=str(bases["mixtral"].path), experts="fused")
    combine([InputSpec(str(path))], tmp_path / "fused", options)
    assert error(case, run(case, read(path)), case.truth(path)) < 1e-9
    assert error(case, case.truth(tmp_path / "fused"), case.truth(path)) < 1e-9


def test_there_and_back_is_the_same(tmp_path: Path, bases: dict[str, Base]) -> None:
    path, base = per_expert(tmp_path / "v4"), str(bases["mixtral"].path)
    for name, layout in (("fused", "fused"), ("back", "per-expert")):
        combine([InputSpec(str(path))], tmp_path / name, Options(base=base, experts=layout))
        path = tmp_path / name
    assert close(deltas(read(tmp_path / "v4")), deltas(read(path)))


def without_up(path: str) -> bool:
    return not path.endswith("w3")


def first_expert(path: str) -> bool:
    return ".experts.0." in path


@pytest.mark.parametrize("only", [without_up, first_expert])
def test_missing_matrices_are_zero(
    only: Callable[[str], bool], tmp_path: Path, bases: dict[str, Base]
) -> None:
    """PEFT refuses gate without up, though it is up with a delta of zero."""
    path, case = per_expert(tmp_path / "v4", only=only), moe("part")
    options = Options(base=str(bases["mixtral"].path), experts="fused")
    combine([InputSpec(str(path))], tmp_path / "fused", options)
    assert error(case, case.truth(tmp_path / "fused"), run(case, read(path))) < 1e-9
    blank = deltas(read(tmp_path / "fused"))["model.layers.0.mlp.experts.gate_up_proj[0]"]
    assert bool(blank[96:].any()) is (only is first_expert)


@pytest.mark.parametrize(
    "config",
    [
        {"alpha_pattern": {"w3": 9}},
        {"rank_pattern": {"w3": 3}},
        {"rank_pattern": {"w1": 4}, "alpha_pattern": {"w1": 10}},
    ],
)
def test_parts_of_other_ranks_and_scales(
    config: dict[str, Any], tmp_path: Path, bases: dict[str, Base]
) -> None:
    """PEFT doubles the one rank of the config."""
    path = per_expert(tmp_path / "v4", **config)
    case, base = moe("scales"), str(bases["mixtral"].path)
    for ranks in ("uniform", "per-site"):
        out = tmp_path / ranks
        combine([InputSpec(str(path))], out, Options(base=base, experts="fused", ranks=ranks))
        assert error(case, case.truth(out), run(case, read(path))) < 1e-6


def test_one_of_each_layout_are_merged_on_the_base(tmp_path: Path, bases: dict[str, Base]) -> None:
    """The same matrices: their sum is that of both deltas, in either layout."""
    case = moe("merge")
    fused, v4 = case.build(tmp_path / "fused"), per_expert(tmp_path / "v4")
    base, specs = str(bases["mixtral"].path), [InputSpec(str(fused)), InputSpec(str(v4))]
    sums = {}
    for layout in (None, "fused"):
        out = tmp_path / f"out-{layout}"
        combine(specs, out, Options(base=base, total=True, experts=layout))
        found = deltas(read(out))
        assert all(("[" in name) == (layout == "fused") for name in found)
        sums[layout] = run(case, read(out))
        assert error(case, case.truth(out), sums[layout]) < 1e-6
        checks = verify(out, Questions(base=base)).checks
        assert not [check for check in checks if check.status == FAIL], checks
    assert error(case, sums[None], sums["fused"]) < 1e-6
    only = deltas(read(fused))["model.layers.0.mlp.experts.down_proj[2]"]
    other = deltas(read(v4))["model.layers.0.block_sparse_moe.experts.2.w2"]
    both = deltas(read(tmp_path / "out-fused"))["model.layers.0.mlp.experts.down_proj[2]"]
    assert torch.allclose(both, only + other, rtol=1e-5, atol=1e-6)


def test_layouts_are_never_a_silent_miss(tmp_path: Path) -> None:
    fused, v4 = moe("miss").build(tmp_path / "fused"), per_expert(tmp_path / "v4")
    with pytest.raises(CannotMerge) as raised:
        combine([InputSpec(str(fused)), InputSpec(str(v4))], tmp_path / "out", Options())
    assert re.search(r"gate_up_proj\[\d\]|down_proj\[\d\]", str(raised.value))
    assert re.search(r"block_sparse_moe\.experts\.\d\.w\d", str(raised.value))
    assert "--base" in str(raised.value)


def test_a_layout_is_asked_of_the_base(tmp_path: Path) -> None:
    """Adapters do not say how many experts there are, nor what each is called."""
    for number, path in enumerate((moe("ask").build(tmp_path / "a"), per_expert(tmp_path / "b"))):
        layout = ("per-expert", "fused")[number]
        with pytest.raises(CannotMerge, match="only the base says: pass --base DIR"):
            combine([InputSpec(str(path))], tmp_path / "out", Options(experts=layout))
    with pytest.raises(UsageError, match="--experts stacked: expected fused or per-expert"):
        combine([InputSpec(str(path))], tmp_path / "out", Options(experts="stacked"))


def test_different_numbers_of_experts_do_not_meet(tmp_path: Path) -> None:
    name, paths = "model.layers.0.mlp.experts", []
    for count in (2, 4):
        pair = {"lora_A": random(2 * count, 6), "lora_B": random(8, 2 * count)}
        tensors = {f"{name}.{side}.weight": value for side, value in pair.items()}
        config = {"target_parameters": [DOWN], "peft_version": "0.21.0"}
        paths.append(save(tmp_path / str(count), tensors, **config))
    with pytest.raises(CannotMerge, match="different layers: .*2 experts, .*4 experts"):
        combine([InputSpec(str(path)) for path in paths], tmp_path / "out", Options())


def test_architectures_without_such_a_spelling_are_refused(
    tmp_path: Path, bases: dict[str, Base]
) -> None:
    """gpt-oss was never stored per expert, and its gate and up alternate."""
    path = moe("none", "gpt_oss").build(tmp_path / "adapter")
    options = Options(base=str(bases["gpt_oss"].path), experts="per-expert")
    with pytest.raises(CannotMerge, match="no spelling per expert"):
        combine([InputSpec(str(path))], tmp_path / "out", options)


@pytest.mark.parametrize("model", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_a_base_knows_its_experts_in_both_layouts(model: str, bases: dict[str, Base]) -> None:
    """As the loaded model has them, whatever the checkpoint calls them."""
    base = bases[model]
    for name, value in moe("base", model).base_model().named_parameters():
        module, _, param = name.rpartition(".")
        if value.ndim == 3:
            whole = base.parameter(Site(module, param))
            assert whole is not None and torch.equal(whole.read(), value)
            for expert in range(EXPERTS):
                found = base.weight(Site(module, param, expert=expert))
                matrix = value[expert].T if model == "gpt_oss" else value[expert]
                assert found is not None and torch.equal(found.read(), matrix)
            assert base.weight(Site(module, param, expert=EXPERTS)) is None
    assert base.expert_count == EXPERTS
    assert base.expert_layout == ("fused" if model == "gpt_oss" else "per-expert")


def test_a_fused_checkpoint_has_the_matrices_of_each_expert(tmp_path: Path) -> None:
    model = moe("fused", "qwen2_moe").base_model()
    tensors = {name: value.detach().clone() for name, value in model.named_parameters()}
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_moe"}))
    save_file(tensors, folder / "model.safetensors")
    base = open_base(str(folder))
    stack = tensors["model.layers.1.mlp.experts.gate_up_proj"]
    for leaf, rows in (("gate_proj", stack[2, :40]), ("up_proj", stack[2, 40:])):
        found = base.weight(Site(f"model.layers.1.mlp.experts.2.{leaf}"))
        assert found is not None and torch.equal(found.read(), rows)
    path = per_expert(tmp_path / "v4", "qwen2_moe")
    combine([InputSpec(str(path))], tmp_path / "out", Options(base=str(folder)))
    assert close(deltas(read(path)), deltas(read(tmp_path / "out")))


# names of other versions of transformers


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "language_model.model.layers.0.self_attn.q_proj",
            "model.language_model.layers.0.self_attn.q_proj",
        ),
        ("model.layers.3.mlp.up_proj", "model.language_model.layers.3.mlp.up_proj"),
        ("model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"),
        ("model.layers.0.block_sparse_moe.experts", "model.layers.0.mlp.experts"),
    ],
)
def test_names_of_other_versions(old: str, new: str) -> None:
    assert new in other_versions(old)
    assert old in other_versions(new)


def test_plain_names_are_not_taken_for_others() -> None:
    assert other_versions("bert.encoder.layer.0.attention.self.query") == []
    assert other_versions("transformer.h.0.mlp.c_fc") == []


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("language_model.model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
        ("model.language_model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"),
        ("model.language_model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"),
    ],
)
def test_a_base_is_found_under_names_of_other_versions(stored: str, asked: str) -> None:
    weight = constant(0.0, (4, 4), F32)
    base = Base(Path("base"), {}, {f"{stored}.weight": weight})
    assert base.locate(asked) == stored
    assert base.weight(Site(asked)) is not None
    assert base.locate("model.layers.0.mlp.other") is None


def drifting(folder: Path, module: str) -> Path:
    torch.manual_seed(6)
    pair = {"lora_A.weight": random(2, HIDDEN), "lora_B.weight": random(EXPERTS, 2)}
    return save(
        folder, {f"{module}.{side}": v for side, v in pair.items()}, target_modules=[module]
    )


def test_the_base_settles_names_of_other_versions(tmp_path: Path, bases: dict[str, Base]) -> None:
    """A lone adapter keeps its names; two that differ are one site, under the base's name."""
    names = ["model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate"]
    paths = [drifting(tmp_path / str(n), name) for n, name in enumerate(names)]
    base, case = str(bases["mixtral"].path), moe("drift")
    report = combine([InputSpec(str(paths[0]))], tmp_path / "lone", Options(base=base))
    assert any("another version" in note.what for note in report.notes)
    assert [*deltas(read(tmp_path / "lone"))] == names[:1]
    specs = [InputSpec(str(path)) for path in paths]
    combine(specs, tmp_path / "both", Options(base=base, total=True))
    found = deltas(read(tmp_path / "both"))
    assert [*found] == names[1:]
    assert torch.allclose(found[names[1]], 2 * deltas(read(paths[0]))[names[0]])
    assert torch.equal(run(case, read(paths[0])), run(case, read(paths[1])))
    checks = verify(tmp_path / "both", Questions(base=base)).checks
    assert not [
        c for c in checks if c.status == FAIL and c.name in ("promise", "weights", "forward")
    ]
    with pytest.raises(CannotMerge, match="the same module or another one"):
        combine(specs, tmp_path / "none", Options())


# what is malformed


def changed(tensors: dict[str, Tensor], change: str) -> dict[str, Tensor]:
    name = "model.layers.0.mlp.experts"
    if change == "missing":
        return {k: v for k, v in tensors.items() if k != f"{name}.lora_B.weight"}
    if change == "magnitude":
        return {**tensors, f"{name}.lora_magnitude_vector": torch.ones(64)}
    if change == "rank":
        return {
            **tensors,
            f"{name}.lora_A.weight": random(7, 96),
            f"{name}.lora_B.weight": random(64, 7),
        }
    if change == "pair":
        return {**tensors, f"{name}.lora_B.weight": random(64, 8)}
    return tensors


@pytest.mark.parametrize(
    ("change", "config", "sentence"),
    [
        ("missing", {}, "lora_B is missing"),
        ("magnitude", {}, "lora_magnitude_vector is stored, which PEFT has for no parameter"),
        ("rank", {}, "not a multiple of the config's rank 2"),
        ("pair", {}, "are no pair"),
        ("", {"target_parameters": None}, "nested, as several parameters"),
        ("", {"target_parameters": [DOWN]}, "which is which is not known"),
        ("", {"target_parameters": [DOWN, "experts.other"]}, "which is which is not known"),
        ("", {"target_parameters": "experts"}, "expected names of parameters"),
    ],
)
def test_malformed_files_are_refused(
    change: str, config: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    path = old_file(tmp_path, (96, 64), **{"peft_version": "0.21.0", **config})
    stored = {k.removeprefix(PREFIX): v for k, v in load_file(path / WEIGHTS).items()}
    raw = json.loads((path / CONFIG).read_text())
    save(path, changed(stored, change), **raw)
    with pytest.raises(AdaptmergeError, match=re.escape(sentence)):
        read(path)


def test_experts_that_the_model_does_not_have(bases: dict[str, Base], tmp_path: Path) -> None:
    path = moe("many").build(tmp_path / "adapter")
    adapter = read(path)
    edits = [e for e in adapter.edits if e.site.expert == 0]
    site = edits[0].site
    beyond = type(edits[0])(Site(site.module, site.param, site.layer, 7), edits[0].factor)  # type: ignore[attr-defined, call-arg]
    with pytest.raises(InputError, match="no expert 7"):
        run(moe("many"), adapter.with_edits([beyond]))
    model: nn.Module = moe("many").base_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with runtime.attach(model, adapter):
        logits(model, moe("many").inputs())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
