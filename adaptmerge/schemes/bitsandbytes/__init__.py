"""Checkpoints quantised by bitsandbytes: the layout of their files, and the codes and scales themselves."""

from __future__ import annotations

from adaptmerge.schemes.bitsandbytes.layout import SCHEMES
from adaptmerge.schemes.bitsandbytes.quantiser import QUANTISERS

__all__ = ["QUANTISERS", "SCHEMES"]
