"""Heads of two tasks merged by every policy: the logits of the one that is meant, in the real model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import copies
import pytest
import torch
from peft_cases import (
    ATTENTION,
    GPT2_SIZES,
    SIZES,
    llama,
    logits,
    randomise,
    save_adapter,
    seeded,
    token_inputs,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig

from adaptmerge import runtime
from adaptmerge.adapters.graph import Labels
from adaptmerge.cli import main
from adaptmerge.commands import verify as library
from adaptmerge.commands.combine import Options, combine
from adaptmerge.commands.inspect import summarise
from adaptmerge.commands.recipe import load_recipe
from adaptmerge.errors import AdaptmergeError, CannotMerge, CannotStore, UsageError
from adaptmerge.formats.inputs import InputSpec, open_input

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD = "base_model.model.classifier.weight"
MOOD, TOPIC = ("bad", "fine", "good"), ("sport", "law")


def bert(labels: Sequence[str] = MOOD) -> nn.Module:
    """The same body whatever the labels are."""
    return copies.fresh(_made_by(tuple(labels)))


@cache
def _made_by(labels: tuple[str, ...]) -> Callable[[], nn.Module]:
    from transformers import BertConfig, BertForSequenceClassification

    named = {"id2label": dict(enumerate(labels)), "label2id": {v: i for i, v in enumerate(labels)}}

    def make() -> nn.Module:
        model = seeded(lambda: BertForSequenceClassification(BertConfig(**SIZES, **named)))
        if len(labels) != len(MOOD):
            body = {k: v for k, v in bert().state_dict().items() if not k.startswith("classifier.")}
            model.load_state_dict(body, strict=False)
        return model

    return make


def classifier(folder: Path, seed: int, labels: Sequence[str] = MOOD) -> Path:
    """A random LoRA with its head, as PEFT and `transformers` save them."""
    key = "classifier", seed, tuple(labels)
    return copies.written(key, lambda place: _classifier(place, seed, labels), folder)


def _classifier(folder: Path, seed: int, labels: Sequence[str]) -> None:
    from peft import LoraConfig, get_peft_model

    given = {"r": 3, "lora_alpha": 7, "target_modules": ["query", "value"]}
    model = bert(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **given))
        randomise(wrapped, seed, torch.float32)
        save_adapter(wrapped, folder)
    model.config.save_pretrained(folder)  # type: ignore[operator,union-attr]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return copies.save(_made_by(MOOD), tmp_path / "base")


def merge(
    paths: Sequence[Path], weights: Sequence[float] | None = None, name: str = "out", **options: Any
) -> Path:
    given = [None] * len(paths) if weights is None else list(weights)
    specs = [InputSpec(str(p), p.name, w) for p, w in zip(paths, given, strict=True)]
    output = paths[0].parent / name
    combine(specs, output, Options(**options))
    return output


def expected(paths: Sequence[Path], weights: Sequence[float], head: Mapping[str, Tensor]) -> Tensor:
    """Logits of the base with the weighted sum of the deltas and a head, by plain tensors."""
    model = bert([str(i) for i in range(head["weight"].shape[0])])
    modules: Any = dict(model.named_modules())
    with torch.no_grad():
        for path, weight in zip(paths, weights, strict=True):
            tensors = load_file(path / WEIGHTS)
            for key in (key for key in tensors if key.endswith("lora_A.weight")):
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                up = tensors[key.replace("lora_A", "lora_B")]
                modules[module].weight += weight * 7 / 3 * (up @ tensors[key])
        for param, value in head.items():
            getattr(modules["classifier"], param).copy_(value)
    return logits(model, token_inputs())


def head_of(path: Path) -> dict[str, Tensor]:
    tensors = load_file(path / WEIGHTS)
    prefix = "base_model.model.classifier."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def in_peft(path: Path, count: int) -> Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(bert([str(i) for i in range(count)]), path).eval()
    return logits(model, token_inputs())


def ours(path: Path) -> Tensor:
    model = bert()
    with runtime.attach(model, open_input(InputSpec(str(path))).adapter):
        return logits(model, token_inputs())


def check(path: Path, meant: Tensor) -> None:
    """PEFT and we compute what is meant, relative to what the adapters do."""
    for found in (in_peft(path, meant.shape[1]), ours(path)):
        torch.testing.assert_close(found, meant, rtol=0, atol=1e-5 * float(meant.norm()))


def verified(out: Path, base: Path, **inputs: Path) -> library.Verdict:
    given = {name: str(path) for name, path in inputs.items()}
    return library.verify(out, library.Questions(str(base), given, "cpu"))


def labels_in(path: Path) -> list[str]:
    table = json.loads((path / "config.json").read_text())["id2label"]
    return [table[str(i)] for i in range(len(table))]


# every policy, in forward


@pytest.mark.parametrize("chosen", ["mood", "topic"])
def test_the_named_head_is_the_one_that_computes(chosen: str, tmp_path: Path, base: Path) -> None:
    paths = [classifier(tmp_path / "mood", 1), classifier(tmp_path / "topic", 2, TOPIC)]
    out = merge(paths, [0.6, 0.4], heads=chosen)
    check(out, expected(paths, [0.6, 0.4], head_of(tmp_path / chosen)))
    assert labels_in(out) == list({"mood": MOOD, "topic": TOPIC}[chosen])
    verdict = verified(out, base)
    assert verdict.status == library.PASS, verdict.checks


@pytest.mark.parametrize("weights", [(0.75, 0.25), (0.5, 0.9)])
def test_heads_of_one_task_are_averaged(
    weights: tuple[float, float], tmp_path: Path, base: Path
) -> None:
    """Weights that do not sum to 1 count from the base's own head."""
    paths = [classifier(tmp_path / "a", 1), classifier(tmp_path / "b", 2)]
    out = merge(paths, weights, heads="average", base=str(base), strict=True)
    own = bert().classifier.state_dict()  # type: ignore[union-attr]
    rest = 1 - sum(weights)
    one, two = (head_of(path) for path in paths)
    head = {k: weights[0] * one[k] + weights[1] * two[k] + rest * own[k] for k in one}
    check(out, expected(paths, weights, head))
    assert labels_in(out) == list(MOOD)
    verdict = verified(out, base)
    assert verdict.status == library.PASS, verdict.checks


