"""Recipes: a merge written down in YAML, checked strictly, with errors at file, line and key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptmerge.algebra.fit import Budget
from adaptmerge.commands.combine import ALLOWABLE, Options
from adaptmerge.errors import InputError, UsageError, did_you_mean
from adaptmerge.files import hub, sniff
from adaptmerge.files.paths import exists, missing
from adaptmerge.files.strict_json import capped
from adaptmerge.formats.inputs import Input, InputSpec, named, parse_input
from adaptmerge.formats.registry import format_named
from adaptmerge.formats.unread import MERGEKIT
from adaptmerge.merging.heads.policies import WORDS
from adaptmerge.merging.weights import SiteRule, Value, base_weights, check_pattern
from adaptmerge.methods.registry import method_named
from adaptmerge.tensors import dtypes

if TYPE_CHECKING:
    from yaml import Node

    from adaptmerge.commands.recipe_schema import InputTable, RecipeTable, RuleTable

Loc = tuple[str | int, ...]
Problem = tuple[Loc, str]
SCHEMA = "https://json-schema.org/draft/2020-12/schema"
UNKNOWN = "?"  # stands for inputs that cannot be read
YAML_1_1 = " (quote words like no, off and on: YAML reads them as true or false)"


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: its table, and its inputs with names, paths and weights resolved."""

    path: Path
    table: RecipeTable
    inputs: tuple[InputSpec, ...]

    def specs(self) -> list[InputSpec]:
        """The inputs, with unique names, paths that hold from here, and the recipe's weights."""
        return list(self.inputs)

    def options(self) -> Options:
        """Everything but inputs and output."""
        table = self.table
        return Options(
            method=table.method,
            weights=table.weights if isinstance(table.weights, str) else None,
            total=table.sum,
            rules=tuple(_rule(rule) for rule in table.sites),
            budget=Budget(table.rank, table.energy, table.max_error, table.per_site),
            dtype=table.dtype,
            target=table.to,
            ranks=table.ranks,
            version=table.peft_version,
            experts=table.experts,
            heads=table.heads,
            base=None if table.base is None else _from_here(table.base, self.path.parent),
            allow=frozenset(table.allow),
            strict=table.strict,
        )

    def output(self) -> Path | None:
        """Where the recipe writes to, if it says so."""
        return None if self.table.output is None else self.path.parent / self.table.output


def load_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file.

    Raises InputError when it is no YAML table, and UsageError with all that is wrong in it, each
    problem as FILE:LINE: KEY: SENTENCE.
    """
    lines, values = _parsed(path)
    if "merge_method" in values:
        raise InputError(MERGEKIT, where=str(path))
    table, problems = _validated(values)
    inputs: list[InputSpec] = []
    if table is not None:
        inputs, found = _checked(table, path.parent)
        problems += found
    if problems or table is None:
        raise lines.error([*problems, *_absent(inputs)])
    if lines.repeated:
        raise InputError([f"{path}:{line}: {sentence}" for line, sentence in lines.repeated])
    return Recipe(path, table, tuple(inputs))


def _checked(table: RecipeTable, folder: Path) -> tuple[list[InputSpec], list[Problem]]:
    """The inputs, and all that is wrong beyond single values."""
    if table.inputs == [UNKNOWN]:
        return [], _choices(table)
    inputs, problems = _inputs(table, folder)
    if not problems:
        inputs, problems = _weighted(table, inputs)
        problems += _names(table, [str(spec.name) for spec in inputs])
    return inputs, [*problems, *_choices(table)]


def _absent(specs: Sequence[InputSpec]) -> list[Problem]:
    """Inputs that are not there, said beside what else is wrong: alone they are for who opens them."""
    return [
        (("inputs", index), str(missing(spec.source)))
        for index, spec in enumerate(specs)
        if not exists(spec.source)
        and not hub.is_id(spec.source)
        and not hub.is_address(spec.source)
    ]


def check_locked(recipe: Recipe, inputs: Sequence[Input]) -> None:
    """Raises InputError naming every input that is not pinned, or is not what it is pinned to."""
    problems = [problem for item in inputs for problem in _unlocked(item)]
    if problems:
        raise InputError(problems, where=f"{recipe.path} --locked")


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors and other tools."""
    from adaptmerge.commands.recipe_schema import RecipeTable

    schema = RecipeTable.model_json_schema()
    return {"$schema": SCHEMA, **schema, "title": "adaptmerge recipe"}


