"""Poly: poly_lora_A, poly_lora_B and poly_router.module_logits for all tasks; ?task=N reads one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptmerge.adapters.families.poly import Poly, PolyTask
from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.adapters.weight_edits import Add
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner

DOWN, UP, LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    """All tasks as they are stored, or the LoRA of the task that was asked for."""
    up, down, logits = (parts[leaf] for leaf in (UP, DOWN, LOGITS))
    _check(reading, parts)
    task = reading.options.task
    if task is None:
        return [Poly(Site(module), up, down, logits)]
    if task >= logits.shape[0]:
        raise Malformed(f"?task={task}: expected one of its tasks, 0 to {logits.shape[0] - 1}")
    return [Add(Site(module), PolyTask(up, down, logits, task))]


def _check(reading: Reading, parts: Parts) -> None:
    if reading.setting("poly_type") != "poly":
        raise Malformed(f"poly_type is {reading.setting('poly_type')!r}: expected 'poly'")
    splits, skills, rank, tasks = map(reading.setting, ("n_splits", "n_skills", "r", "n_tasks"))
    up, down, logits = (parts[leaf].shape for leaf in (UP, DOWN, LOGITS))
    found = down[:2], down[3:], up[:3], logits
    expected = (splits, skills), (rank,), (splits, skills, rank), (tasks, splits * skills)
    if found != expected or len(up) != 4:
        raise Malformed(
            f"{DOWN} {list(down)}, {UP} {list(up)} and {LOGITS} {list(logits)} are not of {tasks} tasks, "
            f"{splits} splits, {skills} skills and rank {rank}, as the config says"
        )


def tensors(edit: Poly) -> Parts:
    return {DOWN: edit.down, UP: edit.up, LOGITS: edit.logits}


def settings(edit: Edit) -> Mapping[str, Any]:
    """Those of all tasks; the LoRA of one has none here."""
    if not isinstance(edit, Poly):
        return {}
    splits, skills, _, rank = edit.down.shape
    tasks = edit.logits.shape[0]
    return {
        "r": rank,
        "n_tasks": tasks,
        "n_skills": skills,
        "n_splits": splits,
        "poly_type": "poly",
    }


TUNER = Tuner(
    "POLY",
    takes=("task",),
    summary="for each task another mean of several LoRAs",
    shapes={
        "poly_lora_A": "splits skills _part rank",
        "poly_lora_B": "splits skills rank _part",
        r"poly_router\.module_logits": "_tasks _choices",
    },
    leaves=(DOWN, UP, r"poly_router\.module_logits"),
    module=module,
    tensors=tensors,
    settings=settings,
    maths={"r": 8, "n_tasks": 1, "n_skills": 4, "n_splits": 1, "poly_type": "poly"},
    as_lora="exact",
    merges="with ?task=N, exact sum of the LoRAs that they are",
)
