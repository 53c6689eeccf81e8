"""A base model on disk: its config, its tensors as refs, its module names and its fingerprint."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from adaptmerge.adapters import experts
from adaptmerge.adapters.graph import Site
from adaptmerge.adapters.module_paths import layer_index, other_versions, suffixes
from adaptmerge.bases.layers import Layers
from adaptmerge.bases.ties import Ties, called_vocabulary, stated, ties_of, untying
from adaptmerge.errors import InputError
from adaptmerge.tensors.compare import same_values
from adaptmerge.tensors.refs import Stored, TensorRef

# Models and modules whose weights lie (in, out) in their checkpoints (transformers' Conv1D).
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
GGUF = ".gguf"
COMPLEX = "C"  # how the names of such types begin
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
SAMPLE = 1024  # bytes read at each end of a tensor for the fingerprint


class TensorPlace(NamedTuple):
    """Where a parameter lies in a checkpoint: the tensor's name, which of the matrices that it stacks, and
    whether it is stored as (in, out)."""

    name: str
    expert: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Base:
    """A `transformers` checkpoint folder, seen through its headers."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorRef]
    on_disk: Base | None = None  # the base as it lies, where the tensors are what that stands for
    asks_class: bool = (
        True  # whether the model's class may be built, which takes torch and a second
    )

    @cached_property
    def modules(self) -> frozenset[str]:
        """The paths of all modules that hold a tensor, as the checkpoint names them, and of those that
        hold experts, which checkpoints name one by one. A module may have none: see `tied_modules`."""
        held = {name.rpartition(".")[0] for name in self.tensors}
        held |= {f"{one.block}.experts" for name in held if (one := experts.matrix_of(name))}
        return frozenset(held)

    @cached_property
    def ties(self) -> Ties:
        """What the model's class ties, or where there is none the checkpoint."""
        found = ties_of(self.config) if self.asks_class else None
        return stated(self.config, self.tensors) if found is None else found

    @cached_property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """The tensors of the checkpoint that are one parameter, those that it stores first. Tensors that
        are stored with other values are none, whatever the class says: they are loaded apart."""
        groups = (sorted(map(self._named, g), key=self._is_absent) for g in self.ties.groups)
        alike = (self._alike(dict.fromkeys(names)) for names in groups)
        return tuple(names for names in alike if len(names) > 1 and names[0] in self.tensors)

    @cached_property
    def tied_modules(self) -> frozenset[str]:
        """The modules that the checkpoint stores nothing of, since all of it is another module's."""
        return frozenset(n.rpartition(".")[0] for names in self.tied for n in names) - self.modules

    def holds_tokens(self, module: str) -> bool:
        """Whether the rows of a module, or of one in it, are the tokens of the vocabulary."""
        if not self.may_be_tied(module):
            return False
        if not self.ties.by_class:
            return called_vocabulary(module)
        return any(f".{module}." in f".{known}." for known in self.ties.vocabulary)

    @cached_property
    def embedding(self) -> str | None:
        """The tensor that tokens enter by; None where that is not known."""
        found = self.ties.embedding
        return None if found is None else self._named(f"{found}.weight")

    @cached_property
    def head(self) -> str | None:
        """The module that tokens leave by; None where that is not known."""
        found = self.ties.head
        return None if found is None else self._named(f"{found}.weight").removesuffix(".weight")

    def may_be_tied(self, module: str) -> bool:
        """Whether a parameter of a module may be another one, too: cheaply no where every layer has its
        own."""
        return not self._layers.each_has(module)

    @cached_property
    def _layers(self) -> Layers:
        return Layers(self.modules)

    def untied(self, names: tuple[str, ...]) -> dict[str, Any]:
        """The entries of the config with which these tensors are loaded apart; none where no entry has to
        say so, or none can."""
        group = next(g for g in self.ties.groups if {*map(self._named, g)} >= {*names})
        return untying(self.config, group)

    def _named(self, parameter: str) -> str:
        """What the checkpoint calls a parameter of the class, up to a prefix; as the class does where the
        checkpoint has none."""
        module, _, param = parameter.rpartition(".")
        for path in (module, *other_versions(module)):
            longer = [n for n in self._by_suffix.get(path, ()) if _one_longer(n, path)]
            for name in (path, path.partition(".")[2], *(longer if len(longer) == 1 else ())):
                if f"{name}.{param}" in self.tensors:
                    return f"{name}.{param}"
        return self.ties.stored_as.get(parameter, parameter)

    def _is_absent(self, name: str) -> bool:
        return name not in self.tensors

    def _alike(self, names: Iterable[str]) -> tuple[str, ...]:
        first, *others = names
        stored = self.tensors.get(first)
        return (
            first,
            *(
                name
                for name in others
                if name not in self.tensors
                or (stored is not None and same_values(stored, self.tensors[name]))
            ),
        )

    @cached_property
    def expert_layout(self) -> str | None:
        """Whether experts are stored "fused" or "per-expert"; None without experts."""
        if any(experts.matrix_of(name) for name in self.modules):
            return experts.PER_EXPERT
        return experts.FUSED if any(n.endswith(".experts") for n in self.modules) else None

    @cached_property
    def expert_style(self) -> experts.Style | None:
        """How the architecture names the matrices of one expert; None when that is not known."""
        return experts.style_of(self.architecture, sorted(self.modules))

    @cached_property
    def expert_count(self) -> int:
        """How many experts a layer has; 0 without experts."""
        ones = (experts.matrix_of(name) for name in self.modules)
        count = max((one.expert + 1 for one in ones if one), default=0)
        whole = (ref.shape[0] for name, ref in self.tensors.items() if _is_stack(name, ref))
        return count or next(whole, 0)

    @property
    def architecture(self) -> str | None:
        """The model type of the config, e.g. "llama"."""
        found = self.config.get("model_type")
        return str(found) if found else None

    def locate(self, module: str) -> str | None:
        """The checkpoint's name of a module: equal, or equal up to one model prefix, or what another
        version of transformers calls it; None if absent.

        Checkpoints saved without a head leave out the prefix that the model with a head has.
        """
        if module not in self._located:
            self._located[module] = self._found(module)
        return self._located[module]

    @cached_property
    def _located(self) -> dict[str, str | None]:
        """What has been located so far: planning asks for the same modules many times."""
        return {}

    def _found(self, module: str) -> str | None:
        found = (self._near(name) for name in (module, *other_versions(module)))
        stored = next((name for name in found if name is not None), None)
        return stored or self._one_expert(module) or self._of_class(module)

    def _of_class(self, module: str) -> str | None:
        """The name of an embedding or head that the checkpoint has under another name than the class, or
        that it stores nothing of, since it is tied."""
        if not self.may_be_tied(module):
            return None
        renamed = {
            n.rpartition(".")[0]: s.rpartition(".")[0] for n, s in self.ties.stored_as.items()
        }
        known = dict.fromkeys(sorted(self.tied_modules)) | renamed
        for path in (module, *other_versions(module)):
            found = [name for name in known if _is_near(name, path)]
            if found:
                return known[found[0]] or found[0]
        return None

    def _near(self, module: str) -> str | None:
        if module in self.modules:
            return module
        shorter = module.partition(".")[2]
        if shorter in self.modules:
            return shorter
        longer = [name for name in self._by_suffix.get(module, ()) if _one_longer(name, module)]
        return longer[0] if len(longer) == 1 else None

    def _one_expert(self, module: str) -> str | None:
        """The name of one expert's module where the checkpoint stacks all experts."""
        one = experts.matrix_of(module)
        holder = None if one is None else self.locate(f"{one.block}.experts")
        if one is None or holder is None:
            return None
        return holder + module.removeprefix(f"{one.block}.experts")

    @cached_property
    def _by_suffix(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.modules:
            for suffix in suffixes(name):
                found.setdefault(suffix, []).append(name)
        return found

    def parameter(self, site: Site) -> TensorRef | None:
        """The stored parameter at a site, as it lies in the checkpoint; None if there is none.

        One that is tied to another is that. Raises InputError for complex numbers: no edit is for them.
        """
        found = self._parameter(site)
        if found is not None and found.dtype.name.startswith(COMPLEX):
            raise InputError(
                f"{found.name} holds {found.dtype} values: expected real numbers, such as f32 or bf16",
                where=self.path.name,
            )
        return found

    def _parameter(self, site: Site) -> TensorRef | None:
        module = self.locate(site.module)
        if module is None:
            return None
        if site.expert is not None:
            return self._experts.matrix(module, site.param, site.expert)
        stored = self.tensors.get(f"{module}.{site.param}")
        if stored is None and site.param in experts.STACKED:
            return self._experts.stack(module, site.param, self.expert_count)
        if stored is None and site.param == "weight":
            stored = self._experts.part(module)
        return self._partner(module, site.param) if stored is None else stored

    def place(self, site: Site) -> TensorPlace | None:
        """Where the parameter at a site is stored by itself, or as one matrix of a stack; None if neither.

        One that is tied to another has a place that holds nothing yet.
        """
        module = self.locate(site.module)
        if module is None:
            return None
        name, turned = f"{module}.{site.param}", self.is_transposed(site)
        if site.expert is not None:
            stack = self.tensors.get(name)
            found = stack is not None and len(stack.shape) == 3 and site.expert < stack.shape[0]
            return TensorPlace(name, site.expert, turned) if found else None
        held = name in self.tensors or self._partner(module, site.param) is not None
        return TensorPlace(name, None, turned) if held else None

    def _partner(self, module: str, param: str) -> TensorRef | None:
        """The stored parameter that one which is not stored is tied to."""
        if not self.may_be_tied(module):
            return None
        found = (names[0] for names in self.tied if f"{module}.{param}" in names)
        return next((self.tensors[name] for name in found), None)

    @property
    def _experts(self) -> experts.Checkpoint:
        return experts.Checkpoint(self.tensors, self._stacks_transposed)

    @property
    def _stacks_transposed(self) -> bool:
        return self.architecture in experts.TRANSPOSED

    def weight(self, site: Site) -> TensorRef | None:
        """The parameter at a site as edits see it: (out, in) for matrices, kernels flattened."""
        stored = self.parameter(site)
        if stored is None or len(stored.shape) < 2:
            return stored
        if self.is_transposed(site):
            return stored.T if len(stored.shape) == 2 else stored
        return stored.reshape(stored.shape[0], math.prod(stored.shape[1:]))

    def is_transposed(self, site: Site) -> bool:
        """Whether the checkpoint holds the weight as (in, out), as `transformers`' Conv1D does."""
        if site.expert is not None:
            return self._stacks_transposed
        turned = self.architecture in CONV1D_MODELS and site.param == "weight"
        return turned and site.module.rpartition(".")[2] in CONV1D_MODULES

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all names, shapes, dtypes and the first and last bytes of every stored tensor."""
        if self.on_disk is not None:
            return self.on_disk.fingerprint
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            ref = self.tensors[name]
            digest.update(f"{name} {ref.dtype} {list(ref.shape)}\n".encode())
            digest.update(_ends(ref))
        return f"sampled-1:{digest.hexdigest()}"


def replicated(base: Base, ranges: Sequence[tuple[int, int]]) -> Base:
    """The base with copies of its layers in ranges one after the other, as files see it: the tensors of a
    copy are those of the layer that it copies."""
    if not ranges:
        return base
    copies = [index for start, stop in ranges for index in range(start, stop)]
    tensors: dict[str, TensorRef] = {}
    for name, ref in base.tensors.items():
        own = layer_index(name)
        found = [place for place, index in enumerate(copies) if index == own]
        at = [name] if own is None else [_numbered(name, place) for place in found]
        tensors.update(dict.fromkeys(at, ref))
    key = next((key for key in LAYER_COUNTS if key in base.config), LAYER_COUNTS[0])
    return replace(base, tensors=tensors, config={**base.config, key: len(copies)})


def _numbered(name: str, layer: int) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", str(layer), name, count=1)


def _is_stack(name: str, ref: TensorRef) -> bool:
    return name.rpartition(".")[2] in experts.STACKED and len(ref.shape) == 3


def _is_near(name: str, path: str) -> bool:
    """Whether two paths are equal, but for one component before one of them."""
    return path in (name, name.partition(".")[2]) or path.partition(".")[2] == name


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
