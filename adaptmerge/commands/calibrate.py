"""Measuring what flows into the linear layers of a model while it reads a text.

The model is run module by module on the values that its weights stand for, so that one larger than memory
can be measured, quantised or not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from adaptmerge.bases.base import GGUF, Base
from adaptmerge.bases.classes import in_one_sentence, quietly
from adaptmerge.bases.open import open_base
from adaptmerge.errors import InputError, UsageError
from adaptmerge.files import sniff
from adaptmerge.files.listing import sha256_of
from adaptmerge.files.safetensors import write_safetensors
from adaptmerge.files.scratch import Scratch
from adaptmerge.files.staging import Staging
from adaptmerge.lazy import torch
from adaptmerge.parallel import Progress, silent
from adaptmerge.rounding.input_moments import FORMAT, RANK, VERSION, Accumulated
from adaptmerge.runtime.models import device_named, model_config, outputs_of
from adaptmerge.runtime.stream import stream_model
from adaptmerge.schemes.view import view_of

TOKENS, LENGTH, AT_ONCE = 16384, 512, 4096  # of a text, of a piece of it, of pieces run together
LEAST = 128  # tokens that say anything


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a user may ask of a measurement; see the command line's help for each."""

    tokens: int = TOKENS
    rank: int = RANK
    device: str = "auto"
    force: bool = False


class Measured(NamedTuple):
    """How many tokens were read, and how many modules they were measured in."""

    tokens: int
    modules: int


def calibrate(
    base: str | Path,
    text: str | Path,
    output: str | Path,
    options: Calibration = Calibration(),  # noqa: B008 - frozen
    progress: Progress = silent,
) -> Measured:
    """Writes the moments of the inputs of all linear layers of a base while it reads a text.

    Raises AdaptmergeError; then there is no output.
    """
    text, output = Path(text), Path(output)
    if options.tokens < LEAST or options.rank < 0:
        raise UsageError(f"--tokens is at least {LEAST}, and --rank not below 0")
    model = view_of(open_base(base))
    staging = Staging(output, force=options.force, inputs=[text, model.values.path], single=True)
    with staging:
        name = staging.target.name
        found = measure(
            model.values, text, staging.path(name), staging.scratch(name), options, progress
        )
        staging.commit(name)
    return found


def measure(
    base: Base,
    text: Path,
    path: Path,
    beside: Path,
    options: Calibration,
    progress: Progress = silent,
    only: Collection[str] | None = None,
) -> Measured:
    """Writes the moments into a safetensors file, with a temporary one beside it; `only` those of some
    modules of the checkpoint."""
    pieces = pieces_of(base, text, options.tokens)
    model = stream_model(base, device=device_named(options.device))
    with _listening(model, base, options.rank, only) as heard:
        batches = torch.split(pieces, max(1, AT_ONCE // pieces.shape[1]))
        for number, batch in enumerate(batches):
            outputs_of(model, _inputs(base, batch))
            progress(number + 1, len(batches))
    said = {"format": FORMAT, "version": VERSION, "tokens": str(pieces.numel())}
    said |= {"base": base.fingerprint, "text": sha256_of(text)}
    with Scratch(beside) as scratch:
        tensors = {
            name: scratch.put(value, name)
            for module, one in heard.items()
            if one.tokens
            for name, value in one.tensors(module).items()
        }
        write_safetensors(path, tensors, said)
    return Measured(pieces.numel(), sum(one.tokens > 0 for one in heard.values()))


def pieces_of(base: Base, text: Path, most: int) -> torch.Tensor:
    """Token numbers (pieces, length) from all over a text, each piece with the token that texts begin with.

    Raises InputError for texts that are too short, and where no tokenizer lies with the base.
    """
    tokenizer = _tokenizer(base.path)
    ids = torch.tensor(tokenizer(sniff.text(text), add_special_tokens=False)["input_ids"])
    first = [one for one in (tokenizer.bos_token_id, tokenizer.cls_token_id) if one is not None][:1]
    length = min(LENGTH, most, _positions(base)) - len(first)
    if len(ids) < LEAST:
        raise InputError(f"has {len(ids)} tokens, expected {LEAST} or more", where=str(text))
    length = min(length, len(ids))
    pieces = ids[: len(ids) // length * length].view(-1, length)
    wanted = max(1, min(len(pieces), most // (length + len(first))))
    spread = torch.arange(wanted) * len(pieces) // wanted
    start = torch.tensor(first, dtype=ids.dtype).expand(wanted, -1)
    return torch.cat([start, pieces[spread]], dim=1)


def _positions(base: Base) -> int:
    said = model_config(base.path).get_text_config()
    found = getattr(said, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 1 else LENGTH


def _tokenizer(path: Path) -> Any:
    """The tokenizer that lies with a base, from local files only."""
    from transformers import AutoTokenizer

    single = path.suffix == GGUF
    folder, file = (path.parent, {"gguf_file": path.name}) if single else (path, {})
    with quietly(), in_one_sentence(f"the tokenizer of {path}"):
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **file
        )


def _inputs(base: Base, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
    if base.config.get("is_encoder_decoder"):
        found["decoder_input_ids"] = batch
    return found


@contextmanager
def _listening(
    model: torch.nn.Module, base: Base, rank: int, only: Collection[str] | None
) -> Iterator[dict[str, Accumulated]]:
    """What flows into the linear layers of a model while the block runs, by modules of the checkpoint."""
    ears = _Ears(rank)
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            stored = base.locate(name) if _is_linear(module) else None
            if stored is not None and (only is None or stored in only):
                handle = module.register_forward_pre_hook(ears.of(stored))
                hooks.callback(handle.remove)
        yield ears.heard


def _is_linear(module: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)


class _Ears:
    """Hooks that take the inputs of modules; of those that are given one tensor only the first does."""

    def __init__(self, rank: int) -> None:
        self.heard: dict[str, Accumulated] = {}
        self._rank = rank
        self._last: tuple[torch.Tensor, Accumulated] | None = None

    def of(self, module: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        """The hook of one module of the checkpoint."""

        def hear(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            if given:
                self._take(module, given[0])

        return hear

    def _take(self, module: str, inputs: torch.Tensor) -> None:
        last, owner = self._last or (None, None)
        own = self.heard.setdefault(
            module, owner if owner and inputs is last else Accumulated(self._rank)
        )
        if own is owner and inputs is last:
            return
        own.take(inputs.detach().reshape(-1, inputs.shape[-1]))
        self._last = inputs, own
