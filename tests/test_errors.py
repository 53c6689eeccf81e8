"""What errors propose: words that were meant, and nothing that was already given."""

from __future__ import annotations

from pathlib import Path

import pytest
from console import run

from adaptmerge.commands.fuse import FuseOptions, _how_lost
from adaptmerge.commands.fuse.report import AdapterLoss
from adaptmerge.errors import did_you_mean, nearest
from adaptmerge.files.paths import missing
from adaptmerge.merging.settle import _wider
from adaptmerge.schemes.scheme import quantisers
from adaptmerge.tensors.dtypes import BF16, F16, F32, DType

QUANTS = ["same", "bf16", "fp16", "fp32", *quantisers()]
DTYPES = ["bf16", "fp16", "fp32", "bfloat16", "float16", "float32"]


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("int4", QUANTS, "int4-g128"),
        ("nf8", QUANTS, None),
        ("fp8", DTYPES, None),
        ("float64", DTYPES, None),
        ("bfloat", DTYPES, "bfloat16"),
        ("nf4_double", QUANTS, "nf4,double"),
        ("lineer", ["linear", "svd"], "linear"),
        ("slerp", ["linear", "svd"], None),
        ("train", ["run", "verify"], None),
        ("layers.3.q_prj", ["layers.2.q_proj", "layers.3.q_proj"], "layers.3.q_proj"),
    ],
)
def test_a_word_of_another_meaning_is_never_proposed(
    word: str, known: list[str], meant: str | None
) -> None:
    assert nearest(word, known) == meant
    wanted = f"did you mean {meant!r}?" if meant else f"known: {', '.join(known)}"
    assert did_you_mean(word, known) == wanted


def test_a_path_of_another_number_is_not_proposed(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-30").mkdir()
    assert "check the path" in str(missing(tmp_path / "checkpoint-40"))
    assert "did you mean" in str(missing(tmp_path / "chekpoint-30"))


LOST = AdapterLoss(norm=1.0, gain=0.1, sub=0.9, relative=0.0)


@pytest.mark.parametrize(
    ("options", "said", "unsaid"),
    [
        (FuseOptions(rounding="nearest", dtype="bf16"), "--rounding adaptive", "--scales"),
        (FuseOptions(rounding="adaptive", dtype="bf16"), "--dtype fp32", "--rounding"),
        (FuseOptions(dtype="float32"), "pass --allow loss", "wider"),
        (FuseOptions(scales="keep"), "--scales solve", "--rounding"),
        (FuseOptions(quant="fp32"), "pass --allow loss", "--quant"),
    ],
)
def test_what_was_given_is_not_advised(options: FuseOptions, said: str, unsaid: str) -> None:
    sentence = _how_lost(LOST, options)
    assert said in sentence
    assert unsaid not in sentence


@pytest.mark.parametrize(
    ("dtype", "advice"), [(F16, "--dtype bf16 or fp32"), (BF16, "--dtype fp32"), (F32, "smaller")]
)
def test_a_wider_dtype_is_advised_than_was_asked_for(dtype: DType, advice: str) -> None:
    assert advice in _wider(dtype)


def test_verify_does_not_ask_for_the_base_that_was_given(fixtures: Path, tmp_path: Path) -> None:
    tiny = fixtures / "tinyllama"
    run("combine", str(tiny / "lora-r8-perl"), "-o", str(tmp_path / "out"))
    without = run("verify", str(tmp_path / "out"))
    given = run("verify", str(tmp_path / "out"), "--base", str(tiny / "base"))
    assert "pass --base" in without.stdout
    assert "pass --base" not in given.stdout
