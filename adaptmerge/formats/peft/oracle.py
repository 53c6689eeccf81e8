"""PEFT itself, where installed, as the judge of what an adapter on disk computes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaptmerge.adapters.graph import Site
from adaptmerge.files.safetensors import read_header
from adaptmerge.formats.format import Answer, Oracle
from adaptmerge.formats.peft.config import CONFIG, METADATA_KEY, WEIGHTS
from adaptmerge.lazy import quietly, torch

NOISE = 16.0  # units in the last place of outputs that rounding may move them by
SEEN = 1e-3  # of what is added, above which rounding is too much to tell readings apart


@contextmanager
def _as_folder(path: Path) -> Iterator[Path]:
    """The adapter as the folder that PEFT loads; a lone file is linked into a temporary one."""
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / WEIGHTS[0]).symlink_to(path.resolve())
        config = json.loads(read_header(path).metadata[METADATA_KEY])
        (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        yield folder


def deltas(model: Any, path: Path) -> dict[str, torch.Tensor]:
    """Module path to what PEFT's own merge adds to the weight, (out, in) in float64.

    Empty for families that PEFT does not merge.
    """
    with quietly(), _untied(model), _as_folder(path) as folder:
        from peft import PeftModel

        before = {name: value.double() for name, value in model.state_dict().items()}
        if _config(folder).get("layer_replication"):
            return {}  # PEFT merges all copies of a layer into one
        wrapped = PeftModel.from_pretrained(model, str(folder)).double()
        if wrapped.active_peft_config.is_prompt_learning:
            return {}
        adapted, stacks = _adapted(wrapped), _stacks(wrapped)
        if not (adapted or stacks) or not hasattr(wrapped.base_model, "merge_and_unload"):
            return {}
        try:
            merged = wrapped.merge_and_unload()
        except (NotImplementedError, ValueError, TypeError, AttributeError):
            return {}
    found = {}
    for name, turned in adapted.items():
        delta = merged.get_submodule(name).weight.detach() - before[f"{name}.weight"]
        found[name] = (delta.T if turned else delta).reshape(delta.shape[turned], -1)
    for (name, param), turned in stacks.items():
        stack = getattr(merged.get_submodule(name), param).detach() - before[f"{name}.{param}"]
        for expert, delta in enumerate(stack):
            found[str(Site(name, param, expert=expert))] = delta.T if turned else delta
    return {name: delta for name, delta in found.items() if bool(delta.any())}


def answers(model: Any, path: Path, count: int) -> dict[str, Answer] | None:
    """What PEFT's own layers add for `count` random inputs each, by site.

    None where an adapted module is no linear, or computes otherwise than on its input alone. The base's
    weights are as before afterwards.
    """
    with quietly(), _untied(model), _as_folder(path) as folder:
        from peft import PeftModel

        if _config(folder).get("layer_replication"):
            return None
        try:  # without what PEFT would initialise, at some cost, before it loads the file
            wrapped = PeftModel.from_pretrained(model, str(folder), low_cpu_mem_usage=True).eval()
        except (RuntimeError, ValueError, TypeError, NotImplementedError):
            return None
    if any(value.is_meta for value in wrapped.parameters()):
        return None
    adapted = {} if wrapped.active_peft_config.is_prompt_learning else _adapted(wrapped)
    if not adapted or _stacks(wrapped):
        return None
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in adapted:
        layer = wrapped.base_model.model.get_submodule(name)
        try:
            answer = _asked(layer, count, generator)
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError):
            return None
        if answer is None:
            return None
        found[name] = answer
    return {name: answer for name, answer in found.items() if bool(answer.added.any())}


def _asked(layer: Any, count: int, generator: torch.Generator) -> Answer | None:
    """Random inputs of a linear and what is added for them, in float64 where the model's own dtype is too
    coarse to tell; None for other modules, and where rounding hides what is added."""
    base = layer.get_base_layer()
    kind = type(base).__name__
    if kind not in ("Linear", "Conv1D"):
        return None
    width = base.weight.shape[0 if kind == "Conv1D" else 1]
    given = torch.randn(count, width, generator=generator, dtype=torch.float64)
    with torch.no_grad(), quietly():
        narrow = given.to(base.weight.dtype)
        found = _answer(narrow, base(narrow), layer(narrow))
        if found.noise <= SEEN:
            return found
        plain = torch.func.functional_call(base, _wide(base), (given,))
        found = _answer(given, plain, torch.func.functional_call(layer, _wide(layer), (given,)))
        return None if found.noise > SEEN else found


def _answer(given: torch.Tensor, plain: torch.Tensor, moved: torch.Tensor) -> Answer:
    added = moved - plain
    size = float(added.norm())
    eps = torch.finfo(plain.dtype).eps
    return Answer(given, added, NOISE * eps * float(moved.norm()) / size if size else 0.0)


def _wide(module: Any) -> dict[str, torch.Tensor]:
    """All tensors of a module, those of floats in float64."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {n: value.double() if value.is_floating_point() else value for n, value in tensors}


@contextmanager
def _untied(model: Any) -> Iterator[None]:
    """Gives modules that share a matrix one of their own each: PEFT would merge into that of all. The
    config says so meanwhile; forwards may read it, and so it is put back."""
    seen: set[int] = set()
    said = getattr(model.config, "tie_word_embeddings", None)
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in seen:
            module.weight = torch.nn.Parameter(weight.detach().clone())
            model.config.tie_word_embeddings = False
        seen.add(id(weight))
    try:
        yield
    finally:
        if said is not None:
            model.config.tie_word_embeddings = said


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return found


def _stacks(wrapped: Any) -> dict[tuple[str, str], bool]:
    """Module and name of the adapted parameters that stack experts, and whether as (experts, in, out)."""
    return {
        (name.replace(".base_layer", ""), module.parameter_name): bool(
            getattr(module.get_base_layer(), "is_transposed", False)
        )
        for name, module in wrapped.base_model.model.named_modules()
        if hasattr(module, "parameter_name") and module.get_param().ndim == 3
    }


def _adapted(wrapped: Any) -> dict[str, bool]:
    """The modules with one adapted weight, and whether it lies (in, out); rows that are replaced are no
    deltas."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name: type(module.get_base_layer()).__name__ == "Conv1D"
        for name, module in wrapped.base_model.model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and not isinstance(module, TrainableTokensLayer)
        and hasattr(module.get_base_layer(), "weight")
    }


def forward(model: Any, path: Path, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The first output (logits or hidden states) of `model` with the adapter loaded by PEFT."""
    with quietly(), torch.no_grad(), _as_folder(path) as folder:
        from peft import PeftModel

        wrapped = PeftModel.from_pretrained(model, str(folder)).eval()
        outputs: torch.Tensor = wrapped(**inputs)[0]
    return outputs


ORACLE = Oracle("peft", deltas, forward, answers)
