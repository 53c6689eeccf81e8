"""A tuned checkpoint seen as an adapter of its base: deltas of matrices, all else whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from adaptmerge.adapters.graph import Adapter, BaseReference, Edit, Kind, Labels, Note
from adaptmerge.adapters.stored_edits import Replace, saved_module, stores_value
from adaptmerge.adapters.weight_edits import Add
from adaptmerge.algebra.factors import Rows, Term, whole_term
from adaptmerge.algebra.linalg import row_blocks
from adaptmerge.bases.base import Base
from adaptmerge.bases.ties import FLAG
from adaptmerge.commands.extract.pairs import Pair, pairs_of, problems_of
from adaptmerge.errors import CannotStore, InputError
from adaptmerge.files.strict_json import capped
from adaptmerge.lazy import torch
from adaptmerge.merging.align import and_more
from adaptmerge.parallel import ordered
from adaptmerge.tensors.compare import same_values
from adaptmerge.tensors.refs import Permute, TensorRef

LORA, FULL, SKIP = "lora", "full", "skip"
SAME, ROUNDED, DIFFERS = "same", "rounded", "differs"
SHOWN = 6  # problems of one pair of checkpoints; the others are mostly the same


@dataclass(frozen=True, slots=True)
class Wanted:
    """What becomes of embeddings (lora, full, skip) and vectors (full, skip); the layout of experts."""

    embeddings: str = LORA
    vectors: str = FULL
    experts: str = "fused"


@dataclass(frozen=True, slots=True)
class Difference:
    """tuned - base as a factor, subtracted after both are widened."""

    tuned: TensorRef
    base: TensorRef

    @property
    def shape(self) -> tuple[int, int]:
        return self.tuned.shape[0], self.tuned.shape[1]

    @property
    def at_once(self) -> bool:
        """Whether some rows cost as much to read as all of them."""
        return any(isinstance(s, Permute) for ref in (self.tuned, self.base) for s in ref.steps)

    def dense(self, rows: Rows = None) -> torch.Tensor:
        tuned, base = ((r.slice(0, *rows) if rows else r) for r in (self.tuned, self.base))
        return tuned.read().double() - base.read().double()

    def thin(self) -> list[Term]:
        return whole_term(self.matrix())

    def matrix(self) -> torch.Tensor:
        """All of it in working precision, a block of rows at a time."""
        wide = torch.float64 in (self.tuned.dtype.torch, self.base.dtype.torch)
        dtype = torch.float64 if wide else torch.float32
        if self.at_once:
            return self.tuned.read().to(dtype) - self.base.read().to(dtype)
        found = torch.empty(self.shape, dtype=dtype)
        for start, stop in row_blocks(self.shape):
            block = self.tuned.slice(0, start, stop).read().to(dtype)
            found[start:stop] = block - self.base.slice(0, start, stop).read().to(dtype)
        return found


def as_adapter(base: Base, tuned: Base, wanted: Wanted, workers: int) -> Adapter:
    """The tuned model as edits of the base, with Notes on what is left out.

    Raises InputError when the two are no models of one architecture, or nothing differs.
    """
    _check_models(base, tuned)
    kind = {"architectures": tuned.config.get("architectures")}
    pairs = pairs_of(replace(base, config={**base.config, **kind}), tuned, wanted.experts)
    problems = problems_of(pairs)
    if problems:
        raise InputError(capped(problems, SHOWN), where=tuned.path.name)
    differing, rounded = _compared(pairs, workers)
    if not differing:
        sentence = (
            "nothing differs: it holds the same values as the base; name the tuned model second"
        )
        raise InputError(sentence, where=tuned.path.name)
    edits, notes = _edits(differing, base, tuned, wanted)
    notes += [*rounded, *_missing(pairs, tuned), *_tied_elsewhere(edits, tuned)]
    if not edits:
        sentence = (
            "all that differs is left out by --embeddings and --vectors: nothing is to be written"
        )
        raise InputError(sentence, where=tuned.path.name)
    reference = BaseReference(architecture=base.architecture, fingerprint=base.fingerprint)
    adapter = Adapter("default", tuple(edits), reference, tuple(notes))
    return replace(adapter, labels=_labels(adapter, tuned))


def _check_models(base: Base, tuned: Base) -> None:
    for model in (base, tuned):
        where = model.path.name
        if not model.tensors:
            raise InputError("has no weights: expected model.safetensors", where=where)
        method = (model.config.get("quantization_config") or {}).get("quant_method", "")
        if model.config.get("quantization_config"):
            raise InputError(
                f"is quantised ({method or 'by its config'}): extract from full-precision checkpoints",
                where=where,
            )
    if base.architecture != tuned.architecture:
        raise InputError(
            f"is a {tuned.architecture} model and the base {base.path.name} is a {base.architecture} "
            "model: give two checkpoints of one architecture",
            where=tuned.path.name,
        )


def _compared(pairs: Sequence[Pair], workers: int) -> tuple[list[Pair], list[Note]]:
    """The pairs that differ, and a word on those that differ by the rounding of a narrower dtype alone."""
    present = [pair for pair in pairs if pair.after is not None]
    with ThreadPoolExecutor(max_workers=workers) as pool:
        found = list(zip(present, ordered(pool, workers, _compare, present), strict=True))
    cast = [str(pair.site) for pair, how in found if how == ROUNDED]
    what = "the base's values, rounded to the dtype of the tuned model: taken as unchanged"
    notes = [Note(Kind.ASSUMED, f"{what} ({and_more(cast)})")] if cast else []
    return [pair for pair, how in found if how == DIFFERS], notes


def _compare(pair: Pair) -> str:
    before, after = pair.before, pair.after
    if before is None or after is None or before.shape != after.shape:
        return DIFFERS
    if before.dtype == after.dtype:
        return SAME if same_values(before, after) else DIFFERS
    left, right = before.read(), after.read()
    if torch.equal(left.double(), right.double()):
        return SAME
    return ROUNDED if torch.equal(left.to(right.dtype), right) else DIFFERS


def _edits(
    pairs: Sequence[Pair], base: Base, tuned: Base, wanted: Wanted
) -> tuple[list[Edit], list[Note]]:
    """One edit per differing parameter, and those beside one in a module that is kept whole."""
    edits: dict[object, Edit] = {}
    notes: list[Note] = []
    skipped: dict[str, list[str]] = {}
    for pair in pairs:
        how = _treatment(pair, wanted)
        if how == SKIP:
            what = "embeddings" if pair.is_vocabulary else "vectors"
            skipped.setdefault(what, []).append(str(pair.site))
        elif how == LORA:
            edits[pair.site] = _delta(pair, base, tuned)
        else:
            edits |= {edit.site: edit for edit in _whole(pair, base, tuned)}
            notes += _said_of(pair)
    for what, sites in skipped.items():
        said = f"{what} that differ are left out: {and_more(sites)}"
        notes.append(Note(Kind.DROPPED, said))
    found = list(edits.values())
    _check_owners(found)
    return found, notes


def _treatment(pair: Pair, wanted: Wanted) -> str:
    if pair.before is None:
        return FULL
    if pair.is_resized:
        return SKIP if wanted.embeddings == SKIP else FULL
    if not pair.is_matrix:
        return wanted.vectors
    return wanted.embeddings if pair.is_vocabulary else LORA


def _delta(pair: Pair, base: Base, tuned: Base) -> Edit:
    after, before = tuned.weight(pair.site), base.weight(pair.site)
    assert after is not None
    assert before is not None
    return Add(pair.site, Difference(after, before))


def _whole(pair: Pair, base: Base, tuned: Base) -> list[Edit]:
    """The parameter as the tuned model has it: a bias beside a weight, or all of a small module."""
    site = pair.site
    assert pair.after is not None
    weight = base.parameter(replace(site, param="weight"))
    if site.param == "bias" and weight is not None and len(weight.shape) > 1:
        return [Replace(site, pair.after, "bias")]
    found: dict[str, TensorRef] = {site.param: pair.after}
    located = tuned.locate(site.module)
    for name, ref in tuned.tensors.items():
        module, _, param = name.rpartition(".")
        if module == located:
            found.setdefault(param, ref)
    return [
        Replace(replace(site, param=param), value, "head", site.module)
        for param, value in sorted(found.items(), reverse=True)
    ]


def _said_of(pair: Pair) -> list[Note]:
    if pair.is_resized:
        assert pair.before is not None
        what = (
            f"has {pair.shape[0]} rows and the base {pair.before.shape[0]}: kept whole; resize the base "
            "before the adapter is loaded"
        )
        return [Note(Kind.INFO, what, site=str(pair.site))]
    if pair.before is None:
        return [Note(Kind.INFO, "is not in the base: kept whole", site=str(pair.site))]
    return []


def _check_owners(edits: Sequence[Edit]) -> None:
    """Raises CannotStore for a parameter of a module that has adapted modules inside."""
    owners = {saved_module(edit) for edit in edits} - {""}
    inside = {
        owner
        for owner in owners
        for edit in edits
        if edit.site.module.startswith(f"{owner}.") and edit.site.module != owner
    }
    if inside:
        raise CannotStore(
            f"{min(inside)}: a parameter of its own differs, and modules inside of it do, too: no adapter "
            "holds both; pass --vectors skip"
        )


def _missing(pairs: Sequence[Pair], tuned: Base) -> list[Note]:
    """A word on what only the base has."""
    absent = [str(pair.site) for pair in pairs if pair.after is None]
    if not absent:
        return []
    what = f"{tuned.path.name} has no {and_more(absent)}: taken as unchanged"
    return [Note(Kind.ASSUMED, what)]


def _tied_elsewhere(edits: Sequence[Edit], tuned: Base) -> list[Note]:
    """A word where an embedding that differs may also be a matrix of modules that no tensor names."""
    if tuned.ties.by_class or not tuned.config.get(FLAG, True):
        return []
    shared = [edit for edit in edits if tuned.holds_tokens(edit.site.module)]
    what = (
        "transformers has no class of this model, and so nothing says to which modules it is tied"
    )
    return [Note(Kind.ASSUMED, what, site=str(shared[0].site))] if shared else []


def _labels(adapter: Adapter, tuned: Base) -> Mapping[str, Labels]:
    """What the rows of an added head stand for, as the tuned model's config says."""
    table = tuned.config.get("id2label")
    if not isinstance(table, dict):
        return {}
    spelled = {str(number): str(label) for number, label in table.items()}
    names = tuple(spelled.get(str(number), "") for number in range(len(table)))
    problem = tuned.config.get("problem_type")
    return {
        saved_module(edit): Labels(names, str(problem) if problem else None)
        for edit in adapter.edits
        if saved_module(edit) and stores_value(edit) and all(names)
        if edit.site.param == "weight" and edit.value.shape[0] == len(names)
        if edit.site.layer.kind != "embedding" and len(edit.value.shape) > 1
    }
