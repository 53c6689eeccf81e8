"""VB-LoRA: vblora_logits_A (r, in / length, vectors), _B (out / length, r, vectors), and one vector bank.

With save_only_topk_weights: instead of logits the indices of the topk vectors and all but one weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from adaptmerge.adapters.families.vblora import BankChoice, BankLogits, VbLora
from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.adapters.weight_edits import Add
from adaptmerge.formats.peft.additive import integer
from adaptmerge.formats.peft.read import each_module
from adaptmerge.formats.peft.shared import uncut
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Spelling, Tuner
from adaptmerge.tensors.refs import TensorRef

DOWN, UP, BANK = "vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"
INDICES, WEIGHTS = "_topk_indices", "_topk_weights"


def read(reading: Reading) -> list[Edit]:
    """Sides mixed from the bank that is stored once."""
    bank = reading.shared(BANK)
    if bank is None:
        raise Malformed(f"base_model.{BANK} is missing: no side can be put together without it")
    expected = (reading.setting("num_vectors"), reading.setting("vector_length"))
    if bank.shape != expected:
        raise Malformed(
            f"the vector bank has shape {list(bank.shape)}, but the config says {list(expected)}"
        )
    return each_module(reading, partial(_edit, bank=bank))


def _edit(reading: Reading, module: str, parts: Parts, bank: TensorRef) -> list[Edit]:
    up, down = (_choice(reading, parts, leaf, bank) for leaf in (UP, DOWN))
    rank = reading.setting("r")
    if (up.grid[1], down.grid[0]) != (rank, rank):
        raise Malformed(
            f"has ranks {up.grid[1]} (B) and {down.grid[0]} (A), but the config says r = {rank}"
        )
    return [Add(Site(module), VbLora(up, down, bank))]


def _choice(reading: Reading, parts: Parts, leaf: str, bank: TensorRef) -> BankLogits | BankChoice:
    topk = integer(reading, "topk")
    if leaf + INDICES not in parts:
        logits = parts[leaf]
        _check_shape(leaf, logits, bank.shape[0], "num_vectors")
        if topk > bank.shape[0]:
            raise Malformed(f"topk is {topk}: expected 1 to num_vectors, {bank.shape[0]}")
        return BankLogits(logits, topk)
    if not reading.setting("save_only_topk_weights"):
        raise Malformed(
            f"{leaf}{INDICES} is stored, but save_only_topk_weights is false, so that PEFT would not "
            "read it: set it to true in the config"
        )
    indices, weights = parts[leaf + INDICES], parts[leaf + WEIGHTS]
    _check_shape(leaf + INDICES, indices, topk, "topk")
    _check_shape(leaf + WEIGHTS, weights, topk - 1, "topk - 1")
    if indices.shape[:2] != weights.shape[:2]:
        raise Malformed(
            f"{leaf}{INDICES} {list(indices.shape)} and {leaf}{WEIGHTS} {list(weights.shape)} are no pair"
        )
    return BankChoice(indices, weights)


def _check_shape(leaf: str, ref: TensorRef, last: int, why: str) -> None:
    if len(ref.shape) != 3 or ref.shape[-1] != last:
        raise Malformed(
            f"{leaf} has shape {list(ref.shape)}: expected three axes, the last of {last} ({why})"
        )


def tensors(edit: Add) -> Parts:
    found: dict[str, TensorRef] = {}
    for leaf, choice in ((UP, _factor(edit).up), (DOWN, _factor(edit).down)):
        if isinstance(choice, BankLogits):
            found[leaf] = choice.values
        else:
            found |= {leaf + INDICES: choice.indices, leaf + WEIGHTS: choice.weights}
    return found


def settings(edit: Add) -> Mapping[str, Any]:
    choice = _factor(edit).up
    logits = isinstance(choice, BankLogits)
    topk = choice.topk if isinstance(choice, BankLogits) else choice.indices.shape[-1]
    return {"r": choice.grid[1], "topk": topk, "save_only_topk_weights": not logits}


def shared(edits: Sequence[Add]) -> Spelling:
    bank = uncut((_factor(edit).bank for edit in edits), "the vector bank")
    sizes = {"num_vectors": bank.shape[0], "vector_length": bank.shape[1]}
    return Spelling({f"base_model.{BANK}": bank}, sizes)


def _factor(edit: Add) -> VbLora:
    assert isinstance(edit.factor, VbLora)
    return edit.factor


TUNER = Tuner(
    "VBLORA",
    summary="B A, put together from vectors of one bank",
    shapes={
        "vblora_logits_[AB]": "_a _b _vectors",
        "vblora_logits_[AB]_topk_indices": "whole: _a _b _topk",
        "vblora_logits_[AB]_topk_weights": "_a _b _topk?",
        "vblora_vector_bank": "vectors length",
    },
    leaves=tuple(leaf + end for leaf in (DOWN, UP) for end in ("", INDICES, WEIGHTS)),
    read=read,
    tensors=tensors,
    settings=settings,
    shared=shared,
    maths={
        "r": 4,
        "num_vectors": 256,
        "vector_length": 256,
        "topk": 2,
        "save_only_topk_weights": False,
    },
    training=frozenset({"vblora_dropout", "init_vector_bank_bound", "init_logits_std"}),
    bias_mode="vblora_only",
    as_lora="exact",
    merges="exact sum of the LoRAs that they are",
)
