"""Base models as `transformers` builds them, random inputs for them, and what they compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaptmerge.adapters.graph import Adapter
from adaptmerge.adapters.stored_edits import Replace
from adaptmerge.bases.base import GGUF
from adaptmerge.bases.classes import in_one_sentence, model_class, quietly
from adaptmerge.errors import InputError, UsageError
from adaptmerge.files.listing import Listing
from adaptmerge.lazy import torch
from adaptmerge.parallel import Tell

CONFIG, ADAPTER = "config.json", "adapter_config.json"
UNLIKELY = 12_289  # labels: no dimension of a model is so by chance
SHOWN = 5  # names listed in a message
# The classes that have a head of one kind, by what PEFT calls the task.
TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
}


def load_model(
    base_dir: Path, device: str = "cpu", dtype: str = "float32", adapter: Adapter | None = None
) -> torch.nn.Module:
    """The model in a checkpoint folder, in eval mode with eager attention, from local files only.

    With an adapter, of a class that has its heads, which are made as large; what the folder lacks of them
    is zero. Raises InputError when it cannot be loaded, lacks weights, or asks for code of its own.
    """
    where = str(base_dir)
    config = model_config(base_dir)
    if (base_dir / ADAPTER).is_file():
        raise InputError(
            f"holds an adapter beside the model ({ADAPTER}), which transformers loads with it: move the "
            "files of the adapter to a folder of their own",
            where=where,
        )
    with quietly(), in_one_sentence(where):
        model, report = class_with_heads(config, adapter).from_pretrained(
            base_dir,
            config=config,
            dtype=dtype_named(dtype),
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = fill_heads(model, report["missing_keys"], adapter)
    if missing:
        raise InputError(
            f"lacks {len(missing)} weights of {type(model).__name__}, which would be random: "
            f"{some(missing)}; is this a whole checkpoint?",
            where=where,
        )
    with in_one_sentence(where):
        fit_heads(model, adapter)
        loaded: torch.nn.Module = model.to(device).eval()
    return loaded


def twin(model: torch.nn.Module) -> torch.nn.Module:
    """Modules of its own around the same weights: what is put into one model is not in the other."""
    known: dict[int, Any] = {id(value): value for value in model.buffers()}
    for value in model.parameters():
        known[id(value)] = torch.nn.Parameter(value.detach(), requires_grad=False)
    return copy.deepcopy(model, known)


def model_config(base_dir: Path) -> Any:
    """The `transformers` config of a folder. Raises InputError when it asks for remote code."""
    where = str(base_dir)
    if base_dir.suffix == GGUF:
        return _gguf_config(base_dir)
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


def _gguf_config(path: Path) -> Any:
    """The config that a GGUF model's metadata states."""
    from transformers import AutoConfig

    from adaptmerge.bases.gguf_model import config_of

    said = config_of(path)
    with quietly(), in_one_sentence(str(path)):
        return AutoConfig.for_model(said.pop("model_type"), **said)


def class_with_heads(config: Any, adapter: Adapter | None) -> Any:
    """The config's class, or where that lacks a head of the adapter the class of the same type for the
    adapter's task, else the first that has it."""
    own = model_class(config)
    heads = _heads(adapter)
    if not heads or _has(own, config, heads):
        return _told_of_padding(own, config)
    import transformers

    hints = adapter.hints.values() if adapter else ()
    task = next((h["task_type"] for h in hints if isinstance(h, dict) and h.get("task_type")), "")
    names = [TASKS[task]] if task in TASKS else []
    for name in (*names, *TASKS.values()):
        found = getattr(transformers, name)._model_mapping.get(type(config), None)
        if found is not None and _has(found, config, heads):
            return _told_of_padding(found, config)
    return own


def labels_of_heads(config: Any, adapter: Adapter) -> int | None:
    """How many labels the adapter's heads are for, by the rows of those parameters that have a row for each
    label in the class with these heads; None where no parameter has, or they disagree."""
    probe = copy.deepcopy(config)
    probe.num_labels = UNLIKELY
    with torch.device("meta"), quietly():
        model = class_with_heads(probe, adapter)(probe)
    following = {name for name, value in model.named_parameters() if UNLIKELY in value.shape[:1]}
    names = {name.removeprefix(f"{model.base_model_prefix}.") for name in following} | following
    rows = {
        edit.value.shape[0]
        for edits in _heads(adapter).values()
        for edit in edits
        if f"{edit.site.module}.{edit.site.param}" in names
    }
    return rows.pop() if len(rows) == 1 else None


