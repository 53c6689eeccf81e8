"""Where the edits of a merge land in a checkpoint: from the steps of a plan to tensors of the output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from adaptmerge.adapters.graph import Kind, Note, Site
from adaptmerge.adapters.stored_edits import stores_rows, stores_value
from adaptmerge.adapters.weight_edits import factor_of
from adaptmerge.algebra.factors import Factor
from adaptmerge.bases.base import Base, TensorPlace
from adaptmerge.bases.stored_as import StoredAs
from adaptmerge.commands.fuse.anew import Anew, tensors_of
from adaptmerge.commands.fuse.kept_wide import Plain
from adaptmerge.commands.fuse.pieces.layout import Copy, Fused, Recoded, Tensor, output_dtype
from adaptmerge.errors import CannotMerge, CannotStore
from adaptmerge.files.pickles import IN_FILES
from adaptmerge.merging.heads.policies import is_vocabulary
from adaptmerge.merging.plan import Plan, Step
from adaptmerge.methods.method import Method
from adaptmerge.rounding.codes import CodedMatrix
from adaptmerge.rounding.matrix import Matrix, Part
from adaptmerge.schemes.coded import CodedWeight, Dequantised, named, stacked
from adaptmerge.tensors.compare import same_values
from adaptmerge.tensors.dtypes import F32, DType
from adaptmerge.tensors.refs import TensorRef, computed

HEADS = ("lm_head", "embed_out", "output_embeddings")  # heads that a config can untie
QUANTISED_THERE = ", and quantised in the base: pass --quant bf16, or --heads drop"
EXPERTS = Note(
    Kind.INFO, "experts are not quantised: transformers holds them stacked, not as linear layers"
)
MERGED = "merged"  # what a method adds that is no sum over adapters


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to one parameter, or one matrix of a stack: a new value, then what is added to it, then
    rows put in its place."""

    site: Site
    value: TensorRef | None = None
    parts: tuple[Part, ...] = ()
    tokens: tuple[tuple[tuple[int, ...], TensorRef], ...] = ()

    @property
    def only_tokens(self) -> bool:
        return self.value is None and not self.parts and bool(self.tokens)


