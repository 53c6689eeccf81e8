"""RoAd: road_theta and road_alpha, out / 2, out or 2 out values by variant; the bias is turned too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptmerge.adapters.families.road import Road
from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner

EACH = {"road_1": 1, "road_2": 2, "road_4": 4}


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    angles, scales = parts["road_theta"], parts["road_alpha"]
    each = EACH.get(reading.setting("variant"))
    if each is None:
        found, known = reading.setting("variant"), ", ".join(EACH)
        raise Malformed(f"variant is {found!r}: expected one of {known}")
    group = reading.setting("group_size")
    if not isinstance(group, int) or group < 2 or group % 2:
        raise Malformed(f"group_size is {group!r}: expected an even number of at least 2")
    out = 2 * angles.count // each
    if angles.shape != scales.shape or out % group:
        raise Malformed(
            f"has {angles.count} angles and {scales.count} scales, which give no outputs in groups of "
            f"{group}"
        )
    weight = reading.matrix(module)
    if weight is not None and weight.shape[0] != out:
        raise Malformed(
            f"is for {out} outputs, but the base has {weight.shape[0]}: is the variant right?"
        )
    return [Road(Site(module, param), angles, scales, each, group) for param in ("weight", "bias")]


def tensors(edit: Road) -> Parts:
    """Those of the weight; the bias shares them."""
    if edit.site.param != "weight":
        return {}
    return {"road_theta": edit.angles, "road_alpha": edit.scales}


def settings(edit: Road) -> Mapping[str, Any]:
    return {"variant": f"road_{edit.each}", "group_size": edit.group}


TUNER = Tuner(
    "ROAD",
    summary="outputs turned and scaled pair by pair",
    shapes={
        "road_theta": "n",
        "road_alpha": "n",
    },
    leaves=("road_theta", "road_alpha"),
    module=module,
    tensors=tensors,
    settings=settings,
    maths={"variant": "road_1", "group_size": 64},
    as_lora="base",
    merges="as deltas, with the base",
)
