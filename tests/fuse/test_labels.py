"""Classifiers whose labels nothing counts but the rows of the adapter's head: reward models, mostly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fuse.models import fuse

import adaptmerge.commands.verify as library

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = torch.arange(1, 37).reshape(4, 9)


def base_of(folder: Path) -> Path:
    """A language model: the adapter brings the head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def classifier(base: Path, folder: Path, task: str, labels: int) -> torch.Tensor:
    """What PEFT's model computes, whose adapter lies in the folder then."""
    import peft
    import transformers

    kinds = {"SEQ_CLS": "Sequence", "TOKEN_CLS": "Token"}
    auto = getattr(transformers, f"AutoModelFor{kinds[task]}Classification")
    model = auto.from_pretrained(base, num_labels=labels)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 7, "init_lora_weights": False}
    config = peft.LoraConfig(task_type=task, target_modules=["q_proj", "up_proj"], **options)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "score.modules_to_save" in name:
                value.normal_()
        found: torch.Tensor = adapted(TOKENS).logits.double()
    adapted.save_pretrained(folder)
    return found


def computed(folder: Path, task: str) -> torch.Tensor:
    import transformers

    kinds = {"SEQ_CLS": "Sequence", "TOKEN_CLS": "Token"}
    auto = getattr(transformers, f"AutoModelFor{kinds[task]}Classification")
    with torch.no_grad():
        found: torch.Tensor = auto.from_pretrained(folder).eval()(TOKENS).logits.double()
    return found


@pytest.mark.parametrize(("task", "labels"), [("SEQ_CLS", 1), ("TOKEN_CLS", 5)])
def test_labels_are_counted_by_the_rows_of_the_head(task: str, labels: int, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    wanted = classifier(base, tmp_path / "adapter", task, labels)
    report = fuse(base, [tmp_path / "adapter"], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {str(row): f"LABEL_{row}" for row in range(labels)}
    assert any("no names for them" in note.what for note in report.notes)
    found = computed(tmp_path / "out", task)
    assert found.shape == wanted.shape
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_two_labels_need_no_word(tmp_path: Path) -> None:
    """A config that says nothing means two."""
    base = base_of(tmp_path / "base")
    classifier(base, tmp_path / "adapter", "SEQ_CLS", 2)
    report = fuse(base, [tmp_path / "adapter"], tmp_path / "out")
    assert "id2label" not in report.config
    assert not any("no names for them" in note.what for note in report.notes)


def test_verify_counts_the_labels_of_the_config(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    classifier(base, tmp_path / "adapter", "SEQ_CLS", 3)
    fuse(base, [tmp_path / "adapter"], tmp_path / "out")
    assert (
        library.verify(tmp_path / "out", library.Questions(base=str(base))).status == library.PASS
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["id2label"], config["label2id"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    verdict = library.verify(tmp_path / "out", library.Questions(base=str(base)))
    assert verdict.status == library.FAIL
    (said,) = (check.detail for check in verdict.checks if check.name == "config")
    assert said == "config.json counts 2 labels, but the head has 3 rows"
