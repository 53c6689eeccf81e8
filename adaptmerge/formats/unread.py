"""What an input is that no format here reads, so that a refusal can say so.

Told by names of files and of tensors, and by the first bytes of files. A kind that becomes a format leaves
this list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from adaptmerge.errors import InputError
from adaptmerge.files.listing import Listing

TENSORS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".index.json")
PIPELINE = re.compile(r"(unet|text_encoder(_\d)?|transformer(_\d)?)\.")
# a transformer of a pipeline, not one that language models call by that name
DIFFUSION = re.compile(r"\.(to_[qkv]|to_out|add_[qkv]_proj|(single_)?transformer_blocks)\b")
PIPELINE_METADATA = "lora_adapter_metadata"
MISTRAL = re.compile(r"^layers\.\d+\.(attention|feed_forward)\.w\w\.lora_[AB]\.weight$")
KOHYA = re.compile(r"(lora_(unet|te\d?|transformer)|lycoris)_\w+\.")
MLX = re.compile(r"\.lora_[ab]$")


def is_foreign(keys: Collection[str], metadata: Mapping[str, str]) -> bool:
    """Whether tensors that look like PEFT's are another library's, with another meaning."""
    return is_pipeline(keys, metadata) or any(map(MISTRAL.match, keys))


def is_pipeline(keys: Collection[str], metadata: Mapping[str, str]) -> bool:
    """Whether tensors are of the components of a diffusers pipeline, which PEFT's own names may follow."""
    if PIPELINE_METADATA in metadata:
        return True
    found = [key for key in keys if PIPELINE.match(key)]
    return bool(found) and all(
        not key.startswith("transformer") or DIFFUSION.search(key) for key in found
    )


class Kind(NamedTuple):
    """A kind of input and how it is told: from its file names, from the keys of its tensors, or from the
    first bytes of a file."""

    sentence: str
    names: Callable[[Collection[str]], bool] = lambda names: False
    keys: Callable[[Collection[str]], bool] = lambda keys: False
    bytes: Callable[[bytes], bool] = lambda head: False


def ends(*suffixes: str) -> Callable[[Collection[str]], bool]:
    """Whether any name ends so."""
    return lambda names: any(name.endswith(suffixes) for name in names)


def called(pattern: str) -> Callable[[Collection[str]], bool]:
    """Whether a pattern is all of any name."""
    found = re.compile(pattern)
    return lambda names: any(map(found.fullmatch, names))


def some(pattern: str | re.Pattern[str]) -> Callable[[Collection[str]], bool]:
    """Whether a pattern is found in any key."""
    found = re.compile(pattern)
    return lambda keys: any(map(found.search, keys))


def begins(*marks: bytes, at: int = 0) -> Callable[[bytes], bool]:
    """Whether the bytes from there on begin so."""
    return lambda head: head[at:].startswith(marks)


def _is_model(keys: Collection[str]) -> bool:
    """Whether tensors are those of a whole model: an embedding, and no side of an adapter."""
    embeds = r"(embed_tokens|word_embeddings|wte|embeddings|embed_in)\.weight$"
    return some(embeds)(keys) and not some(SIDES)(keys)


def _is_diffusion_model(keys: Collection[str]) -> bool:
    parts = r"^(model\.diffusion_model|down_blocks|transformer_blocks|double_blocks|mid_block)\."
    return some(parts)(keys) and not some(SIDES)(keys)


def _is_onnx(head: bytes) -> bool:
    """A protobuf that begins with a small version and the name of who wrote it."""
    return (
        len(head) > 8 and head[0] == 8 and head[1] < 32 and head[2] == 0x12 and head[4:8].isalpha()
    )


