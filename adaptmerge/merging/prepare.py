"""One way into a merge: inputs opened and weighed, and the question that planning answers of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from adaptmerge.adapters.graph import Adapter, Kind, Note
from adaptmerge.bases.base import Base
from adaptmerge.errors import UsageError
from adaptmerge.files.paths import exists
from adaptmerge.formats.format import Format, Stores
from adaptmerge.formats.inputs import Input, InputSpec, in_natural_order, open_inputs
from adaptmerge.merging.heads.policies import Given, Policies, check_policies, policies
from adaptmerge.merging.request import Request
from adaptmerge.merging.weights import SiteRule, Weights, base_weights, is_checkpoint_schedule
from adaptmerge.methods.registry import method_named


@dataclass(frozen=True, slots=True)
class Merging:
    """What a user may ask of any merge, whatever becomes of the result."""

    method: str = "linear"
    weights: str | None = None
    total: bool = False
    rules: tuple[SiteRule, ...] = ()
    heads: Given = None
    allow: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Opened:
    """The inputs of a merge with their weights and what becomes of their heads."""

    inputs: Sequence[Input]
    merging: Merging
    weights: Weights
    heads: Policies

    @cached_property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters by the names of their inputs."""
        return {item.name: item.adapter for item in self.inputs}

    def request(
        self, adapters: Mapping[str, Adapter], base: Base | None, target: Format, stores: Stores
    ) -> Request:
        """The question to plan for: these adapters, on this base, for a target that stores so much."""
        return Request(
            method=method_named(self.merging.method),
            weights=self.weights,
            target=target,
            stores=stores,
            heads=self.heads,
            adapters=adapters,
            base=base,
            allowed=self.merging.allow,
        )

    @property
    def weight_notes(self) -> list[Note]:
        """A word where several inputs count alike because nothing was said."""
        given = [item.spec.weight for item in self.inputs]
        said = self.merging.weights or self.merging.total or any(w is not None for w in given)
        if said or len(given) < 2:
            return []
        return [unweighted(len(given))]

    @property
    def input_notes(self) -> list[Note]:
        """What reading each input had to say."""
        return [replace(n, input=i.name) for i in self.inputs for n in i.adapter.notes]


def unweighted(count: int) -> Note:
    """What is said of so many inputs that count alike because nothing was said."""
    return Note(Kind.INFO, f"no weights were given: each of {count} inputs counts 1/{count}")


def check_merging(
    specs: Sequence[InputSpec], merging: Merging, allowable: Collection[str], missing: str
) -> None:
    """Raises UsageError for what cannot be asked together; `missing` is said where no input is given."""
    if not specs:
        raise UsageError(missing)
    _refuse_numbers(specs, merging.weights)
    if merging.total and (merging.weights or any(spec.weight is not None for spec in specs)):
        raise UsageError("--sum means weight 1 for each: leave it out, or the weights")
    unknown = sorted(merging.allow - set(allowable))
    if unknown:
        *others, last = allowable
        raise UsageError(f"--allow {unknown[0]}: expected {', '.join(others)} or {last}")


NUMBER = re.compile(r",?[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?,?", re.IGNORECASE)


def _refuse_numbers(specs: Sequence[InputSpec], weights: str | None) -> None:
    """Raises UsageError for weights that became inputs by a space before them."""
    lone = [spec.source for spec in specs if NUMBER.fullmatch(spec.source)]
    lone = [source for source in lone if not exists(source)]
    if lone and weights:
        meant = ",".join(part.strip(",") for part in (weights, *lone))
        raise UsageError(f"{lone[0]} is no input: write --weights {meant}, without spaces")
    if lone:
        raise UsageError(
            f"{lone[0]} is no input: a weight follows its input, as in adapter:{lone[0].strip(',')}, or "
            "say all in one word, --weights 0.7,0.3"
        )


def open_merging(specs: Sequence[InputSpec], merging: Merging, base: Base | None) -> Opened:
    """The inputs, opened. Raises AdaptmergeError for what their headers and the options can tell."""
    if is_checkpoint_schedule(merging.weights):
        specs = in_natural_order(specs)
    inputs = open_inputs(specs, base)
    names = [item.name for item in inputs]
    given = [item.spec.weight for item in inputs]
    weights = Weights(base_weights(names, given, merging.weights, merging.total), merging.rules)
    opened = Opened(inputs, merging, weights, policies(merging.heads, names))
    check_policies(opened.heads, opened.adapters)
    return opened
