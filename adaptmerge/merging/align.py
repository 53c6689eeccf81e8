"""Which edits of which adapters meet at which site, and whether they may."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from adaptmerge.adapters import experts
from adaptmerge.adapters.graph import (
    Adapter,
    Edit,
    Key,
    Kind,
    Layer,
    Note,
    Site,
    key_of,
)
from adaptmerge.adapters.module_paths import natural_key, other_versions, suffixes
from adaptmerge.adapters.weight_edits import factor_of
from adaptmerge.bases.base import Base
from adaptmerge.errors import CannotMerge
from adaptmerge.files.strict_json import capped
from adaptmerge.merging.base_names import named_bases
from adaptmerge.merging.misfits import misfits

# What models with a head put before the modules of the model without (their base_model_prefix).
MODEL_PREFIXES = frozenset(
    {"model", "transformer", "bert", "roberta", "distilbert", "electra", "deberta", "albert"}
    | {"gpt_neox", "backbone", "encoder", "vit", "wav2vec2"}
)
SHOWN = 6  # conflicts of one merge; the others are mostly the same


@dataclass(frozen=True, slots=True)
class Group:
    """The edits of one kind at one site: (adapter name, edit), in input order."""

    site: Site
    kind: str
    members: tuple[tuple[str, Edit], ...]

    @property
    def key(self) -> Key:
        """What its edits are known by."""
        return Key(self.site, self.kind)


def align(
    adapters: Mapping[str, Adapter],
    base: Base | None,
    allowed: frozenset[str],
    layout: str | None = None,
) -> tuple[list[Group], list[Note]]:
    """Groups in natural order of their sites. Raises CannotMerge with all conflicts at once.

    layout: of experts, "fused" or "per-expert"; None leaves it as all inputs have it, else as the base.
    """
    notes, problems = named_bases(adapters, allowed)
    problems += _replications(adapters)
    given = adapters
    adapters = in_one_layout(given, base, layout)
    notes += _renamed(given, adapters, "matrices of experts are in another layout")
    if base is not None:
        given, adapters = adapters, _on_base(adapters, base)
        notes += _renamed(given, adapters, "sites are named as in the base")
        notes += _drifted(adapters, base)
        problems += [p for name, a in adapters.items() for p in misfits(name, a, base)]
    else:
        problems += _coincidences(adapters) or _strangers(adapters, allowed)
    groups = _grouped(adapters)
    problems += [problem for group in groups for problem in _conflicts(group)]
    if problems:
        raise CannotMerge(capped(problems, SHOWN))
    return groups, notes


def _grouped(adapters: Mapping[str, Adapter]) -> list[Group]:
    found: dict[Key, list[tuple[str, Edit]]] = {}
    for name, adapter in adapters.items():
        for edit in adapter.edits:
            found.setdefault(key_of(edit), []).append((name, edit))
    groups = [Group(*key, tuple(members)) for key, members in found.items()]
    return sorted(groups, key=lambda group: natural_key(str(group.site)))


def _conflicts(group: Group) -> list[str]:
    """Different layers or shapes at one site."""
    shapes = {name: _shape(edit) for name, edit in group.members}
    layers = {name: _as_linear(edit.site.layer) for name, edit in group.members}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        return [f"{group.site}: the adapters are for different shapes: {found}"]
    if len(set(layers.values())) > 1:
        found = ", ".join(
            f"{name} {layer.stacked or ''} {layer.kind}".replace("  ", " ")
            for name, layer in layers.items()
        )
        return [f"{group.site}: the adapters are for different layers: {found}"]
    return []


def _as_linear(layer: Layer) -> Layer:
    """The layer; a bare matrix is as good as a linear layer's."""
    return replace(layer, kind="linear") if layer.kind == "parameter" else layer


def _shape(edit: Edit) -> tuple[int, ...]:
    factor = factor_of(edit)
    return () if factor is None else factor.shape


def and_more(sites: Sequence[str]) -> str:
    """The first of some sites, and how many others there are."""
    return sites[0] if len(sites) == 1 else f"{sites[0]} and {len(sites) - 1} more"


