"""What of an adapter does not fit a base model, each in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adaptmerge.adapters.graph import Adapter, Edit, Site
from adaptmerge.adapters.module_paths import original
from adaptmerge.adapters.weight_edits import factor_of, scaled_by, side_of
from adaptmerge.bases.base import CONV1D_MODELS, Base


def misfits(name: str, adapter: Adapter, base: Base) -> list[str]:
    """One sentence for each edit whose module the base lacks, or has in another shape."""
    replication = adapter.base.replication
    found = [misfits_of(edit, base, replication) for edit in adapter.edits]
    return [f"{name}: {problem}" for problems in found for problem in problems]


def missing(site: Site, base: Base) -> str:
    """That the base has no such module."""
    return f"{site} is not in the base {base.path.name}: is it for another model?"


def misfits_of(edit: Edit, base: Base, replication: Sequence[tuple[int, int]]) -> list[str]:
    """What is amiss with one edit of an adapter for a base whose layers are copied so; mostly nothing."""
    factor, site = factor_of(edit), edit.site
    site = replace(site, module=original(site.module, replication))
    is_weight = site.param == "weight" or site.expert is not None
    if factor is None and site.param == "weight":
        return _scale_misfits(edit, base)
    if factor is None or not is_weight or not base.tensors:
        return []
    weight = base.parameter(site) if site.expert is None else base.weight(site)
    if weight is None:
        if site.expert is None and base.locate(site.module) is not None:
            return []
        return [missing(site, base)]
    rows = weight.shape[0] if weight.shape else 0
    shape = (rows, weight.count // rows if rows else 0)
    turned = base.architecture in CONV1D_MODELS
    if factor.shape == shape or (turned and factor.shape == shape[::-1]):
        return []
    return [
        f"{edit.site} is for a weight of {list(factor.shape)}, but the base {base.path.name} "
        f"has {list(shape)}"
    ]


def _scale_misfits(edit: Edit, base: Base) -> list[str]:
    """A vector of scales is as long as the side of the weight that it scales."""
    vector, weight = scaled_by(edit), base.weight(edit.site)
    if vector is None or weight is None or len(weight.shape) < 2:
        return []
    inner = side_of(edit) == "in"
    fits = weight.shape[1] % vector.count == 0 if inner else weight.shape[0] == vector.count
    if fits:
        return []
    return [
        f"{edit.site} scales {vector.count} {'inputs' if inner else 'outputs'}, but the weight "
        f"of the base {base.path.name} is {list(weight.shape)}"
    ]
