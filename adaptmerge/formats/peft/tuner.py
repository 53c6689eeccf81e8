"""How PEFT spells one family of adapters: tensor names and config fields, to edits and back.

A family is one file of `tuners/`, named as its peft_type in lower case, with a constant TUNER. The file
says what is particular; finding modules, heads, biases, targets and unknown fields is done here for all.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from adaptmerge.adapters.graph import Adapter, Edit, Kind, Layer, Note, Site
from adaptmerge.adapters.weight_edits import factor_of, family_of
from adaptmerge.errors import CannotStore
from adaptmerge.formats.format import ReadOptions, WriteOptions
from adaptmerge.formats.peft import tuners
from adaptmerge.formats.peft.keys import PREFIX
from adaptmerge.formats.shapes import Malformed as Malformed
from adaptmerge.formats.shapes import Shapes
from adaptmerge.tensors.refs import TensorRef

if TYPE_CHECKING:
    from adaptmerge.formats.peft.config import PeftConfig
    from adaptmerge.formats.peft.keys import Keys

Parts = Mapping[str, TensorRef]


@dataclass
class Reading:
    """An adapter being read: its tensors, config, options, and what was noted and found wrong."""

    tuner: Tuner
    keys: Keys
    config: PeftConfig
    options: ReadOptions
    notes: list[Note] = field(default_factory=list)

    def setting(self, name: str, module: str | None = None) -> Any:
        """A field of the config, or PEFT's default; for a module, with the field's pattern applied."""
        default = self.tuner.maths.get(name)
        value = self.config.raw.get(name, default)
        if value is None and default is not None:
            raise Malformed(f"{name} is null in the config: expected a value such as {default!r}")
        table = self.tuner.patterns.get(name)
        if module is None or table is None:
            return value
        from adaptmerge.formats.peft.config import Patterns

        return Patterns.of(self.config.raw.get(table) or {}).find(module, value)

    def shared(self, name: str) -> TensorRef | None:
        """A tensor stored once for all modules (base_model.NAME), taken off; None if it is not stored."""
        ref = self.keys.take(f"base_model.{name}") or self.keys.take(name)
        return None if ref is None else replace(self.looked_at(name, ref), shared=True)

    def looked_at(self, name: str, ref: TensorRef) -> TensorRef:
        """A tensor that belongs to no module. Raises Malformed where it is not what the family stores."""
        self.tuner.rules.check({name: ref})
        return ref

    def weight(self, module: str, param: str = "weight") -> TensorRef | None:
        """The base's own parameter, (out, in); None without --base or where the base has none."""
        base = self.options.base
        return None if base is None else base.weight(Site(module, param))

    def matrix(self, module: str) -> TensorRef | None:
        """The base's own weight (out, in), None as above. Raises Malformed where it is no matrix, or holds
        nothing."""
        found = self.weight(module)
        if found is not None and (len(found.shape) != 2 or not found.count):
            raise Malformed(
                f"is for a matrix, but the base has {list(found.shape)}: is this adapter for another model?"
            )
        return found

    @property
    def advice(self) -> str:
        """What to do where a base is needed: give one, or another."""
        base = self.options.base
        return (
            "pass --base DIR"
            if base is None
            else f"{base.path.name} has none there: give its own base"
        )

    def layer(self, module: str) -> Layer:
        """What the base has there: a convolution with its kernel; linear where nothing says else."""
        base = self.options.base
        stored = None if base is None else base.parameter(Site(module))
        kernel = () if stored is None else stored.shape[2:]
        return Layer("conv", kernel) if kernel else Layer()

    def ignored(self) -> list[Note]:
        """A Note on modules that PEFT ignores, since target_modules does not select them; they are read."""
        lost = self.config.unselected(self.keys.modules)
        if not lost:
            return []
        what = f"target_modules selects {len(lost)} stored sites not, which PEFT ignores: read as active"
        return [Note(Kind.ASSUMED, what, site=lost[0])]

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of the base's weight. Raises Malformed without --base, which the file needs."""
        weight = self.matrix(module)
        if weight is None:
            raise Malformed(f"the file does not say the shape of the weight: {self.advice}")
        return weight.shape[0], weight.shape[1]


class Spelling(NamedTuple):
    """Tensors by their full keys without `base_model.model.`, and config fields."""

    tensors: Mapping[str, TensorRef]
    config: Mapping[str, Any]


def nothing(edit: Edit) -> Mapping[str, Any]:
    """For edits that need no tensor or field of their own."""
    return {}