def test_heads_of_two_tasks_are_put_together(tmp_path: Path, base: Path) -> None:
    paths = [classifier(tmp_path / "mood", 1), classifier(tmp_path / "topic", 2, TOPIC)]
    out = merge(paths, [0.6, 0.4], heads="concat", strict=True)
    one, two = (head_of(path) for path in paths)
    check(out, expected(paths, [0.6, 0.4], {k: torch.cat([one[k], two[k]]) for k in one}))
    assert labels_in(out) == [*MOOD, *TOPIC]
    assert AutoConfig.from_pretrained(out).num_labels == 5
    (line,) = json.loads((out / "adaptmerge.json").read_text())["output"]["heads"]
    owners = [*zip(["mood"] * 3, MOOD, strict=True), *zip(["topic"] * 2, TOPIC, strict=True)]
    assert line["rows"] == [{"input": name, "label": label} for name, label in owners]
    verdict = verified(out, base)
    assert verdict.status == library.PASS, verdict.checks


@pytest.mark.parametrize("target", ["peft", "native"])
def test_separate_heads_share_the_merged_deltas(target: str, tmp_path: Path, base: Path) -> None:
    """PEFT's own conversion writes all heads under one key: the last one wins."""
    paths = [classifier(tmp_path / "mood", 1), classifier(tmp_path / "topic", 2, TOPIC)]
    out = merge(paths, [0.6, 0.4], heads="separate", target=target)
    for path, labels in zip(paths, (MOOD, TOPIC), strict=True):
        meant = expected(paths, [0.6, 0.4], head_of(path))
        if target == "peft":
            check(out / path.name, meant)
            assert labels_in(out / path.name) == list(labels)
        spec = InputSpec(str(out), adapter=path.name)
        spec = spec if target == "native" else InputSpec(str(out / path.name))
        adapter = open_input(spec).adapter
        assert adapter.labels["classifier"].names == labels
        with runtime.attach(model := bert(), adapter):
            torch.testing.assert_close(logits(model, token_inputs()), meant, rtol=0, atol=1e-5)
    verdict = verified(out, base)
    assert verdict.status == library.PASS, verdict.checks
    assert {"weights of mood", "forward of topic"} <= {c.name for c in verdict.checks}