@dataclass
class Targets:
    """The tensors that change, new ones with the tensor that they are stored beside, names that are no
    more, the entries of the config that follow from them, and Notes."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    config: dict[str, object] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Wishes:
    """How weights are to be written: in which dtype if not their own, and whether tied ones stay one.

    tied: whether the model computes with one matrix for tokens and head. coded: the coded weights of the
    base by name; wide: the dtype that these are written in instead. stored_as: how parameters are stored
    that have another name in the checkpoint. anew: how linear layers are quantised; plain: those that
    are not.
    """

    dtype: DType | None = None
    keep_tied: bool = False
    tied: bool = False
    coded: Mapping[str, CodedWeight] = field(default_factory=dict)
    wide: DType | None = None
    stored_as: Mapping[str, StoredAs] = field(default_factory=dict)
    anew: Anew | None = None
    plain: Plain | None = None


def targets_of(plan: Plan, base: Base, trained: Base, stored: Base, wishes: Wishes) -> Targets:
    """The tensors of a base that a plan changes; `trained` is the base as the adapters were trained on it,
    `stored` the base as it lies.

    Raises CannotMerge with all sites that have no place.
    """
    found = Targets()
    changes = _changes(plan, base)
    _settle_tied(changes, base, wishes, found)
    by_name: dict[str, dict[int | None, tuple[TensorPlace, Change]]] = {}
    for place, change in changes.items():
        by_name.setdefault(place.name, {})[place.expert] = (place, change)
    quantised = {name for name, ref in base.tensors.items() if trained.tensors[name] != ref}
    quantised |= wishes.coded.keys() if wishes.wide is not None else set()
    quantised |= wishes.anew.modules.keys() if wishes.anew is not None else set()
    for name in sorted(quantised - by_name.keys()):
        whole, expert = stacked(name)
        if expert is not None:
            by_name.setdefault(whole, {})
            continue
        module, _, param = name.rpartition(".")
        site = Site(module, param)
        by_name[name] = {None: (TensorPlace(name, None, base.is_transposed(site)), Change(site))}
    parts: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, here in by_name.items():
        coded = {} if wishes.wide is not None else _coded_in(name, here, wishes.coded)
        if wishes.plain is not None and name in wishes.plain.growth:
            _store_plain(name, here, base, trained, wishes, wishes.plain, found)
        elif wishes.anew is not None and name in wishes.anew.modules:
            _quantise(name, *here[None], trained, wishes.anew, found, problems)
        elif coded:
            for expert, one in coded.items():
                parts.update(_recoded(one, here[expert][1]))
        else:
            tensor = _tensor(name, here, base, trained, wishes, found)
            parts[tensor.name] = tensor
    if problems:
        raise CannotStore(problems)
    if wishes.anew is not None:
        found.config |= wishes.anew.config()
        found.notes += [EXPERTS] if base.expert_layout is not None else []
    found.config |= {} if wishes.plain is None else wishes.plain.config
    found.tensors.update(_assembled(parts, stored))
    found.added = {_stored_as(name, wishes).name: beside for name, beside in found.added.items()}
    return found


def _stored_as(name: str, wishes: Wishes) -> StoredAs:
    return wishes.stored_as.get(name) or StoredAs(name)


def _coded_in(
    name: str, here: Iterable[int | None], coded: Mapping[str, CodedWeight]
) -> dict[int | None, CodedWeight]:
    """The coded weights of a parameter, or of those of its experts that change."""
    if None in here and f"{name}[0]" in coded:
        raise CannotMerge(f"is stored whole by an adapter{QUANTISED_THERE}", where=name)
    names = {expert: name if expert is None else f"{name}[{expert}]" for expert in here}
    return {expert: coded[own] for expert, own in names.items() if own in coded}


def _assembled(parts: Mapping[str, Tensor], stored: Base) -> dict[str, Tensor]:
    """The tensors of the output: those given, and stacks of which some entries are."""
    found: dict[str, Tensor] = {}
    for name, tensor in parts.items():
        whole, entry = stacked(name)
        if entry is None:
            found[name] = tensor
        elif whole not in found:
            ref = stored.tensors[whole]
            entries = [parts.get(f"{whole}[{i}]") for i in range(ref.shape[0])]
            held = tuple(e.parts[0] if e else Copy(ref.entry(i)) for i, e in enumerate(entries))
            found[whole] = Tensor(whole, tensor.dtype, (len(held), *tensor.shape), held)
    return found


def _store_plain(
    name: str,
    here: Mapping[int | None, tuple[TensorPlace, Change]],
    base: Base,
    trained: Base,
    wishes: Wishes,
    plain: Plain,
    found: Targets,
) -> None:
    """A weight in 16 bits, in place of the tensors that it was, or was to be, packed in."""
    plainly = replace(wishes, dtype=plain.dtype, wide=plain.dtype)
    tensor = _tensor(name, here, base, trained, plainly, found)
    found.tensors[tensor.name] = tensor
    what = f"stored in {plain.dtype}, {plain.growth[name]:,} bytes more"
    found.notes.append(Note(Kind.INFO, what, site=here[None][1].site.module))
    if wishes.wide is None:
        before = wishes.coded[name].tensors
        found.gone |= before.keys() - {tensor.name}
        found.added |= {} if tensor.name in before else {name: next(iter(before))}


def _quantise(
    name: str,
    place: TensorPlace,
    change: Change,
    trained: Base,
    anew: Anew,
    found: Targets,
    problems: list[str],
) -> None:
    """The tensors that a weight is stored as once it is quantised, in place of its own."""
    start = change.value if change.value is not None else trained.tensors[name]
    try:
        tensors = tensors_of(anew.coded(name, _matrix(start, place, change, F32)))
    except CannotStore as problem:
        problems += problem.problems
        return
    found.tensors |= tensors
    found.added |= {one: name for one in reversed(tensors) if one != name}
    found.gone |= {name} - tensors.keys()


def _recoded(one: CodedWeight, change: Change) -> dict[str, Tensor]:
    """What a coded weight is stored as, by name, all made anew together."""
    if change.value is not None or change.tokens:
        raise CannotMerge(f"is stored whole by an adapter{QUANTISED_THERE}", where=str(change.site))
    weight = computed(Dequantised(one), named(one))
    matrix = Matrix(change.site, weight, weight.dtype, change.parts, coded=True)
    return tensors_of(CodedMatrix(one, matrix))


def _changes(plan: Plan, base: Base) -> dict[TensorPlace, Change]:
    changes: dict[TensorPlace, Change] = {}
    problems = []
    for step in plan.steps:
        place = base.place(step.site) or _new_place(step, base)
        if place is None:
            problems.append(
                f"{step.site}: the base {base.path.name} stores no such parameter: is the adapter for "
                "another model?"
            )
            continue
        before = changes.get(place, Change(step.site))
        changes[place] = _with(before, step, plan.method)
    if problems:
        raise CannotMerge(problems)
    return changes


def _new_place(step: Step, base: Base) -> TensorPlace | None:
    """A parameter that is stored whole may be new to the base: a head."""
    if not stores_value(step.edit) or step.site.expert is not None:
        return None
    module = base.locate(step.site.module) or step.site.module
    return TensorPlace(f"{module}.{step.site.param}")


def _with(change: Change, step: Step, method: Method) -> Change:
    """The change with one more step of the plan."""
    edit = step.edit
    factor = factor_of(edit)
    if factor is not None:
        return replace(change, parts=change.parts + _parts(step, factor, method))
    if stores_rows(edit):
        return replace(change, tokens=(*change.tokens, (edit.rows, edit.values)))
    if not stores_value(edit):
        raise CannotMerge(
            f"{edit.kind} edits change what flows through the model, no weights: they stay an adapter",
            where=str(step.site),
        )
    return replace(change, value=edit.value)


def _parts(step: Step, factor: Factor, method: Method) -> tuple[Part, ...]:
    """What each adapter adds, where the method sums; else what the method has made of them."""
    own = [(member, factor_of(member.edit)) for member in step.members]
    parts = tuple(Part(m.adapter, m.weight, one) for m, one in own if one is not None)
    summed = method.promise is None and len(parts) == len(own)
    return parts if summed else (Part(MERGED, 1.0, factor),)


def _settle_tied(
    changes: dict[TensorPlace, Change], base: Base, wishes: Wishes, found: Targets
) -> None:
    """Heads that share the embedding's matrix: one matrix still, or two from now on."""
    if not wishes.tied:
        return
    for head, embedding in _tied_pairs(base):
        inner, outer = changes.get(TensorPlace(embedding)), changes.get(TensorPlace(head))
        if inner is None and outer is None:
            continue
        rows = inner.tokens if inner is not None else ()
        outer = outer or Change(Site(head.rpartition(".")[0]))
        if rows and not outer.tokens:
            outer = replace(outer, tokens=rows)
        if inner is not None and _alike(inner, outer):
            changes.pop(TensorPlace(head), None)
            if head in base.tensors:
                changes[TensorPlace(head)] = outer
            continue
        _untie(head, embedding, wishes, found)
        changes[TensorPlace(head)] = outer


