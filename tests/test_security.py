"""docs/security.md, where no test of a format or file covers it."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from safetensors.torch import save_file
from torch import zeros

from adaptmerge.errors import InputError
from adaptmerge.formats.inputs import InputSpec, open_input

DANGEROUS = {"load", "eval", "exec", "system"}  # last names of calls that are looked at


def graph_with(factor: dict[str, Any]) -> dict[str, Any]:
    layer = {"is": "Layer", "kind": "linear", "kernel": []}
    site = {"is": "Site", "module": "m", "param": "weight", "layer": layer}
    adapter = {
        "edits": [{"is": "Add", "site": site, "factor": factor}],
        "base": {"is": "BaseReference"},
        "notes": [],
        "hints": {},
        "covers": [],
    }
    return {"adaptmerge_graph": 1, "adapters": {"a": adapter}}


@pytest.mark.parametrize("is_", ["TensorRef", "Stored", "Pickled", "Listing", "Path", "eval"])
def test_a_graph_cannot_name_other_classes(is_: str, tmp_path: Path) -> None:
    """Least of all a path: that would copy a file of this machine into an output."""
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(64))
    dtype = {"dtype": "F32"}
    source = {"is": "Stored", "path": str(secret), "offset": 0, "shape": [4, 4], "dtype": dtype}
    ref = {"is": "TensorRef", "source": source, "shape": [4, 4], "dtype": dtype}
    named = {"TensorRef": ref, "Stored": source}.get(is_, {"is": is_})
    folder = tmp_path / "hostile"
    folder.mkdir()
    graph = graph_with({"is": "Leaf", "ref": named})
    (folder / "graph.json").write_text(json.dumps(graph), encoding="utf-8")
    save_file({"unused": zeros(1)}, folder / "tensors.safetensors")
    with pytest.raises(InputError, match="graph is malformed"):
        open_input(InputSpec(str(folder)))


def test_nothing_trusts_remote_code_or_loads_whole_pickles() -> None:
    """Every load of weights says weights_only=True, and no call passes trust_remote_code."""
    for path in (ROOT / "adaptmerge").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            given = {word.arg: word.value for word in node.keywords}
            if "trust_remote_code" in given:
                assert ast.unparse(given["trust_remote_code"]) == "False", path
            if getattr(node.func, "attr", getattr(node.func, "id", "")) not in DANGEROUS:
                continue
            called = ast.unparse(node.func)
            if called == "torch.load":
                assert "weights_only" in given, path
                assert ast.unparse(given["weights_only"]) == "True", path
            assert called not in ("eval", "exec", "pickle.load", "os.system"), path