def test_native_writes_what_separate_heads_share_once(tmp_path: Path) -> None:
    paths = [classifier(tmp_path / "mood", 1), classifier(tmp_path / "topic", 2, TOPIC)]
    out = merge(paths, heads="separate", target="native")
    sizes = sum(t.nbytes for t in load_file(out / "tensors.safetensors").values())
    one = sum(t.nbytes for t in load_file(merge(paths, name="o", heads="mood") / WEIGHTS).values())
    assert sizes < 1.1 * one


def test_dropped_heads_are_a_note(tmp_path: Path, base: Path) -> None:
    paths = [classifier(tmp_path / "mood", 1), classifier(tmp_path / "topic", 2, TOPIC)]
    out = merge(paths, [0.6, 0.4], heads="drop")
    own = bert().classifier.state_dict()  # type: ignore[union-attr]
    torch.testing.assert_close(ours(out), expected(paths, [0.6, 0.4], own), rtol=0, atol=1e-5)
    assert not head_of(out)
    with pytest.raises(AdaptmergeError, match="head of mood, topic left out: --heads drop"):
        merge(paths, name="strict", heads="drop", strict=True)
    verdict = verified(out, base)
    assert verdict.status == library.PASS, verdict.checks


def test_policies_of_single_modules(tmp_path: Path) -> None:
    paths = [classifier(tmp_path / "mood", 1), classifier(tmp_path / "topic", 2, TOPIC)]
    out = merge(paths, heads=("drop", "classifier=concat"))
    assert len(head_of(out)["weight"]) == 5
    report = json.loads((out / "adaptmerge.json").read_text())
    assert report["options"]["heads"] == {"*": "drop", "classifier": "concat"}
    assert merge(paths, name="table", heads={"*": "mood", "classifier": "topic"}).is_dir()
    assert len(head_of(tmp_path / "table")["weight"]) == 2
    with pytest.raises(UsageError, match="clasifier=concat: no head .*did you mean 'classifier'"):
        merge(paths, name="typo", heads=("clasifier=concat",))


def test_a_recipe_has_policies_by_module(tmp_path: Path) -> None:
    for name, seed, labels in (("mood", 1, MOOD), ("topic", 2, TOPIC)):
        classifier(tmp_path / name, seed, labels)
    recipe = tmp_path / "both.yaml"
    recipe.write_text(
        "inputs: [mood, topic]\noutput: out\nheads: {'*': drop, classifier: concat}\n"
    )
    assert exit_code("run", recipe) == 0
    assert len(head_of(tmp_path / "out")["weight"]) == 5
    recipe.write_text("inputs: [mood, topic]\noutput: out\nheads:\n  classifier: tpoic\n")
    with pytest.raises(UsageError, match="both.yaml:4: heads.classifier: .*did you mean 'topic'"):
        load_recipe(recipe)


def test_an_input_named_like_a_policy_is_called_otherwise(tmp_path: Path) -> None:
    paths = [classifier(tmp_path / "average", 1), classifier(tmp_path / "topic", 2, TOPIC)]
    with pytest.raises(UsageError, match="is a policy, and an input has that name: call the input"):
        merge(paths, heads="average")
    with pytest.raises(UsageError, match="--heads mean: no input has that name .*error, average"):
        merge(paths, heads="mean")


# what is refused


def test_labels_that_differ_are_not_averaged(tmp_path: Path) -> None:
    paths = [classifier(tmp_path / "a", 1), classifier(tmp_path / "b", 2, ("good", "fine", "bad"))]
    with pytest.raises(CannotMerge, match=r"mean different things \(a: bad, fine, good; b: good"):
        merge(paths, heads="average")
    out = merge(paths, heads="average", allow=frozenset({"labels"}))
    report = json.loads((out / "adaptmerge.json").read_text())
    assert [n["what"] for n in report["notes"] if n["kind"] == "assumed"] == [
        "different labels were taken as one (a: bad, fine, good; b: good, fine, bad)"
    ]


