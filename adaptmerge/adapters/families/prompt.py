"""Prompts: learned embeddings in front of the input's (Lester et al. 2021; Liu et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.graph import Site
from adaptmerge.lazy import torch
from adaptmerge.tensors.dtypes import DType
from adaptmerge.tensors.refs import Shape, TensorRef


@dataclass(frozen=True, slots=True)
class Prompt:
    """Virtual tokens before the input embeddings: the first n of `values` (parts * n, dim).

    family: "prompt_tuning", or "p_tuning" and "cpt", which reach the same by other trainings. parts: 2
    where encoder-decoder models have as many rows again, which nothing reads. task: what the model is
    for, in PEFT's words ("CAUSAL_LM"); it leaves a prompt out where this is not said.
    """

    kind: ClassVar[str] = "prompt"
    site: Site
    values: TensorRef
    family: str = "prompt_tuning"
    parts: int = 1
    task: str | None = None

    @property
    def length(self) -> int:
        """The number of virtual tokens."""
        return self.values.shape[0] // self.parts

    def embeddings(self) -> torch.Tensor:
        """(n, dim), as stored."""
        return self.values.slice(0, 0, self.length).read()


@dataclass(frozen=True, slots=True)
class MultitaskPrompt:
    """Prompts of several tasks: values * (columns[task] @ rows[task]) (Wang et al. 2023).

    values (parts * n, dim), columns (tasks, parts * n, r), rows (tasks, r, dim).
    """

    kind: ClassVar[str] = "multitask_prompt"
    family: ClassVar[str] = "multitask_prompt_tuning"
    site: Site
    values: TensorRef
    columns: TensorRef
    rows: TensorRef
    parts: int = 1
    task: str | None = None

    @property
    def why(self) -> str:
        """Why it cannot be run as it is."""
        tasks = self.columns.shape[0]
        return f"holds prompts of {tasks} tasks: name one with ?task=N, N from 0 to {tasks - 1}"


@dataclass(frozen=True, slots=True)
class TaskPrompt:
    """The prompt of one task: values * (columns @ rows), (n, dim), from (n, r) and (r, dim)."""

    values: TensorRef
    columns: TensorRef
    rows: TensorRef

    @property
    def shape(self) -> Shape:
        return self.values.shape

    @property
    def dtype(self) -> DType:
        return self.values.dtype

    def read(self) -> torch.Tensor:
        mixed = self.columns.read().double() @ self.rows.read().double()
        prompt: torch.Tensor = (self.values.read().double() * mixed).to(self.dtype.torch)
        return prompt