def _told_of_padding(kind: Any, config: Any) -> Any:
    """A class that looks at where texts end must be told how; any token will do for a comparison."""
    text = config.get_text_config()
    if kind.__name__.endswith("ForSequenceClassification") and text.pad_token_id is None:
        text.pad_token_id = 0
    return kind


def _heads(adapter: Adapter | None) -> dict[str, list[Replace]]:
    """The parameters of heads and resized embeddings by the module that holds them."""
    found: dict[str, list[Replace]] = {}
    for edit in adapter.edits if adapter else ():
        if isinstance(edit, Replace) and edit.role in ("head", "unlisted"):
            found.setdefault(edit.site.module, []).append(edit)
    return found


def _has(kind: Any, config: Any, heads: Mapping[str, Any]) -> bool:
    with torch.device("meta"):
        modules = {name for name, _ in kind(config).named_modules(remove_duplicate=False)}
    return all(name in modules or f"{kind.base_model_prefix}.{name}" in modules for name in heads)


def fill_heads(model: Any, missing: Collection[str], adapter: Adapter | None) -> list[str]:
    """The missing parameters, sorted, less those of the adapter's heads, which become zero."""
    owners = {edit.owner or path for path, edits in _heads(adapter).items() for edit in edits}
    mine = [name for name in missing if any(name.startswith(f"{owner}.") for owner in owners)]
    with torch.no_grad():
        for name in mine:
            model.get_parameter(name).zero_()
    return sorted(set(missing) - set(mine))


def fit_heads(model: Any, adapter: Adapter | None) -> None:
    """Makes the parameters of the adapter's heads as large as they are there; added rows are zero."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, edits in _heads(adapter).items():
        longer = [found for name, found in modules.items() if name.partition(".")[2] == path]
        module = modules.get(path, longer[0] if len(longer) == 1 else None)
        for edit in edits:
            old = None if module is None else module._parameters.get(edit.site.param)
            if old is None or tuple(old.shape) == edit.value.shape:
                continue
            new = torch.zeros(edit.value.shape, dtype=old.dtype)
            same = tuple(slice(min(a, b)) for a, b in zip(old.shape, new.shape, strict=True))
            new[same] = old.detach()[same]
            assert module is not None  # it has the parameter
            module._parameters[edit.site.param] = torch.nn.Parameter(new)
        if module is not None and hasattr(module, "out_features"):
            module.out_features = module.weight.shape[0]


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype of that name. Raises InputError for any other word."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise InputError(f"no dtype is named {name!r}: expected float32, bfloat16 or float16")
    return found


def device_named(name: str) -> str:
    """The device asked for; "auto" is CUDA, then MPS, then the CPU. Raises UsageError."""
    if name != "auto":
        _probe(name)
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _probe(name: str) -> None:
    try:
        torch.device(name)
    except RuntimeError:
        sentence = f"--device {name}: expected auto, cpu, cuda, cuda:1 or mps"
        raise UsageError(sentence) from None
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        sentence = str(problem).partition("\n")[0]
        raise UsageError(f"--device {name} cannot be used here: {sentence}") from None


def example_inputs(
    config: Mapping[str, Any],
    seed: int = 0,
    batch: int = 2,
    length: int = 16,
    first: Sequence[int] = (),
) -> dict[str, torch.Tensor]:
    """Seeded random tokens (never the padding token) for a model with this config.json; `first` are
    tokens to begin with, up to half of the length."""
    text = config.get("text_config") or config
    size = text.get("vocab_size")
    if not isinstance(size, int) or size < 2:
        raise InputError(f"vocab_size is {size!r}: example inputs are made for text models only")
    positions = text.get("max_position_embeddings") or text.get("n_positions") or length
    generator = torch.Generator().manual_seed(seed)

    def tokens() -> torch.Tensor:
        ids = torch.randint(0, size, (batch, min(length, positions)), generator=generator)
        known = [token for token in first if token < size][: ids.shape[1] // 2]
        ids[:, : len(known)] = torch.tensor(known, dtype=ids.dtype)
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


@contextmanager
def watched(model: torch.nn.Module, tell: Tell) -> Iterator[None]:
    """While active, `tell` hears of each layer that begins its forward."""
    layers = [
        (f"{path}.{name}", layer)
        for path, owner in model.named_modules()
        if isinstance(owner, torch.nn.ModuleList)
        for name, layer in owner.named_children()
        if path.count(".") < 3
    ]

    def told(number: int) -> Callable[..., None]:
        return lambda *_: tell(f"outputs of {layers[number][0]}", number, len(layers))

    handles = [
        layer.register_forward_pre_hook(told(number)) for number, (_, layer) in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
