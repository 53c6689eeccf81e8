"""Whether a whole model fits into the memory that is free."""

from __future__ import annotations

from pathlib import Path

from adaptmerge.bases.base import Base
from adaptmerge.lazy import torch

MEMINFO = Path("/proc/meminfo")
BESIDE = 1.25  # times the weights: what loading and a short forward take beside them
WIDE = 4  # bytes of a weight in float32


def why_streamed(base: Base, device: str) -> str:
    """Why a base in float32 is better streamed layer by layer; "" where it fits, or nobody knows."""
    free = free_memory(device)
    needed = int(sum(ref.count for ref in base.tensors.values()) * WIDE * BESIDE)
    if free is None or needed <= free:
        return ""
    return f"streamed: {needed / 1e9:.1f} GB are needed at once, {free / 1e9:.1f} GB are free"


def free_memory(device: str) -> int | None:
    """Bytes that can be had on a device; None where that is not known."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = MEMINFO.read_text("ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None
