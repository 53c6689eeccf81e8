"""Weights that are quantised anew: which, of what values their scales are taken, and how they are stored.

Scales are what the scheme's library takes for weight plus delta. Where adapters were trained on the base
quantised that very way, they are those of the original weight: then the model is the trained one, on its
own grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from adaptmerge.adapters import experts
from adaptmerge.adapters.graph import Site
from adaptmerge.bases.base import Base
from adaptmerge.commands.fuse.on_base.provenance import RoundTrip
from adaptmerge.commands.fuse.pieces.layout import Recoded, Tensor
from adaptmerge.errors import CannotStore
from adaptmerge.lazy import torch
from adaptmerge.rounding.codes import CodedMatrix
from adaptmerge.rounding.matrix import Matrix, target_rows
from adaptmerge.runtime.linears import linear_layers
from adaptmerge.schemes.coded import CodedWeight
from adaptmerge.schemes.scheme import QUANT_CONFIG, Kept, Quantiser, quantisers
from adaptmerge.schemes.view import View, running_dtype
from adaptmerge.tensors.dtypes import BF16, F32, DType, widest
from adaptmerge.tensors.refs import TensorRef, computed
from adaptmerge.tensors.row_source import RowSource


@dataclass(frozen=True, slots=True)
class Merged(RowSource):
    """A matrix (out, in) with all that is added to it, in float32: a source of refs."""

    matrix: Matrix

    @property
    def at_once(self) -> bool:
        return self.matrix.all_at_once

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape

    def compute(self, start: int, stop: int) -> torch.Tensor:
        return target_rows(self.matrix, (start, stop)).target.float()


@dataclass(frozen=True)
class Anew:
    """How the linear layers of a base are quantised.

    modules: what the model calls them, by the names of their weights. dtype: what the model computes in.
    usual: the linear layers that libraries leave as they are; lost: those that the base does not store.
    """

    quantiser: Quantiser
    modules: Mapping[str, str]
    dtype: DType
    usual: tuple[str, ...]
    lost: tuple[str, ...] = ()

    def coded(self, name: str, matrix: Matrix) -> CodedMatrix:
        """A matrix as it is coded. Raises CannotStore for shapes that there is no room for."""
        source, matrix = matrix.weight.source, replace(matrix, dtype=F32, coded=True)
        if isinstance(source, RoundTrip) and source.trained_on == self.quantiser.name:
            return CodedMatrix(self._coded(name, source.ref), matrix, anew=not matrix.parts)
        values = computed(Merged(matrix), name) if matrix.parts else matrix.weight
        return CodedMatrix(self._coded(name, values), matrix, anew=True)

    def _coded(self, name: str, values: TensorRef) -> CodedWeight:
        return self.quantiser.quantise(name.removesuffix(".weight"), values, self.dtype)

    def config(self, plain: Sequence[str] = ()) -> dict[str, object]:
        """The entries of the config that say how layers are quantised, but for the weights named."""
        chosen = (*self.lost, *(self.modules[name] for name in plain))
        kept = Kept(self.usual, chosen)
        return {QUANT_CONFIG: dict(self.quantiser.config(kept, self.dtype))}


def anew(view: View, name: str, asked: DType | None) -> Anew | None:
    """How the linear layers of a base are quantised where a way to do it is named; None where none is.

    Raises CannotStore for layers that cannot be quantised that way.
    """
    way = quantisers().get(name)
    if way is None:
        return None
    base, layers = view.values, linear_layers(view.values.path)
    names = {module: f"{base.locate(module)}.weight" for module in layers.quantised}
    held = {name: module for module, name in names.items() if name in base.tensors}
    lost = tuple(module for module, name in names.items() if name not in base.tensors)
    turned = [one for one in held if base.is_transposed(Site(one.removesuffix(".weight")))]
    if turned and not way.conv1d:
        raise CannotStore(
            f"--quant {name} is for linear layers, and {len(turned)} are Conv1D: use nf4 or int8",
            where=turned[0],
        )
    if not way.experts:
        _refuse_experts(base, name, held)
    stored = [ref.dtype for one in held if one not in view.coded and (ref := base.tensors[one])]
    usual = running_dtype(view.on_disk.config) or F32 if view.coded else widest(stored or [BF16])
    return Anew(way, held, asked or usual, tuple(layers.kept), lost)


def _refuse_experts(base: Base, name: str, held: Mapping[str, str]) -> None:
    """Raises CannotStore where experts would stay in full precision that no loader then finds."""
    kept = [
        one
        for one in base.tensors
        if one not in held and experts.matrix_of(one.removesuffix(".weight")) is not None
    ]
    if kept:
        raise CannotStore(
            f"--quant {name} leaves experts as they are, which transformers does not load beside packed "
            "layers: use nf4, int8, fp8-channel or gptq-int4-g128",
            where=kept[0],
        )


def tensors_of(coded: CodedMatrix) -> dict[str, Tensor]:
    """The tensors that a coded weight is stored as, all of them made anew together."""
    return {
        name: Tensor(name, ref.dtype, ref.shape, (Recoded(coded, name, ref, leads=number == 0),))
        for number, (name, ref) in enumerate(coded.weight.tensors.items())
    }
