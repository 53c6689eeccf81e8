"""A base model on disk: its config, its tensors as refs, its module names and its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adaptmerge.errors import InputError
from adaptmerge.files import hub
from adaptmerge.files.listing import Listing
from adaptmerge.files.refs import Stored, TensorRef
from adaptmerge.graph import Site
from adaptmerge.names import suffixes

WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
# Models and modules whose weights lie (in, out) in their checkpoints (transformers' Conv1D).
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
SAMPLE = 1024  # bytes read at each end of a tensor for the fingerprint


@dataclass(frozen=True)
class Base:
    """A `transformers` checkpoint folder, seen through its headers."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorRef]

    @cached_property
    def modules(self) -> frozenset[str]:
        """The paths of all modules that hold a tensor, as the checkpoint names them."""
        held = {name.rpartition(".")[0] for name in self.tensors}
        return frozenset(held | ({"lm_head"} if self.config.get("tie_word_embeddings") else set()))

    @property
    def architecture(self) -> str | None:
        """The model type of the config, e.g. "llama"."""
        found = self.config.get("model_type")
        return str(found) if found else None

    def locate(self, module: str) -> str | None:
        """The checkpoint's name of a module: equal, or equal up to one model prefix; None if absent.

        Checkpoints saved without a head leave out the prefix that the model with a head has.
        """
        if module in self.modules:
            return module
        shorter = module.partition(".")[2]
        if shorter in self.modules:
            return shorter
        longer = [name for name in self._by_suffix.get(module, ()) if _one_longer(name, module)]
        return longer[0] if len(longer) == 1 else None

    @cached_property
    def _by_suffix(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.modules:
            for suffix in suffixes(name):
                found.setdefault(suffix, []).append(name)
        return found

    def parameter(self, site: Site) -> TensorRef | None:
        """The stored parameter at a site, as it lies in the checkpoint; None if there is none."""
        module = self.locate(site.module)
        return None if module is None else self.tensors.get(f"{module}.{site.param}")

    def weight(self, site: Site) -> TensorRef | None:
        """The parameter at a site as edits see it: (out, in) for matrices, kernels flattened."""
        stored = self.parameter(site)
        if stored is None or len(stored.shape) < 2:
            return stored
        if self.is_transposed(site):
            return stored.T
        return stored.reshape(stored.shape[0], stored.count // stored.shape[0])

    def is_transposed(self, site: Site) -> bool:
        """Whether the checkpoint holds the weight as (in, out), as `transformers`' Conv1D does."""
        turned = self.architecture in CONV1D_MODELS and site.param == "weight"
        return turned and site.module.rpartition(".")[2] in CONV1D_MODULES

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all names, shapes, dtypes and the first and last bytes of every tensor."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            ref = self.tensors[name]
            digest.update(f"{name} {ref.dtype} {list(ref.shape)}\n".encode())
            digest.update(_ends(ref))
        return f"sampled-1:{digest.hexdigest()}"


def _one_longer(name: str, module: str) -> bool:
    return name.count(".") == module.count(".") + 1


def _ends(ref: TensorRef) -> bytes:
    if not isinstance(ref.source, Stored):
        return b""
    with Path(ref.source.path).open("rb") as file:
        file.seek(ref.source.offset)
        head = file.read(min(SAMPLE, ref.nbytes))
        file.seek(ref.source.offset + max(0, ref.nbytes - SAMPLE))
        return head + file.read(min(SAMPLE, ref.nbytes))


def open_base(source: str) -> Base:
    """The base model at a folder or hub id. Raises InputError when it is not a model checkpoint."""
    path, _ = hub.resolve(source)
    listing = Listing.of(path, source)
    if listing.single or not listing.has("config.json"):
        raise InputError(
            "is not a model folder: expected config.json and model weights in it", where=source
        )
    weights = next((name for name in WEIGHT_FILES if listing.has(name)), None)
    tensors = listing.tensors(weights).refs if weights else {}
    return Base(path, listing.json("config.json"), tensors)
