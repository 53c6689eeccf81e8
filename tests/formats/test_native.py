"""The native format holds every edit of every family, bit for bit, and refuses what it does not know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft_cases import CASES

from adaptmerge.adapters.graph import Adapter
from adaptmerge.bases.open import open_base
from adaptmerge.commands.combine import Options, combine
from adaptmerge.errors import AdaptmergeError, InputError
from adaptmerge.formats.inputs import InputSpec, open_input
from adaptmerge.tensors.compare import same_values
from adaptmerge.tensors.walk import refs_of

RECORDED = [
    "tinyllama/lora-r8-perl",
    "tinyllama/lora-r4-dora-embed-cheaders",
    "tinyllama/ia3-shakespeare",
    "tinyllama/vera-r64-shakespeare",
    "adapterhub/llama/ia3",
    "adapterhub/llama/seq_bn",
    "adapterhub/llama/lora_gating",
    "adapterhub/bert/vera",
]


def same(a: Adapter, b: Adapter) -> bool:
    pairs = zip(a.edits, b.edits, strict=True)
    return all(
        type(x) is type(y)
        and x.site == y.site
        and x.site.layer == y.site.layer
        and all(same_values(p, q) for p, q in zip(refs_of(x), refs_of(y), strict=True))
        and repr(_without_refs(x)) == repr(_without_refs(y))
        for x, y in pairs
    )


def _without_refs(edit: object) -> dict[str, object]:
    from dataclasses import fields

    from adaptmerge.algebra.factors import Factor
    from adaptmerge.tensors.refs import TensorRef

    named = {f.name: getattr(edit, f.name) for f in fields(edit)}  # type: ignore[arg-type]
    return {k: v for k, v in named.items() if not isinstance(v, (TensorRef, Factor))}


def through_native(source: Path, out: Path, base: Path | None = None) -> tuple[Adapter, Adapter]:
    options = Options(target="native", base=str(base) if base else None)
    combine([InputSpec(str(source))], out, options)
    model = open_base(str(base)) if base else None
    before = open_input(InputSpec(str(source)), model).adapter
    return before, open_input(InputSpec(str(out))).adapter


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("file", ["out", "out.safetensors"], ids=["folder", "file"])
def test_recorded_adapters_survive(fixtures: Path, tmp_path: Path, name: str, file: str) -> None:
    base = fixtures / "tinyllama" / "base" if "vera-r64" in name else None
    before, after = through_native(fixtures / name, tmp_path / file, base)
    assert before.edits
    assert same(
        before.with_edits(sorted(before.edits, key=lambda e: (str(e.site), e.kind))),
        after.with_edits(sorted(after.edits, key=lambda e: (str(e.site), e.kind))),
    )


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_peft_variant_survives(tmp_path: Path, name: str) -> None:
    source = CASES[name].build(tmp_path / "in", seed=1)
    before, after = through_native(source, tmp_path / "out")
    key = lambda e: (str(e.site), e.kind)  # noqa: E731
    assert same(
        before.with_edits(sorted(before.edits, key=key)),
        after.with_edits(sorted(after.edits, key=key)),
    )


def test_shared_tensors_are_stored_once(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "tinyllama" / "vera-r64-shakespeare"
    combine([InputSpec(str(source))], tmp_path / "out", Options(target="native"))
    stored = (tmp_path / "out" / "tensors.safetensors").stat().st_size
    assert stored < 1.1 * (source / "adapter_model.safetensors").stat().st_size


def _damaged(fixtures: Path, out: Path, change: str) -> Path:
    combine([InputSpec(str(fixtures / RECORDED[0]))], out, Options(target="native"))
    graph = json.loads((out / "graph.json").read_text())
    edit = graph["adapters"]["default"]["edits"][0]
    if change == "version":
        graph["adaptmerge_graph"] = 99
    elif change == "class":
        edit["is"] = "Popen"
    elif change == "tensor":
        edit["factor"]["parts"][0]["ref"]["tensor"] = "no such tensor"
    elif change == "field":
        edit["surprise"] = 1
    elif change == "left over":
        del graph["adapters"]["default"]["edits"][0]
    (out / "graph.json").write_text(json.dumps(graph))
    return out


@pytest.mark.parametrize("change", ["version", "class", "tensor", "field", "left over"])
def test_a_malformed_graph_is_refused(fixtures: Path, tmp_path: Path, change: str) -> None:
    with pytest.raises(InputError) as problem:
        open_input(InputSpec(str(_damaged(fixtures, tmp_path / "out", change))))
    assert isinstance(problem.value, AdaptmergeError)
    assert "out" in str(problem.value)
