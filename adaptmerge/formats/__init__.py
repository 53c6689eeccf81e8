"""One module or package per on-disk format: what it stores, how to detect, read and write it."""

import sys

from adaptmerge.discovery import Registry

sys.modules[__name__].__class__ = Registry
