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

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from adaptmerge.edits import Add, Bottleneck, Gated, Scale
from adaptmerge.errors import InputError
from adaptmerge.factors import Leaf, Product, low_rank
from adaptmerge.files.listing import Listing
from adaptmerge.files.refs import TensorRef
from adaptmerge.files.safetensors import TensorFile
from adaptmerge.graph import Adapter, BaseReference, Bundle, Edit, Kind, Note, Site, bundle_of
from adaptmerge.registry import Format, ReadOptions

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEADS = ("model_head.safetensors", "pytorch_model_head.bin")
SETUPS = {
    "adapter_fusion_config.json": "an AdapterFusion layer",
    "adapter_setup.json": "a setup of several adapters",
}
READ = "LoRA, gated LoRA, IA3, VeRA, sequential bottleneck"

LORA_KEY = re.compile(
    r"(?P<module>.+)\.loras\.(?P<name>[^.]+)\."
    r"(?P<leaf>lora_A|lora_B|gate\.weight|gate\.bias|vera_B|vera_D)"
)
SHARED_KEY = re.compile(
    r"(?:.+\.)?(?P<module>shared_parameters)\.(?P<name>[^.]+)\.(?P<leaf>lora_A|lora_B)"
)
BOTTLENECK_KEY = re.compile(
    r"(?P<module>.+)\.adapters\.(?P<name>[^.]+)\."
    r"(?P<leaf>adapter_(?:down\.0|up)\.(?:weight|bias))"
)
BOTTLENECK_LEAVES = (
    "adapter_down.0.weight",
    "adapter_down.0.bias",
    "adapter_up.weight",
    "adapter_up.bias",
)
SHARED = "shared_parameters"
FUSED = ("c_attn", "in_proj")  # GPT-2, DeBERTa: q, k and v in one module, adapted apart

