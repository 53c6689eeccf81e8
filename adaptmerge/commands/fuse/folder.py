"""What lies beside the tensors of a fused model: config, tokenizer, licences, index and a model card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptmerge.adapters.graph import Kind, Labels, Note
from adaptmerge.adapters.stored_edits import saved_module
from adaptmerge.bases.base import Base
from adaptmerge.bases.gguf_model import LIBRARY, GgufModel
from adaptmerge.commands.fuse.options import SAME, WIDE
from adaptmerge.commands.fuse.pieces.layout import INDEX, INDEXES, index_of
from adaptmerge.commands.fuse.plan import FusePlan
from adaptmerge.commands.fuse.report import FuseReport, percent
from adaptmerge.errors import InputError
from adaptmerge.files import sniff
from adaptmerge.files.disk import copy_file, write_bytes
from adaptmerge.files.listing import sha256_of
from adaptmerge.files.sniff import whole
from adaptmerge.files.staging import Staging
from adaptmerge.files.strict_json import parse, read_object
from adaptmerge.merging.heads.policies import is_vocabulary
from adaptmerge.merging.plan import Step
from adaptmerge.outputs.companions import CARD, LICENCES, TOKENIZER
from adaptmerge.outputs.report import FILE
from adaptmerge.schemes.scheme import QUANT_CONFIG as ENTRY
from adaptmerge.schemes.view import QUANT_ENTRIES
from adaptmerge.tensors.dtypes import SPELLINGS

CONFIG = "config.json"
ADAPTER = "adapter_config.json"  # beside a model: transformers would load that adapter, too
WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".ot",
) + (".tflite", ".npz", ".index.json", ".onnx_data")
QUANTISERS = ("quantize_config.json", "quant_config.json")  # how GPTQ and AWQ quantised the base
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def write_folder(plan: FusePlan, staging: Staging) -> None:
    """Stages all that is no tensor file, the report and the card apart: a GGUF file has all in it."""
    for name, content in documents(plan).items():
        if isinstance(content, Path):
            copy_file(content, staging.path(name))
        else:
            write_bytes(staging.path(name), content)


def documents(plan: FusePlan) -> dict[str, bytes | Path]:
    """What lies beside the tensors, the report and the card apart: the content, or the file that has it."""
    if _is_gguf(plan):
        return {}
    found: dict[str, bytes | Path] = {
        name: _listing_plain(plan, whole(source)) if name in QUANTISERS else source
        for name, source in carried(plan).items()
    }
    return {**found, CONFIG: _config(plan), **_index(plan)}


def _config(plan: FusePlan) -> bytes | Path:
    """The base's own where nothing in it changes."""
    config = changed_config(plan)
    stored = plan.bases.values.path / CONFIG
    gone = set(QUANT_ENTRIES if plan.options.quant != SAME else ()) - plan.targets.config.keys()
    if not (config or gone):
        return stored
    before = read_object(stored)
    after = {key: value for key, value in {**before, **config}.items() if key not in gone}
    return _encoded(after, ensure_ascii=False)


def _encoded(table: Mapping[str, Any], *, ensure_ascii: bool) -> bytes:
    text = json.dumps(table, indent=2, ensure_ascii=ensure_ascii)
    return f"{text}\n".encode("utf-8", "backslashreplace")


def _listing_plain(plan: FusePlan, held: bytes) -> bytes:
    """A file that says how AWQ quantised the base, with the list of layers that are stored plainly: earlier
    versions of AutoAWQ look for it there, and not in config.json."""
    before, after = plan.bases.on_disk.config, plan.targets.config.get(ENTRY)
    if not isinstance(after, Mapping):
        return held
    try:
        said, _ = parse(held)
    except ValueError:
        return held
    stored = before.get(ENTRY) or {}
    changed = {key: value for key, value in after.items() if stored.get(key) != value}
    if not isinstance(said, dict) or not changed:
        return held
    return _encoded({**said, **changed}, ensure_ascii=False)


def _is_gguf(plan: FusePlan) -> bool:
    return isinstance(plan.bases.values, GgufModel)


def main_file(plan: FusePlan) -> str:
    """The file that makes an output a model."""
    return plan.shards[0].name if _is_gguf(plan) else CONFIG


