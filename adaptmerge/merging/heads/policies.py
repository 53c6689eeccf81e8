"""Heads: modules that adapters store whole, what their rows stand for, and what becomes of them.

| policy | heads of one module that differ |
|---|---|
| error | are refused by name |
| NAME | that input's is kept, with its tokens |
| average | the weighted sum, where shapes and labels agree |
| concat | the rows of all, one below the other: a head for several tasks |
| separate | one adapter each in the output, all with the same merged deltas |
| drop | are left out |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from adaptmerge.adapters.graph import Adapter, Edit, Labels, Site
from adaptmerge.adapters.module_paths import is_suffix
from adaptmerge.adapters.stored_edits import owner_of, role_of, saved_module, stored_value
from adaptmerge.bases.base import Base
from adaptmerge.bases.ties import called_vocabulary
from adaptmerge.errors import UsageError, did_you_mean
from adaptmerge.methods.method import Member
from adaptmerge.tensors.refs import TensorRef

ERROR, AVERAGE, CONCAT, SEPARATE, DROP = "error", "average", "concat", "separate", "drop"
WORDS = (ERROR, AVERAGE, CONCAT, SEPARATE, DROP)
ALL = "*"  # stands for every module in a table of policies
SHOWN = 12  # labels listed at once
UNNAMED = re.compile(r"LABEL_\d+")  # what transformers calls labels that nobody named

Given = str | Sequence[str] | Mapping[str, str] | None


@dataclass(frozen=True, slots=True)
class Policies:
    """A policy word, or the name of an input, for all heads and for those of some modules."""

    default: str = ERROR
    modules: tuple[tuple[str, str], ...] = ()

    def of(self, module: str) -> str:
        """The policy of a module: the last that names it or its end, else that of all."""
        found = [word for name, word in self.modules if is_suffix(name, module)]
        return found[-1] if found else self.default

    def chosen(self, module: str) -> str | None:
        """The input whose head is kept, where that is the policy."""
        word = self.of(module)
        return None if word in WORDS else word

    @property
    def words(self) -> tuple[str, ...]:
        return (self.default, *(word for _, word in self.modules))

    def as_json(self) -> str | dict[str, str] | None:
        """As a recipe spells it: nothing, one word, or module to word."""
        if not self.modules:
            return None if self.default == ERROR else self.default
        return {ALL: self.default, **dict(self.modules)}


def policies(given: Given, names: Iterable[str] = ()) -> Policies:
    """The policies of WORD, MODULE=WORD, several of them, or a table; `names` are those of inputs."""
    known = frozenset(names)
    pairs = [_pair(text, known) for text in ([given] if isinstance(given, str) else given or ())]
    table = dict(given.items() if isinstance(given, Mapping) else pairs)
    default = table.pop(ALL, ERROR)
    return Policies(default, tuple(table.items()))


def _pair(text: str, names: frozenset[str]) -> tuple[str, str]:
    module, equals, word = text.rpartition("=")
    return (module, word) if equals and text not in names else (ALL, text)


def check_policies(found: Policies, adapters: Mapping[str, Adapter]) -> None:
    """Raises UsageError for a word that is no policy and no input, or a module that has no head."""
    names = list(adapters)
    for word in found.words:
        if word in WORDS and word in names and word != ERROR:
            raise UsageError(
                f"--heads {word}: is a policy, and an input has that name: call the input otherwise "
                f"(NAME={word})"
            )
        if word not in WORDS and word not in names:
            raise UsageError(
                f"--heads {word}: no input has that name ({', '.join(names)}), and the policies are "
                f"{', '.join(WORDS)}"
            )
    stored = sorted({m for a in adapters.values() for e in a.edits for m in _modules(e)})
    for module, word in found.modules:
        if not any(is_suffix(module, path) for path in stored):
            hint = did_you_mean(module, stored) if stored else "no input has one"
            raise UsageError(f"--heads {module}={word}: no head is at that module: {hint}")


def _modules(edit: Edit) -> tuple[str, ...]:
    return (owner_of(edit),) if edit.kind in ("replace", "rows") else ()


def is_vocabulary(module: str, base: Base | None) -> bool:
    """Whether the rows of a module are tokens, as the base knows; by its name where there is none."""
    return called_vocabulary(module) if base is None else base.holds_tokens(module)


@dataclass(frozen=True, slots=True)
class Head:
    """A module that an adapter stores whole; `listed`: in modules_to_save, or what stands for it."""

    owner: str
    edits: tuple[Edit, ...]
    labels: Labels | None
    listed: bool

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its parameters, by name inside the head."""
        return {
            f"{e.site.module}.{e.site.param}".removeprefix(f"{self.owner}."): stored_value(e).shape
            for e in self.edits
        }


def heads_of(adapter: Adapter) -> list[Head]:
    """The heads of an adapter, in the order they are stored."""
    found: dict[str, list[Edit]] = {}
    for edit in adapter.edits:
        if saved_module(edit):
            found.setdefault(owner_of(edit), []).append(edit)
    return [
        Head(owner, tuple(edits), adapter.labels.get(owner), _is_listed(edits))
        for owner, edits in found.items()
    ]


def _is_listed(edits: Sequence[Edit]) -> bool:
    return all(role_of(edit) == "head" for edit in edits)


def are_named(labels: Labels | None) -> bool:
    """Whether labels say anything: LABEL_0, LABEL_1, ... are what a model has that was given none."""
    return labels is not None and not all(UNNAMED.fullmatch(name) for name in labels.names)


def shown(labels: Labels) -> str:
    """The first labels as text for a terminal, and how many more there are."""
    names = [name if name.isprintable() else repr(name)[1:-1] for name in labels.names[:SHOWN]]
    rest = len(labels.names) - SHOWN
    return ", ".join(names) + (f" and {rest} more" if rest > 0 else "")


def own_parameter(base: Base | None, site: Site) -> TensorRef | None:
    """The base's own value of a parameter; of a head that it ties to its embedding, the embedding's."""
    return base.parameter(site) if base else None


def union(members: Sequence[Member], labels: Mapping[str, Labels | None]) -> Labels:
    """The labels of heads one below the other; what is not told apart gets its input's name."""
    spelled = [(m.adapter, name) for m in members for name in row_names(m, labels[m.adapter])]
    names = [name for _, name in spelled]
    plain = {name for name in names if names.count(name) == 1 and not name.isdecimal()}
    return Labels(tuple(n if n in plain else f"{adapter}/{n}" for adapter, n in spelled))


def row_names(member: Member, labels: Labels | None) -> tuple[str, ...]:
    """The labels of the rows of a member's last layer, or their numbers."""
    rows = stored_value(member.edit).shape[0]
    named = labels is not None and len(labels.names) == rows and are_named(labels)
    return labels.names if named and labels is not None else tuple(map(str, range(rows)))
