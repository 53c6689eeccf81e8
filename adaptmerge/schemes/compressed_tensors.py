"""How [compressed-tensors](https://github.com/vllm-project/compressed-tensors) stores weights.

| format | tensors of a module |
|---|---|
| pack-quantized | weight_packed i32, rows of 4 or 8 bits, low ones first; weight_shape; weight_g_idx; |
| | weight_zero_point i32, packed along columns, or i8 |
| int-quantized | weight i8; weight_zero_point i8 |
| float-quantized | weight f8_e4m3 |
| nvfp4-pack-quantized | weight_packed u8, low nibble first; weight_global_scale f32 divides scales |
| mxfp4-, mxfp8- | as nvfp4 without it, as float-quantized; scales are powers of two |

All have weight_scale, one per tensor, row, group of columns or block; w = scale (level - zero). The library
computes that in the dtype of the scale; here it is float32, of which its values are the rounding. Which
modules are quantised is told by the tensors; targets of the config only say in how many bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adaptmerge.bases.base import Base
from adaptmerge.errors import InputError
from adaptmerge.lazy import torch
from adaptmerge.schemes.coded import CodedWeight
from adaptmerge.schemes.grids import BlockGrid
from adaptmerge.schemes.narrow import (
    Fp4,
    Fp8,
    Ints,
    Levels,
    block_of,
    is_power_of_two,
    scales,
    unpacked,
)
from adaptmerge.schemes.scheme import Scheme, checked, config_of, kept_under
from adaptmerge.tensors.refs import TensorRef

URL = "https://github.com/vllm-project/compressed-tensors"
METHOD = "compressed-tensors"
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense") + (
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)
BESIDE = ("weight_shape", "input_scale", "input_zero_point", "input_global_scale")
OPTIONAL = ("weight_zero_point", "weight_g_idx", "weight_global_scale")
ZERO_DTYPES = ("I8", "F8_E4M3", "F32", "BF16", "F16")
WHOLE = ("I32", "I64")
FLOATS = ("F32", "BF16", "F16")
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E4M3", "F8_E8M0", "U8")
FP4_BLOCKS = ((1, 16), (1, 32))  # of NVFP4 and MXFP4


@dataclass(frozen=True, slots=True)
class Compressed:
    """One weight; `block` is the rows and columns that share a scale. over: a scale of scales."""

    module: str
    shape: tuple[int, int]
    levels: Levels
    block: tuple[int, int]
    weight: TensorRef
    scale: TensorRef
    zero: TensorRef | None = None
    order: TensorRef | None = None
    over: TensorRef | None = None
    beside: tuple[TensorRef, ...] = ()

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        refs = (self.weight, self.scale, self.zero, self.order, self.over, *self.beside)
        return {ref.name: ref for ref in refs if ref is not None}

    @property
    def _blocks(self) -> int:
        """Blocks in a row."""
        return -(-self.shape[1] // self.block[1])

    @property
    def _is_free(self) -> bool:
        """Whether every row has scales of its own, which are not powers of two."""
        return self.block[0] == 1 and not is_power_of_two(self.scale)

    def grid(self, rows: tuple[int, int]) -> tuple[torch.Tensor, BlockGrid]:
        codes = self.levels.read(self.weight.slice(0, *rows), self.shape[1])
        scale = self._of_rows(self.scale, rows) / self._over()
        if not bool(scale.isfinite().all()):
            raise InputError(f"{self.module}.weight_global_scale makes scales that are not finite")
        grid = self.levels.grid(scale, self._groups())
        return codes, grid if self.zero is None else self._with_zeros(grid, self.zero, rows)

    def _of_rows(self, ref: TensorRef, rows: tuple[int, int]) -> torch.Tensor:
        """What is stored per block, for some rows (rows, blocks), float32."""
        height = self.block[0]
        if height == 1 and len(ref.shape):
            return scales(ref.slice(0, *rows)).reshape(-1, self._blocks)
        return scales(ref).reshape(-1, self._blocks)[torch.arange(*rows) // height]

    def _over(self) -> torch.Tensor:
        return torch.ones(()) if self.over is None else self.over.read().float().reshape(())

    def _groups(self) -> torch.Tensor:
        """The block of each column; an order that was never set holds -1."""
        order = None if self.order is None else self.order.read().long()
        if order is None or bool((order < 0).any()):
            return torch.arange(self.shape[1]) // self.block[1]
        if bool((order >= self._blocks).any()):
            raise InputError(f"{self.module}.weight_g_idx names more than {self._blocks} groups")
        return order

    def _with_zeros(self, grid: BlockGrid, zero: TensorRef, rows: tuple[int, int]) -> BlockGrid:
        if zero.dtype.name != "I32" or not isinstance(self.levels, Ints):
            return _zeroed(grid, self._of_rows(zero, rows))
        per_word = 32 // self.levels.bits
        start, stop = rows[0] // per_word, -(-rows[1] // per_word)
        fields = unpacked(zero.slice(0, start, stop).read().T, self.levels.bits).T
        skipped = rows[0] - start * per_word
        found = fields[skipped : skipped + rows[1] - rows[0]].float()
        return _zeroed(grid, found + grid.low)

    def pack(self, codes: torch.Tensor, grid: BlockGrid) -> dict[str, torch.Tensor]:
        found = {self.weight.name: self.levels.write(codes, self.weight)}
        if self._is_free:
            found[self.scale.name] = self._stored(grid.scale).view(self.scale.shape)
        return found

    def _stored(self, scale: torch.Tensor) -> torch.Tensor:
        """Scales in the dtype that they are stored in, the largest where they are larger."""
        dtype = self.scale.dtype.torch
        most = torch.finfo(dtype).max
        return (scale.float() * self._over()).clamp(-most, most).to(dtype)

    def nearest_scales(self, scale: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor | None:
        if not self._is_free:
            return None
        return (self._stored(scale).float() / self._over()).to(scale.dtype)


def _zeroed(grid: BlockGrid, zero: torch.Tensor) -> BlockGrid:
    return BlockGrid(grid.scale, grid.groups, grid.table, grid.low, grid.high, zero)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _detect(base: Base) -> bool:
    return config_of(base).get("quant_method") == METHOD


def _find(base: Base) -> Mapping[str, CodedWeight]:
    """The weights that are stored as codes. Raises InputError naming what is missing, misshapen or of a
    kind that cannot be read."""
    problems = [*_refused(config_of(base)), *_lost(base)]
    found: dict[str, CodedWeight] = {}
    for module in () if problems else _modules(base):
        try:
            found[module] = _weight(base, module)
        except InputError as problem:
            problems += problem.problems
    nothing = f"its config says that {METHOD} quantised it, but no weight is stored as codes"
    return checked(base, found, problems, nothing)


def _refused(config: Mapping[str, Any]) -> Iterator[str]:
    """What a config says that no grid of a weight can take into account."""
    transforms = _mapping(config.get("transform_config"))
    if transforms and transforms.get("config_groups", True):
        yield (
            "its weights are rotated (transform_config: QuaRot, SpinQuant), and an adapter for the "
            "original does not fit them; give the original base"
        )
    sparsity = _mapping(config.get("sparsity_config")).get("format") or "dense"
    if sparsity != "dense":
        yield f"its weights are stored sparse (sparsity_config: {sparsity}), which cannot be fused into"
    said = [config.get("format"), *(group.get("format") for group in _groups_of(config))]
    unknown = sorted({str(one) for one in said if one is not None and one not in FORMATS})
    if unknown:
        yield f"has the format {', '.join(unknown)}, which cannot be read (known: {', '.join(FORMATS)})"


def _groups_of(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = _mapping(config.get("config_groups")).values()
    return [group for group in groups if isinstance(group, Mapping)]


def _modules(base: Base) -> Iterator[str]:
    """The modules that hold codes."""
    for name in base.tensors:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_packed" or (leaf == "weight" and f"{name}_scale" in base.tensors):
            yield module


def _lost(base: Base) -> Iterator[str]:
    """Codes and scales that lack one another."""
    for name, ref in base.tensors.items():
        module, _, leaf = name.rpartition(".")
        is_coded = leaf == "weight" and ref.dtype.name in ("I8", "F8_E4M3", "F8_E5M2")
        if (is_coded or leaf == "weight_packed") and f"{module}.weight_scale" not in base.tensors:
            yield f"{module}.weight_scale is missing beside {name}"
        own = (f"{module}.weight", f"{module}.weight_packed")
        if leaf == "weight_scale" and not any(one in base.tensors for one in own):
            yield f"{' or '.join(own)} is missing beside {name}"


def _weight(base: Base, module: str) -> Compressed:
    """A weight from its tensors. Raises InputError saying what is wrong with them."""
    leaves = ("weight", "weight_packed", *OPTIONAL, *BESIDE)
    own = {leaf: base.tensors.get(f"{module}.{leaf}") for leaf in leaves}
    weight = own["weight_packed"] or own["weight"]
    scale = base.tensors[f"{module}.weight_scale"]
    assert weight is not None
    if len(weight.shape) != 2 or not weight.count:
        raise InputError(f"{weight.name} is {list(weight.shape)}, expected a matrix with values")
    group = _group_for(module, _groups_of(config_of(base)))
    levels, shape = _levels(weight, own["weight_shape"], group)
    block = _block(shape, scale, group, levels)
    beside = tuple(ref for leaf in BESIDE if (ref := own[leaf]) is not None)
    zero, order, over = (own[leaf] for leaf in OPTIONAL)
    found = Compressed(module, shape, levels, block, weight, scale, zero, order, over, beside)
    _check(found)
    return found


def _levels(
    weight: TensorRef, stated: TensorRef | None, group: Mapping[str, Any]
) -> tuple[Levels, tuple[int, int]]:
    """How codes are stored, and the shape of the weight."""
    rows, width = weight.shape
    kind = weight.dtype.name, weight.name.endswith("_packed")
    if kind == ("U8", True):
        return Fp4(), (rows, 2 * width)
    if kind == ("F8_E4M3", False):
        return Fp8(), (rows, width)
    if kind == ("I8", False):
        bits = group.get("num_bits")
        bits = bits if isinstance(bits, int) and 0 < bits < 8 else 8
        return Ints(bits, packed=False), (rows, width)
    if kind != ("I32", True):
        raise InputError(f"{weight.name} is {weight.dtype}, which cannot be read as codes")
    whole = stated is not None and stated.dtype.name in WHOLE and stated.count == 2
    sides: list[int] = stated.read().flatten().tolist() if stated is not None and whole else []
    if len(sides) != 2 or sides[0] != rows:
        where = weight.name.removesuffix("packed")
        held = "missing" if stated is None else f"{stated.dtype} {list(stated.shape)}"
        raise InputError(f"{where}shape is {sides or held}, expected [{rows}, in]")
    return Ints(_bits(weight, sides[1], group), packed=True), (rows, sides[1])


def _bits(weight: TensorRef, width: int, group: Mapping[str, Any]) -> int:
    """In how many bits a row of codes is packed."""
    fitting = [bits for bits in range(1, 9) if -(-width * bits // 32) == weight.shape[1]]
    said = group.get("num_bits") or (fitting[0] if len(fitting) == 1 else None)
    if said not in fitting or said not in (4, 8):
        found = " or ".join(map(str, fitting)) or "more than 8"
        raise InputError(
            f"{weight.name} has {found} bits for each of {width} columns, expected {said or '4 or 8'}; "
            "others than 4 and 8 cannot be read"
        )
    return int(said)


def _block(
    shape: tuple[int, int], scale: TensorRef, group: Mapping[str, Any], levels: Levels
) -> tuple[int, int]:
    """The rows and columns that share a scale."""
    if scale.dtype.name not in SCALE_DTYPES:
        raise InputError(
            f"{scale.name} is {scale.dtype}, expected one of {', '.join(SCALE_DTYPES).lower()}"
        )
    grid = (scale.count, 1) if len(scale.shape) == 1 else scale.shape
    found = block_of(shape, grid, _said(group))
    if found is None:
        raise InputError(
            f"{scale.name} is {list(scale.shape)}, expected one per tensor, row, group or block "
            f"of {list(shape)}"
        )
    if isinstance(levels, Fp4) and found not in FP4_BLOCKS:
        raise InputError(f"{scale.name} has a scale per {list(found)}, expected groups of 16 or 32")
    return found[0], found[1]


def _said(group: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The block that a config says; older ones write it as "128x128"."""
    sides = group.get("block_structure")
    found = re.findall(r"\d+", str(sides)) if sides else []
    return [(int(found[0]), int(found[1]))] if len(found) == 2 else []


