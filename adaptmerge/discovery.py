"""How formats, methods and schemes are found: as modules of a package, or entry points of its name."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType
from typing import Any

from adaptmerge.errors import AdaptmergeError


@cache
def modules_in(package: str) -> tuple[Any, ...]:
    """All modules of a package, imported, in the order of their names."""
    root = importlib.import_module(package)
    names = sorted(info.name for info in pkgutil.iter_modules(root.__path__))
    return tuple(importlib.import_module(f"{package}.{name}") for name in names)


def constants_in(package: str, constant: str) -> tuple[Any, ...]:
    """What modules of a package declare under the name of a constant."""
    return tuple(getattr(m, constant) for m in modules_in(package) if hasattr(m, constant))


def collect(package: str, constant: str) -> dict[str, Any]:
    """What modules of a package and other distributions declare, by name.

    Raises AdaptmergeError where two have one name.
    """
    from importlib.metadata import entry_points

    own = constants_in(package, constant)
    table: dict[str, Any] = {}
    for item in (*own, *(e.load() for e in entry_points(group=package))):
        if item.name in table:
            raise AdaptmergeError(
                f"two {package} entries are named {item.name!r}: remove one package"
            )
        table[item.name] = item
    return table


class Registry(ModuleType):
    """A package that, when called, gives all that its `registry` finds: the public function of its name
    works whichever of the two was imported last."""

    def __call__(self) -> Any:
        registry = importlib.import_module(f"{self.__name__}.registry")
        return getattr(registry, self.__name__.rpartition(".")[2])()
