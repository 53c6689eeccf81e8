"""One file per merge method: a pure function from weighted edits to a factor expression."""

import sys

from adaptmerge.discovery import Registry

sys.modules[__name__].__class__ = Registry