@dataclass(frozen=True)
class _Lines:
    """The parsed nodes of a recipe, which know their lines."""

    path: Path
    root: Node
    repeated: Sequence[tuple[int, str]]  # keys that stand twice: line and sentence

    def error(self, problems: Iterable[Problem]) -> UsageError:
        """All problems in the order of their lines, as FILE:LINE: KEY: SENTENCE."""
        again = ((line, "", sentence) for line, sentence in self.repeated)
        found = sorted([*again, *((*self._find(loc), sentence) for loc, sentence in problems)])
        return UsageError(
            capped([f"{self.path}:{n}: {key}{': ' * bool(key)}{text}" for n, key, text in found])
        )

    def _find(self, loc: Loc) -> tuple[int, str]:
        """The line of the innermost part of `loc` that is written down, and its spelling."""
        node, line, shown = self.root, self.root.start_mark.line, ""
        for part in loc:
            if isinstance(part, str) and part.startswith("<"):
                continue
            shown += f"[{part}]" if isinstance(part, int) else f".{part}" if shown else part
            found = _child(node, part)
            if found is not None:
                node, line = found
        return line + 1, shown


def _child(node: Node, part: str | int) -> tuple[Node, int] | None:
    """The node under a key or index, and the line where that begins."""
    from yaml import MappingNode, SequenceNode

    if isinstance(node, SequenceNode) and isinstance(part, int):
        found = node.value[part] if part < len(node.value) else None
        return found and (found, found.start_mark.line)
    pairs = node.value if isinstance(node, MappingNode) else []
    return next(((v, k.start_mark.line) for k, v in pairs if k.value == part), None)


def _parsed(path: Path) -> tuple[_Lines, Mapping[str, Any]]:
    """The nodes and the plain values of a YAML file. Raises InputError unless it is one table."""
    import yaml

    if path.is_dir():
        raise InputError("is a folder: give a recipe, a file in YAML", where=str(path))
    text = sniff.text(path)
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise InputError("is no recipe: expected a table with the key inputs", where=str(path))
        lines = _Lines(path, root, sorted(_repeated(root, set())))
        return lines, loader.construct_document(root)
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        line = mark.line + 1 if mark else 1
        raise InputError(f"{path}:{line}: is not YAML: {problem.problem}") from None
    except (yaml.YAMLError, ValueError) as problem:
        sentence = " ".join(str(problem).split())
        raise InputError(f"is not YAML: {sentence}", where=str(path)) from None
    except RecursionError:
        raise InputError("is nested too deeply: is it a recipe?", where=str(path)) from None


def _repeated(node: Node, seen: set[int]) -> Iterable[tuple[int, str]]:
    """(line, sentence) of each key that a table has twice, which YAML readers pass over."""
    from yaml import MappingNode, ScalarNode, SequenceNode

    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, SequenceNode):
        for item in node.value:
            yield from _repeated(item, seen)
    first: dict[str, int] = {}
    for key, value in node.value if isinstance(node, MappingNode) else []:
        line = key.start_mark.line + 1
        if isinstance(key, ScalarNode):
            if key.value in first:
                yield line, f"the key {key.value!r} is also on line {first[key.value]}: keep one"
            first.setdefault(key.value, line)
        yield from _repeated(value, seen)


def _validated(values: Mapping[str, Any]) -> tuple[RecipeTable | None, list[Problem]]:
    """The table and what is wrong with it: of a table that is, what is left without the keys that are."""
    from pydantic import ValidationError

    from adaptmerge.commands.recipe_schema import RecipeTable

    try:
        return RecipeTable.model_validate(values), []
    except ValidationError as failed:
        found = [(error["loc"], _sentence(error)) for error in failed.errors(include_url=False)]
    except RecursionError:
        return None, [((), "is nested in itself: write it out")]
    wrong = {loc[0] for loc, _ in found if loc}
    rest = {key: value for key, value in values.items() if key not in wrong}
    return (RecipeTable.model_validate({"inputs": [UNKNOWN], **rest}) if wrong else None), found


def _sentence(error: Any) -> str:
    """A pydantic error in this project's words."""
    from adaptmerge.commands.recipe_schema import known_keys

    kind, loc = error["type"], error["loc"]
    if kind == "extra_forbidden":
        return f"unknown key: {did_you_mean(str(loc[-1]), known_keys(loc))}"
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind == "string_pattern_mismatch":
        return f"{_patterns(loc)}, found {error['input']!r}"
    found = error["input"]
    shown = type(found).__name__ if isinstance(found, (dict, list)) else repr(found)
    expected = error["msg"].replace("Input should be", "expected")
    hint = YAML_1_1 if isinstance(found, bool) and kind == "string_type" else ""
    return f"{expected}, found {shown}{hint}"


def _patterns(loc: Loc) -> str:
    if "sha256" in loc:
        return "expected 64 hexadecimal digits"
    return "expected a letter, then letters, digits, '.', '-' or '_'"