def _tied_pairs(base: Base) -> list[tuple[str, str]]:
    """(head, embedding) tensors that are one matrix."""
    heads = [m for m in sorted(base.modules) if m.rpartition(".")[2] in HEADS]
    stored = [name for name in base.tensors if is_vocabulary(name.removesuffix(".weight"))]
    inner = [n for n in stored if n.removesuffix(".weight").rpartition(".")[2] not in HEADS]
    return [(f"{head}.weight", inner[0]) for head in heads if inner]


def _alike(inner: Change, outer: Change) -> bool:
    """Whether an embedding and its head are changed to the same values."""
    if inner.tokens != outer.tokens:
        return False
    if inner.value is None or outer.value is None:
        return inner.only_tokens and outer.only_tokens
    return not (inner.parts or outer.parts) and same_values(inner.value, outer.value)


def _untie(head: str, embedding: str, wishes: Wishes, found: Targets) -> None:
    module = head.rpartition(".")[0]
    if wishes.keep_tied:
        raise CannotMerge(
            f"only one of {module} and {embedding.rpartition('.')[0]} changes, which are one matrix in the "
            "base: leave out --keep-tied to store them apart",
            where=module,
        )
    found.config["tie_word_embeddings"] = False
    found.notes.append(
        Note(Kind.INFO, "is stored apart from the embedding from now on (untied)", site=module)
    )


