"""Which edits of which adapters meet at which site, and whether they may."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from adaptmerge.base import CONV1D_MODELS, Base
from adaptmerge.edits import factor_of
from adaptmerge.errors import CannotMerge
from adaptmerge.files.strict_json import capped
from adaptmerge.graph import Adapter, Edit, Kind, Note, Site
from adaptmerge.names import natural_key, suffixes

# What models with a head put before the modules of the model without (their base_model_prefix).
MODEL_PREFIXES = frozenset(
    {"model", "transformer", "bert", "roberta", "distilbert", "electra", "deberta", "albert"}
    | {"gpt_neox", "backbone", "encoder", "vit", "wav2vec2"}
)
SHOWN = 6  # conflicts of one merge; the others are mostly the same
QUANTISED = re.compile(
    r"[-_.](unsloth|bnb|4bit|8bit|int4|int8|nf4|fp4|gptq|awq|gguf|fp8|bf16|fp16|hf|quantized|w4a16)\b"
)


@dataclass(frozen=True, slots=True)
class Group:
    """The edits of one kind at one site: (adapter name, edit), in input order."""

    site: Site
    kind: str
    members: tuple[tuple[str, Edit], ...]


def align(
    adapters: Mapping[str, Adapter], base: Base | None, allowed: frozenset[str]
) -> tuple[list[Group], list[Note]]:
    """Groups in natural order of their sites. Raises CannotMerge with all conflicts at once."""
    notes, problems = _base_names(adapters, allowed)
    if base is not None:
        given, adapters = adapters, _on_base(adapters, base)
        notes += _renamed(given, adapters)
        problems += _against_base(adapters, base)
    else:
        problems += _coincidences(adapters) or _strangers(adapters, allowed)
    groups = _grouped(adapters)
    problems += [problem for group in groups for problem in _conflicts(group)]
    problems += _compositions(groups, len(adapters))
    if problems:
        raise CannotMerge(capped(problems, SHOWN))
    return groups, notes


def _grouped(adapters: Mapping[str, Adapter]) -> list[Group]:
    found: dict[tuple[Site, str], list[tuple[str, Edit]]] = {}
    for name, adapter in adapters.items():
        for edit in adapter.edits:
            found.setdefault((edit.site, edit.kind), []).append((name, edit))
    groups = [Group(site, kind, tuple(members)) for (site, kind), members in found.items()]
    return sorted(groups, key=lambda group: natural_key(str(group.site)))


def _conflicts(group: Group) -> list[str]:
    """Different layers or shapes at one site."""
    shapes = {name: _shape(edit) for name, edit in group.members}
    layers = {name: edit.site.layer for name, edit in group.members}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        return [f"{group.site}: the adapters are for different shapes: {found}"]
    if len(set(layers.values())) > 1:
        found = ", ".join(f"{name} {layer.kind}" for name, layer in layers.items())
        return [f"{group.site}: the adapters are for different layers: {found}"]
    return []


def _shape(edit: Edit) -> tuple[int, ...]:
    factor = factor_of(edit)
    return () if factor is None else factor.shape


def _compositions(groups: Sequence[Group], inputs: int) -> list[str]:
    """Sites where different inputs bring different kinds of weight edit."""
    by_site: dict[Site, dict[str, set[str]]] = {}
    for group in groups:
        if group.kind not in ("replace", "rows"):
            owners = {name for name, _ in group.members}
            by_site.setdefault(group.site, {})[group.kind] = owners
    mixed: dict[str, list[str]] = {}
    for site, kinds in by_site.items():
        if len(kinds) > 1 and inputs > 1 and len(set().union(*kinds.values())) > 1:
            mixed.setdefault(" and ".join(sorted(kinds)), []).append(str(site))
    return [
        f"{and_more(sites)}: inputs bring {kinds} edits, which without the base can be neither summed "
        "nor compared: give inputs of one kind"
        for kinds, sites in mixed.items()
    ]


def and_more(sites: Sequence[str]) -> str:
    """The first of some sites, and how many others there are."""
    return sites[0] if len(sites) == 1 else f"{sites[0]} and {len(sites) - 1} more"


def _coincidences(adapters: Mapping[str, Adapter]) -> list[str]:
    """Modules that are the same only after a prefix of one of them is removed."""
    modules = {name: {edit.site.module for edit in a.edits} for name, a in adapters.items()}
    problems = []
    for short_name, shorts in modules.items():
        for long_name, longs in modules.items():
            if short_name == long_name:
                continue
            pairs = [
                (suffix, module)
                for module in sorted(longs - shorts)
                for suffix in suffixes(module)[1:-1]
                if suffix in shorts and suffix not in longs
            ]
            if pairs:
                short, long = pairs[0]
                problems.append(
                    f"{long_name} has {long} where {short_name} has {short} (and {len(pairs) - 1} more): "
                    "the same module or another one? pass --base DIR to decide"
                )
    return problems


def _strangers(adapters: Mapping[str, Adapter], allowed: frozenset[str]) -> list[str]:
    """Adapters whose layers lie under different paths are for different architectures."""
    if "base" in allowed:
        return []
    roots = {name: _layer_roots(adapter) for name, adapter in adapters.items()}
    (first, known), *others = roots.items()
    return [
        f"{first} adapts {min(known)}.N and {name} adapts {min(found)}.N: these are different "
        "architectures; if one model has both, pass --base DIR or --allow base"
        for name, found in others
        if known and found and not known & found
    ]


def _layer_roots(adapter: Adapter) -> set[str]:
    """The paths of the lists of layers: what comes before the layer number."""
    numbered = (re.match(r"(.*?)\.\d+(\.|$)", edit.site.module) for edit in adapter.edits)
    return {found[1] for found in numbered if found}


def _on_base(adapters: Mapping[str, Adapter], base: Base) -> dict[str, Adapter]:
    """Sites under the base's own names; where the checkpoint leaves out the model's prefix and an
    adapter has it, with that prefix."""
    spelled: dict[str, str] = {}
    for adapter in adapters.values():
        for edit in adapter.edits:
            located = base.locate(edit.site.module)
            if located is not None:
                known = spelled.get(located, located)
                spelled[located] = _fuller(known, edit.site.module, located)
    return {
        name: adapter.with_edits(_respelled(edit, base, spelled) for edit in adapter.edits)
        for name, adapter in adapters.items()
    }


def _fuller(known: str, module: str, located: str) -> str:
    prefix = module.removesuffix(located).removesuffix(".")
    return module if prefix in MODEL_PREFIXES and module.endswith(f".{located}") else known


def _respelled(edit: Edit, base: Base, spelled: Mapping[str, str]) -> Edit:
    located = base.locate(edit.site.module)
    module = spelled.get(located or "", edit.site.module)
    if module == edit.site.module:
        return edit
    moved: Edit = replace(edit, site=replace(edit.site, module=module))  # type: ignore[type-var]
    return moved


def _renamed(before: Mapping[str, Adapter], after: Mapping[str, Adapter]) -> list[Note]:
    """What the base's names changed."""
    notes = []
    for name, adapter in before.items():
        pairs = zip(adapter.edits, after[name].edits, strict=True)
        moved = [(old.site, new.site) for old, new in pairs if old.site != new.site]
        if moved:
            old, new = moved[0]
            what = f"{len(moved)} sites are named as in the base: {old} is {new}"
            notes.append(Note(Kind.INFO, what, input=name))
    return notes


