"""Writing PEFT adapters: the family's own tensors, and what all families have in common."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from adaptmerge.adapters.graph import Adapter, Bundle, Edit
from adaptmerge.adapters.module_paths import exact_suffixes, is_suffix
from adaptmerge.adapters.stored_edits import Replace, ReplaceRows
from adaptmerge.adapters.weight_edits import family_of
from adaptmerge.errors import CannotStore
from adaptmerge.formats.format import Output, Stores, WriteOptions
from adaptmerge.formats.peft.beside import METADATA_KEY as MODEL_KEY
from adaptmerge.formats.peft.beside import MODEL_CONFIG, config_of
from adaptmerge.formats.peft.config import CONFIG, METADATA_KEY, WEIGHTS, exactly
from adaptmerge.formats.peft.lora_write import is_bias, refused
from adaptmerge.formats.peft.releases import RELEASES
from adaptmerge.formats.peft.saved import IMPLIED
from adaptmerge.formats.peft.target_parameters import is_target
from adaptmerge.formats.peft.tuner import Spelling, Tuner, families, tuner_of
from adaptmerge.formats.peft.versions import fields_of, fitted
from adaptmerge.tensors.refs import TensorRef

# Fields that describe training or the old layout; with the written tensors they are no longer true.
STALE = (
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "exclude_modules",
    "loftq_config",
    "corda_config",
    "eva_config",
    "lora_ga_config",
    "peft_version",
    "target_parameters",
    "trainable_token_indices",
    "use_rslora",
)
LORA = "lora"
SAVED = ("replace", "rows")  # kinds that lie beside any family

Tensors = dict[str, TensorRef]


def stores(options: WriteOptions) -> Stores:
    """One rank and one scale for all sites, unless patterns are asked for; one family per file."""
    per_site = options.ranks == "per-site"
    return Stores(
        kinds=frozenset({"add", "dora", "replace", "rows"}),
        families=frozenset(families()),
        exclusive=frozenset({"add", "dora"}),
        scale="site" if per_site else "adapter",
        one_rank=not per_site,
        params=None,
        dtypes=frozenset({"F64", "F32", "F16", "BF16"}),
    )


def refuses(edits: Sequence[Edit], options: WriteOptions) -> list[str]:
    """Biases of a LoRA lie beside its two sides: PEFT ignores one where there are none."""
    adapted = {e.site.module for e in edits if e.kind != "dora" and not is_bias(e)}
    alone = [
        str(e.site)
        for e in edits
        if is_bias(e) and family_of(e) in (LORA, "") and e.site.module not in adapted
    ]
    problems = [f"peft has no place for {bias} without a delta of its weight" for bias in alone[:1]]
    tuner = tuner_of(_family(edits))
    if _family(edits) != LORA and any(e.kind == "rows" and not family_of(e) for e in edits):
        problems.append(f"peft has no place for token rows beside {_family(edits)}")
    if tuner is not None and not tuner.writable:
        problems.append(f"peft's {tuner.peft_type} is only read so far")
    return [*problems, *(refused(edits) if _family(edits) == LORA else [])]


def write(bundle: Bundle, output: Output, options: WriteOptions) -> str:
    """Writes the adapter, lowered for `stores`; returns the name of the tensor file."""
    adapter = bundle.single
    tuner = tuner_of(_family(adapter.edits))
    assert tuner is not None
    spelled = tuner.write(adapter, options) if tuner.write is not None else _spelled(tuner, adapter)
    tensors = _saved(tuner, adapter)
    tensors |= {_key(tuner, name): ref for name, ref in spelled.tensors.items()}
    config = _config(tuner, adapter, options, spelled.config)
    metadata = {"format": "pt", **output.metadata}
    beside = config_of(adapter)
    if output.single:
        metadata[METADATA_KEY] = json.dumps(config, sort_keys=True)
        metadata |= {MODEL_KEY: json.dumps(beside, sort_keys=True)} if beside else {}
    else:
        if beside is not None:
            text = json.dumps(beside, indent=2, ensure_ascii=False) + "\n"
            output.text(MODEL_CONFIG, text)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        output.text(CONFIG, text)
    name = output.single or WEIGHTS[0]
    output.safetensors(name, dict(sorted(tensors.items())), metadata)
    return name


def _family(edits: Sequence[Edit]) -> str:
    """The one family of the edits; files with heads only are written as LoRA."""
    found = {family_of(edit) for edit in edits if edit.kind not in SAVED} - {""}
    found = found or {family_of(edit) for edit in edits} - {""}
    return found.pop() if len(found) == 1 else LORA


def _key(tuner: Tuner, name: str) -> str:
    """A full key: tensors of modules get the prefix, what all modules share has its own."""
    shared = name.startswith("base_model.") or "." not in name
    return name if shared else tuner.prefix + name


def _own(tuner: Tuner, adapter: Adapter) -> list[Edit]:
    return [edit for edit in adapter.edits if family_of(edit) == tuner.peft_type.lower()]


def _spelled(tuner: Tuner, adapter: Adapter) -> Spelling:
    """Tensors and fields of a family edit by edit, then those that its edits share."""
    assert tuner.tensors is not None
    edits = _own(tuner, adapter)
    tensors = {
        f"{edit.site.module}.{leaf}": ref
        for edit in edits
        for leaf, ref in tuner.tensors(edit).items()
    }
    settings: dict[str, dict[str, Any]] = {}
    for edit in reversed(edits):
        settings.setdefault(edit.site.module, {}).update(tuner.settings(edit))
    fields = _fields(tuner, settings)
    together = tuner.shared(edits) if tuner.shared is not None else Spelling({}, {})
    return Spelling({**tensors, **together.tensors}, {**fields, **together.config})


def _fields(tuner: Tuner, by_module: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Each field's commonest value; the others in its pattern table, by whole module paths."""
    result: dict[str, Any] = {}
    for name in sorted({name for fields in by_module.values() for name in fields}):
        values = {m: fields[name] for m, fields in by_module.items() if name in fields}
        common = _commonest(list(values.values()))
        result[name] = common
        others = {exactly(m): value for m, value in values.items() if value != common}
        if name in tuner.patterns:
            result[tuner.patterns[name]] = others
        elif others:
            raise CannotStore(f"{tuner.peft_type} has one {name} for all modules, here are several")
    return result


