"""AdaLoRA: lora_A (R, in), lora_E (R, 1), lora_B (out, R), kernels flattened into in.

The scale has init_r, not the rank that pruning left; rank_pattern says of every pruned module which of
the first components are left, and a file cannot be loaded without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adaptmerge.adapters.families.adalora import AdaLora
from adaptmerge.adapters.graph import Edit
from adaptmerge.adapters.weight_edits import Add
from adaptmerge.formats.peft.additive import added, integer, number, refuse
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner

# Fields of LoRA that AdaLoRA inherits and does not look at.
IGNORED = frozenset(
    {"r", "use_rslora", "alpha_pattern", "lora_bias", "init_lora_weights", "qalora_group_size"}
    | {"eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config"}
    | {"megatron_config", "megatron_core", "runtime_config", "ensure_weight_tying", "loftq_config"}
)
SCHEDULE = frozenset(
    {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}
)
UNREAD = "an AdaLoRA with it is not read"
REFUSED = {
    **dict.fromkeys(("layer_replication", "target_parameters", "alora_invocation_tokens"), UNREAD),
    **dict.fromkeys(("arrow_config", "kasa_config", "use_bdlora", "use_qalora"), UNREAD),
    **dict.fromkeys(("trainable_token_indices", "use_dora"), UNREAD),
}


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    """alpha / (init_r + 1e-5) times the product of what pruning left."""
    for name, why in REFUSED.items():
        if reading.setting(name):
            refuse(reading, name, why)
    up, singular, down = (parts[leaf] for leaf in ("lora_B", "lora_E", "lora_A"))
    initial = integer(reading, "init_r")
    _check_rank(reading, module, down.shape[0], initial)
    factor = AdaLora(up, singular, down, number(reading, "lora_alpha"), initial)
    return added(reading, module, factor)


def _check_rank(reading: Reading, module: str, rank: int, initial: int) -> None:
    mask = _mask(reading.setting("rank_pattern"), module)
    if mask is not None and len(mask) != initial:
        raise Malformed(f"rank_pattern has {len(mask)} entries, but init_r is {initial}")
    expected = initial if mask is None else sum(mask)
    if rank != expected:
        said = f"init_r is {initial}" if mask is None else f"rank_pattern keeps {expected}"
        raise Malformed(f"lora_A has rank {rank}, but {said}: is this config of another adapter?")


def _mask(pattern: Mapping[str, Any] | None, module: str) -> list[bool] | None:
    """What is left of a module's components; its key may still have the adapter's name."""
    start = f"{module}.lora_E"
    found = (mask for key, mask in (pattern or {}).items() if f"{key}.".startswith(f"{start}."))
    mask = next(found, None)
    if mask is not None and not (isinstance(mask, list) and all(isinstance(m, bool) for m in mask)):
        raise Malformed(f"rank_pattern has {mask!r}: expected a list of true and false")
    return mask


def tensors(edit: Add) -> Parts:
    factor = _adalora(edit)
    return {"lora_A": factor.down, "lora_E": factor.singular, "lora_B": factor.up}


def settings(edit: Add) -> Mapping[str, Any]:
    factor = _adalora(edit)
    return {"init_r": factor.initial_rank, "lora_alpha": factor.alpha}


def finish(edits: Sequence[Add], config: dict[str, Any]) -> dict[str, Any]:
    """With a mask for every pruned module, and a length of training, without which PEFT loads none."""
    pattern = config.get("rank_pattern")
    masks = {
        f"{edit.site.module}.lora_E": _written(pattern, edit)
        for edit in edits
        if _is_pruned(edit) or _mask(pattern, edit.site.module)
    }
    return {"total_step": 1, **config, "rank_pattern": masks or None}


def _is_pruned(edit: Add) -> bool:
    factor = _adalora(edit)
    return factor.down.shape[0] != factor.initial_rank


def _written(pattern: Mapping[str, Any] | None, edit: Add) -> list[bool]:
    """The mask that was read; else one that keeps the first components, which are those stored."""
    factor = _adalora(edit)
    rank = factor.down.shape[0]
    mask = _mask(pattern, edit.site.module)
    if mask is not None and sum(mask) == rank:
        return mask
    return [place < rank for place in range(factor.initial_rank)]


def _adalora(edit: Add) -> AdaLora:
    assert isinstance(edit.factor, AdaLora)
    return edit.factor


TUNER = Tuner(
    "ADALORA",
    summary="B diag(E) A, singular values pruned in training",
    shapes={
        "lora_A": "r? in",
        "lora_E": "r? 1",
        "lora_B": "out r?",
    },
    leaves=("lora_A", "lora_B", "lora_E"),
    module=module,
    tensors=tensors,
    settings=settings,
    finish=finish,
    maths={"init_r": 12, "lora_alpha": 8, "rank_pattern": None, **dict.fromkeys(REFUSED)},
    training=IGNORED | SCHEDULE | {"lora_dropout"},
    bias_mode="lora_only",
    merges="exact sum",
)