def _index(plan: FusePlan) -> dict[str, bytes | Path]:
    """The index: the base's own bytes where nothing in it changes."""
    root = plan.bases.values.path
    if len(plan.shards) == 1 and not (root / INDEX).is_file():
        return {}
    source = next((root / name for name in INDEXES if (root / name).is_file()), None)
    stored = {} if source is None else read_object(source)
    metadata = {k: v for k, v in (stored.get("metadata") or {}).items() if k != "total_size"}
    made = index_of(plan.shards, metadata)
    same = stored.get("weight_map") == made["weight_map"]
    size = (stored.get("metadata") or {}).get("total_size")
    if source is not None and same and size in (None, made["metadata"]["total_size"]):
        return {INDEX: source}
    return {INDEX: _encoded(made, ensure_ascii=True)}


def carried(plan: FusePlan) -> dict[str, Path]:
    """The files that go along: all of the base but weights, and tokenizers of adapters that change it."""
    root = plan.bases.values.path
    found = {
        name: path
        for name, path in _files(root)
        if name not in (CONFIG, CARD, FILE, ADAPTER, *INDEXES)
    }
    if plan.options.quant != SAME:
        found = {name: path for name, path in found.items() if name not in QUANTISERS}
    found.update(_tokenizer(plan))
    for item in plan.inputs:
        for name in LICENCES:
            path = item.listing.root / name
            if item.listing.single is None and item.listing.has(name):
                same = name in found and sha256_of(found[name]) == sha256_of(path)
                found.update({} if same else {f"{name}.{item.name}": path})
    return found


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """All files below a folder that hold no weights, hidden ones left out."""
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if path.is_file() and not hidden and not name.endswith(WEIGHTS):
            yield name, path


def _tokenizer(plan: FusePlan) -> dict[str, Path]:
    """The tokenizer of the adapter that changes the vocabulary, where it brings one."""
    if not plan.targets.resized and not any(step.edit.kind == "rows" for step in plan.plan.steps):
        return {}
    steps = [step for step in plan.plan.steps if _is_vocabulary(step, plan.bases.values)]
    owners = {member.adapter for step in steps for member in step.members}
    found: dict[str, Path] = {}
    for item in plan.inputs:
        if item.name in owners and item.listing.single is None:
            found |= {n: item.listing.root / n for n in TOKENIZER if item.listing.has(n)}
    return found


def _is_vocabulary(step: Step, base: Base) -> bool:
    return step.edit.kind in ("rows", "replace") and is_vocabulary(step.site.module, base)


def left_out(plan: FusePlan) -> list[Note]:
    """Files of weights that are not fused into, and would be stale beside those that are."""
    if _is_gguf(plan):
        return []
    used = {Path(path).name for path in _sources(plan)} | set(INDEXES)
    root = plan.bases.values.path
    others = [
        p.relative_to(root).as_posix()
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.name.endswith(WEIGHTS) and p.name not in used
    ]
    if not others:
        return []
    what = f"other weights of the base are left out, being without the adapters: {', '.join(others[:5])}"
    return [Note(Kind.INFO, what)]


def _sources(plan: FusePlan) -> list[str]:
    return [
        path
        for ref in plan.bases.on_disk.tensors.values()
        if isinstance(path := getattr(ref.source, "path", None), str)
    ]


def changed_config(plan: FusePlan) -> dict[str, Any]:
    """The entries of config.json that change, with their new values."""
    if _is_gguf(plan):
        return {}
    stored = read_object(plan.bases.values.path / CONFIG)
    wanted = {k: v for k, v in plan.bases.values.config.items() if stored.get(k) != v}
    wanted |= plan.targets.config
    if plan.options.quant in WIDE:
        wanted |= {"torch_dtype": TORCH_NAMES[SPELLINGS[plan.options.quant].name]}
    if plan.options.dtype:
        name = TORCH_NAMES[SPELLINGS[plan.options.dtype].name]
        wanted |= {key: name for key in ("torch_dtype", "dtype") if key in stored}
        wanted |= {} if "torch_dtype" in stored or "dtype" in stored else {"torch_dtype": name}
    wanted |= _head(plan)
    return {key: value for key, value in wanted.items() if stored.get(key) != value}


