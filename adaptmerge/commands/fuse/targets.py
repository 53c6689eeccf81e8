"""Where changes land in a checkpoint: the tensors of the output that are not the base's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from adaptmerge.adapters.graph import Kind, Note, Site
from adaptmerge.bases.base import TensorPlace
from adaptmerge.bases.stored_as import StoredAs
from adaptmerge.bases.ties import resized
from adaptmerge.commands.fuse.anew import Anew, tensors_of
from adaptmerge.commands.fuse.changes import Change, Changes, changes_of, settle_tied, store_apart
from adaptmerge.commands.fuse.kept_wide import Plain
from adaptmerge.commands.fuse.on_base.bases import Bases
from adaptmerge.commands.fuse.pieces.layout import Copy, Fused, Recoded, Tensor, output_dtype
from adaptmerge.errors import CannotMerge, CannotStore
from adaptmerge.files.in_memory import AS_STORED
from adaptmerge.merging.plan import Plan
from adaptmerge.rounding.codes import CodedMatrix
from adaptmerge.rounding.matrix import Matrix
from adaptmerge.schemes.coded import CodedWeight, Dequantised, named, stacked
from adaptmerge.tensors.dtypes import F32, DType
from adaptmerge.tensors.refs import TensorRef, computed

QUANTISED_THERE = ", and quantised in the base: pass --quant bf16, or --heads drop"
KEPT_APART = (
    "no entry of the config unties these alone, so that it takes transformers 5, which keeps apart what "
    "is stored twice and differs"
)
EXPERTS = Note(
    Kind.INFO, "experts are not quantised: transformers holds them stacked, not as linear layers"
)


@dataclass
class Targets:
    """The tensors that change, new ones with the tensor that they are stored beside, names that are no
    more, the entries of the config that follow from them, and Notes; resized: whether there are more
    tokens, or fewer."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    config: dict[str, object] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    resized: bool = False

    def say(self, what: str, module: str) -> None:
        """Adds a Note about a module."""
        self.notes.append(Note(Kind.INFO, what, site=module))


@dataclass(frozen=True, slots=True)
class Wishes:
    """How weights are to be written: in which dtype if not their own, and whether tied ones stay one.

    coded: the coded weights of the
    base by name; wide: the dtype that these are written in instead. stored_as: how parameters are stored
    that have another name in the checkpoint. anew: how linear layers are quantised; plain: those that
    are not.
    """

    dtype: DType | None = None
    keep_tied: bool = False
    coded: Mapping[str, CodedWeight] = field(default_factory=dict)
    wide: DType | None = None
    stored_as: Mapping[str, StoredAs] = field(default_factory=dict)
    anew: Anew | None = None
    plain: Plain | None = None


class Placed(NamedTuple):
    """A change and where it is stored."""

    place: TensorPlace
    change: Change


Here = Mapping[int | None, Placed]  # the changes of one tensor, by the entry of a stack


def targets_of(plan: Plan, bases: Bases, wishes: Wishes) -> Targets:
    """The tensors of a base that a plan changes.

    Raises CannotMerge with all sites that have no place, CannotStore with all that cannot be quantised.
    """
    landing = _Landing(bases, wishes)
    changes = changes_of(plan, bases.values)
    for names in settle_tied(changes, bases.values):
        landing.untie(names, changes)
    by_name: dict[str, dict[int | None, Placed]] = {}
    for place, change in changes.items():
        by_name.setdefault(place.name, {})[place.expert] = Placed(place, change)
    for name, here in _with_unchanged(by_name, bases, wishes).items():
        landing.land(name, here)
    return landing.finished()


def _with_unchanged(
    by_name: Mapping[str, Mapping[int | None, Placed]], bases: Bases, wishes: Wishes
) -> dict[str, Here]:
    """The changes, and weights that nothing is added to but that are stored otherwise than before."""
    base, trained = bases.values, bases.trained
    found: dict[str, Here] = dict(by_name)
    quantised = {name for name, ref in base.tensors.items() if trained.tensors[name] != ref}
    quantised |= wishes.coded.keys() if wishes.wide is not None else set()
    quantised |= wishes.anew.modules.keys() if wishes.anew is not None else set()
    for name in sorted(quantised - by_name.keys()):
        whole, expert = stacked(name)
        if expert is not None:
            found.setdefault(whole, {})
            continue
        module, _, param = name.rpartition(".")
        site = Site(module, param)
        place = TensorPlace(name, None, base.is_transposed(site))
        found[name] = {None: Placed(place, Change(site))}
    return found


