"""Adapters of embeddings and heads that are one matrix, on models that call them otherwise: fused models
and merges compute what PEFT computes with base and adapter side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fuse.models import error, fuse
from fuse.tied_models import TIED, TiedModel
from safetensors.torch import load_file, save_file
from tiers import repeats

from adaptmerge.algebra.fit import Budget
from adaptmerge.bases.open import open_base
from adaptmerge.commands.combine import Options, combine
from adaptmerge.commands.extract import Extraction, extract
from adaptmerge.commands.verify import Questions, verify
from adaptmerge.errors import CannotMerge
from adaptmerge.formats.inputs import InputSpec

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT advises the person who trains
TIGHT = 1e-5  # of the adapter's effect
OTHERS = r".*(q_proj|query|\.q|in_proj)"  # modules that are tied to nothing
SIDES = ("embedding", "head")
FIRST = {"whisper": "embedding", "mamba": "head", "t5": "embedding", "bert": "embedding"}
BOTH = [
    (name, side) if FIRST.get(name) == side else repeats(name, side)
    for name in TIED
    for side in SIDES
]
EACH = [name if name in FIRST else repeats(name) for name in TIED]
# Its config unties nothing, or a forward reads the config: what differs is stored for itself.
STAY_TIED = {"t5", "umt5"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def said(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def check(model: TiedModel, base: Path, adapter: Path, wanted: torch.Tensor, out: Path) -> None:
    """Fuses, and looks at what the result computes, at its tensors' names, and at what `verify` says."""
    fuse(base, [adapter], out)
    assert error(model.computed(out), wanted, model.plain()) < TIGHT
    assert weights(out).keys() - weights(base).keys() <= model.tied | {
        "cls.predictions.decoder.bias"
    }
    if model is not TIED["whisper"]:  # whose inputs are no tokens
        assert verify(out, Questions(str(base), {adapter.name: str(adapter)})).status == "pass"


@pytest.mark.parametrize(("name", "side"), BOTH)
def test_low_rank_deltas(name: str, side: str, tmp_path: Path) -> None:
    model = TIED[name]
    base = model.base(tmp_path / "base")
    wanted = model.trained(tmp_path / "a", target_modules=[getattr(model, side)])
    check(model, base, tmp_path / "a", wanted, tmp_path / "out")
    tie = said(tmp_path / "out").get("tie_word_embeddings", True)
    assert tie is (name in STAY_TIED)


@pytest.mark.parametrize(("name", "side"), BOTH)
def test_matrices_that_are_stored_whole(name: str, side: str, tmp_path: Path) -> None:
    model = TIED[name]
    base = model.base(tmp_path / "base")
    wanted = model.trained(
        tmp_path / "a", target_modules=OTHERS, modules_to_save=[getattr(model, side)]
    )
    check(model, base, tmp_path / "a", wanted, tmp_path / "out")


@pytest.mark.parametrize("name", EACH)
def test_rows_of_tokens_stay_those_of_all_that_is_tied(name: str, tmp_path: Path) -> None:
    """Rows of what the class calls its input embedding, put into the one matrix of the real model. PEFT
    does the same, but for a head's bias, which it leaves out then."""
    model = TIED[name]
    base = model.base(tmp_path / "base")
    found = model.trained(tmp_path / "a", target_modules=OTHERS, trainable_token_indices=[5, 7])
    wanted = model.with_rows(tmp_path / "a", [5, 7])
    assert name == "bert" or error(found, wanted, model.plain()) < TIGHT
    check(model, base, tmp_path / "a", wanted, tmp_path / "out")
    assert weights(tmp_path / "out").keys() == weights(base).keys()


@pytest.mark.parametrize("name", EACH)
def test_a_merge_of_two(name: str, tmp_path: Path) -> None:
    """Half and half of two merged adapters, fused, is what the two fused at these weights are."""
    model = TIED[name]
    base = model.base(tmp_path / "base")
    for side in SIDES:
        model.trained(tmp_path / side, target_modules=[getattr(model, side)])
    specs = [InputSpec(str(tmp_path / side), weight=0.5) for side in SIDES]
    combine(specs, tmp_path / "merged", Options(base=str(base)))
    if model is not TIED["whisper"]:  # whose inputs are no tokens
        found = verify(tmp_path / "merged", Questions(str(base)))
        assert found.status == "pass", found
    fuse(base, {tmp_path / "embedding": 0.5, tmp_path / "head": 0.5}, tmp_path / "at once")
    fuse(base, [tmp_path / "merged"], tmp_path / "out")
    once = model.computed(tmp_path / "at once")
    assert error(model.computed(tmp_path / "out"), once, model.plain()) < TIGHT
    assert weights(tmp_path / "out").keys() == weights(tmp_path / "at once").keys()


