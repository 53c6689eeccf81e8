"""Checkpoints quantised by bitsandbytes: the layout of their files, and the codes and scales themselves."""

from __future__ import annotations

from adaptmerge.schemes.bitsandbytes.fresh import FRESH
from adaptmerge.schemes.bitsandbytes.layout import SCHEMES

__all__ = ["FRESH", "SCHEMES"]
