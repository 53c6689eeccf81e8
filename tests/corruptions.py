"""Ways to damage an output: in its bytes, its values, its settings and every figure of its report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

REPORT = "adaptmerge.json"
Damage = Callable[[Path], None]


def reseal(output: Path) -> None:
    """Has the report name all files as they are now, so that only what is in them can be wrong."""
    report = json.loads((output / REPORT).read_text())
    for name in report["files"]:
        report["files"][name] = hashlib.sha256((output / name).read_bytes()).hexdigest()
    (output / REPORT).write_text(json.dumps(report))


def of_bytes(output: Path) -> Iterator[tuple[str, Damage]]:
    """The lowest bit of a byte here and there in every file that was written."""
    for name in json.loads((output / REPORT).read_text())["files"]:
        size = (output / name).stat().st_size
        for share in (0.0, 0.3, 0.6, 0.999):
            at = min(size - 1, int(share * size))
            yield f"byte {at} of {name}", partial(_flip, name, at)


def _flip(name: str, at: int, output: Path) -> None:
    raw = bytearray((output / name).read_bytes())
    raw[at] ^= 1
    (output / name).write_bytes(raw)


def of_values(output: Path) -> Iterator[tuple[str, Damage]]:
    """Tensors scaled, moved, cut, swapped, of another dtype, lost and added."""
    for path in sorted(output.glob("*.safetensors")):
        tensors = load_file(path)
        names = sorted(n for n, value in tensors.items() if value.ndim == 2 and value.numel() > 1)
        for name, other in zip(names, [*names[2:], *names[:2]], strict=True):
            for how in (_scaled, _negated, _zeroed, _one_moved, _not_finite, _rolled):
                yield f"{how.__name__} {name}", partial(_changed, path.name, name, how)
            if tensors[name].shape == tensors[other].shape and other != name:
                swap = partial(_swapped, path.name, name, other)
                yield f"swapped {name} and {other}", swap
        yield f"lost {names[0]}", partial(_lost, path.name, names[0])
        yield f"cut {names[0]}", partial(_changed, path.name, names[0], lambda v: v[:-1].clone())


def _scaled(value: Tensor) -> Tensor:
    return (value.float() * 1.1).to(value.dtype) if value.is_floating_point() else value ^ 1


def _negated(value: Tensor) -> Tensor:
    return -value if value.is_floating_point() else value ^ 128


def _zeroed(value: Tensor) -> Tensor:
    return torch.zeros_like(value)


def _one_moved(value: Tensor) -> Tensor:
    found = value.clone()
    at = int(found.float().abs().argmax())
    found.view(-1)[at] = found.view(-1)[at] * 2 if found.is_floating_point() else 0
    return found


def _not_finite(value: Tensor) -> Tensor:
    found = value.clone()
    found.view(-1)[0] = torch.nan if found.is_floating_point() else found.view(-1)[0] ^ 64
    return found


def _rolled(value: Tensor) -> Tensor:
    return value.roll(1, 0)


def _changed(file: str, name: str, how: Callable[[Tensor], Tensor], output: Path) -> None:
    _rewrite(output / file, lambda tensors: tensors.update({name: how(tensors[name])}))


def _swapped(file: str, one: str, two: str, output: Path) -> None:
    _rewrite(output / file, lambda t: t.update({one: t[two].clone(), two: t[one].clone()}))


def _lost(file: str, name: str, output: Path) -> None:
    _rewrite(output / file, lambda tensors: tensors.pop(name))


def _rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata)


def of_headers(output: Path) -> Iterator[tuple[str, Damage]]:
    """What the headers of files say beside their tensors."""
    for path in sorted(output.rglob("*.safetensors")):
        name = str(path.relative_to(output))
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        for key in metadata:
            yield f"{name} header {key} lost", partial(_relabelled, name, key, None)
            yield (
                f"{name} header {key} changed",
                partial(_relabelled, name, key, f"{metadata[key]} "),
            )
        yield f"{name} header another", partial(_relabelled, name, "another", "x")


def _relabelled(file: str, key: str, value: str | None, output: Path) -> None:
    with safe_open(output / file, "pt") as opened:
        metadata = dict(opened.metadata() or {})
    metadata.pop(key, None)
    if value is not None:
        metadata[key] = f"{value[:-2]}x{value[-2:]}" if value.endswith("} ") else value
    save_file(load_file(output / file), output / file, metadata)


def of_settings(output: Path, file: str) -> Iterator[tuple[str, Damage]]:
    """Every entry of a JSON file changed, dropped and doubled; and one more in every table."""
    for path, value in _entries(json.loads((output / file).read_text())):
        where = f"{file} {_shown(path)}"
        if not (isinstance(value, (dict, list)) and value):
            for number, other in enumerate(_others(value)):
                yield f"{where} #{number}", partial(_edited, file, path, partial(_set, other))
        yield f"{where} dropped", partial(_edited, file, path, _dropped)
        yield f"{where} doubled", partial(_edited, file, path, _doubled)


def _entries(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """All entries of tables and lists, those within others after these."""
    inner = value.items() if isinstance(value, dict) else enumerate(_listed(value))
    for key, found in inner:
        yield (*path, key), found
        yield from _entries(found, (*path, key))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _others(value: Any) -> list[Any]:
    """Other values of the same kind, near and far, and one of another kind."""
    if isinstance(value, bool):
        return [not value, None]
    if isinstance(value, float):
        return [value * 1.01 or 0.01, value * 1.5 + 1, None]
    if isinstance(value, int):
        return [value + 1, value + 0.5, None]
    if isinstance(value, str):
        return [f"{value}x", None]
    return ["x", 1]


def _shown(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _edited(
    file: str, path: tuple[Any, ...], edit: Callable[[Any, Any], None], output: Path
) -> None:
    """Edits the table or list that the last key of the path is in."""
    whole = json.loads((output / file).read_text())
    table = whole
    for key in path[:-1]:
        table = table[key]
    edit(table, path[-1])
    (output / file).write_text(json.dumps(whole))


def _set(value: Any, table: Any, key: Any) -> None:
    table[key] = value


def _dropped(table: Any, key: Any) -> None:
    del table[key]


def _doubled(table: Any, key: Any) -> None:
    """Once more: in a list beside itself, in a table under another name."""
    if isinstance(table, list):
        table.insert(key, table[key])
    else:
        table[f"{key} again"] = table[key]