@dataclass(frozen=True, slots=True)
class Tuner:
    r"""One family. leaves: regular expressions of its tensor names below a module ("hada_w1_a",
    r"adamss_A\.\d+"), without .weight and adapter names; a bias ends in ".bias".

    shapes: leaf to the axes of its tensors, see `shapes`; they are looked at before any edit is made.
    module: the edits of one module from its tensors by leaf; raises Malformed. read: instead of module,
    all edits at once, for families without tensors per module.
    maths: config fields that change what is computed, with PEFT's defaults. training: those that do not.
    patterns: field to the table of its exceptions by module.
    tensors, settings: leaf to tensor and field to value of one edit, to write it. shared: tensors
    (full keys) and fields of all edits together. finish: the last word on the config, whole.
    prefix: what comes before module paths in its keys. takes: options of an input beyond the base.
    as_lora: "itself", "exact", "svd" (full rank), "base" (by its delta on the base) or "never".
    merges: how several become one, for the page on families. refused: why no merge can be right.
    """

    peft_type: str
    summary: str
    leaves: tuple[str, ...] = ()
    shapes: Mapping[str, str] = field(default_factory=dict)
    module: Callable[[Reading, str, Parts], Sequence[Edit]] | None = None
    read: Callable[[Reading], Sequence[Edit]] | None = None
    maths: Mapping[str, Any] = field(default_factory=dict)
    training: frozenset[str] = frozenset()
    patterns: Mapping[str, str] = field(default_factory=dict)
    tensors: Callable[[Any], Parts] | None = None
    settings: Callable[[Any], Mapping[str, Any]] = nothing
    shared: Callable[[Sequence[Any]], Spelling] | None = None
    finish: Callable[[Sequence[Any], dict[str, Any]], dict[str, Any]] | None = None
    write: Callable[[Adapter, WriteOptions], Spelling] | None = None
    prefix: str = PREFIX
    takes: tuple[str, ...] = ()
    bias_mode: str = ""
    as_lora: str = "exact"
    merges: str = ""
    refused: str = ""

    @property
    def rules(self) -> Shapes:
        """What its tensors must be."""
        return Shapes(self.shapes)

    @property
    def writable(self) -> bool:
        """Whether it is written back as itself."""
        return self.tensors is not None or self.write is not None

    def key(self) -> re.Pattern[str]:
        """The pattern of its keys: module, leaf, an adapter's name if it was kept, weight or bias."""
        leaves = "|".join(self.leaves) or "(?!)"
        return re.compile(
            rf"(?P<module>.*?)\.(?P<leaf>{leaves})"
            r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<tail>weight|bias))?$"
        )


# Fields that no family computes with.
COMMON = frozenset(
    {"auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode"}
    | {"init_weights", "layers_pattern", "layers_to_transform", "modules_to_save", "peft_type"}
    | {"peft_version", "revision", "target_modules", "task_type", "fan_in_fan_out"}
)


def judge(tuner: Tuner, edit: Edit) -> None:
    """Raises ValueError where what an edit is made of cannot be computed with, or is no weight's."""
    factor = factor_of(edit)
    if factor is not None and min(factor.shape) < 1:
        raise Malformed(f"is for a weight of {list(factor.shape)}")
    if family_of(edit) != tuner.peft_type.lower():
        return  # in another form than the one it is written in, as one task of a poly is
    try:
        tuner.settings(edit)
    except (IndexError, ZeroDivisionError) as problem:
        raise Malformed(f"its parts do not fit each other ({problem})") from None


def misshapen(edit: Edit, family: str) -> list[str]:
    """What of an edit that another format holds is not as its family stores it, one sentence each."""
    tuner = tuner_of(family)
    if tuner is None:
        return []
    try:
        parts = dict(tuner.tensors(_at_weight(edit))) if tuner.tensors else {}
        with suppress(CannotStore):
            parts |= tuner.shared([edit]).tensors if tuner.shared else {}
        bare = {
            name.removeprefix("base_model.").removesuffix(".weight"): ref
            for name, ref in parts.items()
        }
        tuner.rules.check(bare)
        tuner.rules.sizes(bare)
        judge(tuner, edit)
    except (ValueError, IndexError, TypeError, AssertionError) as problem:
        return [f"its tensors are not those of {tuner.peft_type}: {problem}"]
    return []


def _at_weight(edit: Edit) -> Edit:
    """The edit of the weight whose tensors the edit of a bias shares, as some families spell them once."""
    made: Any = edit
    return (
        replace(made, site=replace(edit.site, param="weight"))
        if edit.site.param == "bias"
        else edit
    )


@cache
def families() -> tuple[str, ...]:
    """The names of all families, lower case."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(tuners.__path__)))


def tuner_of(peft_type: str) -> Tuner | None:
    """The family of a peft_type; None when it is not known."""
    name = peft_type.lower()
    if name not in families():
        return None
    found: Tuner = importlib.import_module(f"{tuners.__name__}.{name}").TUNER
    return found


def all_tuners() -> list[Tuner]:
    """Every family."""
    return [tuner for name in families() if (tuner := tuner_of(name)) is not None]