def _against_base(adapters: Mapping[str, Adapter], base: Base) -> list[str]:
    problems = []
    for name, adapter in adapters.items():
        for edit in adapter.edits:
            problems += _edit_against_base(name, edit, base)
    return problems


def _edit_against_base(name: str, edit: Edit, base: Base) -> list[str]:
    factor = factor_of(edit)
    if factor is None or edit.site.param != "weight" or not base.tensors:
        return []
    weight = base.parameter(edit.site)
    if weight is None:
        if base.locate(edit.site.module) is not None:
            return []
        return [
            f"{name}: {edit.site} is not in the base {base.path.name}: is it for another model?"
        ]
    rows = weight.shape[0]
    shape = (rows, weight.count // rows if rows else 0)
    turned = base.architecture in CONV1D_MODELS
    if factor.shape == shape or (turned and factor.shape == shape[::-1]):
        return []
    return [
        f"{name}: {edit.site} is for a weight of {list(factor.shape)}, but the base {base.path.name} "
        f"has {list(shape)}"
    ]


def _base_names(
    adapters: Mapping[str, Adapter], allowed: frozenset[str]
) -> tuple[list[Note], list[str]]:
    """Bases that differ in spelling are a Note, others an error unless allowed."""
    names = {name: a.base.name for name, a in adapters.items() if a.base.name}
    if len(set(names.values())) < 2:
        return _revisions(adapters), []
    listed = ", ".join(f"{name}: {base}" for name, base in names.items())
    if len({_bare(base or "") for base in names.values()}) == 1:
        return [Note(Kind.INFO, f"base names are spelled differently ({listed})")], []
    if "base" in allowed:
        return [Note(Kind.ASSUMED, f"different bases were allowed ({listed})")], []
    return [], [
        f"the adapters name different bases ({listed}): their sum means nothing unless these are the "
        "same weights; if they are, pass --allow base"
    ]


def _revisions(adapters: Mapping[str, Adapter]) -> list[Note]:
    found = {name: a.base.revision for name, a in adapters.items() if a.base.revision}
    if len(set(found.values())) < 2:
        return []
    listed = ", ".join(f"{name}: {revision}" for name, revision in found.items())
    return [Note(Kind.ASSUMED, f"revisions of the base differ and are taken as one ({listed})")]


def _bare(name: str) -> str:
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()
    previous = ""
    while previous != last:
        previous, last = last, QUANTISED.sub("", last)
    return last


def layer_count(sites: Iterable[Site]) -> int:
    """One more than the highest layer number among the sites."""
    from adaptmerge.names import layer_index

    numbers = [layer_index(site.module) for site in sites]
    return 1 + max((number for number in numbers if number is not None), default=-1)