SIDES = re.compile(r"lora|adapter|ia3|vera|hada|prompt", re.IGNORECASE)
NOT_YET = "which adaptmerge cannot read yet"
ONNX = "is an ONNX model, no adapter: give the adapter that it was made with"
WHOLE = (
    "is a whole model, no adapter: use it as a base (adaptmerge fuse), or take an adapter out of it "
    "(adaptmerge extract)"
)
PIPELINE_LORA = f"is a LoRA of a diffusers pipeline, {NOT_YET}"
NEMO = f"is of NVIDIA NeMo or Megatron, {NOT_YET}"
MLX_ADAPTER = f"is an adapter of MLX, {NOT_YET}"
SHARDS = "is a checkpoint in shards of {}, which nothing reads as it is: {} first"
RECIPE = "is a recipe of {}: {}"
KINDS: Sequence[Kind] = (
    Kind(PIPELINE_LORA, keys=lambda keys: is_pipeline(keys, {})),
    Kind(f"is a LoRA of kohya's sd-scripts or LyCORIS, {NOT_YET}", keys=some(KOHYA)),
    Kind(f"is a LoRA of torchtune, {NOT_YET}", keys=some(r"^layers\.\d+\..*\.lora_[ab]\.weight$")),
    Kind(f"is a LoRA of LitGPT, {NOT_YET}", keys=some(r"^transformer\.h\.\d+\..*\.lora_[AB]$")),
    Kind(f"is a LoRA of mistral-finetune, {NOT_YET}", keys=some(MISTRAL)),
    Kind(f"is a LLaMA-Adapter, {NOT_YET}", keys=some(r"^adapter_query\.weight$")),
    Kind(MLX_ADAPTER, ends("adapters.npz"), some(MLX)),
    Kind(NEMO, ends(".nemo"), some(r"\.adapter\.linear_(in|out)\.|adapter_layer\.lora_")),
    Kind(f"is a textual inversion, {NOT_YET}", keys=some(r"^(emb_params|string_to_param\b.*)$")),
    Kind(f"is an IP-Adapter, {NOT_YET}", keys=some(r"^(ip_adapter|image_proj)\.")),
    Kind("is a ControlNet, no adapter of weights", keys=some(r"^(controlnet_|control_model\.)")),
    Kind(
        "is an ONNX adapter, whose names only its own graph tells: give the adapter that it was made of",
        ends(".onnx_adapter"),
        bytes=begins(b"TORT", at=4),
    ),
    Kind(ONNX, ends(".onnx"), bytes=_is_onnx),
    Kind("is an adapter of Apple's foundation models, which no other tool reads", ends(".mil")),
    Kind(
        "is an HDF5 file, as Keras writes: only adapters of PyTorch are read",
        bytes=begins(b"\x89HDF\r\n"),
    ),
    Kind("is an archive: unpack it and give the folder", ends(".zip"), bytes=begins(b"\x1f\x8b")),
    Kind("is a tar archive: unpack it and give the folder", bytes=begins(b"ustar", at=257)),
    Kind(WHOLE, called(r"(pytorch_)?model-\d+-of-\d+\.(safetensors|bin)"), _is_model),
    Kind(WHOLE, called(r"model_index\.json"), _is_diffusion_model),
    Kind(
        SHARDS.format("torch.distributed", "merge them (accelerate merge-weights)"), ends(".distcp")
    ),
)
STATE = re.compile(
    r"(optimizer|scheduler|scaler|rng_state\w*|training_args)\.(pt|pth|bin)|trainer_state\.json"
)
MERGEKIT = RECIPE.format(
    "mergekit, which merges whole models", "use mergekit, or name adapters as inputs"
)
TEXTS = {  # of YAML, by a key that only it has
    r"^merge_method\s*:": MERGEKIT,
    r"^inputs\s*:": RECIPE.format("adaptmerge", "start it with adaptmerge run"),
    r"^(base_model|model_name_or_path)\s*:": "is a configuration of a training: give the folder of the "
    "adapter that it wrote",
}


def refuse_state(listing: Listing) -> None:
    """Raises InputError for files of a training that lie beside an adapter."""
    if listing.single and STATE.fullmatch(listing.single):
        raise InputError(
            "is the state of a training, no adapter: give the folder that it lies in",
            where=listing.origin,
        )


def kind_of(listing: Listing) -> str | None:
    """A sentence on what an input is; None where that cannot be told."""
    if _config(listing).keys() & {"lora_parameters", "fine_tune_type"}:
        return MLX_ADAPTER
    names = [listing.single] if listing.single else list(listing.names)
    keys, metadata = _tensors(listing, names)
    if PIPELINE_METADATA in metadata:
        return PIPELINE_LORA
    head = listing.head(listing.single, 512) if listing.single else b""
    told = (k.sentence for k in KINDS if k.names(names) or k.keys(keys) or k.bytes(head))
    return next(told, None) or (_text(listing) if listing.single else _folder(listing))


def _text(listing: Listing) -> str | None:
    """What a single file of text or of arrays is."""
    assert listing.single is not None
    if listing.single == "adapter_config.json":
        return "is the config of an adapter: give the folder that it lies in"
    if listing.single.endswith(".npz"):
        arrays = _arrays(listing)
        return MLX_ADAPTER if some(MLX)(arrays) else "is an archive of NumPy arrays, no adapter"
    if not listing.single.endswith((".yaml", ".yml")):
        return None
    text = listing.head(listing.single, 1 << 16).decode("utf-8", errors="replace")
    return next((said for key, said in TEXTS.items() if re.search(key, text, re.MULTILINE)), None)


def _arrays(listing: Listing) -> list[str]:
    """The names of the arrays of a NumPy archive; none where it is damaged."""
    import zipfile

    try:
        with zipfile.ZipFile(listing.root / str(listing.single)) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, ValueError, zipfile.BadZipFile):
        return []


def _folder(listing: Listing) -> str | None:
    """What a folder without an adapter is."""
    if called(r"global_step\d+")(listing.folders):
        return SHARDS.format("DeepSpeed", "run the zero_to_fp32.py that lies in it")
    if called(r"(pytorch_model_fsdp|distcp|optimizer)_\d+")(listing.folders):
        return SHARDS.format("FSDP", "merge them (accelerate merge-weights)")
    if listing.has("config.json") and "architectures" in _json(listing, "config.json"):
        return WHOLE
    if any(map(STATE.fullmatch, listing.names)) or called(r"checkpoint-\d+")(listing.folders):
        return "is the folder of a training run, without an adapter in itself"
    return None


def _config(listing: Listing) -> Mapping[str, Any]:
    return _json(listing, "adapter_config.json")


def _json(listing: Listing, name: str) -> Mapping[str, Any]:
    try:
        return listing.json(name) if listing.has(name) else {}
    except InputError:
        return {}


def _tensors(listing: Listing, names: Sequence[str]) -> tuple[Collection[str], Mapping[str, str]]:
    """The keys and metadata of the first file of tensors that can be read."""
    for name in names:
        if name.endswith(TENSORS):
            try:
                file = listing.tensors(name)
            except InputError:
                continue
            return file.refs.keys(), file.metadata
    return (), {}