@pytest.mark.parametrize("unnamed", ["missing", "default"])
def test_rows_that_nobody_named_are_an_assumption(unnamed: str, tmp_path: Path) -> None:
    labels = ("LABEL_0", "LABEL_1", "LABEL_2")
    paths = [classifier(tmp_path / f"a{seed}", seed, labels) for seed in (1, 2)]
    if unnamed == "missing":
        for path in paths:
            (path / "config.json").unlink()
    with pytest.raises(AdaptmergeError, match="rows are taken to mean the same in a1, a2"):
        merge(paths, heads="average", strict=True)
    out = merge(paths, name="both", heads="concat", strict=True)
    assert labels_in(out) == [f"a{seed}/{row}" for seed in (1, 2) for row in range(3)]


def test_shared_labels_of_a_concat_get_the_names_of_their_inputs(tmp_path: Path) -> None:
    paths = [classifier(tmp_path / "a", 1), classifier(tmp_path / "b", 2, ("good", "new"))]
    out = merge(paths, heads="concat")
    assert labels_in(out) == ["bad", "fine", "a/good", "b/good", "new"]
    assert open_input(InputSpec(str(out))).adapter.labels["classifier"] == Labels(
        ("bad", "fine", "a/good", "b/good", "new")
    )


def test_weights_that_need_the_base_say_so(tmp_path: Path) -> None:
    paths = [classifier(tmp_path / "a", 1), classifier(tmp_path / "b", 2)]
    with pytest.raises(CannotMerge, match="weights that sum to 1.4 need the base's own head"):
        merge(paths, [0.5, 0.9], heads="average")


def test_heads_of_other_shapes_have_no_average(tmp_path: Path) -> None:
    paths = [classifier(tmp_path / "a", 1), classifier(tmp_path / "b", 2, TOPIC)]
    for path in paths:
        (path / "config.json").unlink()
    with pytest.raises(
        CannotMerge, match=r"have no average \(a \[3, 64\], b \[2, 64\]\): --heads con"
    ):
        merge(paths, heads="average")


def test_several_adapters_need_a_folder(tmp_path: Path) -> None:
    paths = [classifier(tmp_path / "mood", 1), classifier(tmp_path / "topic", 2, TOPIC)]
    with pytest.raises(
        CannotStore, match="an adapter for each head .mood, topic.* give -o a folder"
    ):
        merge(paths, name="out.safetensors", heads="separate")
    assert not list(tmp_path.glob("out*"))


def test_an_output_that_replaces_another_keeps_none_of_its_labels(tmp_path: Path) -> None:
    paths = [classifier(tmp_path / "mood", 1), classifier(tmp_path / "topic", 2, TOPIC)]
    merge(paths, heads="separate")
    assert (tmp_path / "out" / "mood" / "config.json").is_file()
    out = merge(paths, heads="concat", force=True)
    assert not list(out.glob("*/*"))
    merge(paths, heads="drop", force=True)
    assert not (out / "config.json").exists()


def test_a_lone_file_keeps_labels_in_its_header(tmp_path: Path) -> None:
    paths = [classifier(tmp_path / "mood", 1), classifier(tmp_path / "topic", 2, TOPIC)]
    out = merge(paths, name="both.safetensors", heads="concat")
    assert open_input(InputSpec(str(out))).adapter.labels["classifier"].names == (*MOOD, *TOPIC)


# heads of several layers


def layered(folder: Path, seed: int, rows: int, dense: int = 1) -> Path:
    """A head of two layers, as RoBERTa's; `dense` seeds its first one."""
    path = classifier(folder, seed, [f"{folder.name}{i}" for i in range(rows)])
    tensors = {k: v for k, v in load_file(path / WEIGHTS).items() if k not in head_keys(path)}
    first, last = (torch.Generator().manual_seed(s) for s in (dense, seed))
    prefix = "base_model.model.classifier"
    for name, shape in (("weight", (64, 64)), ("bias", (64,))):
        tensors[f"{prefix}.dense.{name}"] = torch.randn(shape, generator=first)
    for name, shape in (("weight", (rows, 64)), ("bias", (rows,))):
        tensors[f"{prefix}.out_proj.{name}"] = torch.randn(shape, generator=last)
    save_file(tensors, path / WEIGHTS)
    return path


