"""Which parameters are one, and what tokens enter and leave by: as model classes of `transformers` have it
once they are saved and loaded, for all that write text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from made_classes import classes, tiny
from peft_cases import MODELS

from adaptmerge.adapters.graph import Site
from adaptmerge.bases.classes import skeleton
from adaptmerge.bases.open import open_base
from adaptmerge.bases.ties import resized, ties_of, untying
from adaptmerge.errors import InputError

SHARES = 12  # tests that all classes are shared out to
MADE = 16  # classes of each share at least, of 30, of which there is a small model
# Stores its embedding in two tensors, which no base reads: what changes it is refused.
IN_PARTS = {"Molmo2ForConditionalGeneration": "model.language_model.embed_tokens.weight"}
FEW = {
    "whisper": "WhisperForConditionalGeneration",
    "mamba": "MambaForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "bert": "BertForMaskedLM",
    "distilbert": "DistilBertForMaskedLM",
    "modernbert": "ModernBertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "openai-gpt": "OpenAIGPTLMHeadModel",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
}


def loaded(model: Any, folder: Path) -> Any:
    """The model as it is once saved and loaded, its weights random before."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.normal_(generator=generator)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def shared(model: Any) -> set[frozenset[str]]:
    """The names of parameters that lie in the same memory."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.numel():
            found.setdefault(parameter.data_ptr(), []).append(name)
    return {frozenset(names) for names in found.values() if len(names) > 1}


def path_of(model: Any, getter: str) -> str | None:
    try:
        wanted = getattr(model, getter)()
    except NotImplementedError:
        return None
    return next((name for name, module in model.named_modules() if module is wanted), None)


def check(model: Any, folder: Path) -> None:
    """What is said of a folder is what the model does that is loaded from it."""
    found = loaded(model, folder)
    base = open_base(str(folder))
    assert base.ties.by_class
    assert {frozenset(group) for group in base.ties.groups} == shared(found)
    ends = [path_of(found, f"get_{side}_embeddings") for side in ("input", "output")]
    assert [base.ties.embedding, base.ties.head] == ends
    named = {f"{end}.weight" for end in ends if end} | {n for group in shared(found) for n in group}
    values = dict(model.named_parameters(remove_duplicate=False))
    for name in named & values.keys():
        module, _, param = name.rpartition(".")
        ref = base.parameter(Site(module, param))
        assert (ref is None) is (IN_PARTS.get(type(model).__name__) == name), name
        assert ref is None or torch.equal(ref.read(), values[name].detach()), name
    for group in base.tied:
        assert group[0] in base.tensors


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", FEW)
def test_classes_that_call_them_otherwise(kind: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(kind, FEW[kind], tie_word_embeddings=tied)
    assert model is not None
    check(model, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("share", range(SHARES))
def test_every_class_that_writes_text(share: int, tmp_path: Path) -> None:
    made = 0
    for kind, name in classes()[share::SHARES]:
        for tied in (True, False):
            model = tiny(kind, name, tie_word_embeddings=tied)
            if model is not None:
                check(model, tmp_path / f"{name}-{tied}")
                made += tied
    assert made >= MADE


SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
SIZES |= {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
}


@pytest.mark.parametrize("kind", ["Qwen2_5_VLConfig", "Qwen2VLConfig"])
@pytest.mark.parametrize("tied", [False, True])
def test_models_whose_text_has_a_config_that_says_nothing_of_ties(kind: str, tied: bool) -> None:
    import transformers

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**SIZES, "rope_parameters": rope}
    said = {"text_config": text, "vision_config": VISION, "tie_word_embeddings": tied}
    config = getattr(transformers, kind)(**said)
    assert not hasattr(config.get_text_config(), "tie_word_embeddings")
    name = kind.replace("Config", "ForConditionalGeneration")
    found = ties_of({**config.to_dict(), "architectures": [name]})
    assert found is not None
    assert bool(found.groups) is tied


def test_what_unties_a_model(tmp_path: Path) -> None:
    """One entry does, or that of its text, too; none where the class ties all the same, or a forward reads
    the entry."""
    cases: dict[str, dict[str, Any]] = {
        "whisper": {"tie_word_embeddings": False},
        "bert": {"tie_word_embeddings": False},
        "t5": {},
        "umt5": {},
    }
    for kind, wanted in cases.items():
        name = {"umt5": "UMT5ForConditionalGeneration"}.get(kind) or FEW[kind]
        config: dict[str, Any] = {"model_type": kind, "architectures": [name]}
        found = ties_of(config)
        assert found is not None
        assert untying(config, found.groups[0]) == wanted, kind
    config = {"model_type": "qwen2_5_vl", "text_config": {**SIZES, "tie_word_embeddings": True}}
    config |= {"architectures": [FEW["qwen2_5_vl"]], "vision_config": VISION}
    found = ties_of(config)
    assert found is not None
    entries = untying(config, found.groups[0])
    assert entries["tie_word_embeddings"] is entries["text_config"]["tie_word_embeddings"] is False


def test_a_larger_vocabulary_is_said_where_the_config_counts_it() -> None:
    assert resized({"vocab_size": 5}, 7) == {"vocab_size": 7}
    assert resized({"text_config": {"vocab_size": 5, "other": 1}}, 7) == {
        "text_config": {"vocab_size": 7, "other": 1}
    }
    assert resized({}, 7) == {"vocab_size": 7}


def test_no_class_is_built_unless_a_module_may_be_tied(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model: Any = MODELS["llama"]()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("adaptmerge.bases.base.ties_of", _never)
    base = open_base(str(tmp_path))
    for module in sorted(base.modules):
        assert base.parameter(Site(module)) is not None
        if "layers" in module:
            assert not base.may_be_tied(module)
            assert base.parameter(Site(module, "bias")) is None


def _never(*_: Any) -> Any:
    raise AssertionError("the class was built")


def test_a_model_of_endless_layers_is_not_built() -> None:
    said = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 10**9,
    }
    with pytest.raises(InputError, match="num_hidden_layers is 1000000000 in config.json"):
        skeleton(said)