def _tensor(
    name: str,
    here: Mapping[int | None, tuple[TensorPlace, Change]],
    base: Base,
    trained: Base,
    wishes: Wishes,
    found: Targets,
) -> Tensor:
    stored = base.tensors.get(name)
    if None not in here:
        assert stored is not None
        return _stack(name, stored, here, wishes)
    place, change = here[None]
    source = stored if stored is not None else base.parameter(change.site)
    if stored is None:
        found.added[name] = _beside(name, source, base)
    if change.value is not None:
        _note_resize(name, source, change.value, found)
    start = change.value if change.value is not None else trained.tensors.get(name, source)
    assert start is not None
    dtype = output_dtype(source if source is not None else start, wishes.dtype)
    if name in wishes.coded and wishes.wide is not None:
        dtype = wishes.wide
    stored_as = _stored_as(name, wishes)
    computed = change.parts or change.tokens or start.dtype != dtype
    if not computed and isinstance(start.source, IN_FILES):
        kept = stored_as.kept(start)
        return Tensor(stored_as.name, dtype, kept.shape, (Copy(kept),))
    matrix = _matrix(start.shifted(stored_as.added), place, change, dtype)
    shape = start.shape[::-1] if stored_as.turned else start.shape
    part = Fused(matrix, place.transposed != stored_as.turned, stored_as.heads)
    return Tensor(stored_as.name, dtype, shape, (part,))


def _matrix(start: TensorRef, place: TensorPlace, change: Change, dtype: DType) -> Matrix:
    """The change of one stored parameter as that of a matrix (out, in)."""
    if place.transposed:
        start = start.T
    elif len(start.shape) != 2:
        rows = start.shape[0] if start.shape else 1
        start = start.reshape(rows, start.count // max(1, rows))
    return Matrix(change.site, start, dtype, change.parts, change.tokens)


def _stack(
    name: str,
    stored: TensorRef,
    here: Mapping[int | None, tuple[TensorPlace, Change]],
    wishes: Wishes,
) -> Tensor:
    """A parameter that stacks matrices, of which some change."""
    dtype = output_dtype(stored, wishes.dtype)
    if wishes.wide is not None and f"{name}[0]" in wishes.coded:
        dtype = wishes.wide
    parts: list[Copy | Fused | Recoded] = []
    for expert in range(stored.shape[0]):
        one = stored.slice(0, expert, expert + 1).reshape(*stored.shape[1:])
        if expert not in here:
            parts.append(Copy(one))
            continue
        place, change = here[expert]
        parts.append(Fused(_matrix(one, place, change, dtype), place.transposed))
    return Tensor(name, dtype, stored.shape, tuple(parts))


def _beside(name: str, source: TensorRef | None, base: Base) -> str:
    """The stored tensor that a new one goes beside: the one that it was tied to, else the last."""
    return (
        source.name
        if source is not None and source.name in base.tensors
        else list(base.tensors)[-1]
    )


def _note_resize(name: str, source: TensorRef | None, value: TensorRef, found: Targets) -> None:
    module = name.rpartition(".")[0]
    if source is None or source.shape == value.shape:
        return
    what = f"is of shape {list(value.shape)} now, was {list(source.shape)}"
    found.notes.append(Note(Kind.INFO, what, site=module))
    if is_vocabulary(module):
        found.config["vocab_size"] = value.shape[0]
