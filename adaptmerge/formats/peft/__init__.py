"""Hugging Face PEFT adapters: adapter_config.json with adapter_model.safetensors (or .bin).

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint

| quirk | here |
|---|---|
| the scale is in the config only: alpha / r, rsLoRA alpha / sqrt(r), patterns | one number per site |
| keys may keep adapter names, wrapper prefixes, or copies of the base | removed; kept as Replace |
| target_modules is a set or a regular expression | the shortest exact list of suffixes |
| embeddings swap the roles of A and B; convolutions have kernels in A | (out, in) factors |
"""

from __future__ import annotations

from collections.abc import Sequence

from adaptmerge.adapters.graph import Adapter, BaseReference, Bundle, Edit, Note, bundle_of
from adaptmerge.errors import InputError
from adaptmerge.files.listing import Listing
from adaptmerge.formats.format import Format, Output, ReadOptions, Stores, WriteOptions
from adaptmerge.formats.peft.beside import labels_of, model_config, token_names
from adaptmerge.formats.peft.config import (
    CONFIG,
    FAMILY_MARKS,
    METADATA_KEY,
    READABLE,
    WEIGHTS,
    PeftConfig,
    find_config,
)
from adaptmerge.formats.peft.keys import Keys
from adaptmerge.formats.peft.oracle import ORACLE
from adaptmerge.formats.peft.read import edits_of
from adaptmerge.formats.peft.releases import RELEASES
from adaptmerge.formats.peft.target_parameters import covers
from adaptmerge.formats.peft.tuner import Reading, Tuner, tuner_of
from adaptmerge.formats.unread import is_foreign


def detect(listing: Listing) -> bool:
    """Whether there is a PEFT config, or a tensor file with keys of a PEFT family."""
    if listing.single is None and listing.has(CONFIG):
        return "peft_type" in listing.json(CONFIG)
    name = listing.single or next((name for name in READABLE if listing.has(name)), "")
    if not name.endswith((".safetensors", ".bin", ".pt", ".pth", ".index.json")):
        return False
    file = listing.tensors(name)
    if is_foreign(file.refs.keys(), file.metadata):
        return False
    if METADATA_KEY in file.metadata or (name in WEIGHTS and _has_config(listing)):
        return True
    return any(mark in key for key in file.refs for mark in FAMILY_MARKS)


def _has_config(listing: Listing) -> bool:
    return listing.has(CONFIG) and "peft_type" in listing.json(CONFIG)


def read(listing: Listing, options: ReadOptions) -> Bundle:
    """The adapter at `listing`. Raises InputError with every problem of its files."""
    file = listing.tensors(_weights(listing))
    found = find_config(listing, file)
    config = PeftConfig.of(found.values, where=found.where or listing.origin)
    tuner = tuner_of(config.peft_type)
    if tuner is None:
        raise InputError(
            f"is a PEFT {config.peft_type} adapter, a family that this version does not know: "
            "update adaptmerge",
            where=listing.origin,
        )
    _check_options(options, config, tuner, listing.origin)
    reading = Reading(tuner, Keys.of(file, tuner.key(), tuner.prefix), config, options)
    edits = edits_of(reading)
    beside = model_config(listing, file) if any(getattr(e, "owner", "") for e in edits) else {}
    labels = labels_of(edits, beside, reading.notes)
    adapter = Adapter(
        name="default",
        edits=tuple(edits),
        base=BaseReference(
            name=config.base_model, revision=config.revision, replication=config.replication
        ),
        notes=(*(Note(*note) for note in found.notes), *reading.notes),
        hints={"peft": config.hints(), **({"config": dict(beside)} if labels else {})},
        covers=config.covers(edit.site.module for edit in edits) | covers(config, edits),
        labels=labels,
        tokens=token_names(listing, edits),
    )
    return bundle_of(adapter)


def _check_options(options: ReadOptions, config: PeftConfig, tuner: Tuner, where: str) -> None:
    """Raises InputError where what was asked of an input means nothing for it, or not what it says."""
    family = config.peft_type
    if options.alpha is not None and config.alpha not in (None, options.alpha):
        raise InputError(
            f"?alpha={options.alpha:g} contradicts its config, which says {config.alpha:g}: leave it out",
            where=where,
        )
    if options.alpha is not None and family != "LORA":
        raise InputError(f"?alpha= is for LoRA; {family} has no alpha: leave it out", where=where)
    for name in ("task", "init"):
        if getattr(options, name) is not None and name not in tuner.takes:
            raise InputError(f"?{name}= means nothing for a {family}: leave it out", where=where)


def _weights(listing: Listing) -> str:
    if listing.single:
        return listing.single
    name = next((name for name in READABLE if listing.has(name)), None)
    if name is None:
        raise InputError(
            f"has adapter_config.json but no weights: expected {WEIGHTS[0]}",
            where=listing.origin,
        )
    return name


def _write(bundle: Bundle, output: Output, options: WriteOptions) -> str:
    from adaptmerge.formats.peft import write

    return write.write(bundle, output, options)


def _stores(options: WriteOptions) -> Stores:
    from adaptmerge.formats.peft import write

    return write.stores(options)


def _refuses(edits: Sequence[Edit], options: WriteOptions) -> list[str]:
    from adaptmerge.formats.peft import write

    return write.refuses(edits, options)


FORMAT = Format(
    name="peft",
    title="Hugging Face PEFT, all families (docs/families.md)",
    url="https://huggingface.co/docs/peft/developer_guides/checkpoint",
    detect=detect,
    read=read,
    write=_write,
    stores=_stores,
    refuses=_refuses,
    suffixes=(".safetensors",),
    takes_alpha=True,
    files=(CONFIG, *READABLE),
    versions=RELEASES,
    oracle=ORACLE,
)
