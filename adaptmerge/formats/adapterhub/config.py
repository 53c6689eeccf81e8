"""AdapterHub's adapter_config.json: which family it is, and the fields that change its maths."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from adaptmerge.adapters.graph import Kind, Note
from adaptmerge.errors import InputError

CONFIG = "adapter_config.json"
FAMILIES = ("LoRA", "gated LoRA", "IA3", "VeRA", "bottleneck")
READ = "LoRA, gated LoRA, IA3, VeRA, sequential bottleneck"

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
        if family not in FAMILIES:
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
    if not is_number(alpha):
        problems.append(f"alpha is {alpha!r}: expected a number")
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        problems.append(f"r is {r!r}: expected the rank, a whole number of at least 1")
    return problems


def _bottleneck_problems(raw: Mapping[str, Any]) -> list[str]:
    fields = raw["config"]
    has = [what for name, what in NOT_SEQUENTIAL.items() if fields.get(name)]
    if not is_number(fields.get("scaling", 1.0)):
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


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
