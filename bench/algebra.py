"""The bare algebra of an SVD merge, from memory to memory, without any code of adaptmerge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

Tensors = Mapping[str, torch.Tensor]
SUFFIX = ".lora_A.weight"


def merge_all(adapters: Sequence[Tensors], *, scale: float, rank: int, workers: int) -> None:
    """The best pair of that rank for `scale` times the sum of the deltas, at every site."""
    names = [name.removesuffix(SUFFIX) for name in adapters[0] if name.endswith(SUFFIX)]

    def merge(name: str) -> None:
        ups = [adapter[f"{name}.lora_B.weight"] for adapter in adapters]
        downs = [adapter[name + SUFFIX] for adapter in adapters]
        _merge(ups, downs, scale, rank)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(merge, names):
            pass
    torch.set_num_threads(before)


def _merge(
    ups: Sequence[torch.Tensor], downs: Sequence[torch.Tensor], scale: float, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    up = torch.cat([value.float() for value in ups], dim=1) * scale
    down = torch.cat([value.float() for value in downs])
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(down.T)
    u, sigma, v = torch.linalg.svd(left_core.double() @ right_core.double().T)
    root = sigma[:rank].sqrt()
    new_up = left @ (u[:, :rank] * root).float()
    new_down = (root[:, None] * v[:rank]).float() @ right.T
    return new_up.bfloat16(), new_down.bfloat16()