def _head(plan: FusePlan) -> dict[str, Any]:
    """Labels of a head, and the class that has it where the base's own has not."""
    found: dict[str, Any] = {}
    labels = [step.labels for step in plan.plan.steps if step.labels is not None]
    heads = [step for step in plan.plan.steps if saved_module(step.edit)]
    if labels:
        found |= _label_map(labels[-1])
    if not heads:
        return found
    from adaptmerge.runtime.models import class_with_heads, labels_of_heads, model_config

    config = model_config(plan.bases.values.path)
    stored = plan.inputs[0].adapter.with_edits([step.edit for step in heads])
    count = None if labels else labels_of_heads(config, stored)
    if count is not None and count != config.num_labels:
        found |= _label_map(Labels(tuple(f"LABEL_{row}" for row in range(count))))
    added = [step.edit for step in heads if _is_new(plan, step)]
    if added:
        found |= {"architectures": [class_with_heads(config, stored.with_edits(added)).__name__]}
    return found


def unnamed_labels(plan: FusePlan, config: Mapping[str, Any]) -> list[Note]:
    """A word where labels are only counted, since nothing beside the adapter names them."""
    if "id2label" not in config or any(step.labels is not None for step in plan.plan.steps):
        return []
    first, *others = config["id2label"].values()
    called = f"{first} to {others[-1]}" if others else first
    what = f"the head has {1 + len(others)} rows and no names for them: config.json says {called}"
    return [Note(Kind.INFO, what)]


def _is_new(plan: FusePlan, step: Step) -> bool:
    place = plan.bases.values.place(step.site)
    return place is None or place.name not in plan.bases.values.tensors


def _label_map(labels: Labels) -> dict[str, Any]:
    names = dict(enumerate(labels.names))
    found: dict[str, Any] = {
        "id2label": {str(i): name for i, name in names.items()},
        "label2id": {name: i for i, name in names.items()},
    }
    return found | ({"problem_type": labels.problem} if labels.problem else {})


def licences(plan: FusePlan) -> tuple[dict[str, str], list[Note]]:
    """The licence that each model card names, by input and base, and a Note where they differ."""
    cards = {"base": plan.bases.values.path / CARD}
    cards |= {i.name: i.listing.root / CARD for i in plan.inputs if i.listing.has(CARD)}
    found = {name: text for name, path in cards.items() if (text := _licence(path))}
    if len(set(found.values())) < 2:
        return found, []
    listed = ", ".join(f"{name}: {licence}" for name, licence in found.items())
    return found, [Note(Kind.INFO, f"licences differ ({listed}): see which holds for the result")]


def _licence(card: Path) -> str | None:
    try:
        text = sniff.text(card)
    except InputError:
        return None
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    line = re.search(r"^license:\s*(\S+)", head[1], re.MULTILINE) if head else None
    return line[1] if line else None


def card(plan: FusePlan, report: FuseReport) -> str:
    """A model card that names base, adapters, weights and what rounding did."""
    named, _ = licences(plan)
    base = next((i.adapter.base.name for i in plan.inputs if i.adapter.base.name), None)
    one = next(iter(named.values())) if len(set(named.values())) == 1 else None
    head = ["---", "tags: [merged, adapter]"]
    head += [f"library_name: {LIBRARY if _is_gguf(plan) else 'transformers'}"]
    head += [f"base_model: {base}", "base_model_relation: finetune"] if base else []
    head += [f"license: {one}"] if one else []
    return "\n".join(
        [
            *head,
            "---",
            "",
            "# Base model with adapters fused in",
            "",
            f"Base `{base or plan.bases.values.path.name}`, dtype of weights as stored there"
            f"{_written(plan)}.",
            "`adaptmerge.json` has the numbers of every tensor; `adaptmerge verify` checks them.",
            "",
            "| adapter | format | weight | licence | arrives | error |",
            "| --- | --- | --- | --- | --- | --- |",
            *_rows(plan, report, named),
            "",
            "arrives: how much of the adapter's change is in the weights. error: the size of the rounding",
            "error, relative to that change, in the inputs that the adapter reads.",
            "",
        ]
    )


def _written(plan: FusePlan) -> str:
    """What weights are written as, where that is not as they are stored."""
    said = f", written as {plan.options.dtype}" if plan.options.dtype else ""
    return f"{said}, linear layers quantised as {plan.options.quant}" if plan.quantised else said


def _rows(plan: FusePlan, report: FuseReport, named: Mapping[str, str]) -> Sequence[str]:
    rows = []
    for item in plan.inputs:
        loss = report.adapters.get(item.name)
        arrives, error = ("-", "-") if loss is None else (percent(loss.gain), percent(loss.sub))
        weight = plan.weights.base[item.name]
        licence = named.get(item.name, "-")
        rows.append(
            f"| {item.name} | {item.format.name} | {weight:.6g} | {licence} | {arrives} | {error} |"
        )
    return rows
