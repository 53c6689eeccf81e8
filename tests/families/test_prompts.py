"""Virtual tokens where PEFT needs more than the common contract: tasks, labels, generation; and what
is refused: malformed files, other models, families that mix anew for every token."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families.cases import FamilyCase, all_cases
from families.cases_prompts import t5
from peft_cases import bert, gpt2, llama, logits, token_inputs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adaptmerge import runtime
from adaptmerge.adapters.families.prompt import Prompt
from adaptmerge.adapters.graph import Adapter, Site
from adaptmerge.adapters.stored_edits import Opaque
from adaptmerge.bases.open import open_base
from adaptmerge.commands.combine import Options, combine
from adaptmerge.commands.inspect import summarise
from adaptmerge.errors import AdaptmergeError, InputError
from adaptmerge.formats.inputs import InputSpec, open_input
from adaptmerge.tensors.dtypes import F32
from adaptmerge.tensors.refs import constant

TASKS = FamilyCase(
    "multitask",
    "MultitaskPromptTuningConfig",
    {"num_virtual_tokens": 5, "num_tasks": 3, "num_ranks": 2},
    merges=False,
)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def read(folder: Path, task: int | None = None) -> Adapter:
    return open_input(InputSpec(str(folder), task=task)).adapter


def attached(model: nn.Module, adapter: Adapter, inputs: dict[str, Tensor]) -> Tensor:
    with runtime.attach(model, adapter):
        return logits(model, inputs)


def of_task(folder: Path, task: int) -> Tensor:
    """What PEFT computes for both rows of the batch with one task."""
    inputs = {**TASKS.inputs(), "task_ids": torch.tensor([task, task])}
    return logits(TASKS.loaded(folder), inputs)


@pytest.fixture(scope="module")
def multitask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TASKS.build(tmp_path_factory.mktemp("multitask"))


@pytest.mark.parametrize("task", [0, 2])
def test_a_task_of_a_multitask_prompt_is_a_prompt(
    task: int, multitask: Path, tmp_path: Path
) -> None:
    truth = of_task(multitask, task)
    assert (of_task(multitask, 1) - truth).norm() > 0.1 * truth.norm()
    model = TASKS.base_model().double()
    assert error(attached(model, read(multitask, task), TASKS.inputs()), truth) < 1e-6
    for target in ("native", "peft"):
        out = tmp_path / target
        combine([InputSpec(str(multitask), task=task)], out, Options(target=target))
        assert error(attached(model, read(out), TASKS.inputs()), truth) < 1e-6
    assert error(TASKS.truth(tmp_path / "peft"), truth) < 1e-6
    assert json.loads((tmp_path / "peft" / CONFIG).read_text())["peft_type"] == "PROMPT_TUNING"


def error(outputs: Tensor, truth: Tensor) -> float:
    return float((outputs - truth).norm() / truth.norm())


def test_without_a_task_a_multitask_prompt_is_kept_as_it_is(
    multitask: Path, tmp_path: Path
) -> None:
    native, out = tmp_path / "native", tmp_path / "out"
    combine([InputSpec(str(multitask))], native, Options(target="native"))
    combine([InputSpec(str(native))], out, Options(target="peft"))
    before, after = load_file(multitask / WEIGHTS), load_file(out / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(of_task(multitask, 1), of_task(out, 1))
    with pytest.raises(InputError, match=r"3 tasks: name one with \?task=N, N from 0 to 2"):
        attached(llama(), read(multitask), token_inputs())


def test_a_task_that_is_not_there(multitask: Path) -> None:
    with pytest.raises(InputError, match=r"\?task=3: it has 3 tasks, from 0 to 2"):
        read(multitask, 3)


@pytest.mark.parametrize("name", ["prompt_llama", "prefix_llama", "prompt_gpt2", "prefix_gpt2"])
def test_generation_is_that_of_peft(name: str, tmp_path: Path) -> None:
    """The prompt is added once, also for padded inputs."""
    case = all_cases()[name]
    folder = case.build(tmp_path)
    inputs = case.inputs()
    inputs["attention_mask"][0, :3] = 0
    options: Any = {**inputs, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PEFT leaves out position ids
        truth = case.loaded(folder).generate(**options)
    model: Any = case.base_model().double()
    with runtime.attach(model, read(folder)):
        found = model.generate(**options)
    assert torch.equal(found, truth)


@pytest.mark.parametrize("name", ["prompt_llama", "prefix_llama", "prompt_bert", "prefix_bert"])
def test_labels_types_and_positions_go_along(name: str, tmp_path: Path) -> None:
    case = all_cases()[name]
    folder = case.build(tmp_path)
    inputs = case.inputs()
    if case.model == "bert":
        types = torch.arange(12).expand(2, -1) % 2
        extra = {"labels": torch.tensor([0, 2]), "token_type_ids": types}
    else:
        extra = {"labels": inputs["input_ids"], "position_ids": torch.arange(12).expand(2, -1)}
    model: Any = case.base_model().double()
    with torch.no_grad(), runtime.attach(model, read(folder)):
        found = model(**inputs, **extra)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = case.loaded(folder)(**inputs, **extra)
    assert torch.allclose(found.loss, truth.loss, rtol=1e-12, atol=0)
    assert torch.allclose(found.logits, truth.logits, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["prompt_llama", "prefix_llama", "adaption_llama"])
def test_a_streamed_model_runs_them(name: str, tmp_path: Path) -> None:
    case = all_cases()[name]
    base, folder = case.save_base(tmp_path / "base"), case.build(tmp_path / "adapter")
    adapter = read(folder)
    truth = attached(runtime.load_model(base), adapter, token_inputs())
    streamed = runtime.stream_model(open_base(str(base)))
    assert torch.allclose(attached(streamed, adapter, token_inputs()), truth, atol=1e-5)


def test_rows_of_a_tied_embedding_are_rows_of_the_head(tmp_path: Path) -> None:
    """Beside a LoRA, PEFT stores them once for both."""
    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    options["trainable_token_indices"] = [3, 7]
    case = FamilyCase("tied", "LoraConfig", options, "gpt2")
    folder = case.build(tmp_path)
    truth = case.truth(folder)
    found = attached(case.base_model().double(), read(folder), case.inputs())
    assert (found - truth).norm() < 1e-6 * (truth - case.plain()).norm()


def xlora(folder: Path) -> Path:
    expert = FamilyCase("expert", "LoraConfig", {"target_modules": ["q_proj"]})
    adapters = {name: str(expert.build(folder / name)) for name in ("a", "b")}
    model: Any = llama()
    model.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=64, xlora_depth=2, adapters=adapters
    )
    peft.get_peft_model(model, config).save_pretrained(folder / "x")
    return folder / "x"


def lily(folder: Path) -> Path:
    case = FamilyCase("lily", "LilyConfig", {"target_modules": ["q_proj"], "r": 4})
    return case.build(folder)


def shadow(folder: Path) -> Path:
    return FamilyCase("shadow", "ShadowConfig").build(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [xlora, lily, shadow])
def test_what_mixes_for_every_token_is_shown_and_refused(
    build: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = build(tmp_path / "adapter")
    item = open_input(InputSpec(str(folder)))
    assert all(isinstance(edit, Opaque) for edit in item.adapter.edits)
    assert {ref.name for edit in item.adapter.edits for ref in edit.tensors} == set(  # type: ignore[attr-defined]
        load_file(folder / WEIGHTS)
    )
    assert {family.kind for family in summarise(item).families} == {"opaque"}
    with pytest.raises(AdaptmergeError, match="which no change of weights does"):
        combine([InputSpec(str(folder))], tmp_path / "out")
    with pytest.raises(InputError, match="which no change of weights does"):
        attached(llama(), item.adapter, token_inputs())


def changed(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def reshaped(folder: Path, name: str, shape: tuple[int, ...] | None) -> None:
    """One tensor with another shape, or left out."""
    tensors = load_file(folder / WEIGHTS)
    full = next(key for key in sorted(tensors) if key.endswith(name))
    tensors.pop(full)
    tensors |= {} if shape is None else {full: torch.ones(shape)}
    save_file(tensors or {"x": torch.ones(1)}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("prompt_llama", {"num_virtual_tokens": 6}, r"\[5, 64\], but its config says \[6, 64\]"),
        ("prompt_llama", {"token_dim": 32}, r"\[5, 64\], but its config says \[5, 32\]"),
        ("prompt_llama", {"num_transformer_submodules": 3}, "num_transformer_submodules is 3"),
        ("prefix_llama", {"num_layers": 3}, r"\[5, 128\], but its config says \[5, 192\]"),
        ("prefix_llama", {"num_layers": None}, "num_layers is None in its config"),
        ("prefix_llama", {"num_attention_heads": 5}, "in 5 heads"),
        ("adaption_llama", {"adapter_len": 4}, "has 6 tokens, adapter_len is 4"),
        ("trainable_tokens", {"token_indices": [1]}, "4 trainable tokens are stored"),
        ("trainable_tokens", {"token_indices": None}, "but token_indices is None"),
        ("prompt_llama", {"new_mixing": 2}, "new_mixing is 2, which this version does not know"),
    ],
)
def test_configs_that_contradict_the_tensors(
    name: str, fields: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    folder = all_cases()[name].build(tmp_path)
    changed(folder, **fields)
    with pytest.raises(InputError, match=sentence):
        read(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "shape", "sentence"),
    [
        ("prompt_llama", "prompt_embeddings", None, "prompt_embeddings is missing"),
        ("prompt_llama", "prompt_embeddings", (320,), "expected \\(tokens, dimension\\)"),
        ("prefix_llama", "prompt_embeddings", (5, 64), "but its config says"),
        ("adaption_llama", "adaption_gate", None, "adaption_gate is missing"),
        ("adaption_llama", "adaption_prompt", (6, 64), "expected \\(1, tokens, dimension\\)"),
    ],
)
def test_tensors_that_are_missing_or_misshapen(
    name: str, tensor: str, shape: tuple[int, ...] | None, sentence: str, tmp_path: Path
) -> None:
    folder = all_cases()[name].build(tmp_path)
    reshaped(folder, tensor, shape)
    with pytest.raises(InputError, match=sentence):
        read(folder)


def test_factors_of_tasks_that_do_not_fit(tmp_path: Path) -> None:
    folder = TASKS.build(tmp_path)
    reshaped(folder, "prefix_task_rows", (2, 2, 64))
    with pytest.raises(InputError, match=r"prefix_task_rows \[2, 2, 64\] do not fit"):
        read(folder)


def test_without_a_task_type_it_is_said(tmp_path: Path) -> None:
    folder = all_cases()["prompt_llama"].build(tmp_path)
    changed(folder, task_type=None)
    assert any("no task_type" in note.what for note in read(folder).notes)


@pytest.mark.parametrize(
    ("name", "make", "sentence"),
    [
        ("prefix_gpt2", llama, "for 2 layers of 4 key-value heads of size 16, .* has 2 of 2 of 16"),
        ("prefix_llama", lambda: nn.Linear(2, 2), "has no"),
        ("prompt_llama", lambda: nn.Linear(2, 2), "has no input embeddings"),
        ("adaption_gpt2", bert, "has no transformer.h.0.attn"),
    ],
)
def test_other_models_are_refused(
    name: str, make: Callable[[], nn.Module], sentence: str, tmp_path: Path
) -> None:
    adapter = read(all_cases()[name].build(tmp_path))
    with pytest.raises(InputError, match=sentence), runtime.attach(make(), adapter):
        pass


def test_a_prompt_of_another_width_is_refused() -> None:
    values = constant(1.0, (3, 48), F32)
    adapter = Adapter("wide", (Prompt(Site("", "prompt"), values),))
    with (
        pytest.raises(InputError, match="embeddings of 48, GPT2LMHeadModel of 64"),
        runtime.attach(gpt2(), adapter),
    ):
        pass


def test_an_encoder_run_by_itself_is_refused(tmp_path: Path) -> None:
    """Generation would leave the prompt out without a word."""
    adapter = read(all_cases()["prompt_t5"].build(tmp_path))
    model: Any = t5()
    with (
        pytest.raises(InputError, match="an encoder that was run by itself"),
        runtime.attach(model, adapter),
    ):
        model.generate(**token_inputs(), max_new_tokens=2)
