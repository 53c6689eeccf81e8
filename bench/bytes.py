"""Bits per byte of texts under the tiny Llama with other weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

WINDOW, BATCH = 64, 128
LEAST = 60_000  # characters of a text
FOLDER = Path("fixtures/tinyllama")


@dataclass(frozen=True, slots=True)
class Scored:
    """Bits per byte of a text: of each window, and of all."""

    windows: torch.Tensor

    @property
    def mean(self) -> float:
        return float(self.windows.mean())


class Texts:
    """A folder of NAME.txt with at least 60,000 characters each, of which as many are used."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> str:
        text = (self._folder / f"{name}.txt").read_text(encoding="utf-8")[:LEAST]
        if len(text) < LEAST:
            raise SystemExit(f"{name}.txt has {len(text)} characters, expected {LEAST}")
        return text


class Tiny:
    """The tiny Llama in float32, whose linears' weights are put in its place one after another."""

    def __init__(self, texts: Texts) -> None:
        from tokenizers import Tokenizer
        from transformers import AutoModelForCausalLM

        self.folder, self._texts = FOLDER, texts
        self._tokenizer = Tokenizer.from_file(str(FOLDER / "base" / "tokenizer.json"))
        self._model = AutoModelForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.float32)
        self._model.eval()
        self.weights = {
            name: module.weight.detach().clone()
            for name, module in self._model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
        }

    def scored(
        self, weights: Mapping[str, torch.Tensor], texts: Sequence[str]
    ) -> dict[str, Scored]:
        """The texts under the model with these weights."""
        for name, value in weights.items():
            self._model.get_submodule(name).weight.data.copy_(value)
        return {text: self._scored(self._texts[text]) for text in texts}

    @torch.no_grad()
    def _scored(self, text: str) -> Scored:
        ids = self._tokenizer.encode(text).ids
        rows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
        rows = torch.nn.functional.pad(rows, (1, 0))  # the token that texts begin with
        found = []
        for part in rows.split(BATCH):
            logits = self._model(input_ids=part[:, :-1]).logits.transpose(1, 2)
            found.append(torch.nn.functional.cross_entropy(logits, part[:, 1:], reduction="none"))
        bits = torch.cat(found).double().sum(1) / math.log(2)
        return Scored(bits * (len(ids) / WINDOW / len(text.encode())))
