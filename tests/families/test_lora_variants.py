"""Variants of LoRA that PEFT cannot load again, what is refused, and what merges of variants are."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families.cases import QV, all_cases
from families.cases_lora import BASE, far
from peft_cases import llama, logits, token_inputs
from safetensors.torch import load_file
from samples import CONFIG, MODULES, WEIGHTS, adapter, config_of, deltas, random_sides, write
from torch import Tensor, nn

from adaptmerge import runtime
from adaptmerge.adapters.graph import Adapter
from adaptmerge.adapters.stored_edits import Opaque
from adaptmerge.adapters.weight_edits import Add, delta_on
from adaptmerge.bases.open import open_base
from adaptmerge.commands.combine import Options, combine
from adaptmerge.errors import AdaptmergeError, CannotMerge, CannotStore, InputError
from adaptmerge.formats.inputs import InputSpec, open_input

peft = pytest.importorskip("peft")
Q, UP = MODULES


def read(path: Path, **options: Any) -> Adapter:
    return open_input(InputSpec(str(path), **options), None).adapter


def run(adapter: Adapter, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
    model = llama().double()
    with runtime.attach(model, adapter):
        return logits(model, dict(inputs or token_inputs()))


def nothing(model: nn.Module, config: Any) -> None:
    """No preparation."""


def covariances(model: nn.Module, config: Any) -> None:
    from peft.tuners.lora.corda import preprocess_corda

    inputs = {name: value[:1] for name, value in token_inputs().items()}
    preprocess_corda(model, config, run_model=lambda: logits(model, inputs))


def gradients(model: nn.Module, config: Any) -> None:
    from peft import preprocess_loraga

    def step() -> None:
        outputs: Any = model(**token_inputs())
        outputs.logits.square().mean().backward()

    preprocess_loraga(model, config, step)


INITS: dict[str, tuple[dict[str, Any], Callable[[nn.Module, Any], None]]] = {
    "pissa": ({}, nothing),
    "pissa_niter_4": ({}, nothing),
    "olora": ({}, nothing),
    "corda": ({"corda_config": peft.tuners.lora.config.CordaConfig()}, covariances),
    "lora_ga": ({"lora_ga_config": peft.tuners.lora.config.LoraGAConfig()}, gradients),
}


@pytest.fixture
def trained(tmp_path: Path) -> Callable[[str], tuple[Path, Path, Tensor]]:
    """The folders of an adapter as initialised and as trained, and what PEFT computed at last."""

    def build(init: str, **options: Any) -> tuple[Path, Path, Tensor]:
        more, prepare = INITS[init]
        config = peft.LoraConfig(init_lora_weights=init, **BASE, **more, **options)
        base = llama()
        torch.manual_seed(0)
        prepare(base, config)
        model: Any = peft.get_peft_model(base, config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "first")
        model.peft_config["default"].init_lora_weights = init
        far(model)
        model.save_pretrained(tmp_path / "last")
        return tmp_path / "first", tmp_path / "last", logits(model.double().eval(), token_inputs())

    return build


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", INITS)
def test_what_moved_since_the_initialisation_needs_no_base(
    init: str, trained: Callable[..., tuple[Path, Path, Tensor]], tmp_path: Path
) -> None:
    first, last, truth = trained(init)
    effect = (truth - logits(llama().double(), token_inputs())).norm()
    found = read(last, init=str(first))
    assert (run(found) - truth).norm() < 1e-5 * effect
    out = tmp_path / "out"
    combine([InputSpec(str(last), init=str(first))], out, Options())
    assert config_of(out).get("init_lora_weights") in (None, True)
    assert config_of(out)["r"] == 8
    plain = peft.PeftModel.from_pretrained(llama(), out).double().eval()
    assert (logits(plain, token_inputs()) - truth).norm() < 1e-5 * effect


@pytest.mark.filterwarnings("ignore")
def test_dora_on_an_initialised_base(
    trained: Callable[..., tuple[Path, Path, Tensor]],
) -> None:
    first, last, truth = trained("pissa", use_dora=True)
    effect = (truth - logits(llama().double(), token_inputs())).norm()
    assert (run(read(last, init=str(first))) - truth).norm() < 1e-5 * effect
    with pytest.raises(InputError, match="init_lora_weights is 'pissa', .* add \\?init=DIR"):
        read(last)


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
def test_what_the_base_cannot_say_again_is_asked_for(init: str, tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", 1, init_lora_weights=init)
    with pytest.raises(InputError, match=f"init_lora_weights is '{init}', .* add \\?init=DIR"):
        read(path)


def test_loftq_is_an_assumption(tmp_path: Path) -> None:
    first, last = (adapter(tmp_path / f"a{i}", i, init_lora_weights="loftq") for i in (1, 2))
    found = read(last, init=str(first))
    assert [n.kind for n in found.notes if "LoftQ" in n.what] == ["assumed"]
    moved = {m: d - deltas(first)[m] for m, d in deltas(last).items()}
    for edit in found.edits:
        assert isinstance(edit, Add)
        assert torch.allclose(edit.factor.dense(), moved[edit.site.module])


@pytest.mark.parametrize("name", ["embedding", "conv_bias", "attention"])
def test_other_layers_than_linear_ones_may_have_moved(name: str, tmp_path: Path) -> None:
    case = all_cases()[f"lora_{name}"]
    paths = [case.build(tmp_path / f"a{seed}", seed=seed) for seed in (1, 2)]
    one, two = (
        {edit.site: edit.factor.dense() for edit in read(path).edits if isinstance(edit, Add)}
        for path in paths
    )
    moved = read(paths[1], init=str(paths[0]))
    checked = [edit for edit in moved.edits if isinstance(edit, Add) and edit.site.param != "bias"]
    for edit in checked:
        assert torch.allclose(edit.factor.dense(), two[edit.site] - one[edit.site])
    assert checked


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ({"lora_alpha": 5}, "has the scale 1.66667, but the adapter 2: the same lora_alpha"),
        ({"rank": 2}, r"has lora_B \[12, 2\] and lora_A \[2, 9\], but the adapter"),
    ],
)
def test_another_initial_adapter(first: dict[str, Any], message: str, tmp_path: Path) -> None:
    initial = adapter(tmp_path / "first", 1, **first)
    last = adapter(tmp_path / "last", 2, init_lora_weights="corda")
    with pytest.raises(InputError, match=message):
        read(last, init=str(initial))


# Configs and tensors that are refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"init_lora_weights": "magic"},
            "init_lora_weights is 'magic', which this version does not",
        ),
        ({"init_lora_weights": 3}, "init_lora_weights is 3, which this version does not know"),
        ({"kasa_config": {"dropped": 3}}, "kasa_config.dropped is 3, which this version does not"),
        ({"use_bdlora": True}, "use_bdlora is True: expected an object"),
        ({"alora_invocation_tokens": "hi"}, "alora_invocation_tokens is 'hi': expected a list of"),
        ({"kasa_config": {}, "velora_config": {}}, "kasa_config and velora_config are set: PEFT"),
        ({"layer_replication": [[2, 0]]}, r"layer_replication is \[\[2, 0\]\]: expected pairs"),
        ({"kasa_config": {}}, "q_proj: kasa_config is set but no lora_diag is stored"),
        ({"use_bdlora": {"nblocks": 0}}, "q_proj: nblocks of use_bdlora is 0: expected a whole"),
        (
            {"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["q_proj"]}},
            r"q_proj: \[12, 3\] and \[3, 9\] are no pair with down in 2 diagonal blocks",
        ),
        (
            {"use_bdlora": {"target_modules_bd_a": ["q"], "target_modules_bd_b": ["q_proj"]}},
            "q_proj: use_bdlora names it for both sides",
        ),
        ({"use_bdlora": {"nblocks": 2}}, "q_proj: use_bdlora names it for neither side"),
        ({"use_qalora": True, "qalora_group_size": 0}, "qalora_group_size is 0: expected a whole"),
        ({"use_magic": 3}, "config field use_magic is 3, which this version does not know"),
        (
            {"kasa_config": {}, "init_lora_weights": "pissa"},
            "kasa_config is set together with init_lora_weights 'pissa'",
        ),
        (
            {"fan_in_fan_out": True, "init_lora_weights": "olora"},
            "init_lora_weights is 'olora', .* add \\?init=DIR",
        ),
    ],
)
def test_configs_that_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read(adapter(tmp_path / "a", 1, **config))


@pytest.mark.parametrize(
    ("leaf", "shape", "config", "message"),
    [
        ("lora_diag", (3,), {}, "lora_diag is stored, which the config names no use of"),
        ("lora_diag", (4,), {"kasa_config": {}}, r"lora_diag has shape \[4\]: expected \[3\]"),
    ],
)
def test_tensors_that_are_refused(
    leaf: str, shape: tuple[int, ...], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tensors = {f"base_model.model.{module}.{leaf}": torch.ones(shape) for module in MODULES}
    path = write(tmp_path / "a", random_sides(1), tensors=tensors, **config)
    with pytest.raises(InputError, match=message):
        read(path)


def test_a_variant_for_linear_layers_on_an_embedding(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.embed.lora_embedding_A": torch.ones(3, 9),
        "base_model.model.embed.lora_embedding_B": torch.ones(4, 3),
    }
    path = write(tmp_path / "a", {}, tensors=tensors, r=3, lora_alpha=3, kasa_config={})
    with pytest.raises(
        InputError, match="embed: kasa_config is set: PEFT has this variant for linear"
    ):
        read(path)


# QA-LoRA, which PEFT computes for GPTQ layers only


def test_pooled_inputs(tmp_path: Path) -> None:
    from peft.tuners.lora.variants import QALoraLinearVariant

    torch.manual_seed(0)
    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    options: dict[str, Any] = {"use_qalora": True, "qalora_group_size": 5, "lora_alpha": 7}
    found = read(write(tmp_path / "a", {Q: (a, b)}, **options))
    (edit,) = found.edits
    module = SimpleNamespace(
        lora_A={"x": SimpleNamespace(weight=a)},
        lora_B={"x": SimpleNamespace(weight=b)},
        lora_dropout={"x": nn.Identity()},
        scaling={"x": 7 / 3},
        qalora_group_size={"x": 5},
        training=False,
        in_features=20,
    )
    inputs = torch.randn(2, 3, 20, dtype=torch.float64)
    truth = QALoraLinearVariant.forward(module, "x", inputs, torch.zeros(2, 3, 6))
    assert isinstance(edit, Add)
    assert torch.allclose(inputs @ edit.factor.dense().T, truth)
    out = tmp_path / "out"
    combine([InputSpec(str(tmp_path / "a"))], out, Options())
    assert config_of(out)["use_qalora"] is True
    assert config_of(out)["qalora_group_size"] == 5
    assert torch.equal(read(out).edits[0].factor.dense(), edit.factor.dense())  # type: ignore[attr-defined]
    combine([InputSpec(str(tmp_path / "a"))], tmp_path / "plain", Options(form="lora"))
    assert config_of(tmp_path / "plain")["use_qalora"] is False
    assert torch.allclose(deltas(tmp_path / "plain")[Q], edit.factor.dense())


# aLoRA


def alora(folder: Path, seed: int, tokens: list[int]) -> Path:
    case = all_cases()["lora_alora"]

    def randomise(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _, value in sorted(model.named_parameters()):
            if value.requires_grad:
                value.data = 0.1 * torch.randn(value.shape, generator=generator)

    moved = copy.copy(case)
    object.__setattr__(moved, "randomise", randomise)
    return moved.build(folder, alora_invocation_tokens=tokens)


def test_alora_acts_where_its_tokens_are(tmp_path: Path) -> None:
    path = alora(tmp_path / "a", 1, [11, 5])
    inputs = token_inputs()
    inputs["input_ids"][0, 2:] = torch.tensor([9, 8, 11, 5, 9, 9, 11, 5, 1, 2])  # twice: the last
    inputs["input_ids"][1, 2] = 6  # never
    base = llama()
    truth = logits(peft.PeftModel.from_pretrained(llama(), path).eval().double(), inputs)
    plain, found = logits(base.double(), inputs), run(read(path), inputs)
    assert torch.allclose(found, truth, atol=1e-9)
    assert torch.equal(found[1], plain[1])
    assert torch.equal(found[0, :8], plain[0, :8])
    assert not torch.allclose(found[0, 8:], plain[0, 8:])


def test_alora_goes_on_while_it_generates(tmp_path: Path) -> None:
    path = alora(tmp_path / "a", 1, [11, 5])
    inputs = token_inputs()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    theirs = peft.PeftModel.from_pretrained(llama(), path).eval()
    model: Any = llama()
    plain = model.generate(**inputs, **options)
    truth = theirs.generate(**inputs, **options)
    with runtime.attach(model, read(path)):
        found = model.generate(**inputs, **options)
    assert torch.equal(found, truth)
    assert not torch.equal(found, plain)


def test_aloras_of_the_same_tokens_are_summed(tmp_path: Path) -> None:
    paths = [alora(tmp_path / f"a{seed}", seed, [11, 5]) for seed in (1, 2)]
    out = tmp_path / "out"
    combine([InputSpec(str(p)) for p in paths], out, Options(weights="0.5,0.25"))
    assert config_of(out)["alora_invocation_tokens"] == [11, 5]
    one, two, both = (deltas(path) for path in (*paths, out))
    for module, delta in both.items():
        assert torch.allclose(delta, 0.5 * one[module] + 0.25 * two[module], atol=1e-6)
    other = alora(tmp_path / "other", 3, [7])
    with pytest.raises(CannotMerge, match="tokens differs between"):
        combine([InputSpec(str(paths[0])), InputSpec(str(other))], tmp_path / "no", Options())


# Arrow


def test_arrow_is_shown_and_never_merged(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", 1, arrow_config={"top_k": 2})
    edits = read(path).edits
    assert all(isinstance(edit, Opaque) for edit in edits)
    assert len(edits) == 2
    with pytest.raises(AdaptmergeError, match="an Arrow router chooses adapters for every token"):
        combine([InputSpec(str(path))], tmp_path / "out", Options())


# Variants that meet


def build(name: str, folder: Path, **options: Any) -> Path:
    return all_cases()[f"lora_{name}"].build(folder, **options)


def merged(paths: list[Path], out: Path, **options: Any) -> Path:
    combine([InputSpec(str(path)) for path in paths], out, Options(**options))
    return out


@pytest.mark.parametrize("name", ["pissa", "olora", "kasa", "bd_rest", "monteclora"])
def test_every_weight_variant_can_become_a_plain_lora(name: str, tmp_path: Path) -> None:
    case = all_cases()[f"lora_{name}"]
    path, base = case.build(tmp_path / "a"), case.save_base(tmp_path / "base")
    out = merged([path], tmp_path / "out", form="lora", base=str(base))
    config = config_of(out)
    for field in ("kasa_config", "use_bdlora", "monteclora_config", "init_lora_weights"):
        assert not config.get(field) or config[field] is True
    truth, plain = case.truth(path), case.plain()
    assert (case.truth(out) - truth).norm() < 1e-5 * (truth - plain).norm()


@pytest.mark.parametrize("name", ["pissa", "kasa", "bd_rest"])
def test_a_variant_and_a_plain_lora_are_summed_as_deltas(name: str, tmp_path: Path) -> None:
    case = all_cases()[f"lora_{name}"]
    base_folder = case.save_base(tmp_path / "base")
    base = open_base(str(base_folder))
    paths = [case.build(tmp_path / "a"), build("plain", tmp_path / "b", seed=3)]
    out = merged(paths, tmp_path / "out", base=str(base_folder), weights="0.5,2")
    total = deltas(out)
    for site, edits in read(paths[0]).sites().items():
        weight = base.weight(site)
        assert weight is not None
        truth = 0.5 * delta_on(edits, weight).dense() + 2 * deltas(paths[1])[site.module]
        assert torch.allclose(total[site.module], truth, atol=1e-5)


def test_a_sum_with_an_initialised_lora_needs_the_base(tmp_path: Path) -> None:
    paths = [build("pissa", tmp_path / "a"), build("plain", tmp_path / "b")]
    with pytest.raises(CannotMerge, match="base"):
        merged(paths, tmp_path / "out")


def test_variants_at_different_sites_are_not_written_as_one(tmp_path: Path) -> None:
    """PEFT would take the plain sites for initialised ones."""
    paths = [
        build("pissa", tmp_path / "a", target_modules=["q_proj"]),
        build("plain", tmp_path / "b", target_modules=["v_proj"]),
    ]
    with pytest.raises((CannotMerge, CannotStore)):
        merged(paths, tmp_path / "out", weights="1,1")
    base = all_cases()["lora_pissa"].save_base(tmp_path / "base")
    merged(paths, tmp_path / "with", weights="1,1", base=str(base))
    assert not config_of(tmp_path / "with").get("init_lora_weights")


def test_block_diagonal_and_plain_sites_are_one_file(tmp_path: Path) -> None:
    paths = [
        build("bd", tmp_path / "a", target_modules=QV),
        build("plain", tmp_path / "b", target_modules=["down_proj"]),
    ]
    out = merged(paths, tmp_path / "out", weights="1,1")
    assert config_of(out)["use_bdlora"]["match_strict"] is False
    found = run(read(out))
    truth = logits(peft.PeftModel.from_pretrained(llama(), out).double().eval(), token_inputs())
    assert torch.allclose(found, truth, atol=1e-9)


def test_copies_of_layers_must_be_the_same(tmp_path: Path) -> None:
    paths = [build("replicated", tmp_path / "a"), build("plain", tmp_path / "b")]
    with pytest.raises(CannotMerge, match="are for different copies of the base's layers"):
        merged(paths, tmp_path / "out")
    twice = [paths[0], build("replicated", tmp_path / "c", seed=4)]
    out = merged(twice, tmp_path / "both")
    assert config_of(out)["layer_replication"] == [[0, 2], [0, 1], [1, 2]]
    assert len(deltas(out)) == 16


def test_a_replicated_model_is_itself_again(tmp_path: Path) -> None:
    path, model = build("replicated", tmp_path / "a"), llama()
    before = dict(model.named_modules())
    with runtime.attach(model, read(path)):
        assert len(model.model.layers) == model.config.num_hidden_layers == 4  # type: ignore[union-attr,arg-type]
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in before.items()}
    assert model.config.num_hidden_layers == 2  # type: ignore[union-attr]


def test_attention_is_merged_at_one_rank_and_scale(tmp_path: Path) -> None:
    """What PEFT adds twice is stored once, whatever the sum looks like."""
    case = all_cases()["lora_attention"]
    paths = [case.build(tmp_path / f"a{i}", seed=i, r=2 + i) for i in (1, 2)]
    model = case.base_model().double()
    out = merged(paths, tmp_path / "out", weights="0.5,1", ranks="per-site")
    inputs = case.inputs()
    before = model.state_dict()
    moved = [case.merged(path) for path in paths]
    total = {k: v + 0.5 * (moved[0][k] - v) + (moved[1][k] - v) for k, v in before.items()}
    model.load_state_dict(total)
    truth, plain = logits(model, inputs), case.plain()
    assert (case.truth(out) - truth).norm() < 1e-5 * (truth - plain).norm()


def test_state_of_training_is_dropped_by_a_sum(tmp_path: Path) -> None:
    paths = [build("velora", tmp_path / f"a{i}", seed=i) for i in (1, 2)]
    out = merged(paths, tmp_path / "out")
    assert not [key for key in load_file(out / WEIGHTS) if "velora" in key]
    assert not config_of(out).get("velora_config")


def test_pooling_that_peft_left_out_is_seen_on_the_base(tmp_path: Path) -> None:
    case = all_cases()["lora_plain"]
    path, base = case.build(tmp_path / "a"), case.save_base(tmp_path / "base")
    config = config_of(path) | {"use_qalora": True, "qalora_group_size": 2}
    (path / CONFIG).write_text(json.dumps(config))
    found = open_input(InputSpec(str(path)), open_base(str(base))).adapter
    assert [n.kind for n in found.notes if "not pooled" in n.what] == ["assumed"]


def test_state_of_training_is_kept_without_its_config(tmp_path: Path) -> None:
    path = build("velora", tmp_path / "a")
    config = config_of(path) | {"velora_config": None}
    (path / CONFIG).write_text(json.dumps(config))
    out = merged([path], tmp_path / "out")
    assert load_file(out / WEIGHTS).keys() == load_file(path / WEIGHTS).keys()
