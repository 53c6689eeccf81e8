"""The config of an adapter as an older release of PEFT reads it.

A release that does not know a field fails on it, or leaves it out silently or with a warning: then the
adapter computes something else. So what cannot be left out is refused.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

from adaptmerge.errors import CannotStore, UsageError
from adaptmerge.formats.peft.config import exactly
from adaptmerge.formats.peft.releases import COMMON, FIELDS, GONE, INHERITS, RELEASES, SUCCESSORS
from adaptmerge.formats.peft.tuner import tuner_of

# Values that mean the same as no such field, beside empty ones.
UNSET = {"megatron_core": "megatron.core", "qalora_group_size": 16}
# Fields that say nothing about what is computed.
SAYINGS = frozenset({"auto_mapping", "peft_version", "revision"})
PATTERNS = ("rank_pattern", "alpha_pattern")
TARGETS = ("target_modules", "feedforward_modules")

Config = Mapping[str, Any]
# init_lora_weights and the release that it came with, which may be followed by a number of iterations.
INITS = {
    "pissa": "0.11",
    "olora": "0.12",
    "eva": "0.14",
    "corda": "0.15",
    "orthogonal": "0.16",
    "lora_ga": "0.19",
    "mica": "0.20",
}


def _begun_as(init: str) -> Callable[[Config], bool]:
    return lambda config: str(config.get("init_lora_weights")).startswith(init)


# (family, first release that means the same, when it matters, what older ones do): no field tells.
CHANGES: tuple[tuple[str, str, Callable[[Config], bool], str], ...] = (
    ("OFT", "0.16", lambda config: True, "stores OFT in another form, as oft_r"),
    (
        "OFT",
        "0.18",
        lambda config: bool(config.get("use_cayley_neumann")),
        "cuts the Cayley series of OFT after another power",
    ),
    (
        "LORA",
        "0.19",
        lambda config: bool(config.get("target_parameters")),
        "swaps the inputs and outputs of target_parameters",
    ),
    (
        "ADAMSS",
        "0.20",
        lambda config: True,
        "takes the subspaces of ADAMSS from a random SVD without a seed",
    ),
    (
        "PSOFT",
        "0.20",
        lambda config: config.get("psoft_svd") == "lowrank",
        "takes psoft_svd 'lowrank' from a random SVD without a seed",
    ),
    *(
        ("LORA", since, _begun_as(init), f"does not know init_lora_weights {init!r}")
        for init, since in INITS.items()
    ),
)


def release_of(version: str) -> str:
    """The release, as 0.13, of a version as 0.13 or 0.13.2. Raises UsageError if it is none of them."""
    release = ".".join(version.split(".")[:2])
    if not re.fullmatch(r"\d+\.\d+(\.\d+)?", version) or release not in RELEASES:
        raise UsageError(
            f"{version!r} is no release of peft that can be written for: expected {RELEASES[0]} to "
            f"{RELEASES[-1]}"
        )
    return release


def fields_of(peft_type: str, version: str) -> frozenset[str]:
    """The config fields that a version knows for a family; none where it does not know the family."""
    release = release_of(version)
    if not _covers(release, family_since(peft_type), GONE.get((peft_type, ""))):
        return frozenset()
    return frozenset(
        name
        for name, since in _since(peft_type).items()
        if _covers(release, since, GONE.get((peft_type, name)))
    )


def family_since(peft_type: str) -> str | None:
    """The release that a family came with; None if no release has it."""
    return next(iter(FIELDS.get(peft_type, ())), None)


def downgraded(
    config: Config, version: str, modules: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """The config as a version of PEFT reads it, and one sentence for each thing that it cannot hold.

    modules: all that are adapted; respelled patterns are checked against them.
    """
    release = release_of(version)
    family = str(config["peft_type"])
    known = fields_of(family, release)
    if not known:
        return dict(config), [_unknown_family(family, release)]
    kept = {name: value for name, value in config.items() if name in known}
    problems = [
        _unknown_field(family, name, value, release)
        for name, value in config.items()
        if name not in known and not _says_nothing(family, name, value)
    ]
    problems += [
        f"peft {release} {what}: write it for {since} or later"
        for changed, since, matters, what in CHANGES
        if changed == family and _number(release) < _number(since) and matters(config)
    ]
    if "peft_version" in known:
        kept["peft_version"] = version
    return _respelled(kept, release, modules, problems), problems


def fitted(config: Config, version: str, modules: Collection[str]) -> dict[str, Any]:
    """The config for a version. Raises CannotStore with everything that it cannot hold."""
    found, problems = downgraded(config, version, modules)
    if problems:
        raise CannotStore(problems)
    return found


def _number(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def _covers(release: str, since: str | None, gone: str | None) -> bool:
    if since is None or _number(release) < _number(since):
        return False
    return gone is None or _number(release) < _number(gone)


@cache
def _since(peft_type: str) -> Mapping[str, str]:
    """Every field of a family to the release that first had both."""
    first = family_since(peft_type)
    assert first is not None
    tables = [COMMON, FIELDS.get(INHERITS.get(peft_type, ""), {})]
    general = {name: release for table in tables for name, release in _by_field(table).items()}
    later = {name: max(release, first, key=_number) for name, release in general.items()}
    return later | _by_field(FIELDS[peft_type])


def _by_field(table: Mapping[str, str]) -> dict[str, str]:
    return {name: release for release, names in table.items() for name in names.split()}


def _says_nothing(family: str, name: str, value: Any) -> bool:
    """Whether a field may be left out: it is not set, or about training."""
    tuner = tuner_of(family)
    training = tuner.training if tuner is not None else frozenset()
    return not value or value == UNSET.get(name) or name in SAYINGS | training


def _unknown_family(family: str, release: str) -> str:
    since = family_since(family)
    if since is None:
        return f"no release of peft up to {RELEASES[-1]} knows {family}"
    if _covers(release, since, None):
        gone, successor = GONE[family, ""], SUCCESSORS[family]
        return f"peft {release} no longer knows {family}, which {gone} replaced by {successor}"
    return f"peft {release} does not know {family}: write it for {since} or later"


def _unknown_field(family: str, name: str, value: Any, release: str) -> str:
    since = _since(family).get(name)
    shown = textwrap.shorten(repr(value), 60, placeholder=" ...")
    found = f"config field {name} of {family}, which is {shown}"
    if since is None:
        return f"no release of peft up to {RELEASES[-1]} knows the {found}"
    if _covers(release, since, None):
        return f"peft {release} no longer knows the {found}: write it for one before {GONE[family, name]}"
    uniform = ", or with one rank and scale (--ranks uniform)" if name in PATTERNS else ""
    return f"peft {release} does not know the {found}: write it for {since} or later{uniform}"


def _respelled(
    config: dict[str, Any], release: str, modules: Collection[str], problems: list[str]
) -> dict[str, Any]:
    """The config with target_modules and patterns as the release matches them."""
    result = dict(config)
    # 0.4 matches any end of a path, 0.5 takes dots for any character: neither does so to an expression.
    if _number(release) < (0, 6):
        for name in TARGETS:
            if isinstance(config.get(name), (list, tuple, set)) and config[name]:
                paths = "|".join(re.escape(target) for target in sorted(config[name]))
                result[name] = rf"(.*\.)?({paths})"
    # Until 0.14 LoRA's patterns match only behind a dot; else a key counts that is the whole path.
    if config["peft_type"] == "LORA" and _number(release) < (0, 15):
        for name in PATTERNS:
            table = config.get(name) or {}
            if table:
                result[name] = {_whole(key): value for key, value in table.items()}
                problems += _clashes(name, result[name], release, modules)
    return result


def _whole(key: str) -> str:
    """The plain path of a key that matches one module only; another key as it is."""
    plain = re.sub(r"\\(.)", r"\1", key[1:])
    return plain if key == exactly(plain) else key


def _clashes(
    name: str, table: Mapping[str, Any], release: str, modules: Collection[str]
) -> list[str]:
    """Keys that the release would not match as meant."""
    anchored = [key for key in table if key.startswith("^")]
    problems = [
        f"peft {release} never matches the key {key!r} of {name}: write it for 0.15 or later"
        for key in anchored
    ]
    return problems + [
        f"peft {release} takes the key {key!r} of {name} for {module} too: write it for 0.15 or later"
        for key in table
        for module in modules
        if key in modules and module.endswith(f".{key}")
    ]