def head_keys(path: Path) -> set[str]:
    return {f"base_model.model.classifier.{name}" for name in head_of(path)}


@pytest.mark.parametrize("policy", ["average", "concat", "separate"])
def test_heads_of_two_layers_compute_what_is_meant(policy: str, tmp_path: Path) -> None:
    """RoBERTa's: `dense` is equal in both where the last layers are put together."""
    from peft import LoraConfig, get_peft_model
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(**{**SIZES, "max_position_embeddings": 66}, num_labels=3)
    paths = [tmp_path / "a", tmp_path / "b"]
    for seed, path in enumerate(paths):
        model = seeded(lambda: RobertaForSequenceClassification(config))
        model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lora = LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "value"])
            wrapped = get_peft_model(model, lora)
            randomise(wrapped, seed, torch.float32)
            save_adapter(wrapped, path)
        if policy == "concat":
            dense = {k: v for k, v in before.items() if k.startswith("classifier.dense")}
            prefixed = {f"base_model.model.{k}": v for k, v in dense.items()}
            rewrite(path, lambda tensors, same=prefixed: tensors.update(same))
    verdict = verified(merge(paths, [0.75, 0.25], heads=policy), tmp_path / "base")
    assert verdict.status == library.PASS, verdict.checks
    asked = [c.name for c in verdict.checks if c.name.startswith("forward in peft")]
    assert len(asked) == (2 if policy == "separate" else 1)


def test_only_the_last_layer_of_a_head_is_put_together(tmp_path: Path) -> None:
    paths = [layered(tmp_path / "a", 1, 3), layered(tmp_path / "b", 2, 2)]
    out = load_file(merge(paths, heads="concat") / WEIGHTS)
    prefix = "base_model.model.classifier"
    assert out[f"{prefix}.out_proj.weight"].shape == (5, 64)
    assert out[f"{prefix}.out_proj.bias"].shape == (5,)
    assert out[f"{prefix}.dense.weight"].shape == (64, 64)
    assert library.verify(tmp_path / "out").status == library.PASS
    other = layered(tmp_path / "c", 3, 2, dense=9)
    with pytest.raises(
        CannotMerge, match="classifier.dense.* only the last layer of a head can be"
    ):
        merge([paths[0], other], name="differ", heads="concat")


def test_layers_of_a_head_that_are_modules_of_their_own(tmp_path: Path) -> None:
    """DistilBERT's pre_classifier comes before its classifier: it has no labels to put together."""
    paths = [classifier(tmp_path / "a", 1), classifier(tmp_path / "b", 2, TOPIC)]
    for path, seed in zip(paths, (5, 5), strict=True):
        tensors = load_file(path / WEIGHTS)
        before = torch.randn((64, 64), generator=torch.Generator().manual_seed(seed))
        tensors["base_model.model.pre_classifier.weight"] = before
        save_file(tensors, path / WEIGHTS)
        config = json.loads((path / CONFIG).read_text())
        config["modules_to_save"] = ["pre_classifier", "classifier"]
        (path / CONFIG).write_text(json.dumps(config))
    out = load_file(merge(paths, heads="concat") / WEIGHTS)
    assert out["base_model.model.pre_classifier.weight"].shape == (64, 64)
    assert out[HEAD].shape == (5, 64)
    tensors["base_model.model.pre_classifier.weight"] += 1
    save_file(tensors, paths[1] / WEIGHTS)
    with pytest.raises(CannotMerge, match="pre_classifier.*only the last layer of a head"):
        merge(paths, name="differ", heads="concat")


# vocabularies


def speaker(folder: Path, seed: int, modules: Sequence[str], *, tied: bool = False) -> Path:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=3,
        lora_alpha=7,
        target_modules=ATTENTION,
        modules_to_save=[*modules],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copies.fresh(llama), config)
        randomise(model, seed, torch.float32)
        save_adapter(model, folder)
    if tied:
        tensors = load_file(folder / WEIGHTS)
        tensors["base_model.model.lm_head.weight"] = tensors[EMBEDDING].clone()
        save_file(tensors, folder / WEIGHTS)
    return folder


