"""AdaMSS: a low-rank delta per cluster of output rows, behind one projection (Zheng et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.families.seeded import global_seed
from adaptmerge.algebra import decompose
from adaptmerge.algebra.factors import Expanded, Factor, Leaf, Product
from adaptmerge.algebra.linalg import working
from adaptmerge.lazy import torch
from adaptmerge.tensors.dtypes import DType
from adaptmerge.tensors.places import places_in
from adaptmerge.tensors.refs import TensorRef, computed, join

SEEDED = 123456789  # of the k-means that PEFT clusters rows with
ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Scattered:
    """The parts (rows of one cluster, rank) block by block, each row put where `rows` says."""

    parts: tuple[TensorRef, ...]
    rows: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.count, sum(part.shape[1] for part in self.parts)

    @property
    def dtype(self) -> DType:
        return self.parts[0].dtype

    def read(self) -> torch.Tensor:
        parts = [working(part.read()) for part in self.parts]
        blocks: torch.Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        rows = places_in(self.rows, len(blocks))
        placed: torch.Tensor = torch.empty_like(blocks).index_copy(0, rows, blocks)
        return placed


@dataclass(frozen=True, slots=True)
class Adamss(Expanded):
    """scatter(up_i down_i) basis[:, start:stop], with ups (rows_i, r_i), downs (r_i, r), basis (r, in).

    rows: the output rows of all clusters, one after the other. Where the base has a bias, the basis has
    one more column, which gives the bias.
    seed: of the decomposition that rows were clustered by; it is kept for those who cluster again.
    """

    family: ClassVar[str] = "adamss"
    ups: tuple[TensorRef, ...]
    downs: tuple[TensorRef, ...]
    basis: TensorRef
    rows: TensorRef
    start: int
    stop: int
    seed: int

    def expand(self) -> Factor:
        up = computed(Scattered(self.ups, self.rows))
        down, basis = join(list(self.downs), 0), self.basis.slice(1, self.start, self.stop)
        return Product((Leaf(up), Leaf(down), Leaf(basis)))


def clustered_rows(weight: torch.Tensor, rank: int, clusters: int, seed: int) -> list[list[int]]:
    """The rows of each cluster of a weight (out, in), its bias beside it: k-means of the rows of U of a
    random rank-`rank` SVD. Raises ImportError without scikit-learn."""
    from sklearn.cluster import KMeans

    with global_seed(seed):
        left, _, _ = decompose.svd_lowrank(weight.float(), min(rank, *weight.shape), 2)
    count = min(clusters, weight.shape[0])
    means = KMeans(count, init="random", n_init=1, max_iter=ROUNDS, random_state=SEEDED)
    owners = torch.from_numpy(means.fit_predict(left.numpy()))
    return [torch.where(owners == index)[0].tolist() for index in range(count)]
