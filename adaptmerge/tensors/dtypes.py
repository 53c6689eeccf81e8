"""Element types of stored tensors, by their safetensors names, usable without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adaptmerge.lazy import torch


@dataclass(frozen=True, slots=True)
class DType:
    """An element type: safetensors name, size in bits, torch attribute (None: bytes only)."""

    name: str
    bits: int
    torch_name: str | None
    is_float: bool = False

    @property
    def torch(self) -> torch.dtype:
        """The torch dtype; types that torch cannot hold read as raw bytes (uint8)."""
        found: torch.dtype = getattr(torch, self.torch_name or "uint8", torch.uint8)
        return found

    @property
    def eps(self) -> float:
        """Unit roundoff times two: the distance from 1 to the next value."""
        return float(torch.finfo(self.torch).eps)

    def nbytes(self, count: int) -> int:
        """Bytes of `count` elements, rounded up to whole bytes."""
        return (count * self.bits + 7) // 8

    def __str__(self) -> str:
        return self.name.lower()


_ALL = (
    DType("BOOL", 8, "bool"),
    DType("F4", 4, None, True),
    DType("F6_E2M3", 6, None, True),
    DType("F6_E3M2", 6, None, True),
    DType("U8", 8, "uint8"),
    DType("I8", 8, "int8"),
    DType("F8_E5M2", 8, "float8_e5m2", True),
    DType("F8_E4M3", 8, "float8_e4m3fn", True),
    DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", True),
    DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", True),
    DType("F8_E8M0", 8, "float8_e8m0fnu", True),
    DType("I16", 16, "int16"),
    DType("U16", 16, "uint16"),
    DType("F16", 16, "float16", True),
    DType("BF16", 16, "bfloat16", True),
    DType("I32", 32, "int32"),
    DType("U32", 32, "uint32"),
    DType("F32", 32, "float32", True),
    DType("C64", 64, "complex64"),
    DType("F64", 64, "float64", True),
    DType("I64", 64, "int64"),
    DType("U64", 64, "uint64"),
)
BY_NAME = {dtype.name: dtype for dtype in _ALL}
BF16, F16, F32, F64 = (BY_NAME[name] for name in ("BF16", "F16", "F32", "F64"))
U8, I8, I32, I64 = (BY_NAME[name] for name in ("U8", "I8", "I32", "I64"))
SPELLINGS = {"bf16": BF16, "fp16": F16, "f16": F16, "fp32": F32, "f32": F32}
SPELLINGS |= {"bfloat16": BF16, "float16": F16, "float32": F32}


def of_torch(dtype: torch.dtype) -> DType:
    """The DType of a torch dtype."""
    name = str(dtype).removeprefix("torch.")
    return next(found for found in _ALL if found.torch_name == name)


def is_plain(value: torch.Tensor) -> bool:
    """Whether a tensor is a dense run of values, on a device, in a type that files have."""
    known = any(str(value.dtype) == f"torch.{found.torch_name}" for found in _ALL)
    return known and value.layout == torch.strided and not (value.is_quantized or value.is_meta)


def widest(dtypes: list[DType]) -> DType:
    """The type that holds every one of `dtypes`: the same if all agree, else float32 or wider."""
    unique = set(dtypes)
    if len(unique) == 1:
        return dtypes[0]
    return F64 if F64 in unique else F32


def default_dtype(dtypes: Sequence[DType]) -> DType:
    """The dtype a merge is written in: the inputs' own when they agree, else float32."""
    floating = [dtype for dtype in dtypes if dtype.is_float and dtype.bits >= 16]
    return widest(floating) if floating else F32
