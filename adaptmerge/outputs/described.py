"""What an output says of its inputs and its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from adaptmerge import __version__
from adaptmerge.adapters.graph import Adapter, BaseReference
from adaptmerge.bases.base import Base
from adaptmerge.formats.inputs import Input


def described_result(adapters: Mapping[str, Adapter], base: Base | None) -> Adapter:
    """The result's base, hints and promises: what the inputs agree on."""
    all_of = list(adapters.values())
    names = {a.base.name for a in all_of if a.base.name}
    revisions = {a.base.revision for a in all_of if a.base.revision}
    reference = BaseReference(
        name=all_of[0].base.name or next(iter(sorted(names)), None),
        revision=next(iter(revisions)) if len(revisions) == 1 else None,
        architecture=base.architecture if base else None,
        fingerprint=base.fingerprint if base else None,
        replication=all_of[0].base.replication,
    )
    covers = frozenset().union(*(a.covers for a in all_of))
    return Adapter(
        "default", (), reference, hints=_agreed([a.hints for a in all_of]), covers=covers
    )


def _agreed(hints: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Entries that all inputs spell alike, two levels deep (format, then field)."""
    first, *others = hints
    result: dict[str, Any] = {}
    for key, value in first.items():
        if not all(key in other for other in others):
            continue
        if isinstance(value, Mapping):
            inner = [other[key] for other in others]
            result[key] = {
                k: v for k, v in value.items() if all(k in o and o[k] == v for o in inner)
            }
        elif all(other[key] == value for other in others):
            result[key] = value
    return result


def modules_of(base: Base | None, adapter: Adapter) -> frozenset[str] | None:
    """All modules of the base, spelled as the adapter spells those it has."""
    if base is None or not base.tensors:
        return None
    spelled = {base.locate(edit.site.module): edit.site.module for edit in adapter.edits}
    return frozenset(spelled.get(module, module) for module in base.modules)


def described_input(item: Input, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What a report says of an input."""
    return {
        "name": item.name,
        "source": portable(item.spec.source),
        "format": item.format.name,
        "revision": item.revision,
        "alpha": item.spec.alpha,
        "task": item.spec.task,
        "init": item.spec.init,
        "adapter": item.spec.adapter,
        "base": asdict(item.adapter.base),
        "sha256": dict(hashes),
    }


def portable(source: str) -> str:
    """The source as written, without the folders of an absolute path."""
    return Path(source).name if Path(source).is_absolute() else source


def version_of(package: str) -> str:
    """The installed version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return __version__ if package == "adaptmerge" else "unknown"
