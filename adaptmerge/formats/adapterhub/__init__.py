"""AdapterHub adapters (library `adapters`): adapter_config.json with adapter.safetensors (or .bin).

Format: https://docs.adapterhub.ml/loading.html

| quirk | here |
|---|---|
| one architecture "lora" for LoRA, IA3, VeRA and DoRA | told apart by other fields of the config |
| Llama's intermediate_lora is down_proj, output_lora is up_proj | modules come from keys alone |
| a gated LoRA is not scaled by alpha / r | Gated with scale 1 |
| IA3 scales outputs by alpha * l, after the bias, feed-forward ones too | Scale of both |
| VeRA trains full square vera_B and vera_D | a product of four matrices |
| versions before 1.1.0 ignored a LoRA's alpha | alpha = r, with a note |
"""

from __future__ import annotations

from adaptmerge.adapters.graph import Adapter, BaseReference, Bundle, Kind, Note, bundle_of
from adaptmerge.errors import InputError
from adaptmerge.files.listing import Listing
from adaptmerge.formats.adapterhub.config import CONFIG, READ, Config
from adaptmerge.formats.adapterhub.families import READERS
from adaptmerge.formats.adapterhub.keys import Keys
from adaptmerge.formats.format import Format, ReadOptions

WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEADS = ("model_head.safetensors", "pytorch_model_head.bin")
SETUPS = {
    "adapter_fusion_config.json": "an AdapterFusion layer",
    "adapter_setup.json": "a setup of several adapters",
}


def detect(listing: Listing) -> bool:
    """Whether there is an AdapterHub config, of an adapter or of a setup of several."""
    if listing.single is not None and listing.single not in WEIGHTS:
        return False
    if not listing.has(CONFIG):
        return listing.single is None and any(listing.has(name) for name in SETUPS)
    config = listing.json(CONFIG)
    return "config" in config and bool({"model_type", "model_name"} & config.keys())


def read(listing: Listing, options: ReadOptions) -> Bundle:
    """The adapter at `listing`. Raises InputError with every problem of its files."""
    if not listing.has(CONFIG):
        known = (what for name, what in SETUPS.items() if listing.has(name))
        found = next(known, f"a folder without {CONFIG}")
        raise InputError(f"is {found}, which is not read yet (read: {READ})", where=listing.origin)
    config = Config.of(listing.json(CONFIG), f"{listing.origin}/{CONFIG}")
    keys = Keys.of(listing.tensors(_weights(listing)))
    edits = READERS[config.family](keys, config)
    if not edits:
        keys.problems.append(f"holds no {config.family}, which its config says it is")
    keys.finish()
    base_name = config.raw.get("model_name")
    adapter = Adapter(
        name=str(config.raw.get("name") or "default"),
        edits=tuple(edits),
        base=BaseReference(str(base_name) if base_name else None, architecture=config.model_type),
        notes=(*config.notes, *_head_notes(listing)),
        hints={"adapterhub": dict(config.raw)},
    )
    return bundle_of(adapter)


def _weights(listing: Listing) -> str:
    name = listing.single or next((name for name in WEIGHTS if listing.has(name)), None)
    if name is None:
        raise InputError(
            f"has {CONFIG} but no weights: expected {' or '.join(WEIGHTS)}", where=listing.origin
        )
    return name


def _head_notes(listing: Listing) -> list[Note]:
    heads = [name for name in HEADS if listing.has(name)]
    return [Note(Kind.DROPPED, f"the prediction head in {name} is not read") for name in heads]


FORMAT = Format(
    name="adapterhub",
    title="AdapterHub adapters (reads LoRA, gated LoRA, IA3, VeRA and sequential bottlenecks)",
    url="https://docs.adapterhub.ml/loading.html",
    detect=detect,
    read=read,
    files=(CONFIG, *WEIGHTS),
)