def _commonest(values: Sequence[Any]) -> Any:
    return max(values, key=lambda value: (sum(value == other for other in values), repr(value)))


def _saved(tuner: Tuner, adapter: Adapter) -> Tensors:
    """Parameters and rows stored whole."""
    adapted = {edit.site.module for edit in adapter.edits if edit.kind not in SAVED}
    tensors: Tensors = {}
    for edit in adapter.edits:
        if isinstance(edit, Replace) and not family_of(edit):
            infix = ".base_layer" if _beside(edit, adapted) else ""
            tensors[f"{tuner.prefix}{edit.site.module}{infix}.{edit.site.param}"] = edit.value
        elif isinstance(edit, ReplaceRows) and family_of(edit) != tuner.peft_type.lower():
            key = f"{edit.site.module}.token_adapter.trainable_tokens_delta"
            tensors[tuner.prefix + key] = edit.values
    return tensors


def _beside(edit: Replace, adapted: set[str]) -> bool:
    return edit.role == "base copy" or (edit.role == "bias" and edit.site.module in adapted)


def _config(
    tuner: Tuner, adapter: Adapter, options: WriteOptions, own: Mapping[str, Any]
) -> dict[str, Any]:
    adapted = [edit.site.module for edit in _adapting(tuner, adapter)]
    config = {
        "auto_mapping": None,
        "task_type": None,
        **_kept(tuner, adapter),
        **own,
        "base_model_name_or_path": adapter.base.name,
        "revision": adapter.base.revision,
        "inference_mode": True,
        "modules_to_save": _saved_modules(adapter),
        "peft_type": tuner.peft_type,
    }
    if adapted:
        config["target_modules"] = own.get("target_modules") or _targets(adapter, adapted, options)
    if not _has_head_for(config.get("task_type"), adapter):
        config["task_type"] = None
    if tuner.bias_mode:
        config["bias"] = _bias_mode(tuner, adapter, adapted)
    if tuner.finish is not None:
        config = tuner.finish(_own(tuner, adapter), config)
    known = fields_of(tuner.peft_type, RELEASES[-1])
    config = {name: value for name, value in config.items() if value or name in known}
    return config if options.version is None else fitted(config, options.version, adapted)


def _has_head_for(task: object, adapter: Adapter) -> bool:
    """Whether the head is stored that PEFT looks for in an adapter for this task."""
    names = IMPLIED.get(str(task))
    owners = [edit.owner for edit in adapter.edits if isinstance(edit, Replace)]
    return names is None or any(is_suffix(name, owner) for name in names for owner in owners)


def _adapting(tuner: Tuner, adapter: Adapter) -> list[Edit]:
    """The edits whose modules are targets: a LoRA's bias lies beside one, a parameter is another kind."""
    beside = tuner.peft_type.lower() == LORA
    own = [edit for edit in _own(tuner, adapter) if edit.site.module]
    found = [edit for edit in own if not (beside and is_bias(edit))]
    return [edit for edit in found if not is_target(edit)]


def _kept(tuner: Tuner, adapter: Adapter) -> dict[str, Any]:
    """What the original config said, as far as it is still true."""
    hints = adapter.hints.get("peft", {})
    if hints.get("peft_type") != tuner.peft_type:
        return {name: hints.get(name) for name in ("task_type", "auto_mapping")}
    return {"fan_in_fan_out": False, **{k: v for k, v in hints.items() if k not in STALE}}


def _bias_mode(tuner: Tuner, adapter: Adapter, adapted: Sequence[str]) -> str:
    biased = {e.site.module for e in adapter.edits if isinstance(e, Replace) and e.role == "bias"}
    if not biased:
        return "none"
    return tuner.bias_mode if biased <= set(adapted) else "all"


def _saved_modules(adapter: Adapter) -> list[str] | None:
    owners = {e.owner for e in adapter.edits if isinstance(e, Replace) and e.role == "head"}
    return sorted(owners) or None


def _targets(adapter: Adapter, adapted: Sequence[str], options: WriteOptions) -> list[str] | str:
    """Suffixes that select exactly the adapted modules; a regular expression where none can."""
    others = (options.modules or frozenset()) - set(adapted)
    known = adapter.covers if options.modules is None else None
    found = exact_suffixes(list(dict.fromkeys(adapted)), others, known)
    if any(is_suffix(target, other) for target in found for other in others):
        return "|".join(re.escape(module) for module in sorted(set(adapted)))
    return found
