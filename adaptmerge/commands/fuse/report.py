"""What was fused into what, and what rounding did: the data behind adaptmerge.json of a fused model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from adaptmerge.adapters.graph import Note
from adaptmerge.algebra.factors import rank_bound
from adaptmerge.bases.base import GGUF
from adaptmerge.commands.fuse.pieces.write import Line
from adaptmerge.errors import InputError
from adaptmerge.files.strict_json import dump, read_object
from adaptmerge.outputs.companions import CARD
from adaptmerge.outputs.report import FILE, VERSION, parsed
from adaptmerge.outputs.said import SaidBase, SaidFusion, SaidInput
from adaptmerge.rounding.codes import coded_error
from adaptmerge.rounding.floats import GRID_ERROR, grid_error
from adaptmerge.rounding.matrix import Measured
from adaptmerge.tensors.dtypes import DType

KEPT = 0.9  # of an adapter's delta must arrive
COMMAND = "fuse"
SAFETENSORS = ".safetensors"


@dataclass(frozen=True, slots=True)
class FusedSite:
    """One matrix of a fused model.

    gain: how much of each adapter's delta arrived, 1 is all; sub: the error in the space of its inputs,
    relative to the delta (None: it is of full rank). predicted: the gain that nearest rounding would have
    had. Norms are absolute (Frobenius). grid: |error| / |W| that what it is stored as has by itself. moved:
    the share of a quantised weight's codes that changed; of one quantised anew, that are not the nearest.
    """

    site: str
    tensor: str
    shape: tuple[int, ...]
    dtype: str
    rounding: str
    weights: Mapping[str, float]
    norms: Mapping[str, float]
    gain: Mapping[str, float | None]
    sub: Mapping[str, float | None]
    predicted: Mapping[str, float | None]
    weight_norm: float
    delta_norm: float
    error: float
    grid: float
    moved: float | None = None


@dataclass(frozen=True, slots=True)
class AdapterLoss:
    """What rounding did to one adapter over all sites. floor: of a quantised base the error that computing
    with its weights in 16 bits makes in the space of the adapter's inputs, whatever is stored."""

    norm: float
    gain: float | None
    sub: float | None
    relative: float
    floor: float | None = None


@dataclass(frozen=True, slots=True)
class FuseReport:
    """Everything a reader of a fused model may ask; `as_json` is the file's content.

    files: the sha256 of every other file that was written, by name; in reports of earlier versions of those
    with tensors only.
    """

    options: Annotated[Mapping[str, Any], SaidFusion]
    inputs: Sequence[Annotated[Mapping[str, Any], SaidInput]]
    base: Annotated[Mapping[str, Any], SaidBase]
    versions: Mapping[str, str]
    adapters: Mapping[str, AdapterLoss]
    noise: float
    sites: Sequence[FusedSite]
    files: Mapping[str, str]
    changed: Sequence[str]
    config: Mapping[str, Any]
    notes: Sequence[Note]
    command: str = COMMAND
    method: str = "linear"

    @property
    def shards(self) -> list[str]:
        """The files that hold tensors."""
        return [name for name in self.files if name.endswith((SAFETENSORS, GGUF))]

    def as_json(self) -> dict[str, Any]:
        """Plain data, without times and absolute paths, so that equal runs give equal bytes."""
        return {"report": VERSION, **asdict(self)}

    def as_text(self) -> str:
        """The content of the report file."""
        return dump(self.as_json()) + "\n"


def site_of(line: Line) -> FusedSite:
    """A line of the report."""
    matrix, measured = line.matrix, line.measured
    names = [part.adapter for part in matrix.parts]
    norms = [math.sqrt(added) for added in measured.added]
    return FusedSite(
        site=str(matrix.site),
        tensor=line.tensor,
        shape=matrix.shape,
        dtype=line.stored_as,
        rounding=line.choice.rounding,
        weights={part.adapter: part.weight for part in matrix.parts},
        norms=dict(zip(names, norms, strict=True)),
        gain=dict(zip(names, measured.gains, strict=True)),
        sub=dict(zip(names, measured.subs, strict=True)),
        predicted=dict(zip(names, line.choice.predicted, strict=False)),
        weight_norm=math.sqrt(measured.weight),
        delta_norm=math.sqrt(measured.delta),
        error=math.sqrt(measured.error),
        grid=_grid_error(line),
        moved=None if line.coded is None else measured.moved / math.prod(matrix.shape),
    )


def _grid_error(line: Line) -> float:
    """|error| / |W| that what a matrix is stored as has by itself."""
    if line.coded is not None:
        return coded_error(line.coded)
    return grid_error(line.matrix) if line.matrix.dtype.is_float else 0.0


@dataclass(slots=True)
class _Sums:
    added: float = 0.0
    inner: float = 0.0
    inside: float = 0.0
    thin: float = 0.0
    weight: float = 0.0
    floor: float = 0.0


def losses(lines: Sequence[Line], running: DType | None = None) -> dict[str, AdapterLoss]:
    """What rounding did to each adapter, over all its sites; running: what a quantised base computes in."""
    found: dict[str, _Sums] = {}
    for line in lines:
        for i, part in enumerate(line.matrix.parts):
            sums, m = found.setdefault(part.adapter, _Sums()), line.measured
            sums.added += m.added[i]
            sums.inner += m.inner[i]
            sums.weight += m.weight
            if running is not None and line.coded is not None:
                share = rank_bound(part.factor) / line.matrix.shape[1]
                sums.floor += (GRID_ERROR * running.eps) ** 2 * m.weight * share
            inside = m.inside[i]
            if inside is not None:
                sums.inside += inside
                sums.thin += m.added[i]
    return {name: _loss(sums) for name, sums in found.items()}


def _loss(sums: _Sums) -> AdapterLoss:
    return AdapterLoss(
        norm=math.sqrt(sums.added),
        gain=1 + sums.inner / sums.added if sums.added else None,
        sub=math.sqrt(sums.inside / sums.thin) if sums.thin else None,
        relative=math.sqrt(sums.added / sums.weight) if sums.weight else 0.0,
        floor=math.sqrt(sums.floor / sums.added) if sums.floor and sums.added else None,
    )


def noise(measured: Sequence[Measured]) -> float:
    """|error| / |weight| over all matrices."""
    weight = sum(m.weight for m in measured)
    return math.sqrt(sum(m.error for m in measured) / weight) if weight else 0.0


def percent(share: float | None, unknown: str = "-") -> str:
    """A share as people read it: in percent with two decimals at most; what is more than 0 is not 0."""
    if share is None:
        return unknown
    digits = f"{100 * share:.{2 if abs(share) < 10 else 0}f}"
    if not float(digits):
        return "< 0.01 %" if share > 0 else "0 %"
    return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits} %"


def and_error(sub: float | None) -> str:
    """What a message says of an error after the share that arrives."""
    return f", with an error of {percent(sub)} of it in the inputs that it reads" if sub else ""


def is_fused(output: Path) -> bool:
    """Whether a folder is a model that adapters were fused into, as its report says."""
    try:
        found: bool = read_object(output / FILE).get("command") == COMMAND
        return found
    except InputError:
        return False


def load_fuse_report(output: Path) -> FuseReport:
    """The report of a fused model. Raises InputError when there is none or it is of another version."""
    path = output / FILE
    found: FuseReport = parsed(FuseReport, path, "restore it, or fuse again", (CARD,))
    return found
