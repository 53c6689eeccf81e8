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

from adaptmerge.errors import InputError
from adaptmerge.files.listing import Listing
from adaptmerge.formats.peft import write
from adaptmerge.formats.peft.config import (
    CONFIG,
    FAMILY_MARKS,
    READABLE,
    WEIGHTS,
    PeftConfig,
    find_config,
)
from adaptmerge.formats.peft.keys import Keys
from adaptmerge.formats.peft.oracle import ORACLE
from adaptmerge.formats.peft.read import edits_of
from adaptmerge.formats.peft.tuner import Reading, tuner_of
from adaptmerge.graph import Adapter, BaseReference, Bundle, Note, bundle_of
from adaptmerge.registry import Format, ReadOptions


def detect(listing: Listing) -> bool:
    """Whether there is a PEFT config, or a tensor file with keys of a PEFT family."""
    if listing.single is None and listing.has(CONFIG):
        return "peft_type" in listing.json(CONFIG)
    name = listing.single or next((name for name in READABLE if listing.has(name)), "")
    if not name.endswith((".safetensors", ".bin", ".pt", ".pth", ".index.json")):
        return False
    return any(mark in key for key in listing.tensors(name).refs for mark in FAMILY_MARKS)


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
    if options.alpha is not None and config.alpha not in (None, options.alpha):
        raise InputError(
            f"?alpha={options.alpha:g} contradicts its config, which says {config.alpha:g}: leave it out",
            where=listing.origin,
        )
    if options.alpha is not None and config.peft_type != "LORA":
        raise InputError(
            f"?alpha= is for LoRA; {config.peft_type} has no alpha: leave it out",
            where=listing.origin,
        )
    reading = Reading(tuner, Keys.of(file, tuner.key()), config, options)
    edits = edits_of(reading)
    adapter = Adapter(
        name="default",
        edits=tuple(edits),
        base=BaseReference(name=config.base_model, revision=config.revision),
        notes=(*(Note(*note) for note in found.notes), *reading.notes),
        hints={"peft": config.hints()},
        covers=config.covers(edit.site.module for edit in edits),
    )
    return bundle_of(adapter)


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


FORMAT = Format(
    name="peft",
    title="Hugging Face PEFT, all families (docs/families.md)",
    url="https://huggingface.co/docs/peft/developer_guides/checkpoint",
    detect=detect,
    read=read,
    write=write.write,
    stores=write.stores,
    refuses=write.refuses,
    suffixes=(".safetensors",),
    takes_alpha=True,
    files=(CONFIG, *READABLE),
    oracle=ORACLE,
)