EMBEDDING = "base_model.model.model.embed_tokens.weight"


def test_copies_of_one_matrix_stay_one(tmp_path: Path) -> None:
    both = ("embed_tokens", "lm_head")
    paths = [speaker(tmp_path / f"a{seed}", seed, both, tied=True) for seed in (1, 2)]
    for policy in ("average", "a2"):
        out = load_file(merge(paths, name=f"of-{policy}", heads=policy) / WEIGHTS)
        assert torch.equal(out[EMBEDDING], out["base_model.model.lm_head.weight"])
    with pytest.raises(
        CannotMerge, match="is one matrix with .* in a1, a2, and the two would come"
    ):
        merge(paths, heads={"lm_head": "a1", "embed_tokens": "a2"})
    alone = speaker(tmp_path / "alone", 3, ("embed_tokens",))
    with pytest.raises(
        CannotMerge, match="come apart .alone has only model.embed_tokens.: give both"
    ):
        merge([paths[0], alone], heads="average")


def test_vocabularies_are_not_put_together(tmp_path: Path) -> None:
    paths = [speaker(tmp_path / f"a{seed}", seed, ("lm_head",)) for seed in (1, 2)]
    with pytest.raises(CannotMerge, match="lm_head: its rows are the tokens of a vocabulary"):
        merge(paths, heads="concat")


@pytest.mark.parametrize("policy", [None, "average"])
def test_resized_vocabularies_are_refused_by_name(policy: str | None, tmp_path: Path) -> None:
    paths = [speaker(tmp_path / f"a{seed}", seed, ("lm_head",)) for seed in (1, 2)]
    tensors = load_file(paths[1] / WEIGHTS)
    tensors["base_model.model.lm_head.weight"] = torch.randn(130, 64)
    save_file(tensors, paths[1] / WEIGHTS)
    with pytest.raises(
        CannotMerge, match=r"vocabularies of different sizes \(a1 \[128, 64\], a2 \[130"
    ):
        merge(paths, heads=policy)
    assert len(load_file(merge(paths, name="kept", heads="a2") / WEIGHTS)) == 17


def test_norms_are_summed_as_differences(tmp_path: Path) -> None:
    copies.save(llama, tmp_path / "base")
    paths = [speaker(tmp_path / f"a{seed}", seed, ("model.norm",)) for seed in (1, 2)]
    out = merge(paths, [0.5, 0.9], base=str(tmp_path / "base"))
    key = "base_model.model.model.norm.weight"
    one, two = (load_file(path / WEIGHTS)[key] for path in paths)
    own: Any = llama()
    meant = 0.5 * one + 0.9 * two - 0.4 * own.model.norm.weight
    torch.testing.assert_close(load_file(out / WEIGHTS)[key], meant.detach())
    assert verified(out, tmp_path / "base").status == library.PASS
    with pytest.raises(CannotMerge, match="weights that sum to 1.4 need the base's own"):
        merge(paths, [0.5, 0.9], name="blind")


# tokens


def speller(folder: Path, seed: int, ids: Sequence[int], names: Mapping[str, int]) -> Path:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, lora_alpha=7, target_modules=ATTENTION, trainable_token_indices=[*ids])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copies.fresh(llama), config)
        randomise(model, seed, torch.float32)
        save_adapter(model, folder)
    (folder / "added_tokens.json").write_text(json.dumps(dict(names)))
    return folder


def rows_of(path: Path) -> dict[int, Tensor]:
    (edit,) = (e for e in open_input(InputSpec(str(path))).adapter.edits if e.kind == "rows")
    return dict(zip(edit.rows, edit.values.read(), strict=True))  # type: ignore[attr-defined]