def _coincidences(adapters: Mapping[str, Adapter]) -> list[str]:
    """Modules that are the same only without a prefix, or in another version of transformers."""
    modules = {name: {edit.site.module for edit in a.edits} for name, a in adapters.items()}
    problems = []
    for short_name, shorts in modules.items():
        for long_name, longs in modules.items():
            if short_name == long_name:
                continue
            pairs = [
                (suffix, module)
                for module in sorted(longs - shorts)
                for suffix in (*suffixes(module)[1:-1], *other_versions(module))
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


def in_one_layout(
    adapters: Mapping[str, Adapter], base: Base | None, wanted: str | None = None
) -> Mapping[str, Adapter]:
    """The adapters with all experts in one layout: the wanted one, else that of all, else the base's.

    Raises CannotMerge where the layouts differ and nothing says which one to take.
    """
    found = {
        layout: f"{name} has {edit.site}"
        for name, adapter in adapters.items()
        for edit in adapter.edits
        if (layout := experts.layout_of(edit.site)) is not None
    }
    layout = wanted or (base.expert_layout if base is not None and len(found) > 1 else None)
    if len(found) > 1 and layout is None:
        raise CannotMerge(
            f"{found[experts.FUSED]}, which stacks all experts, and {found[experts.PER_EXPERT]}, which is "
            "one expert's: to take them for the same, pass --base DIR"
        )
    if layout is None or found.keys() <= {layout}:
        return adapters
    if base is None:
        raise CannotMerge(
            f"{next(iter(found.values()))}: which experts there are, and what they are called one by one, "
            "only the base says: pass --base DIR"
        )
    style, count = base.expert_style, base.expert_count
    return {n: experts.in_layout(a, layout, style, count) for n, a in adapters.items()}


def _on_base(adapters: Mapping[str, Adapter], base: Base) -> dict[str, Adapter]:
    """Sites under the base's own names; where the checkpoint leaves out the model's prefix and an
    adapter has it, with that prefix; where all adapters name it as another version of transformers,
    as they do."""
    given: dict[str, set[str]] = {}
    for adapter in adapters.values():
        for edit in adapter.edits:
            located = base.locate(edit.site.module)
            if located is not None:
                given.setdefault(located, set()).add(edit.site.module)
    spelled = {located: _spelling(located, modules) for located, modules in given.items()}
    return {
        name: adapter.with_edits(_respelled(edit, base, spelled) for edit in adapter.edits)
        for name, adapter in adapters.items()
    }


def _spelling(located: str, modules: set[str]) -> str:
    fuller = [module for module in modules if _is_fuller(module, located)]
    drifted = [module for module in modules if not _is_near(module, located)]
    if drifted and len(modules) == 1:
        return drifted[0]
    return max(fuller, default=located)


def _is_fuller(module: str, located: str) -> bool:
    prefix = module.removesuffix(located).removesuffix(".")
    return prefix in MODEL_PREFIXES and module.endswith(f".{located}")


def _is_near(module: str, located: str) -> bool:
    """Whether the two are equal up to one prefix."""
    return module == located or module.endswith(f".{located}") or located.endswith(f".{module}")


def _respelled(edit: Edit, base: Base, spelled: Mapping[str, str]) -> Edit:
    located = base.locate(edit.site.module)
    module = spelled.get(located or "", edit.site.module)
    if module == edit.site.module:
        return edit
    return replace(edit, **{"site": replace(edit.site, module=module)})


def _renamed(before: Mapping[str, Adapter], after: Mapping[str, Adapter], what: str) -> list[Note]:
    """What was spelled otherwise."""
    notes = []
    for name, adapter in before.items():
        old, new = adapter.sites(), after[name].sites()
        pairs = ([s for s in old if s not in new], [s for s in new if s not in old])
        if all(pairs):
            said = f"{len(pairs[0])} {what}: {pairs[0][0]} is {pairs[1][0]}"
            notes.append(Note(Kind.INFO, said, input=name))
    return notes


def _drifted(adapters: Mapping[str, Adapter], base: Base) -> list[Note]:
    """A word where the base has modules under the names of another version of transformers."""
    notes = []
    for name, adapter in adapters.items():
        modules = dict.fromkeys(edit.site.module for edit in adapter.edits)
        pairs = [(m, found) for m in modules if (found := base.locate(m)) is not None]
        drifted = [(module, found) for module, found in pairs if not _is_near(module, found)]
        if drifted:
            module, found = drifted[0]
            what = (
                f"{len(drifted)} modules are in the base under the names of another version of "
                f"transformers: {module} is {found}"
            )
            notes.append(Note(Kind.INFO, what, input=name))
    return notes


def _replications(adapters: Mapping[str, Adapter]) -> list[str]:
    """Layers that are copies of other layers in one adapter than in another are not the same layers."""
    found = {name: adapter.base.replication for name, adapter in adapters.items()}
    if len(set(found.values())) < 2:
        return []
    listed = ", ".join(f"{name}: {[list(pair) for pair in r]}" for name, r in found.items())
    return [f"the adapters are for different copies of the base's layers ({listed})"]


def layer_count(sites: Iterable[Site]) -> int:
    """One more than the highest layer number among the sites."""
    from adaptmerge.adapters.module_paths import layer_index

    numbers = [layer_index(site.module) for site in sites]
    return 1 + max((number for number in numbers if number is not None), default=-1)
