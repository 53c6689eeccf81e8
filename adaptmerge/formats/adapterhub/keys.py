"""Tensor keys of AdapterHub files, sorted out by what they belong to."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from adaptmerge.errors import InputError
from adaptmerge.files.tensor_file import TensorFile
from adaptmerge.formats.shapes import Malformed, Shapes
from adaptmerge.tensors.refs import TensorRef

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
SHAPES = Shapes(
    {
        "lora_[AB]|vera_[BD]": "_ _",
        r"gate\.weight": "_ _",
        r"adapter_(down\.0|up)\.weight": "_ _",
        r".*\.bias": "_",
    }
)
BOTTLENECK_LEAVES = (
    "adapter_down.0.weight",
    "adapter_down.0.bias",
    "adapter_up.weight",
    "adapter_up.bias",
)
SHARED = "shared_parameters"
FUSED = ("c_attn", "in_proj")  # GPT-2, DeBERTa: q, k and v in one module, adapted apart

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
        """The modules that hold exactly these leaves, as they must be, taken off; others are problems."""
        found, wanted = {}, set(leaves)
        for module in list(table):
            parts = table.pop(module)
            if wanted - parts.keys():
                lacks = ", ".join(sorted(wanted - parts.keys()))
                self.problems.append(f"{module}: {lacks} is missing")
            elif self.fits(module, {leaf: parts[leaf] for leaf in leaves}):
                found[module] = parts
            self.left += [parts[leaf].name for leaf in sorted(parts.keys() - wanted)]
        return found

    def fits(self, module: str, parts: Parts) -> bool:
        """Whether tensors have the axes of their leaves; what has not is a problem."""
        try:
            SHAPES.check(parts)
        except Malformed as problem:
            self.problems.append(f"{module}: {problem}")
            return False
        return True

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
