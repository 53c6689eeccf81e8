"""What flows into the layers of a base, beside the matrices that are rounded: measured before, or now."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from adaptmerge.adapters.graph import Kind, Note
from adaptmerge.bases.base import Base
from adaptmerge.commands.fuse.pieces.layout import Fused, Recoded, Shard, Tensor, TensorPart
from adaptmerge.errors import InputError, UsageError
from adaptmerge.files.listing import sha256_of
from adaptmerge.rounding.input_moments import Moments, MomentsFile, open_moments
from adaptmerge.rounding.matrix import Matrix
from adaptmerge.runtime.models import some

STORED = ".safetensors"


def is_text(calibration: str | None) -> bool:
    """Whether what is given is to be read by the base first, and no moments yet."""
    return calibration is not None and Path(calibration).suffix != STORED


@dataclass(frozen=True)
class Inputs:
    """The moments of inputs by module of a base, from a file; itself nothing where none was given."""

    base: Base
    file: MomentsFile | None = None
    modules: dict[str, Moments] = field(default_factory=dict)

    def attached(self, shards: Sequence[Shard]) -> list[Shard]:
        """The shards with the moments beside every matrix that something is added to.

        Raises InputError for moments of other layers than those of the base.
        """
        if self.file is None:
            return list(shards)
        problems = [
            f"{matrix.site}: moments of {found.mean_square.shape[0]} inputs, expected {matrix.shape[1]}"
            for matrix in linears_of(shards, self.base)
            if (found := self._of(matrix)) and found.mean_square.shape[0] != matrix.shape[1]
        ]
        if problems:
            raise InputError(
                [*problems, "measure the base that is fused into"], where=str(self.file.path)
            )
        return [replace(s, tensors=tuple(map(self._tensor, s.tensors))) for s in shards]

    def notes(self, shards: Sequence[Shard]) -> list[Note]:
        """A word on layers without moments, and on moments of another base.

        Raises InputError where no layer has any.
        """
        if self.file is None:
            return []
        matrices = _some_linears(shards, self.base)
        bare = [str(matrix.site) for matrix in matrices if self._of(matrix) is None]
        if len(bare) == len(matrices):
            what = f"has moments of no layer that is fused into: expected some of {some(bare)}"
            raise InputError(what, where=str(self.file.path))
        found = []
        if bare:
            what = (
                f"no moments of the inputs of {len(bare)} layers, which count alike: {some(bare)}"
            )
            found.append(Note(Kind.ASSUMED, what))
        if self.file.said.get("base", self.base.fingerprint) != self.base.fingerprint:
            what = "the moments were measured on a base with another fingerprint, taken to be much the same"
            found.append(Note(Kind.ASSUMED, what))
        return found

    def as_json(self) -> dict[str, object] | None:
        """What the report says of it."""
        if self.file is None:
            return None
        said = {key: self.file.said[key] for key in ("text", "tokens") if key in self.file.said}
        return {**said, "sha256": self.sha256, "layers": len(self.modules)}

    @property
    def sha256(self) -> str | None:
        """Of the file."""
        return None if self.file is None else sha256_of(self.file.path)

    def _of(self, matrix: Matrix) -> Moments | None:
        return self.modules.get(self.base.locate(matrix.site.module) or "")

    def _tensor(self, tensor: Tensor) -> Tensor:
        return replace(tensor, parts=tuple(map(self._part, tensor.parts)))

    def _part(self, part: TensorPart) -> TensorPart:
        if isinstance(part, Fused):
            return replace(part, matrix=self._matrix(part.matrix))
        if isinstance(part, Recoded):
            coded = part.coded._replace(matrix=self._matrix(part.coded.matrix))
            return replace(part, coded=coded)
        return part

    def _matrix(self, matrix: Matrix) -> Matrix:
        return (
            replace(matrix, moments=self._of(matrix)) if _is_linear(matrix, self.base) else matrix
        )


def linears_of(shards: Sequence[Shard], base: Base) -> list[Matrix]:
    """The matrices of linear layers that something is added to."""
    matrices = [one.matrix for shard in shards for one in shard.made]
    return [matrix for matrix in matrices if _is_linear(matrix, base)]


def _some_linears(shards: Sequence[Shard], base: Base) -> list[Matrix]:
    """The same. Raises UsageError where there are none."""
    found = linears_of(shards, base)
    if not found:
        raise UsageError("--calibration: no linear layer is fused into: leave it out")
    return found


def _is_linear(matrix: Matrix, base: Base) -> bool:
    site, inputs = matrix.site, matrix.shape[1]
    fused = bool(matrix.parts) and inputs > 1  # the weight of a norm is a column
    return fused and site.param == "weight" and not base.holds_tokens(site.module)


def inputs_of(calibration: str | None, base: Base) -> Inputs:
    """The moments in a file for a base; none where a text is to be read first. Raises InputError."""
    if calibration is None or is_text(calibration):
        return Inputs(base)
    file = open_moments(Path(calibration))
    located = {base.locate(module): moments for module, moments in file.modules.items()}
    return Inputs(base, file, {name: one for name, one in located.items() if name is not None})


@contextmanager
def moments_of_text(
    text: str, base: Base, shards: Sequence[Shard], progress: Callable[[int, int], None]
) -> Iterator[str]:
    """A file, while the block runs, with the moments of the inputs of all layers that are fused into."""
    from adaptmerge.commands.calibrate import Calibration, measure

    only = {base.locate(matrix.site.module) or "" for matrix in _some_linears(shards, base)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"moments{STORED}"
        values = Path(folder) / "values"
        measure(base, Path(text), path, values, Calibration(), progress, only)
        yield str(path)
