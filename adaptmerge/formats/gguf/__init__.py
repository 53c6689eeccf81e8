"""GGUF LoRA adapters, as llama.cpp and everything built on it load them: one .gguf file.

Format: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-adapter.cpp

| quirk | here |
|---|---|
| names are llama.cpp's, e.g. blk.0.attn_q.weight.lora_a | mapped with the base's module names |
| one alpha for all tensors, scale alpha / rank | scales folded into B, alpha 0 (not scaled) |
| llama and its kin have the rows of q and k reordered | rows of lora_b reordered, exactly |
| an embedding's A is (vocabulary, r), its B (dimension, r) | canonical (out, in) factors |
| the layers of GPT-2 are (out, in) like all others | factors as PEFT has them |
"""

from __future__ import annotations

from adaptmerge.adapters.graph import Adapter, Bundle, bundle_of
from adaptmerge.bases.llama_cpp import Names
from adaptmerge.errors import InputError
from adaptmerge.files.gguf import MAGIC, read_header
from adaptmerge.files.listing import Listing
from adaptmerge.formats.format import Format, ReadOptions
from adaptmerge.formats.gguf import write
from adaptmerge.formats.gguf.read import Contents, base_reference, check_kind

LEGACY = b"algg"  # "ggla" as a little-endian number: llama.cpp's adapters of 2023


def detect(listing: Listing) -> bool:
    """Whether the file, or one in a folder without a PEFT config, is GGUF by its first bytes."""
    if listing.single is None and listing.has("adapter_config.json"):
        return False
    return any(listing.head(name, 4) in (MAGIC, LEGACY) for name in _candidates(listing))


def _candidates(listing: Listing) -> list[str]:
    if listing.single is not None:
        return [listing.single]
    return [name for name in listing.names if name.endswith(".gguf")]


def read(listing: Listing, options: ReadOptions) -> Bundle:
    """The adapter at `listing`. Raises InputError with every problem of its file."""
    name, *others = _candidates(listing)
    if others:
        raise InputError(
            f"holds {1 + len(others)} GGUF files: name one of them, e.g. {name}",
            where=listing.origin,
        )
    if listing.head(name, 4) == LEGACY:
        raise InputError(
            "is a GGLA adapter of 2023, which llama.cpp no longer reads: convert its source again",
            where=listing.origin,
        )
    file = read_header(listing.root / name)
    check_kind(file, listing.origin)
    if options.base is None:
        raise InputError(
            "GGUF names tensors as llama.cpp does: pass --base DIR to find their modules",
            where=listing.origin,
        )
    names = Names.of(options.base, InputError)
    edits, notes = Contents(file, names, options).read(listing.origin)
    kept = {key: file.values[key] for key in write.KEPT if file.values.get(key)}
    base = base_reference(file.values)
    return bundle_of(Adapter("default", edits, base, notes, {"gguf": kept} if kept else {}))


FORMAT = Format(
    name="gguf",
    title="GGUF LoRA adapters (llama.cpp, Ollama, LM Studio)",
    url="https://github.com/ggml-org/llama.cpp/blob/master/src/llama-adapter.cpp",
    detect=detect,
    read=read,
    write=write.write,
    stores=write.stores,
    refuses=write.refuses,
    suffixes=(".gguf",),
    takes_alpha=True,
    files=(write.FILE,),
)