def test_keeping_what_is_tied(tmp_path: Path) -> None:
    model = TIED["whisper"]
    base = model.base(tmp_path / "base")
    model.trained(tmp_path / "a", target_modules=["embed_tokens"])
    with pytest.raises(CannotMerge, match="proj_out do not all change alike, which are one matrix"):
        fuse(base, [tmp_path / "a"], tmp_path / "out", keep_tied=True)


def test_a_type_that_transformers_does_not_know(tmp_path: Path) -> None:
    """Its config and tensors say what is tied; the head has its usual name, or the adapter's."""
    model = TIED["llama"]
    base = model.base(tmp_path / "base")
    config = said(base)
    config |= {"model_type": "of_our_own", "architectures": ["OurOwn"]}
    (base / "config.json").write_text(json.dumps(config))
    assert not open_base(str(base)).ties.by_class
    for target in ("embed_tokens", "lm_head"):
        wanted = model.trained(tmp_path / target, target_modules=[target])
        out = tmp_path / f"out {target}"
        fuse(base, [tmp_path / target], out)
        assert weights(out).keys() - weights(base).keys() == {"lm_head.weight"}
        assert said(out)["tie_word_embeddings"] is False
        known = {**said(out), "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        (out / "config.json").write_text(json.dumps(known))
        assert error(model.computed(out), wanted, model.plain()) < TIGHT


def test_matrices_that_are_called_tied_but_differ(tmp_path: Path) -> None:
    """Both are stored, so that they are loaded apart: a change of one leaves the other as it is."""
    model = TIED["mamba"]
    base = model.base(tmp_path / "base")
    tensors = weights(base)
    head = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    save_file({**tensors, "lm_head.weight": head}, base / "model.safetensors", {"format": "pt"})
    model.trained(tmp_path / "a", target_modules=["embeddings"])
    fuse(base, [tmp_path / "a"], tmp_path / "out")
    found = weights(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], head)
    assert not torch.equal(
        found["backbone.embeddings.weight"], tensors["backbone.embeddings.weight"]
    )


@pytest.mark.parametrize("name", ["whisper", "t5", repeats("bert")])
def test_extraction_changes_all_that_is_tied(name: str, tmp_path: Path) -> None:
    model = TIED[name]
    base = model.base(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    moved = {
        key: value + 0.1 * torch.randn(value.shape, generator=generator)
        for key, value in weights(base).items()
    }
    tuned = model.base(tmp_path / "tuned")
    save_file(moved, tuned / "model.safetensors", {"format": "pt"})
    options = Extraction(budget=Budget(rank=32), vectors="full")
    report = extract(str(base), str(tuned), tmp_path / "a", options)
    assert model.tied <= {f"{line.module}.weight" for line in report.sites}
    assert not [note for note in report.notes if note.kind == "assumed"]
    fuse(base, [tmp_path / "a"], tmp_path / "out")
    assert error(model.computed(tmp_path / "out"), model.computed(tuned), model.plain()) < 1e-4


def test_inspecting_on_a_base_builds_no_class_and_needs_no_torch(tmp_path: Path) -> None:
    model = TIED["whisper"]
    base = model.base(tmp_path / "base")
    model.trained(tmp_path / "a", target_modules=["embed_tokens", "proj_out"])
    code = (
        "import sys; from adaptmerge.cli import main; "
        "main([*sys.argv[1:]], standalone_mode=False); "
        "print(sorted({'torch', 'transformers'} & {*sys.modules}))"
    )
    words = ["inspect", str(tmp_path / "a"), "--base", str(base)]
    found = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    assert "2 of 2 modules" in found.stdout
    assert found.stdout.splitlines()[-1] == "[]"
