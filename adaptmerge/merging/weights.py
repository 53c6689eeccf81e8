"""How much each adapter counts, where: base weights, then ordered rules per layer, module and kind."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from adaptmerge.adapters.graph import Key, Site
from adaptmerge.adapters.module_paths import layer_index
from adaptmerge.errors import UsageError, did_you_mean
from adaptmerge.formats.inputs import number

Value = float | tuple[float, ...]
RULE = re.compile(r"(?P<match>.+?)(?:@(?P<kind>[a-z_0-9]+))?:(?P<weights>[^:]+)$")
PAIR = re.compile(r"\s*(?P<name>[^=,\[\]]+)=(?P<value>\[[^\]]*\]|[^,\[\]]+)\s*(?:,|$)")


@dataclass(frozen=True, slots=True)
class SiteRule:
    """Weights for the sites that `match` selects: a glob on the module path or its end, or re:REGEX.

    A module's path selects its weight and its bias; "...q_proj.bias" or ".weight" only that. A layer's
    path selects what stands beside any of its blocks; "...layers.3:mlp" or "*:attention" only that.
    A tuple is a gradient: its numbers are spread evenly over the layers and interpolated.
    """

    match: str
    weights: Mapping[str, Value]
    kind: str | None = None

    def selects(self, site: Site, kind: str) -> bool:
        """Whether the rule is about this site and kind of edit."""
        if self.kind not in (None, kind):
            return False
        paths = {site.module, f"{site.module}.{site.param}", str(site)}
        return any(self._matches(path) for path in paths)

    def _matches(self, path: str) -> bool:
        if self.match.startswith("re:"):
            return re.search(self.match[3:], path) is not None
        return fnmatchcase(path, self.match) or fnmatchcase(path, f"*.{self.match}")


def rule_of(raw: Mapping[str, Any]) -> SiteRule:
    """A rule as a report has it."""
    weights = {n: tuple(w) if isinstance(w, list) else w for n, w in raw["weights"].items()}
    return SiteRule(raw["match"], weights, raw.get("kind"))


@dataclass(frozen=True, slots=True)
class Weights:
    """Base weight per adapter and the rules that override it, later ones over earlier ones."""

    base: Mapping[str, float]
    rules: tuple[SiteRule, ...] = ()

    def at(self, adapter: str, site: Site, kind: str, layers: int) -> float:
        """The weight of one adapter at one site of a model with so many layers."""
        weight: Value = self.base[adapter]
        for rule in self.rules:
            if adapter in rule.weights and rule.selects(site, kind):
                weight = rule.weights[adapter]
        return _at_depth(weight, layer_index(site.module), layers)

    def check(self, sites: Sequence[Key]) -> None:
        """Raises UsageError for rules that name unknown adapters or select no site."""
        problems = []
        for rule in self.rules:
            problems += [
                f"site rule {rule.match!r} names {name!r}: {did_you_mean(name, list(self.base))}"
                for name in rule.weights
                if name not in self.base
            ]
            if not any(rule.selects(*key) for key in sites):
                example = sites[0].site if sites else "none"
                kinds = f" of kind {rule.kind!r}" if rule.kind else ""
                problems.append(
                    f"site rule {rule.match!r} selects no site{kinds}; a site is {example}"
                )
        if problems:
            raise UsageError(problems)


def _at_depth(value: Value, layer: int | None, layers: int) -> float:
    """A gradient's value at a layer; sites outside the layers take its first number."""
    if not isinstance(value, tuple):
        return value
    if layer is None or layers < 2 or len(value) == 1:
        return value[0]
    position = layer / (layers - 1) * (len(value) - 1)
    low = min(int(position), len(value) - 2)
    share = position - low
    return value[low] * (1 - share) + value[low + 1] * share


def parse_rule(text: str) -> SiteRule:
    """PATTERN[@KIND]:NAME=WEIGHT,NAME=[W,W,...] as a rule. Raises UsageError."""
    found = RULE.match(text)
    weights = _pairs(found["weights"], text) if found else {}
    if not found or not weights:
        raise UsageError(
            f"--site {text!r}: expected PATTERN:NAME=WEIGHT,..., e.g. 'layers.[0-7].*attn*:sql=1,chat=0'"
        )
    rule = SiteRule(found["match"], weights, found["kind"])
    check_pattern(rule.match)
    return rule


def check_pattern(match: str) -> None:
    """Raises UsageError when a re: pattern is no regular expression."""
    if match.startswith("re:"):
        try:
            re.compile(match[3:])
        except re.error as problem:
            raise UsageError(f"site rule {match!r} is no regular expression: {problem}") from None


def _pairs(text: str, whole: str) -> dict[str, Value]:
    weights: dict[str, Value] = {}
    end = 0
    for pair in PAIR.finditer(text):
        if pair.start() != end:
            break
        weights[pair["name"].strip()] = _value(pair["value"].strip(), whole)
        end = pair.end()
    return weights if end == len(text) else {}


def _value(text: str, whole: str) -> Value:
    if text.startswith("["):
        return tuple(number(part, f"--site {whole!r}") for part in text[1:-1].split(","))
    return number(text, f"--site {whole!r}")


def base_weights(
    names: Sequence[str],
    given: Sequence[float | None],
    schedule: str | None,
    total: bool,
) -> dict[str, float]:
    """Weight per adapter from `:WEIGHT` of the inputs or from --weights, else 1/N (or 1 with --sum).

    schedule is "0.7,0.3", "ema:0.9" or "last:5". Raises UsageError when these do not fit the inputs.
    """
    if schedule is not None and any(weight is not None for weight in given):
        raise UsageError("weights are given both after the inputs and by --weights: choose one")
    if schedule is not None:
        return dict(zip(names, _scheduled(schedule, len(names)), strict=True))
    if any(weight is not None for weight in given):
        return {n: 1.0 if w is None else w for n, w in zip(names, given, strict=True)}
    return dict.fromkeys(names, 1.0 if total else 1.0 / len(names))


def is_checkpoint_schedule(schedule: str | None) -> bool:
    """Whether --weights is over checkpoints in natural order."""
    return bool(schedule) and str(schedule).startswith(("ema:", "last:"))


def _scheduled(schedule: str, count: int) -> list[float]:
    head, _, tail = schedule.partition(":")
    if head == "ema":
        return _moving_average(number(tail, "--weights ema"), count)
    if head == "last":
        kept = int(tail) if tail.isdecimal() else 0
        if not 1 <= kept <= count:
            raise UsageError(f"--weights last:{tail}: there are {count} inputs, keep 1 to {count}")
        return [0.0] * (count - kept) + [1.0 / kept] * kept
    values = [number(part, "--weights") for part in schedule.split(",")]
    if len(values) != count:
        said = f"{len(values)} number" + "s" * (len(values) != 1)
        raise UsageError(f"--weights has {said} for {count} inputs: give one each")
    return values


def _moving_average(decay: float, count: int) -> list[float]:
    """e_0 = x_0, e_t = decay e_(t-1) + (1 - decay) x_t, written as weights that sum to 1."""
    if not 0 <= decay < 1:
        raise UsageError(f"--weights ema:{decay:g}: the decay is from 0 to below 1")
    weights = [1.0]
    for _ in range(count - 1):
        weights = [weight * decay for weight in weights] + [1.0 - decay]
    return weights