# Where a bottleneck lies (the path before ".adapters."): the layer, and the place in it.
POST_NORM = {
    "mlp": re.compile(r"(.*encoder\.layer\.\d+)\.output"),
    "attention": re.compile(r"(.*encoder\.layer\.\d+)\.attention\.output"),
}
PRE_NORM = {
    "mlp": re.compile(r"(.*(?:layers|h)\.\d+)\.output_adapters"),
    "attention": re.compile(r"(.*(?:layers|h)\.\d+)\.attention_adapters"),
}
PLACES = {
    "bert": POST_NORM,
    "roberta": POST_NORM,
    "gpt2": PRE_NORM,
    "llama": PRE_NORM,
    "mistral": PRE_NORM,
}
# Activations without parameters, by their names in `transformers`.
ACTIVATIONS = """
gelu gelu_10 gelu_accurate gelu_fast gelu_new gelu_python gelu_python_tanh gelu_pytorch_tanh
laplace leaky_relu linear mish quick_gelu relu relu2 relu6 sigmoid silu swish tanh
"""
UNVERSIONED_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
# Fields of a bottleneck that must be off (or absent) for it to be y = h + f(...) and nothing else.
NOT_SEQUENTIAL = {
    "phm_layer": "Compacter (PHM) layers",
    "ln_before": "a layer norm before (ln_before)",
    "ln_after": "a layer norm after (ln_after)",
    "is_parallel": "a parallel place (is_parallel)",
    "use_gating": "a gate (use_gating)",
    "inv_adapter": "an invertible adapter (inv_adapter)",
    "cross_adapter": "a cross-attention adapter (cross_adapter)",
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
    return [Note(Kind.INFO, f"the prediction head in {name} is not part of it") for name in heads]


@dataclass(frozen=True, slots=True)
class Config:
    """What the config says about the computation: its `family` and the fields that change it."""

    raw: Mapping[str, Any]
    fields: Mapping[str, Any]
    family: str
    model_type: str
    notes: tuple[Note, ...] = ()

    @classmethod
    def of(cls, raw: Mapping[str, Any], where: str) -> Config:
        """The config. Raises InputError when it is malformed or of a family that is not read."""
        fields = raw.get("config")
        if not isinstance(fields, dict):
            sentence = f"config is {fields!r}, expected an object with all fields: save it again"
            raise InputError(sentence, where=where)
        family = _family(fields)
        if family not in READERS:
            sentence = f"is an AdapterHub {family} adapter, which is not read yet (read: {READ})"
            raise InputError(sentence, where=where)
        problems = _bottleneck_problems(raw) if family == "bottleneck" else _lora_problems(fields)
        if problems:
            raise InputError(problems, where=where)
        config = cls(raw, fields, family, str(raw.get("model_type")))
        return config if family == "bottleneck" else config._with_old_alpha()

    def _with_old_alpha(self) -> Config:
        """alpha = r for versions that ignored alpha, as the library itself reads their files."""
        match = re.match(r"adapters\.(\d+)\.(\d+)", str(self.raw.get("version")))
        alpha, r = self.fields["alpha"], self.fields["r"]
        if not match or (int(match[1]), int(match[2])) >= (1, 1) or alpha == r:
            return self
        note = Note(
            Kind.INFO, f"alpha is read as {r}, not {alpha}: {self.raw['version']} ignored alpha"
        )
        return replace(self, fields={**self.fields, "alpha": r}, notes=(note,))

    @property
    def scale(self) -> float:
        """alpha / r."""
        return float(self.fields["alpha"]) / float(self.fields["r"])

    @property
    def activation(self) -> str:
        """The name in `transformers` of a bottleneck's activation."""
        return _activation(self.raw)


def _family(fields: Mapping[str, Any]) -> str:
    architecture = fields.get("architecture")
    if architecture == "union":
        parts = fields.get("configs")
        listed = (
            [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
        )
        return f"union ({', '.join(_family(part) for part in listed)})"
    if architecture != "lora":
        return "bottleneck" if architecture is None else str(architecture)
    vera = any(isinstance(fields.get(name), (int, float)) for name in ("vera_d", "vera_b"))
    mode = fields.get("composition_mode", "add")
    if fields.get("use_dora"):
        return "DVoRA" if vera else "DoRA"
    if vera or mode == "scale":
        name = "VeRA" if vera else "IA3"
        return f"gated {name}" if fields.get("use_gating") else name
    if mode != "add":
        return f"LoRA (composition_mode {mode!r})"
    return "gated LoRA" if fields.get("use_gating") else "LoRA"


def _lora_problems(fields: Mapping[str, Any]) -> list[str]:
    alpha, r = fields.get("alpha"), fields.get("r")
    problems = []
    if not _is_number(alpha):
        problems.append(f"alpha is {alpha!r}: expected a number")
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        problems.append(f"r is {r!r}: expected the rank, a whole number of at least 1")
    return problems


def _bottleneck_problems(raw: Mapping[str, Any]) -> list[str]:
    fields = raw["config"]
    has = [what for name, what in NOT_SEQUENTIAL.items() if fields.get(name)]
    if not _is_number(fields.get("scaling", 1.0)):
        has.append(f"scaling {fields['scaling']!r}")
    if not fields.get("original_ln_after", True):
        has.append("no residual after (original_ln_after is false)")
    if fields.get("original_ln_before") and fields.get("residual_before_ln", True) is not True:
        has.append(f"residual_before_ln {fields['residual_before_ln']!r}")
    if _activation(raw) not in ACTIVATIONS.split():
        has.append(f"the activation {fields.get('non_linearity')!r}")
    problems = []
    if has:
        problems.append(
            f"is an AdapterHub bottleneck with {', '.join(has)}, "
            f"which is not read yet (read: {READ})"
        )
    if raw.get("model_type") not in PLACES:
        problems.append(
            f"is an AdapterHub bottleneck of a {raw.get('model_type')} model: "
            f"bottlenecks are read for {', '.join(PLACES)}"
        )
    return problems


def _activation(raw: Mapping[str, Any]) -> str:
    name = str(raw["config"].get("non_linearity")).lower()
    if "version" not in raw:
        name = UNVERSIONED_ACTIVATIONS.get(name, name)
    return "leaky_relu" if name == "leakyrelu" else name


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


Parts = dict[str, TensorRef]


@dataclass
class Keys:
    """The tensors of a file by what they belong to; `finish` fails on problems and leftovers."""

    path: str
    loras: dict[str, Parts] = field(default_factory=dict)
    bottlenecks: dict[str, Parts] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, file: TensorFile) -> Keys:
        """The keys of `file`, sorted out."""
        keys, names = cls(file.path), set()
        for key, ref in file.refs.items():
            match = SHARED_KEY.fullmatch(key) or LORA_KEY.fullmatch(key)
            table = keys.loras if match else keys.bottlenecks
            match = match or BOTTLENECK_KEY.fullmatch(key)
            if match is None or match["leaf"] in table.get(match["module"], {}):
                keys.left.append(key)
                continue
            names.add(match["name"])
            table.setdefault(match["module"], {})[match["leaf"]] = ref
        if len(names) > 1:
            listed = ", ".join(sorted(names))
            keys.problems.append(f"holds several adapters ({listed}): save them one by one")
        return keys

    def take(self, table: dict[str, Parts], leaves: tuple[str, ...]) -> dict[str, Parts]:
        """The modules that hold exactly these leaves, taken off; others are problems."""
        found, wanted = {}, set(leaves)
        for module in list(table):
            parts = table.pop(module)
            if wanted - parts.keys():
                lacks = ", ".join(sorted(wanted - parts.keys()))
                self.problems.append(f"{module}: {lacks} is missing")
            else:
                found[module] = parts
            self.left += [parts[leaf].name for leaf in sorted(parts.keys() - wanted)]
        return found

    def finish(self) -> None:
        """Raises InputError with all problems found and every key that nothing claimed."""
        self.left += [
            ref.name
            for table in (self.loras, self.bottlenecks)
            for parts in table.values()
            for ref in parts.values()
        ]
        left = [f"tensor {key!r} belongs to nothing this format reads" for key in sorted(self.left)]
        if self.problems or left:
            raise InputError([*self.problems, *left], where=self.path)


def _read_lora(keys: Keys, config: Config) -> list[Edit]:
    """(alpha / r) B A."""
    edits: list[Edit] = []
    for module, parts in _pairs(keys, config, ("lora_A", "lora_B")).items():
        edits.append(Add(Site(module), low_rank(parts["lora_B"], parts["lora_A"], config.scale)))
    return edits


def _read_gated(keys: Keys, config: Config) -> list[Edit]:
    """gate * B A, without alpha / r."""
    edits: list[Edit] = []
    leaves = ("lora_A", "lora_B", "gate.weight", "gate.bias")
    for module, parts in _pairs(keys, config, leaves).items():
        gate, bias, width = parts["gate.weight"], parts["gate.bias"], parts["lora_A"].shape[1]
        if gate.shape != (1, width) or bias.shape != (1,):
            keys.problems.append(
                f"{module}: the gate has shapes {list(gate.shape)} and {list(bias.shape)}: "
                f"expected [1, {width}] and [1]"
            )
            continue
        factor = low_rank(parts["lora_B"], parts["lora_A"])
        edits.append(Gated(Site(module), factor, gate, bias))
    return edits


def _pairs(keys: Keys, config: Config, leaves: tuple[str, ...]) -> dict[str, Parts]:
    """The modules whose lora_A is (r, in) and lora_B (out, r), with the config's r."""
    r, found = config.fields["r"], {}
    for module, parts in _unfused(keys, leaves).items():
        a, b = parts["lora_A"].shape, parts["lora_B"].shape
        if len(a) == len(b) == 2 and a[0] == b[1] == r:
            found[module] = parts
        else:
            keys.problems.append(
                f"{module}: lora_A {list(a)} and lora_B {list(b)} are no pair of rank {r}"
            )
    return found


def _unfused(keys: Keys, leaves: tuple[str, ...]) -> dict[str, Parts]:
    fused = [module for module in keys.loras if module.rpartition(".")[2] in FUSED]
    for module in fused:
        keys.problems.append(
            f"{module}: adapts parts of a fused projection, which is not read yet (read: {READ}, "
            "on modules of their own)"
        )
        del keys.loras[module]
    return keys.take(keys.loras, leaves)


def _read_ia3(keys: Keys, config: Config) -> list[Edit]:
    """(W x + b) * (alpha l), for feed-forward modules, too."""
    edits: list[Edit] = []
    for module, parts in _unfused(keys, ("lora_B",)).items():
        column = parts["lora_B"]
        if len(column.shape) != 2 or column.shape[1] != 1:
            keys.problems.append(
                f"{module}: lora_B has shape {list(column.shape)}: an IA3 vector is [out, 1]"
            )
            continue
        vector = column.reshape(column.count).scaled(float(config.fields["alpha"]))
        edits += [Scale(Site(module), vector), Scale(Site(module, "bias"), vector)]
    return edits


def _read_vera(keys: Keys, config: Config) -> list[Edit]:
    """(alpha / r) vera_B B vera_D A, with B and A shared by all modules."""
    shared = keys.loras.pop(SHARED, {})
    if shared.keys() != {"lora_A", "lora_B"}:
        keys.problems.append(f"expected lora_A and lora_B under {SHARED}, found {sorted(shared)}")
        return []
    a, b = (Leaf(replace(shared[leaf], shared=True)) for leaf in ("lora_A", "lora_B"))
    edits: list[Edit] = []
    for module, parts in _unfused(keys, ("vera_B", "vera_D")).items():
        outer, inner = Leaf(parts["vera_B"]), Leaf(parts["vera_D"])
        try:
            edits.append(Add(Site(module), Product((outer, b, inner, a), config.scale)))
        except ValueError as problem:
            keys.problems.append(f"{module}: {problem}")
    return edits


def _read_bottleneck(keys: Keys, config: Config) -> list[Edit]:
    """h + scaling * up(act(down(s))), s the block's sum with the residual, or its output h."""
    found = keys.take(keys.bottlenecks, BOTTLENECK_LEAVES)
    edits = [_bottleneck(keys, config, path, parts) for path, parts in found.items()]
    return [edit for edit in edits if edit is not None]


def _bottleneck(keys: Keys, config: Config, path: str, parts: Parts) -> Edit | None:
    layer, place = _place(path, config.model_type)
    down, down_bias, up, up_bias = (parts[leaf] for leaf in BOTTLENECK_LEAVES)
    shapes = [ref.shape for ref in (down, down_bias, up, up_bias)]
    width, hidden = down_bias.count, up_bias.count
    if layer is None:
        keys.problems.append(f"{path}: is no place of a bottleneck in a {config.model_type} layer")
    elif shapes != [(width, hidden), (width,), (hidden, width), (hidden,)]:
        keys.problems.append(f"{path}: shapes {[list(shape) for shape in shapes]} do not fit")
    else:
        source = "sum" if config.fields.get("original_ln_before") else "output"
        scale, activation = float(config.fields.get("scaling", 1.0)), config.activation
        return Bottleneck(
            Site(layer), place, down, down_bias, up, up_bias, activation, source, scale
        )
    return None


def _place(path: str, model_type: str) -> tuple[str | None, str]:
    for place, pattern in PLACES[model_type].items():
        match = pattern.fullmatch(path)
        if match:
            return match[1], place
    return None, ""


READERS = {
    "LoRA": _read_lora,
    "gated LoRA": _read_gated,
    "IA3": _read_ia3,
    "VeRA": _read_vera,
    "bottleneck": _read_bottleneck,
}

FORMAT = Format(
    name="adapterhub",
    title="AdapterHub adapters (reads LoRA, gated LoRA, IA3, VeRA and sequential bottlenecks)",
    url="https://docs.adapterhub.ml/loading.html",
    detect=detect,
    read=read,
)