def test_tokens_of_all_inputs_are_kept(tmp_path: Path) -> None:
    copies.save(llama, tmp_path / "base")
    paths = [
        speller(tmp_path / "a", 1, (3, 7), {"<x>": 3, "<y>": 7}),
        speller(tmp_path / "b", 2, (7, 11), {"<y>": 7, "<z>": 11}),
    ]
    one, two = map(rows_of, paths)
    out = merge(paths, [0.75, 0.25])
    found = rows_of(out)
    assert list(found) == [3, 7, 11]
    assert torch.equal(found[3], one[3])
    assert torch.equal(found[11], two[11])
    torch.testing.assert_close(found[7], 0.75 * one[7] + 0.25 * two[7])
    assert library.verify(out).status == library.PASS
    with pytest.raises(CannotMerge, match="token 7 differs between a, b, whose weights sum to 1.4"):
        merge(paths, [0.5, 0.9], name="blind")
    out = merge(paths, [0.5, 0.9], name="based", base=str(tmp_path / "base"))
    own: Any = llama()
    row = own.model.embed_tokens.weight[7].detach()
    torch.testing.assert_close(rows_of(out)[7], 0.5 * one[7] + 0.9 * two[7] - 0.4 * row)
    verdict = verified(out, tmp_path / "base")
    assert verdict.status == library.PASS, verdict.checks


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"<w>": 7}, "token 7 is '<y>' in a and '<w>' in b"),
        ({"<y>": 11}, "'<y>' is 7 in a and 11 in b"),
    ],
)
def test_tokens_are_told_by_their_strings(names: dict[str, int], said: str, tmp_path: Path) -> None:
    paths = [
        speller(tmp_path / "a", 1, (3, 7), {"<x>": 3, "<y>": 7}),
        speller(tmp_path / "b", 2, tuple(names.values()), names),
    ]
    with pytest.raises(CannotMerge, match=said):
        merge(paths)
    assert list(rows_of(merge(paths, heads="b"))) == [*names.values()]


def test_rows_beside_a_whole_matrix_are_refused(tmp_path: Path) -> None:
    paths = [
        speaker(tmp_path / "a", 1, ("embed_tokens",)),
        speller(tmp_path / "b", 2, (3,), {}),
    ]
    with pytest.raises(CannotMerge, match="a stores all of it and b rows of it: pass --heads NAME"):
        merge(paths)
    assert merge(paths, heads="a").is_dir()


# what verify must not pass


def rewrite(path: Path, change: Any) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def exit_code(*arguments: object) -> int:
    return int(main([str(argument) for argument in arguments], standalone_mode=False) or 0)


