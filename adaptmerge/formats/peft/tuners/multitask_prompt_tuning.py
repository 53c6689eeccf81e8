"""Multi-task prompt tuning: one prompt times a low-rank matrix per task; ?task=N makes it task N's."""

from __future__ import annotations

from collections.abc import Sequence

from adaptmerge.adapters.families.prompt import MultitaskPrompt, Prompt, TaskPrompt
from adaptmerge.adapters.graph import Edit
from adaptmerge.formats.peft import virtual
from adaptmerge.formats.peft.tuner import Malformed, Reading, Spelling, Tuner
from adaptmerge.tensors.refs import TensorRef, computed

COLUMNS, ROWS = "prefix_task_cols", "prefix_task_rows"


def read(reading: Reading) -> list[Edit]:
    """The prompts of all tasks, or the prompt of the one that was asked for."""
    values = virtual.prompt_values(reading)
    columns, rows = virtual.own(reading, COLUMNS), virtual.own(reading, ROWS)
    _check(values, columns, rows)
    edit = MultitaskPrompt(virtual.SITE, values, columns, rows, *_of(reading))
    task = reading.options.task
    return [edit] if task is None else [_of_task(edit, task)]


def _of(reading: Reading) -> tuple[int, str | None]:
    return virtual.parts(reading), virtual.task_of(reading)


def _check(values: TensorRef, columns: TensorRef, rows: TensorRef) -> None:
    tasks, count, rank = columns.shape if len(columns.shape) == 3 else (0, 0, 0)
    if not tasks or count != values.shape[0] or rows.shape != (tasks, rank, values.shape[1]):
        raise Malformed(
            f"{COLUMNS} {list(columns.shape)} and {ROWS} {list(rows.shape)} do not fit "
            f"{virtual.TENSOR} {list(values.shape)}: expected (tasks, tokens, rank) and (tasks, rank, "
            "dimension)"
        )


def _of_task(edit: MultitaskPrompt, task: int) -> Prompt:
    tasks, count, rank = edit.columns.shape
    if task >= tasks:
        raise Malformed(f"?task={task}: it has {tasks} tasks, from 0 to {tasks - 1}")
    if edit.parts > 1:
        raise Malformed(
            "?task= is for models without a decoder beside an encoder: this one has prompts for both"
        )
    source = TaskPrompt(
        edit.values,
        edit.columns.slice(0, task, task + 1).reshape(count, rank),
        edit.rows.slice(0, task, task + 1).reshape(rank, edit.values.shape[1]),
    )
    name = f"{virtual.TENSOR} of task {task}"
    return Prompt(edit.site, computed(source, name), task=edit.task)


def shared(edits: Sequence[MultitaskPrompt]) -> Spelling:
    (edit,) = edits
    names = {virtual.TENSOR: edit.values, COLUMNS: edit.columns, ROWS: edit.rows}
    tasks, _, rank = edit.columns.shape
    fields = {**virtual.prompt_sizes(edit), "num_tasks": tasks, "num_ranks": rank}
    return Spelling({name: virtual.plain(ref) for name, ref in names.items()}, fields)


TUNER = Tuner(
    "MULTITASK_PROMPT_TUNING",
    takes=("task",),
    summary="a prompt times a low-rank matrix per task; ?task=N takes one task's",
    shapes={
        "prompt_embeddings": "tokens dimension",
        "prefix_task_cols": "tasks tokens rank",
        "prefix_task_rows": "tasks rank dimension",
    },
    read=read,
    tensors=virtual.nothing,
    shared=shared,
    finish=virtual.finish,
    maths={**virtual.SIZES, "num_ranks": 1, "num_tasks": 1},
    training=frozenset(
        {"prompt_tuning_init", "prompt_tuning_init_text", "prompt_tuning_init_task"}
        | {"prompt_tuning_init_state_dict_path", "tokenizer_name_or_path", "tokenizer_kwargs"}
    ),
    prefix=virtual.PREFIX,
    as_lora="never",
    merges="with ?task=N as prompts",
)
