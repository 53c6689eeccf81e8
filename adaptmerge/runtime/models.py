"""Base models as `transformers` builds them, random inputs for them, and what they compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaptmerge.errors import InputError
from adaptmerge.files.listing import Listing
from adaptmerge.lazy import torch

CONFIG = "config.json"
SHOWN = 5  # names listed in a message


def load_model(base_dir: Path, device: str = "cpu", dtype: str = "float32") -> torch.nn.Module:
    """The model in a checkpoint folder, in eval mode with eager attention, from local files only.

    Raises InputError when it cannot be loaded, lacks weights, or asks for code of its own.
    """
    where = str(base_dir)
    config = model_config(base_dir)
    with quietly(), in_one_sentence(where):
        model, report = model_class(config).from_pretrained(
            base_dir,
            config=config,
            dtype=dtype_named(dtype),
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"lacks {len(missing)} weights of {type(model).__name__}, which would be random: "
            f"{some(missing)}; is this a whole checkpoint?",
            where=where,
        )
    with in_one_sentence(where):
        loaded: torch.nn.Module = model.to(device).eval()
    return loaded


def model_config(base_dir: Path) -> Any:
    """The `transformers` config of a folder. Raises InputError when it asks for remote code."""
    where = str(base_dir)
    listing = Listing.of(base_dir, where)
    if listing.single or not listing.has(CONFIG):
        raise InputError("is not a model folder: expected config.json in it", where=where)
    if listing.json(CONFIG).get("auto_map"):
        raise InputError(
            "asks for remote code (auto_map in config.json), which is never run: if transformers "
            "has this model itself, remove auto_map",
            where=where,
        )
    from transformers import AutoConfig

    with quietly(), in_one_sentence(where):
        return AutoConfig.from_pretrained(base_dir, local_files_only=True, trust_remote_code=False)


def model_class(config: Any) -> Any:
    """The class that the config names, else the causal language model or bare model of its type."""
    import transformers

    for name in (config.architectures or ())[:1]:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise InputError(f"transformers has no model for the config type {config.model_type!r}")


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype of that name. Raises InputError for any other word."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise InputError(f"no dtype is named {name!r}: expected float32, bfloat16 or float16")
    return found


@contextmanager
def in_one_sentence(where: str) -> Iterator[None]:
    """Whatever a library raises inside becomes an InputError with the first line of its message."""
    try:
        yield
    except InputError as problem:
        raise problem.located(where) from None
    except Exception as problem:
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise InputError(f"cannot be loaded: {first}", where=where) from problem


@contextmanager
def quietly() -> Iterator[None]:
    """No advice and no progress bars of `transformers` while the block runs."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def example_inputs(
    config: Mapping[str, Any], seed: int = 0, batch: int = 2, length: int = 16
) -> dict[str, torch.Tensor]:
    """Seeded random tokens (never the padding token) for a model with this config.json."""
    text = config.get("text_config") or config
    size = text.get("vocab_size")
    if not isinstance(size, int) or size < 2:
        raise InputError(f"vocab_size is {size!r}: example inputs are made for text models only")
    positions = text.get("max_position_embeddings") or text.get("n_positions") or length
    generator = torch.Generator().manual_seed(seed)

    def tokens() -> torch.Tensor:
        ids = torch.randint(0, size, (batch, min(length, positions)), generator=generator)
        pad = text.get("pad_token_id")
        return ids if pad is None else ids.where(ids != pad, (pad + 1) % size)

    ids = tokens()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.get("is_encoder_decoder"):
        inputs["decoder_input_ids"] = tokens()
    return inputs


def outputs_of(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The first output of the model (logits or hidden states), float32, on the CPU."""
    device = device_of(model)
    with torch.no_grad():
        outputs = model(**{name: value.to(device) for name, value in inputs.items()})
    first: torch.Tensor = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    return first.float().cpu()


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model computes: its parameters' device, or the one its weights are streamed to."""
    streaming = getattr(model, "streaming", None)
    if streaming is not None:
        return torch.device(streaming.device)
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def some(names: list[str]) -> str:
    """The first few names, for a message."""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