def _inputs(table: RecipeTable, folder: Path) -> tuple[list[InputSpec], list[Problem]]:
    """The specs as written, paths resolved and names made unique."""
    specs: list[InputSpec] = []
    problems: list[Problem] = []
    for index, item in enumerate(table.inputs):
        try:
            specs.append(_spec(item, folder))
        except UsageError as problem:
            problems.append((("inputs", index), problem.problems[0]))
    try:
        return named(specs), problems
    except UsageError as problem:
        return specs, [*problems, (("inputs",), problem.problems[0])]


def _spec(item: InputTable | str, folder: Path) -> InputSpec:
    if isinstance(item, str):
        spec = parse_input(item, folder)
    else:
        pinned = {name: digest.lower() for name, digest in item.sha256.items()}
        spec = InputSpec(item.source, item.name, item.weight, item.alpha, sha256=pinned)
    return replace(spec, source=_from_here(spec.source, folder))


def _from_here(source: str, folder: Path) -> str:
    """The source with the recipe's folder in front, unless it is a hub id."""
    source = hub.as_id(source)
    path = folder / source
    if hub.is_address(source):
        return source
    if exists(path) or exists(source) or not hub.is_id(source):
        return str(path)
    return source


def _choices(table: RecipeTable) -> list[Problem]:
    """Words that are not among the known ones."""
    problems: list[Problem] = []
    for key, check in (("method", method_named), ("to", format_named)):
        try:
            word = getattr(table, key)
            if word is not None:
                check(word)
        except UsageError as problem:
            problems.append(((key,), problem.problems[0]))
    if table.dtype is not None and table.dtype not in dtypes.SPELLINGS:
        advice = did_you_mean(table.dtype, list(dtypes.SPELLINGS))
        problems.append((("dtype",), f"{table.dtype!r}: {advice}"))
    problems += [
        (("allow", index), f"{word!r}: {did_you_mean(word, ALLOWABLE)}")
        for index, word in enumerate(table.allow)
        if word not in ALLOWABLE
    ]
    for index, rule in enumerate(table.sites):
        try:
            check_pattern(rule.match)
        except UsageError as problem:
            problems.append((("sites", index, "match"), problem.problems[0]))
    return problems


def _weighted(table: RecipeTable, specs: list[InputSpec]) -> tuple[list[InputSpec], list[Problem]]:
    """The specs with the weights of a list or table; a schedule is only checked."""
    given = table.weights
    if given is None:
        return specs, []
    names = [str(spec.name) for spec in specs]
    try:
        schedule = given if isinstance(given, str) else "last:1"
        base_weights(names, [spec.weight for spec in specs], schedule, total=False)
    except UsageError as problem:
        return specs, [(("weights",), problem.problems[0])]
    if isinstance(given, list) and len(given) != len(specs):
        said = f"{len(given)} number" + "s" * (len(given) != 1)
        count = f"has {said} for {len(specs)} inputs: give one each"
        return specs, [(("weights",), count)]
    if isinstance(given, dict):
        lost = [name for name in names if name not in given]
        if lost:
            return specs, [(("weights",), f"gives {lost[0]!r} no number: name every input")]
        given = [given[name] for name in names]
    if isinstance(given, list):
        specs = [replace(s, weight=w) for s, w in zip(specs, given, strict=True)]
    return specs, []


def _names(table: RecipeTable, names: Sequence[str]) -> list[Problem]:
    """Names that no input has."""
    used: list[tuple[Loc, str]] = []
    if isinstance(table.weights, dict):
        used += [(("weights", name), name) for name in table.weights]
    used += [
        (("sites", index, "weights", name), name)
        for index, rule in enumerate(table.sites)
        for name in rule.weights
    ]
    given = {(): table.heads} if isinstance(table.heads, str) else table.heads or {}
    used += [(("heads", m) if m else ("heads",), w) for m, w in given.items() if w not in WORDS]
    return [
        (loc, f"no input is named {name!r}: {did_you_mean(name, names)}")
        for loc, name in used
        if name not in names
    ]


def _rule(rule: RuleTable) -> SiteRule:
    weights: dict[str, Value] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in rule.weights.items()
    }
    return SiteRule(rule.match, weights, rule.kind)


def _unlocked(item: Input) -> list[str]:
    pinned = item.spec.sha256
    problems = []
    for name, digest in item.listing.sha256(*item.listing.used).items():
        if name not in pinned:
            problems.append(f"input {item.name!r} is not pinned: add sha256: {{{name}: {digest}}}")
        elif pinned[name] != digest:
            problems.append(
                f"input {item.name!r}: {name} is not the file that was pinned: expected sha256 "
                f"{pinned[name]}, found {digest}"
            )
    unused = [name for name in pinned if name not in item.listing.used]
    problems += [f"input {item.name!r} has no file {name!r} that is read" for name in unused]
    return problems