def swapped_rows(path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[HEAD].roll(1, 0)

    rewrite(path, change)


def swapped_heads(path: Path) -> None:
    one, two = path / "mood", path / "topic"
    heads = [
        {k: v for k, v in load_file(p / WEIGHTS).items() if k in head_keys(p)} for p in (one, two)
    ]
    rewrite(one, lambda tensors: tensors.update(heads[1]))
    rewrite(two, lambda tensors: tensors.update(heads[0]))


def other_head(path: Path) -> None:
    theirs = load_file(path.parent / "topic" / WEIGHTS)
    rewrite(path, lambda tensors: tensors.update({k: theirs[k] for k in head_keys(path)}))


def swapped_labels(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    table = config["id2label"]
    table["0"], table["1"] = table["1"], table["0"]
    (path / "config.json").write_text(json.dumps(config))


def other_policy(path: Path) -> None:
    report = json.loads((path / "adaptmerge.json").read_text())
    report["options"]["heads"] = "average"
    (path / "adaptmerge.json").write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("heads", "damage"),
    [
        ("mood", other_head),
        ("separate", swapped_heads),
        ("concat", swapped_rows),
        ("concat", swapped_labels),
        ("concat", other_policy),
        ("mood", swapped_labels),
    ],
)
def test_verify_fails_on_the_wrong_head(
    heads: str, damage: Any, tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [classifier(tmp_path / "mood", 1), classifier(tmp_path / "topic", 2, TOPIC)]
    out = merge(paths, heads=heads)
    assert exit_code("verify", out, "--base", base) == 0, capsys.readouterr().out
    damage(out)
    assert exit_code("verify", out, "--base", base) == 3
    assert "fail" in capsys.readouterr().out


def test_verify_recomputes_an_average(tmp_path: Path) -> None:
    paths = [classifier(tmp_path / "a", 1), classifier(tmp_path / "b", 2)]
    out = merge(paths, [0.75, 0.25], heads="average")
    one, two = (load_file(path / WEIGHTS)[HEAD] for path in paths)
    assert library.verify(out).status == library.PASS
    rewrite(out, lambda tensors: tensors.update({HEAD: 0.25 * one + 0.75 * two}))
    assert library.verify(out).status == library.FAIL


# what inspect says


def test_inspect_lists_heads_with_labels_and_shapes(tmp_path: Path) -> None:
    item = open_input(InputSpec(str(classifier(tmp_path / "mood", 1))))
    (head,) = summarise(item).heads
    assert head.module == "classifier"
    assert head.listed
    assert head.labels == MOOD
    assert head.shapes == {"bias": (3,), "weight": (3, 64)}


@pytest.mark.parametrize(
    ("modules", "task", "listed", "said"),
    [
        (None, "SEQ_CLS", True, "modules_to_save is null: PEFT adds this head for SEQ_CLS itself"),
        (None, None, False, "stored whole though modules_to_save does not list it"),
        (["classifier", "classifier"], None, True, "is listed twice in modules_to_save"),
    ],
)
def test_inspect_says_how_heads_are_listed(
    modules: Any, task: str | None, listed: bool, said: str, tmp_path: Path
) -> None:
    path = classifier(tmp_path / "a", 1)
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(
        json.dumps({**config, "modules_to_save": modules, "task_type": task})
    )
    item = open_input(InputSpec(str(path)))
    assert any(said in note.what for note in item.adapter.notes)
    (head,) = summarise(item).heads
    assert head.listed is listed


def test_heads_that_nothing_lists_are_not_averaged_unasked(tmp_path: Path) -> None:
    paths = [classifier(tmp_path / "a", 1), classifier(tmp_path / "b", 2)]
    for path in paths:
        config = json.loads((path / CONFIG).read_text())
        config |= {"modules_to_save": None, "task_type": None}
        (path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CannotMerge, match="classifier.*head differs between a, b"):
        merge(paths)


def test_labels_are_shown_safely(tmp_path: Path) -> None:
    path = classifier(tmp_path / "a", 1)
    table = {"0": "\x1b[2Jwiped", "1": "b", "2": "c"}
    (path / "config.json").write_text(json.dumps({"id2label": table}))
    (row,) = summarise(open_input(InputSpec(str(path)))).head_rows()
    assert row[-1] == "\\x1b[2Jwiped, b, c"


def test_heads_of_a_tied_base_count_from_its_embedding(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model: Any = seeded(lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)))
    model.save_pretrained(tmp_path / "base")
    paths = []
    for seed in (1, 2):
        tensors = {
            "base_model.model.lm_head.weight": torch.randn(
                128, 64, generator=torch.Generator().manual_seed(seed)
            ),
            "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": torch.ones(2, 64),
            "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight": torch.ones(192, 2),
        }
        path = tmp_path / f"a{seed}"
        path.mkdir()
        save_file(tensors, path / WEIGHTS)
        fields = {
            "r": 2,
            "lora_alpha": 2,
            "target_modules": ["h.0.attn.c_attn"],
            "fan_in_fan_out": True,
        }
        config = {"peft_type": "LORA", "modules_to_save": ["lm_head"], **fields}
        (path / CONFIG).write_text(json.dumps(config))
        paths.append(path)
    out = merge(paths, [0.5, 0.9], heads="average", base=str(tmp_path / "base"))
    one, two = (load_file(path / WEIGHTS)["base_model.model.lm_head.weight"] for path in paths)
    meant = 0.5 * one + 0.9 * two - 0.4 * model.transformer.wte.weight.detach()
    torch.testing.assert_close(load_file(out / WEIGHTS)["base_model.model.lm_head.weight"], meant)
    verdict = verified(out, tmp_path / "base")
    assert verdict.status == library.PASS, verdict.checks


def test_labels_that_cannot_be_read_are_left_out_by_name(tmp_path: Path) -> None:
    path = classifier(tmp_path / "a", 1)
    (path / "config.json").write_text(json.dumps({"id2label": {"1": "x", "2": "y", "5": "z"}}))
    item = open_input(InputSpec(str(path)))
    assert not item.adapter.labels
    assert any("its numbers are not 0, 1, 2" in note.what for note in item.adapter.notes)
