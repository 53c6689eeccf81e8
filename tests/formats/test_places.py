"""Networks at several places of one layer are apart everywhere: read, shown, compared, merged, stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from console import run
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptmerge.adapters.graph import Adapter, Key, Site, key_of
from adaptmerge.errors import InputError
from adaptmerge.formats.inputs import InputSpec, open_input
from adaptmerge.runtime import attach, load_model, outputs_of
from adaptmerge.tensors.walk import refs_of

WEIGHTS, GRAPH = "adapter.safetensors", "graph.json"
SITES = [f"model.layers.{layer}:{place}" for layer in (0, 1) for place in ("attention", "mlp")]
Change = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def scaled(tensors: Mapping[str, Tensor], factor: float, to: str) -> dict[str, Tensor]:
    """A network after each feed-forward as one at another place, with other values."""
    return {key.replace("output_adapters", to): factor * t for key, t in tensors.items()}


def both(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, **scaled(tensors, -1.5, "attention_adapters")}


def attention_only(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return scaled(tensors, -1.5, "attention_adapters")


def mlp_only(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(tensors)


@pytest.fixture
def changed(tmp_path: Path, fixtures: Path) -> Callable[[str, Change], Path]:
    """A copy, so called, of the fixture that has a network after each feed-forward."""

    def made(name: str, change: Change) -> Path:
        folder: Path = shutil.copytree(
            fixtures / "adapterhub" / "llama" / "seq_bn", tmp_path / name
        )
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
        return folder

    return made


@pytest.fixture
def houlsby(changed: Callable[[str, Change], Path]) -> Path:
    """Networks after attention and after the feed-forward of each layer."""
    return changed("houlsby", both)


def read(path: Path) -> Adapter:
    return open_input(InputSpec(str(path))).adapter


def outputs(adapter: Adapter, fixtures: Path) -> Tensor:
    model = load_model(fixtures / "adapterhub" / "llama" / "base")
    with attach(model, adapter):
        found: Tensor = outputs_of(model, {"input_ids": torch.arange(3, 15).view(2, 6)})
    return found


def values(adapter: Adapter) -> dict[tuple[str, int], Tensor]:
    """Every tensor by the site it is at and its number there."""
    return {
        (str(edit.site), number): ref.read()
        for edit in adapter.edits
        for number, ref in enumerate(refs_of(edit))
    }


def test_a_place_tells_sites_and_keys_apart() -> None:
    places = [Site("model.layers.3", place=place) for place in ("", "attention", "mlp")]
    assert len(set(places)) == 3
    assert [str(Key(site, "bottleneck")) for site in places] == [
        "model.layers.3 (bottleneck)",
        "model.layers.3:attention (bottleneck)",
        "model.layers.3:mlp (bottleneck)",
    ]
    assert str(Key(places[2], "add")) == "model.layers.3:mlp"


def test_the_copy_has_two_networks_in_each_layer(houlsby: Path, fixtures: Path) -> None:
    adapter = read(houlsby)
    assert sorted(str(site) for site in adapter.sites()) == SITES
    assert len({key_of(edit) for edit in adapter.edits}) == 4
    one = adapter.with_edits(edit for edit in adapter.edits if edit.site.place == "mlp")
    assert not torch.equal(outputs(adapter, fixtures), outputs(one, fixtures))


@pytest.mark.parametrize("out", ["native", "native.safetensors"])
def test_they_go_through_native_bit_for_bit(
    out: str, houlsby: Path, tmp_path: Path, fixtures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    converted = run("convert", houlsby.name, "--to", "native", "-o", out)
    assert converted.code == 0, converted.shown
    assert "4 sites" in converted.stdout
    before, after = read(houlsby), read(Path(out))
    theirs, ours = values(before), values(after)
    assert theirs.keys() == ours.keys()
    assert len(theirs) == 16
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert torch.equal(outputs(before, fixtures), outputs(after, fixtures))
    verified = run("verify", out, "--base", str(fixtures / "adapterhub" / "llama" / "base"))
    assert verified.code == 0, verified.shown
    assert "4 sites hold what was promised" in verified.stdout
    again = run("convert", out, "--to", "native", "-o", "again")
    assert again.code == 0, again.shown
    assert values(read(Path("again"))).keys() == theirs.keys()


def test_a_network_changed_at_one_place_is_seen(houlsby: Path, tmp_path: Path) -> None:
    assert run("convert", str(houlsby), "--to", "native", "-o", str(tmp_path / "out")).code == 0
    path = tmp_path / "out" / "tensors.safetensors"
    tensors = load_file(path)
    (name,) = (key for key in tensors if "layers.1:attention.bottleneck.up_bias" in key)
    save_file({**tensors, name: tensors[name] + 1}, path)
    found = run("verify", str(tmp_path / "out"), "--input", f"houlsby={houlsby}")
    assert found.code == 3
    assert "model.layers.1:attention" in " ".join(found.stdout.split())
    compared = run("diff", str(houlsby), str(tmp_path / "out"), "--json")
    shares = {row["site"]: row["relative"] for row in json.loads(compared.stdout)["sites"]}
    apart = [site for site, share in shares.items() if share > 0]
    assert apart == ["model.layers.1:attention (bottleneck)"]


def test_diff_counts_every_network(houlsby: Path) -> None:
    found = run("diff", str(houlsby), str(houlsby))
    assert found.code == 0, found.shown
    assert "over 4 sites" in found.stdout


def test_inspect_shows_both_places(houlsby: Path) -> None:
    said = run("inspect", str(houlsby)).stdout
    assert "4 sites" in said
    rows = [line.split()[:3] for line in said.splitlines() if "layers.*" in line]
    assert sorted(rows) == [
        ["model.layers.*:attention", "2", "bottleneck"],
        ["model.layers.*:mlp", "2", "bottleneck"],
    ]
    assert "layers 0-1" in said


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("layers.1:mlp", ["model.layers.1:mlp (bottleneck)"]),
        ("*:attention", [f"model.layers.{n}:attention (bottleneck)" for n in (0, 1)]),
        ("layers.1", [f"model.layers.1:{place} (bottleneck)" for place in ("attention", "mlp")]),
    ],
)
def test_explain_takes_a_place(asked: str, shown: list[str], houlsby: Path, tmp_path: Path) -> None:
    assert run("convert", str(houlsby), "--to", "native", "-o", str(tmp_path / "out")).code == 0
    found = run("explain", str(tmp_path / "out"), asked, "--json")
    assert found.code == 0, found.shown
    lines = json.loads(found.stdout)["sites"]
    assert [line["site"] for line in lines] == shown
    assert all(line["module"] + ":" + line["place"] in line["site"] for line in lines)


def test_networks_at_other_places_of_a_layer_are_joined(
    changed: Callable[[str, Change], Path], houlsby: Path, tmp_path: Path
) -> None:
    first, second = changed("first", attention_only), changed("second", mlp_only)
    out = tmp_path / "out"
    found = run("combine", f"{first}:1", f"{second}:1", "--to", "native", "-o", str(out))
    assert found.code == 0, found.shown
    compared = run("diff", str(houlsby), str(out))
    assert compared.code == 0, compared.shown
    assert "over 4 sites" in compared.stdout


def test_networks_at_one_place_have_no_sum(houlsby: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run("combine", f"a={houlsby}", f"b={houlsby}", "--to", "native", "-o", str(out))
    assert found.code == 1
    assert "model.layers.0:attention and 3 more: linear has no rule for" in found.stderr
    assert not out.exists()


def test_rules_choose_an_adapter_for_each_place(
    houlsby: Path, changed: Callable[[str, Change], Path], tmp_path: Path
) -> None:
    other = changed("other", lambda tensors: scaled(both(tensors), 2.0, "output_adapters"))
    out = tmp_path / "out"
    rules = ["--site", "*:attention:a=1,b=0", "--site", "layers.*:mlp:a=0,b=1"]
    found = run("combine", f"a={houlsby}", f"b={other}", *rules, "--to", "native", "-o", str(out))
    assert found.code == 0, found.shown
    mixed, a, b = (values(read(path)) for path in (out, houlsby, other))
    assert len(mixed) == 16
    for name, value in mixed.items():
        assert torch.equal(value, (a if ":attention" in name[0] else b)[name])
    assert run("verify", str(out), "--input", f"a={houlsby}", "--input", f"b={other}").code == 0


def graph_with(folder: Path, change: Callable[[dict[str, object]], object]) -> Path:
    """The folder, the first edit of its graph changed."""
    graph = json.loads((folder / GRAPH).read_text())
    (adapter,) = graph["adapters"].values()
    change(adapter["edits"][0])
    (folder / GRAPH).write_text(json.dumps(graph))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda edit: edit["site"].update(place="elsewhere"),
            "place is 'elsewhere': expected one of",
        ),
        (lambda edit: edit["site"].update(place=None), "place is None: expected one of"),
        (lambda edit: edit.update(place="attention"), "Bottleneck.place is unknown"),
    ],
)
def test_a_place_that_is_none_is_refused(
    change: Callable[[dict[str, object]], object], said: str, houlsby: Path, tmp_path: Path
) -> None:
    assert run("convert", str(houlsby), "--to", "native", "-o", str(tmp_path / "out")).code == 0
    with pytest.raises(InputError, match=said):
        read(graph_with(tmp_path / "out", change))


def test_graphs_without_places_are_as_they_were(fixtures: Path, tmp_path: Path) -> None:
    """So that the same adapter gives the same bytes as before."""
    adapter = fixtures / "adapterhub" / "bert" / "vera"
    assert run("convert", str(adapter), "--to", "native", "-o", str(tmp_path / "out")).code == 0
    assert '"place"' not in (tmp_path / "out" / GRAPH).read_text()
