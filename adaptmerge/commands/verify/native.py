"""Oracle 3: the format's own library, where it is installed, on what was read and on what was written."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from adaptmerge import runtime
from adaptmerge.adapters.graph import Adapter, Site
from adaptmerge.adapters.weight_edits import WeightEdit, delta_of, delta_on, is_formed
from adaptmerge.algebra.forms import Form, form_of
from adaptmerge.algebra.linalg import in_float64, one_thread_each
from adaptmerge.bases.base import Base
from adaptmerge.commands.verify.checks import FAIL, PASS, SKIPPED, Check, within
from adaptmerge.commands.verify.forward import Bench, Forward, compare, judge
from adaptmerge.formats.format import Answer, Format, Oracle
from adaptmerge.formats.inputs import Input
from adaptmerge.lazy import torch
from adaptmerge.merging.resolve import WHOLE
from adaptmerge.tensors.dtypes import DType
from adaptmerge.tensors.refs import TensorRef

ALIKE = 1e-5  # relative to the library's own delta
PROBES = 8  # random inputs that each layer is asked for
Answers = Mapping[str, Answer]


def installed(form: Format) -> bool:
    """Whether the format's own library can be asked."""
    return form.oracle is not None and importlib.util.find_spec(form.oracle.package) is not None


def check_native_output(bench: Bench, result: Input, ours: Forward, dtype: DType) -> Check:
    """The output loaded and run by its format's own library, against the reference."""
    oracle, path = result.format.oracle, result.path
    assert oracle is not None
    assert path is not None
    name = f"forward in {oracle.package}"
    model = bench.model(result.adapter)

    def ask() -> Check:
        bench.tell(f"outputs in {oracle.package}", 0, 0)
        y = oracle.forward(model, path, bench.inputs)
        return judge(name, compare(y, ours.y_ref, ours.y_base, dtype), idle=ours.idle)

    return _guarded(name, ask)


@one_thread_each()  # a few rows for each of many layers: threads inside them wait for each other
def check_native_inputs(bench: Bench, inputs: Sequence[Input]) -> list[Check]:
    """Our reading of every input against its own library's, where that is installed."""
    checks = []
    for item in inputs:
        oracle = item.format.oracle
        if oracle is not None and installed(item.format):
            name = f"input {item.name} in {oracle.package}"
            checks.append(_guarded(name, partial(_reading, name, bench, item, oracle)))
    return checks


def _guarded(name: str, ask: Callable[[], Check]) -> Check:
    """The library's own refusal is a finding, not a crash."""
    try:
        return ask()
    except Exception as problem:  # noqa: BLE001 - any failure of a foreign library
        return Check(name, FAIL, f"the library cannot load it: {type(problem).__name__}: {problem}")


def _reading(name: str, bench: Bench, item: Input, oracle: Oracle) -> Check:
    """Layers are asked for what they add to random inputs; whole deltas decide where that does not pass."""
    if item.spec.alpha is not None:
        return Check(name, SKIPPED, "the library has no deltas to compare with")
    path = item.path
    if path is None:
        return Check(name, SKIPPED, "it lies in no file that the library could load")
    model = bench.model(item.adapter)
    bench.tell(f"reading {item.name} with {oracle.package}", 0, 0)
    adapter = runtime.as_built(model, item.adapter)
    ours = dict(_edited(adapter, bench.base))
    answers = oracle.answers(model, path, PROBES) if oracle.answers else None
    if answers:
        off = partial(_off_answers, ours, answers)
        found = _judged(name, set(ours), set(answers), off)
        if found.status == PASS:
            return found
    theirs = oracle.deltas(bench.fresh_model(item.adapter), path)
    if not theirs:
        return Check(name, SKIPPED, "the library has no deltas to compare with")
    return _judged(name, set(ours), set(theirs), partial(_off_deltas, ours, theirs))


def _judged(name: str, ours: set[str], theirs: set[str], off: Callable[[str], float]) -> Check:
    problems = [f"{site}: read by one of the two only" for site in sorted(ours ^ theirs)]
    worst = 0.0
    for module in sorted(ours & theirs):
        found = off(module)
        worst = max(worst, found) if math.isfinite(found) else math.inf
        if not within(found, ALIKE):
            problems.append(f"{module}: read {found:.2e} away from the library's delta")
    if problems:
        return Check(name, FAIL, "; ".join(problems[:3]), {"worst": worst, "problems": problems})
    return Check(name, PASS, f"{len(theirs)} deltas are read alike", {"worst": worst})


Edited = tuple[Sequence[WeightEdit], TensorRef]


def _edited(adapter: Adapter, base: Base) -> Iterator[tuple[str, Edited]]:
    """The edits that act on weights of modules and experts, by site; parameters stored whole aside."""
    for site, edits in adapter.sites().items():
        acting = [edit for edit in edits if isinstance(edit, WeightEdit) and edit.kind not in WHOLE]
        weight = base.weight(site) if acting and _has_matrix(site) else None
        if weight is not None:
            yield str(site), (acting, weight)


def _has_matrix(site: Site) -> bool:
    return site.param == "weight" or site.expert is not None


def _off_deltas(ours: Mapping[str, Edited], theirs: Mapping[str, torch.Tensor], site: str) -> float:
    edits, weight = ours[site]
    mine = delta_on(edits, weight).dense()
    return _relative(mine, theirs[site].to(mine))


def _off_answers(ours: Mapping[str, Edited], theirs: Answers, site: str) -> float:
    asked = theirs[site]
    off = _relative(_answer(*ours[site], asked.given.double()), asked.added.double())
    return 0.0 if within(off, asked.noise) else off


def _relative(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine - theirs).norm()) / (float(theirs.norm()) or 1.0)


def _answer(edits: Sequence[WeightEdit], weight: TensorRef, given: torch.Tensor) -> torch.Tensor:
    """What the edits add to the outputs for given inputs (count, in)."""
    form = _form(edits, weight)
    if form is None:
        return given @ delta_on(edits, weight).dense().T
    added = (given @ form.down.T) @ form.up.T
    return added if form.rows is None else added + form.rows * _outputs(weight, given)


def _form(edits: Sequence[WeightEdit], weight: TensorRef) -> Form | None:
    """What a single edit adds as thin sides; the weight is read only where that depends on it."""
    if len(edits) != 1:
        return None
    delta = delta_of(edits[0])
    if delta is not None:
        return form_of(delta)
    return edits[0].form_on(weight.read()) if is_formed(edits[0]) else None


def _outputs(weight: TensorRef, given: torch.Tensor) -> torch.Tensor:
    blocks = in_float64(weight.shape, lambda *rows: weight.slice(0, *rows).read())
    return torch.cat([given @ block.T for _, block in blocks], dim=1)
