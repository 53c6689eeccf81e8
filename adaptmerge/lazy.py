"""Other packages: torch and numpy, imported on first use, so that `--help` and `inspect` stay instant, and
all of them quiet while they work for us."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    import torch
else:

    class _Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            value = getattr(importlib.import_module(self.__name__), name)
            setattr(self, name, value)
            return value

    torch = _Lazy("torch")
    numpy = _Lazy("numpy")

__all__ = ["numpy", "quietly", "torch", "without_logs"]

# whose advice is for those who call them
CHATTY = ("accelerate", "bitsandbytes", "huggingface_hub", "torch", "transformers")


@contextmanager
def without_logs() -> Iterator[None]:
    """Other packages log errors only while the block runs."""
    before = {name: logging.getLogger(name).level for name in CHATTY}
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def quietly() -> Iterator[None]:
    """No advice of other packages while the block imports or calls them; what fails is still raised."""
    with without_logs(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