@dataclass
class _Landing:
    """Changes on their way to tensors, for a base and as is wished; what was made of them so far, and what
    cannot be."""

    bases: Bases
    wishes: Wishes
    found: Targets = field(default_factory=Targets)
    parts: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def land(self, name: str, here: Here) -> None:
        """Makes the tensors that one parameter is stored as."""
        stored = self.bases.values.tensors.get(name)
        if stored is not None and not stored.dtype.is_float:
            self.problems.append(
                f"{name} is {stored.dtype} in the base, expected floating-point numbers: is the base "
                "quantised in a way that its config.json does not say?"
            )
            return
        if stored is not None and not stored.count:
            self.problems.append(
                f"{name} has no values in the base: its shape is {list(stored.shape)}"
            )
            return
        plain, anew = self.wishes.plain, self.wishes.anew
        coded = {} if self.wishes.wide is not None else self._coded_in(name, here)
        if plain is not None and name in plain.growth:
            self._store_plain(name, here, plain)
        elif anew is not None and name in anew.modules:
            self._quantise(name, here[None], anew)
        elif coded:
            for expert, one in coded.items():
                self.parts |= _recoded(one, here[expert].change)
        else:
            tensor = _Writing(self.bases, self.wishes, self.found).tensor(name, here)
            self.parts[tensor.name] = tensor

    def finished(self) -> Targets:
        """All that was made. Raises CannotStore with all that cannot be."""
        found, wishes = self.found, self.wishes
        if self.problems:
            raise CannotStore(self.problems)
        if wishes.anew is not None:
            found.config |= wishes.anew.config()
            found.notes += [EXPERTS] if self.bases.values.expert_layout is not None else []
        found.config |= {} if wishes.plain is None else wishes.plain.config
        found.tensors.update(self._assembled())
        found.added = {_stored_as(n, wishes).name: beside for n, beside in found.added.items()}
        return found

    def untie(self, names: tuple[str, ...], changes: Changes) -> None:
        """Tensors that were one are stored apart, and all that the config unties with them. Raises
        CannotMerge where that is not wished."""
        base = self.bases.values
        modules = [name.rpartition(".")[0] for name in names]
        if self.wishes.keep_tied:
            raise CannotMerge(
                f"{' and '.join(modules)} do not all change alike, which are one matrix in the base: leave "
                "out --keep-tied to store them apart",
                where=modules[-1],
            )
        entries = base.untied(names)
        self.found.config |= entries
        for other in base.tied if entries else ():
            if not {*names} & {*other} and base.untied(other):
                store_apart(other, changes)
        whole = "" if entries else f": {KEPT_APART}"
        for module in modules[1:]:
            what = f"is stored apart from {modules[0]} from now on (untied){whole}"
            self.found.say(what, module)

    def _coded_in(self, name: str, here: Iterable[int | None]) -> dict[int | None, CodedWeight]:
        """The coded weights of a parameter, or of those of its experts that change."""
        coded = self.wishes.coded
        if None in here and f"{name}[0]" in coded:
            raise CannotMerge(f"is stored whole by an adapter{QUANTISED_THERE}", where=name)
        names = {expert: name if expert is None else f"{name}[{expert}]" for expert in here}
        return {expert: coded[own] for expert, own in names.items() if own in coded}

    def _store_plain(self, name: str, here: Here, plain: Plain) -> None:
        """A weight in 16 bits, in place of the tensors that it was, or was to be, packed in."""
        found, plainly = self.found, replace(self.wishes, dtype=plain.dtype, wide=plain.dtype)
        tensor = _Writing(self.bases, plainly, found).tensor(name, here)
        found.tensors[tensor.name] = tensor
        what = f"stored in {plain.dtype}, {plain.growth[name]:,} bytes more"
        found.say(what, here[None].change.site.module)
        if self.wishes.wide is None:
            before = self.wishes.coded[name].tensors
            found.gone |= before.keys() - {tensor.name}
            found.added |= {} if tensor.name in before else {name: next(iter(before))}

    def _quantise(self, name: str, placed: Placed, anew: Anew) -> None:
        """The tensors that a weight is stored as once it is quantised, in place of its own."""
        value = placed.change.value
        start = value if value is not None else self.bases.trained.tensors[name]
        try:
            tensors = tensors_of(anew.coded(name, _matrix(start, placed, F32)))
        except CannotStore as problem:
            self.problems += problem.problems
            return
        self.found.tensors |= tensors
        self.found.added |= {one: name for one in reversed(tensors) if one != name}
        self.found.gone |= {name} - tensors.keys()

    def _assembled(self) -> dict[str, Tensor]:
        """The tensors of the output: those made, and stacks of which some entries are."""
        found: dict[str, Tensor] = {}
        for name, tensor in self.parts.items():
            whole, entry = stacked(name)
            if entry is None:
                found[name] = tensor
            elif whole not in found:
                ref = self.bases.on_disk.tensors[whole]
                entries = [self.parts.get(f"{whole}[{i}]") for i in range(ref.shape[0])]
                held = tuple(e.parts[0] if e else Copy(ref.entry(i)) for i, e in enumerate(entries))
                found[whole] = Tensor(whole, tensor.dtype, (len(held), *tensor.shape), held)
        return found


