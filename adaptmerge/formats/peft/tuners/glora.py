"""GLoRA: five supports glora_A ... glora_E, each Xd @ Xu, X, or `zeros` where it is switched off.

W + W * A + B and b + b * D + E + W C. C, D and E are switched off where the base has no bias, whatever
the config says, so the file's names count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adaptmerge.adapters.families.glora import GloraBias, GloraWeight, Support
from adaptmerge.adapters.graph import Edit, Site, fields_of
from adaptmerge.errors import CannotStore
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Spelling, Tuner
from adaptmerge.tensors.refs import TensorRef

FORMS = {
    "config_A_B": ("lora", "vector", "constant", "none"),
    "config_C": ("lora", "vector", "none"),
    "config_D_E": ("vector", "constant", "none"),
}
LEAVES = {"lora": ("Xd", "Xu"), "vector": ("X",), "constant": ("X",), "none": ("zeros",)}


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    for name, known in FORMS.items():
        if reading.setting(name) not in known:
            raise Malformed(
                f"{name} is {reading.setting(name)!r}: expected one of {', '.join(known)}"
            )
    a, b, c, d, e = (_support(parts, f"glora_{letter}") for letter in "ABCDE")
    return [
        GloraWeight(Site(module), a, b),
        GloraBias(Site(module, "bias"), d, e, c, _weight(reading, module, c)),
    ]


def _weight(reading: Reading, module: str, column: Support) -> TensorRef | None:
    if column.form == "none":
        return None
    weight = reading.matrix(module)
    if weight is None:
        raise Malformed(f"its bias takes up the base's weight (glora_C): {reading.advice}")
    width = column.parts[0].shape[0]
    if weight.shape[1] != width:
        raise Malformed(f"glora_C is for {width} inputs, but the base has {weight.shape[1]}")
    return weight


def _support(parts: Parts, name: str) -> Support:
    if f"{name}.Xd" in parts:
        down, up = parts[f"{name}.Xd"], parts[f"{name}.Xu"]
        if down.shape[1] != up.shape[0]:
            shapes = f"{name}.Xd {list(down.shape)} and {name}.Xu {list(up.shape)}"
            raise Malformed(f"{shapes} do not multiply")
        return Support("lora", (down, up))
    if f"{name}.zeros" in parts:
        return Support("none", (parts[f"{name}.zeros"],))
    value = parts[f"{name}.X"]
    return Support("constant" if value.shape == (1,) else "vector", (value,))


def tensors(edit: GloraWeight | GloraBias) -> Parts:
    letters = {"A": "scale", "B": "shift"}
    if isinstance(edit, GloraBias):
        letters = {"C": "column", "D": "scale", "E": "shift"}
    return {
        f"glora_{letter}.{leaf}": ref
        for letter, field in letters.items()
        for leaf, ref in _leaves(fields_of(edit)[field])
    }


def _leaves(support: Support) -> list[tuple[str, TensorRef]]:
    return list(zip(LEAVES[support.form], support.parts, strict=True))


def shared(edits: Sequence[GloraWeight | GloraBias]) -> Spelling:
    """The one form of each pair of supports that is used anywhere, and the rank of those that have one."""
    used: dict[str, list[Support]] = {name: [] for name in FORMS}
    for edit in edits:
        if isinstance(edit, GloraBias):
            used["config_D_E"] += [edit.scale, edit.shift]
            used["config_C"].append(edit.column)
        else:
            used["config_A_B"] += [edit.scale, edit.shift]
    fields: dict[str, Any] = {name: _form(name, found) for name, found in used.items()}
    ranks = {s.parts[1].shape[0] for found in used.values() for s in found if s.form == "lora"}
    return Spelling({}, {**fields, **_rank(ranks)})


def _form(name: str, supports: Sequence[Support]) -> str:
    forms = sorted({support.form for support in supports} - {"none"})
    if len(forms) > 1:
        raise CannotStore(f"GLORA has one {name} for all modules, here are {' and '.join(forms)}")
    return forms[0] if forms else "none"


def _rank(ranks: set[int]) -> Mapping[str, int]:
    if len(ranks) > 1:
        raise CannotStore(f"GLORA has one rank for all modules, here are {sorted(ranks)}")
    return {"r": ranks.pop()} if ranks else {}


TUNER = Tuner(
    "GLORA",
    summary="W + W * A + B and b + b * D + E + W C",
    shapes={
        r"glora_[AB]\.Xd": "out _r",
        r"glora_[AB]\.Xu": "_r in",
        r"glora_C\.Xd": "in _r",
        r"glora_C\.Xu": "_r 1",
        r"glora_[AB]\.X": "1 | 1 1 | out 1",
        r"glora_C\.X": "in 1",
        r"glora_[DE]\.X": "1 | out",
        r"glora_[A-E]\.zeros": "number: ...",
    },
    leaves=(r"glora_[A-E]\.(?:Xd|Xu|X|zeros)",),
    module=module,
    tensors=tensors,
    shared=shared,
    maths={"r": 8, "config_A_B": "lora", "config_C": "lora", "config_D_E": "constant"},
    bias_mode="glora_only",
    as_lora="base",
    merges="as deltas, with the base",
)
