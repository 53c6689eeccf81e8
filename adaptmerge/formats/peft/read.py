"""Reading one adapter: every config field judged, every tensor in an edit, all problems at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

from adaptmerge.adapters.graph import Edit, Kind, Note
from adaptmerge.adapters.stored_edits import role_of
from adaptmerge.errors import InputError
from adaptmerge.formats.peft.additive import fits
from adaptmerge.formats.peft.fields import own_problems
from adaptmerge.formats.peft.keys import Keys
from adaptmerge.formats.peft.saved import saved_edits
from adaptmerge.formats.peft.tuner import COMMON, Malformed, Parts, Reading, families, judge
from adaptmerge.tensors.walk import refs_of

LORA = "LORA"


def edits_of(reading: Reading) -> list[Edit]:
    """The edits of an adapter. Raises InputError with all problems of config and tensors."""
    tuner, config = reading.tuner, reading.config
    wrong = own_problems(config.raw, tuner.maths, tuner.patterns)
    if wrong:
        raise InputError(wrong, where=config.where)
    reading.notes += reading.keys.notes()
    _judge_fields(reading)
    if tuner.read is not None:
        _check_all(reading)
        found = _guarded(reading, "", {}, partial(tuner.read, reading))
    else:
        assert tuner.module is not None
        found = each_module(reading, tuner.module)
    saved = saved_edits(reading.keys, reading.config, reading.notes)
    _judge_saved(reading, saved, {edit.site.module for edit in found})
    reading.keys.finish()
    if tuner.peft_type != LORA:
        reading.notes += reading.ignored()
    return [*saved, *found]


def _check_all(reading: Reading) -> None:
    """Raises InputError with all tensors that are not as their family stores them."""
    before = len(reading.keys.problems)
    for module, parts in reading.keys.modules.items():
        try:
            reading.tuner.rules.check(parts)
        except Malformed as problem:
            reading.keys.problems.append(f"{module}: {problem}")
    if len(reading.keys.problems) > before:
        raise InputError(reading.keys.problems, where=reading.keys.path)


def _judge_saved(reading: Reading, saved: Sequence[Edit], adapted: Collection[str]) -> None:
    """What lies inside an adapted module, or where the base has nothing, is no parameter stored whole."""
    base = reading.options.base
    marks = {name.partition("_")[0] + "_" for name in families()} | {"hada_", "lora_"}
    for edit in saved:
        module, last = edit.site.module, edit.site.module.rpartition(".")[2]
        inside = module.rpartition(".")[0] in adapted or any(map(last.startswith, marks))
        foreign = base is not None and base.tensors and base.locate(module) is None
        if role_of(edit) == "unlisted" and (inside or foreign):
            reading.keys.problems.append(
                f"tensor of {edit.site} belongs to nothing this format knows"
                + (f", nor to {base.path.name}" if foreign and base is not None else "")
            )


def each_module(
    reading: Reading, read: Callable[[Reading, str, Parts], Sequence[Edit]]
) -> list[Edit]:
    """The edits that `read` makes of each module; what it complains of is said of that module."""
    return [
        edit
        for module, parts in reading.keys.modules.items()
        for edit in _guarded(
            reading, module, parts, partial(_checked, reading, module, parts, read)
        )
    ]


def _checked(
    reading: Reading,
    module: str,
    parts: Parts,
    read: Callable[[Reading, str, Parts], Sequence[Edit]],
) -> Sequence[Edit]:
    """The edits of a module. Raises Malformed where a tensor cannot be what the family stores, or where
    they do not fit each other or the base."""
    rules = reading.tuner.rules
    rules.check(parts)
    edits = read(reading, module, parts)
    for edit in edits:
        judge(reading.tuner, edit)
    _fits_base(reading, module, rules.sizes(parts))
    return edits


def _fits_base(reading: Reading, module: str, sizes: Mapping[str, int]) -> None:
    """Raises Malformed where the sides of the tensors are not those of the base's weight."""
    weight = reading.matrix(module) if sizes.keys() & {"out", "in"} else None
    if weight is None:
        return
    own = (sizes.get("out", weight.shape[0]), sizes.get("in", weight.shape[1]))
    fits(reading, module, own)


def _guarded(
    reading: Reading, module: str, parts: Parts, read: Callable[[], Sequence[Edit]]
) -> list[Edit]:
    """What `read` returns; its complaint and every tensor it made nothing of are problems."""
    problems = reading.keys.problems
    where = f"{module}: " if module else ""
    try:
        edits = read()
    except KeyError as problem:
        found = f"found only {', '.join(parts)}" if parts else "nothing like it is stored"
        problems.append(f"{where}{problem.args[0]} is missing, {found}")
        return []
    except ValueError as problem:
        problems.append(f"{where}{problem}")
        return []
    if not parts:
        return list(edits)
    used = {ref.name for edit in edits for ref in refs_of(edit)}
    problems += [
        f"tensor {ref.name!r} belongs to nothing this format knows"
        for ref in parts.values()
        if ref.name not in used
    ]
    return list(edits)


# Fields of releases long gone, and what they mean where they are set.
FORMER = {
    "enable_lora": "the adapter is of a merged projection of PEFT before 0.3, some parts of which it "
    "leaves alone: give each part an adapter of its own",
}


def _judge_fields(reading: Reading) -> None:
    """Unknown fields: said when unset, an error when they are set, for they may change the maths."""
    tuner = reading.tuner
    known = COMMON | tuner.maths.keys() | tuner.training | set(tuner.patterns.values())
    unknown = {k: v for k, v in reading.config.raw.items() if k not in known | FORMER.keys()}
    reading.keys.problems += [
        f"config field {name} is {value!r}: {FORMER[name]}"
        for name, value in reading.config.raw.items()
        if name in FORMER and value
    ]
    for kind, empty in ((Kind.INFO, (None, [], {}, "")), (Kind.ASSUMED, (0,))):
        names = sorted(name for name, value in unknown.items() if value in empty)
        if names:
            what = (
                f"unknown config fields that are not set are taken as harmless: {', '.join(names)}"
            )
            reading.notes.append(Note(kind, what))
    bias = reading.config.raw.get("bias")
    modes = ("none", "all", tuner.bias_mode)
    if tuner.bias_mode and bias is not None and bias not in modes:
        reading.keys.problems.append(f"bias is {bias!r}: expected {', '.join(modes)}")
    version = reading.config.raw.get("peft_version") or "unknown"
    reading.keys.problems += [
        f"config field {name} is {value!r}, which this version does not know (the file was written by "
        f"peft {version}): it may change what the adapter computes; update adaptmerge"
        for name, value in unknown.items()
        if value
    ]


__all__ = ["Keys", "Malformed", "each_module", "edits_of"]
