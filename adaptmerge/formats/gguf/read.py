"""Reading GGUF adapters: llama.cpp's names back to modules, scales explicit, row orders undone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adaptmerge.adapters.graph import BaseReference, Edit, Kind, Layer, Note, Site
from adaptmerge.adapters.weight_edits import Add
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.bases.llama_cpp import EMBEDDING, Names, rows_problem
from adaptmerge.bases.stored_as import halved
from adaptmerge.errors import InputError
from adaptmerge.files.gguf import GgufFile
from adaptmerge.files.strict_json import capped, quoted
from adaptmerge.formats.format import ReadOptions
from adaptmerge.formats.gguf.write import HUB
from adaptmerge.tensors.refs import TensorRef

SIDES = (".lora_a", ".lora_b")
ALPHA = "adapter.lora.alpha"
TOKENS = "adapter.alora.invocation_tokens"

Pairs = dict[str, dict[str, TensorRef]]


def check_kind(file: GgufFile, origin: str) -> None:
    """Refuses what is GGUF, but no LoRA."""
    values = file.values
    kind, architecture = values.get("general.type"), values.get("general.architecture")
    if architecture == "controlvector":
        raise InputError(
            "is a control vector: it adds to activations, not to weights", where=origin
        )
    if kind != "adapter":
        found = f"general.type is {kind!r}" if kind else "it has no general.type"
        raise InputError(f"is GGUF but no adapter ({found}): name a LoRA adapter", where=origin)
    if values.get("adapter.type") != "lora":
        raise InputError(
            f"is an adapter of type {values.get('adapter.type')!r}, expected 'lora'", where=origin
        )
    if TOKENS in values:
        raise InputError(
            "acts only on tokens after its invocation (aLoRA), and cannot be read as a plain LoRA",
            where=origin,
        )


def base_reference(values: Mapping[str, Any]) -> BaseReference:
    """The hub id of the base where its address is given, else its name."""
    url = _text(values, "general.base_model.0.repo_url") or ""
    name = _text(values, "general.base_model.0.name")
    name = url.removeprefix(HUB) if url.startswith(HUB) else name
    return BaseReference(name=name, revision=_text(values, "adaptmerge.base_revision"))


def _text(values: Mapping[str, Any], key: str) -> str | None:
    found = values.get(key)
    return found if isinstance(found, str) else None


class Contents:
    """The tensors of one file as edits, with all problems gathered."""

    def __init__(self, file: GgufFile, names: Names, options: ReadOptions) -> None:
        self.file, self.names = file, names
        self.problems: list[str] = []
        self.notes: list[Note] = []
        self.alpha = self._alpha(file.values.get(ALPHA, options.alpha))

    def read(self, origin: str) -> tuple[tuple[Edit, ...], tuple[Note, ...]]:
        """Edits in the order of the file, and Notes."""
        self._check_architecture()
        self.problems += [
            f"{quoted(name)} is stored as {kind}: write the adapter as f32, f16 or bf16"
            for name, kind in self.file.others.items()
        ]
        quantised = {name[:-7] for name in self.file.others if name.endswith(SIDES)}
        pairs = {name: sides for name, sides in self._pairs().items() if name not in quantised}
        edits = [self._edit(name, sides) for name, sides in pairs.items()]
        if self.problems:
            raise InputError(capped(self.problems), where=origin)
        return tuple(edit for edit in edits if edit is not None), tuple(self.notes)

    def _alpha(self, found: object) -> float:
        """One for all tensors; 0 and none at all say that they are not scaled."""
        if found is None:
            return 0.0
        if not isinstance(found, int | float) or not math.isfinite(found):
            self.problems.append(f"{ALPHA} is {quoted(found)}: expected a number")
            return 0.0
        return float(found)

    def _check_architecture(self) -> None:
        found, expected = self.file.values.get("general.architecture"), self.names.architecture.name
        if found != expected:
            self.problems.append(
                f"is for llama.cpp's architecture {found!r}, but the base "
                f"{self.names.base.path.name} is {expected!r}: pass its own base"
            )

    def _pairs(self) -> Pairs:
        """Sides by base tensor; Notes for norms, problems for everything else."""
        pairs: Pairs = {}
        for name, ref in self.file.refs.items():
            if name.endswith(SIDES):
                pairs.setdefault(name[:-7], {})[name[-6:]] = ref
            elif name.endswith("_norm.weight"):
                ignored = "a norm stored whole was left out, as llama.cpp ignores it"
                self.notes.append(Note(Kind.DROPPED, ignored, site=name))
            else:
                self.problems.append(
                    f"{quoted(name)} is no side of a LoRA: expected .lora_a or .lora_b"
                )
        return pairs

    def _edit(self, tensor: str, sides: Mapping[str, TensorRef]) -> Edit | None:
        module = self.names.module(tensor)
        found = self._side_problems(tensor, sides)
        if module is None and not found:
            found = [self._nameless(tensor)]
        if found or module is None:
            self.problems += found
            return None
        a, b = sides["lora_a"], sides["lora_b"]
        rank = b.shape[1]
        scale = self.alpha / rank if self.alpha else 1.0
        if tensor == EMBEDDING:
            return Add(Site(module, "weight", Layer("embedding")), low_rank(a, b.T, scale))
        heads = self.names.heads(tensor)
        if heads is not None:
            self.problems += (wrong := rows_problem(module, b, heads))
            b = b if wrong else halved(b, heads)
        return Add(Site(module), low_rank(b, a, scale))

    def _side_problems(self, tensor: str, sides: Mapping[str, TensorRef]) -> list[str]:
        missing = [side for side in ("lora_a", "lora_b") if side not in sides]
        if missing:
            return [f"{quoted(tensor)}: {missing[0]} is missing"]
        a, b = sides["lora_a"].shape, sides["lora_b"].shape
        if len(a) == len(b) == 3:
            return [f"{quoted(tensor)}: LoRA on experts that are stored together is not read yet"]
        rank = a[-1] if tensor == EMBEDDING else a[0]
        if len(a) != 2 or len(b) != 2 or rank != b[1] or not rank:
            return [f"{quoted(tensor)}: lora_a {list(a)} and lora_b {list(b)} are no pair"]
        return []

    def _nameless(self, tensor: str) -> str:
        label, base = f"{quoted(tensor)}: the base {self.names.base.path.name}", self.names.base
        if not base.tensors:
            return f"{label} has only a config: its weights are needed to find the module"
        return f"{label} has no such weight: is the adapter for another model?"