def _check_zero(one: Compressed, zero: TensorRef) -> None:
    """Raises InputError for zeros that do not fit."""
    levels = one.levels
    if zero.dtype.name == "I32" and isinstance(levels, Ints) and one.block[0] == 1:
        _expect(zero, (levels.words(one.shape[0]), one.scale.count // one.shape[0]))
        return
    _expect(zero, one.scale.shape)
    if zero.dtype.name not in ZERO_DTYPES:
        raise InputError(f"{zero.name} is {zero.dtype}, which cannot be read as zeros")


def _check(one: Compressed) -> None:
    """Raises InputError for zeros, an order or a scale of scales that do not fit."""
    zero, order, over = one.zero, one.order, one.over
    if zero is not None:
        _check_zero(one, zero)
    if order is not None:
        _expect(order, (one.shape[1],))
        if order.dtype.name not in WHOLE:
            raise InputError(f"{order.name} is {order.dtype}, expected whole numbers")
    needs = isinstance(one.levels, Fp4) and not is_power_of_two(one.scale)
    if needs != (over is not None):
        raise InputError(
            f"{one.module}.weight_global_scale is {'missing' if needs else 'not expected'}"
        )
    if over is not None and (over.count != 1 or over.dtype.name not in FLOATS):
        raise InputError(f"{over.name} is {over.dtype} {list(over.shape)}, expected one f32")


def _expect(ref: TensorRef, shape: tuple[int, ...]) -> None:
    if ref.shape != shape:
        raise InputError(f"{ref.name} is {ref.dtype} {list(ref.shape)}, expected {list(shape)}")


def _group_for(module: str, groups: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    """What the config says of a module's weights: the group that names it, else the only one of
    a class."""
    naming = [one for one in groups if any(_names(target, module) for target in _targets(one))]
    classes = [one for one in groups if any(target[:1].isupper() for target in _targets(one))]
    chosen = groups if len(groups) == 1 else naming[:1] or classes
    return _mapping(chosen[0].get("weights")) if len(chosen) == 1 else {}


def _targets(group: Mapping[str, Any]) -> list[str]:
    return [str(target) for target in group.get("targets") or ()]


def _names(target: str, module: str) -> bool:
    try:
        pattern = target.removeprefix("re:")
        return target == module or (pattern != target and bool(re.match(pattern, module)))
    except re.error:
        return False


SCHEME = Scheme(METHOD, "compressed-tensors", URL, _detect, _find, kept=kept_under("ignore"))
