"""The shapes and dtypes that a family's tensors may have: one check for all families.

A rule is written as the axes of a tensor: "out r", "2 n?", "r in *". A number is that size, a name the
same size in all tensors of a module, `_` any size; `?` allows none, `*` stands for a kernel of up to three
more axes. Before a colon stands what the values are if not floats: "whole" numbers, or "any". Several
rules of a tensor are parted by `|`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

from adaptmerge.tensors.dtypes import DType
from adaptmerge.tensors.refs import TensorRef

MOST_KERNEL = 3
KINDS = {"float": "floats", "whole": "whole numbers", "number": "numbers", "any": "values"}
WHOLE = re.compile(r"[IU](8|16|32|64)")


class Malformed(ValueError):
    """A module of an adapter is not what its family stores; one sentence without the module's name."""


class Rule(NamedTuple):
    """One rule, parsed; `more` says that kernel axes may follow."""

    axes: tuple[str, ...]
    more: bool
    kind: str

    @property
    def described(self) -> str:
        """What a tensor must be, for a message."""
        names = [axis.removesuffix("?").lstrip("_") or "any" for axis in self.axes]
        listed = ", ".join([*names, *(["kernel"] if self.more else [])])
        return f"({listed}{',' if len(names) == 1 else ''})"

    def fits(self, ref: TensorRef) -> bool:
        """Whether a tensor has these axes and values of this kind."""
        if not _is_of_kind(ref.dtype, self.kind) or self.axes == ("...",):
            return _is_of_kind(ref.dtype, self.kind)
        least, found = len(self.axes), len(ref.shape)
        if not least <= found <= least + MOST_KERNEL * self.more:
            return False
        axes = [*self.axes, *("_" for _ in ref.shape[least:])]
        return all(map(_fits, axes, ref.shape))

    def sizes(self, ref: TensorRef) -> Iterable[tuple[str, int]]:
        """The named axes and their sizes."""
        named = zip(self.axes, ref.shape, strict=False)
        return [(a.removesuffix("?"), size) for a, size in named if a[0].isalpha()]


def _fits(axis: str, size: int) -> bool:
    if axis.isdecimal():
        return size == int(axis)
    return size > 0 or axis.endswith("?")


def _is_of_kind(dtype: DType, kind: str) -> bool:
    is_float = dtype.is_float and dtype.torch_name is not None
    is_whole = WHOLE.fullmatch(dtype.name) is not None
    return {"float": is_float, "whole": is_whole, "number": is_float or is_whole, "any": True}[kind]


@cache
def rules(text: str) -> tuple[Rule, ...]:
    """The rules that a tensor may follow, one of them."""
    return tuple(_parsed(part.strip()) for part in text.split("|"))


def _parsed(text: str) -> Rule:
    kind, _, axes = text.rpartition(":")
    names = axes.split()
    return Rule(tuple(name for name in names if name != "*"), "*" in names, kind or "float")


def shape_of(ref: TensorRef, text: str, leaf: str = "") -> tuple[int, ...]:
    """The shape of a tensor. Raises Malformed where it has another number of axes, none of what it must
    have, or values of another kind."""
    if any(rule.fits(ref) for rule in rules(text)):
        return ref.shape
    name, known = leaf or ref.name or "a tensor", rules(text)
    if not any(_is_of_kind(ref.dtype, rule.kind) for rule in known):
        raise Malformed(f"{name} has values of {ref.dtype}: expected {KINDS[known[0].kind]}")
    expected = " or ".join(dict.fromkeys(rule.described for rule in known))
    raise Malformed(f"{name} has shape {list(ref.shape)}: expected {expected}")


class Shapes(NamedTuple):
    """The rules of a family, by regular expressions on its leaves."""

    table: Mapping[str, str]

    def rule(self, leaf: str) -> str | None:
        """The rule for a leaf; None where the family states none."""
        return next((text for name, text in self.table.items() if re.fullmatch(name, leaf)), None)

    def check(self, parts: Mapping[str, TensorRef]) -> None:
        """Raises Malformed with all tensors of a module that are not as they must be."""
        problems = []
        for leaf, ref in parts.items():
            text = self.rule(leaf)
            try:
                shape_of(ref, text or "any: ...", leaf)
            except Malformed as problem:
                problems.append(str(problem))
        if problems:
            raise Malformed("; ".join(problems))

    def sizes(self, parts: Mapping[str, TensorRef]) -> dict[str, int]:
        """The sizes by the names of axes. Raises Malformed where tensors of a module disagree."""
        found: dict[str, tuple[int, str]] = {}
        for leaf, ref in parts.items():
            fitting = [rule for rule in rules(self.rule(leaf) or "any: ...") if rule.fits(ref)]
            for name, size in fitting[0].sizes(ref) if fitting else ():
                before, first = found.setdefault(name, (size, leaf))
                if before != size:
                    raise Malformed(
                        f"{first} {list(parts[first].shape)} and {leaf} {list(ref.shape)} disagree: "
                        f"{name} is {before} in one and {size} in the other"
                    )
        return {name: size for name, (size, _) in found.items()}