def _stored_as(name: str, wishes: Wishes) -> StoredAs:
    return wishes.stored_as.get(name) or StoredAs(name)


def _recoded(one: CodedWeight, change: Change) -> dict[str, Tensor]:
    """What a coded weight is stored as, by name, all made anew together."""
    if change.value is not None or change.tokens:
        raise CannotMerge(f"is stored whole by an adapter{QUANTISED_THERE}", where=str(change.site))
    weight = computed(Dequantised(one), named(one))
    matrix = Matrix(change.site, weight, weight.dtype, change.parts, coded=True)
    return tensors_of(CodedMatrix(one, matrix))


@dataclass(frozen=True)
class _Writing:
    """How tensors that are not quantised are made of changes."""

    bases: Bases
    wishes: Wishes
    found: Targets

    def tensor(self, name: str, here: Here) -> Tensor:
        """The tensor of a parameter, or of a stack of them."""
        base = self.bases.values
        stored = base.tensors.get(name)
        if None not in here:
            assert stored is not None
            return self._stack(name, stored, here)
        change = here[None].change
        source = stored if stored is not None else base.parameter(change.site)
        if stored is None:
            self.found.added[name] = self._beside(source)
        if change.value is not None:
            self._note_resize(name, source, change.value)
        start = change.value
        if start is None:
            start = self.bases.trained.tensors.get(name, source)
        assert start is not None
        return self._made(
            name, here[None], start, self._dtype(name, start if source is None else source)
        )

    def _dtype(self, name: str, source: TensorRef) -> DType:
        if name in self.wishes.coded and self.wishes.wide is not None:
            return self.wishes.wide
        return output_dtype(source, self.wishes.dtype)

    def _made(self, name: str, placed: Placed, start: TensorRef, dtype: DType) -> Tensor:
        """The tensor made of a first value and what changes it, as the checkpoint stores it."""
        (place, change), stored_as = placed, _stored_as(name, self.wishes)
        is_computed = change.parts or change.tokens or start.dtype != dtype
        if not is_computed and isinstance(start.source, AS_STORED):
            kept = stored_as.kept(start)
            return Tensor(stored_as.name, dtype, kept.shape, (Copy(kept),))
        matrix = _matrix(start.shifted(stored_as.added), placed, dtype)
        shape = start.shape[::-1] if stored_as.turned else start.shape
        part = Fused(matrix, place.transposed != stored_as.turned, stored_as.heads)
        return Tensor(stored_as.name, dtype, shape, (part,))

    def _stack(self, name: str, stored: TensorRef, here: Here) -> Tensor:
        """A parameter that stacks matrices, of which some change."""
        dtype = output_dtype(stored, self.wishes.dtype)
        if self.wishes.wide is not None and f"{name}[0]" in self.wishes.coded:
            dtype = self.wishes.wide
        parts: list[Copy | Fused | Recoded] = []
        for expert in range(stored.shape[0]):
            one = stored.slice(0, expert, expert + 1).reshape(*stored.shape[1:])
            if expert in here:
                matrix = _matrix(one, here[expert], dtype)
                parts.append(Fused(matrix, here[expert].place.transposed))
            else:
                parts.append(Copy(one))
        return Tensor(name, dtype, stored.shape, tuple(parts))

    def _beside(self, source: TensorRef | None) -> str:
        """The stored tensor that a new one goes beside: the one that it was tied to, else the last."""
        tensors = self.bases.values.tensors
        if source is not None and source.name in tensors:
            return source.name
        return list(tensors)[-1]

    def _note_resize(self, name: str, source: TensorRef | None, value: TensorRef) -> None:
        module = name.rpartition(".")[0]
        if source is None or source.shape == value.shape:
            return
        self.found.say(f"is of shape {list(value.shape)} now, was {list(source.shape)}", module)
        if self.bases.values.holds_tokens(module):
            self.found.resized = True
            self.found.config |= resized(self.bases.values.config, value.shape[0])


def _matrix(start: TensorRef, placed: Placed, dtype: DType) -> Matrix:
    """The change of one stored parameter as that of a matrix (out, in)."""
    place, change = placed
    if place.transposed:
        start = start.T
    elif len(start.shape) != 2:
        rows = start.shape[0] if start.shape else 1
        start = start.reshape(rows, start.count // max(1, rows))
    return Matrix(change.site, start, dtype, change.parts, change.tokens)
