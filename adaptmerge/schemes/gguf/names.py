"""The parameters of a GGUF model by the names that modules have in `transformers`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from adaptmerge.adapters import experts
from adaptmerge.adapters.graph import Site
from adaptmerge.bases.gguf_model import GgufModel
from adaptmerge.bases.llama_cpp import HEAD, Names
from adaptmerge.bases.stored_as import StoredAs
from adaptmerge.errors import InputError

EXPERTS = {experts.GATE: "ffn_gate_exps", experts.UP: "ffn_up_exps", experts.DOWN: "ffn_down_exps"}
NORM = "norm.weight"


def stored_as(base: GgufModel) -> dict[str, StoredAs]:
    """How each parameter of the model is stored, by its name in `transformers`; of experts, of which
    llama.cpp stacks all matrices, each by itself.

    Raises InputError where llama.cpp's names are not known, MissingExtra without gguf-py.
    """
    names = Names.of(base, lambda problem: InputError(problem, where=str(base.path)))
    found: dict[str, StoredAs] = {}
    for name in base.parameters:
        one = _stored_as(name, base, names)
        if one is not None:
            found[name] = one
    return found | dict(_experts(base, names.architecture.prefix))


def _stored_as(name: str, base: GgufModel, names: Names) -> StoredAs | None:
    """How a parameter is stored; None where it is not, or is a part of others."""
    module, _, param = name.rpartition(".")
    at = f"{names.table.get_name(module)}.{param}"
    if at not in base.infos and at != HEAD:
        return None
    added = 1.0 if names.architecture.shifted and at.endswith(NORM) else 0.0
    return StoredAs(at, names.heads(at) or 0, added, base.is_transposed(Site(module, param)))


def _experts(base: GgufModel, prefix: str) -> Iterator[tuple[str, StoredAs]]:
    """The matrices of single experts."""
    style = experts.STYLES.get(base.architecture or "")
    layers: Any = base.config.get("num_hidden_layers", 0)
    for layer in range(layers if style is not None else 0):
        assert style is not None
        for part, tensor in EXPERTS.items():
            name = f"blk.{layer}.{tensor}.weight"
            if name in base.infos:
                block = f"{prefix}.layers.{layer}.{style.block or 'mlp'}.experts"
                for i in range(base.infos[name].shape[0]):
                    yield f"{block}.{i}.{style.leaves[part]}.weight", StoredAs(f"{name}[{i}]")
