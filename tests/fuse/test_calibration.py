"""fuse --calibration: the error of what layers put out, by its definition, with moments and without."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fuse.layers import MODULE, Fused, layer, with_lora
from fuse.tiny import Tiny
from safetensors.torch import save_file
from torch import Tensor

from adaptmerge.commands import verify as library
from adaptmerge.commands.calibrate import Calibration, calibrate
from adaptmerge.commands.fuse import FuseOptions, FuseReport, fuse, plan_fusion
from adaptmerge.errors import AdaptmergeError, InputError, OutputError, UsageError
from adaptmerge.formats.inputs import InputSpec

ROWS, COLUMNS, LOUD = 256, 4096, 12
F64 = torch.float64


def loud() -> Tensor:
    """A few directions (in, k) that much flows in along."""
    random = torch.Generator().manual_seed(7)
    turns = torch.linalg.qr(torch.randn(COLUMNS, LOUD, generator=random, dtype=F64)).Q
    found: Tensor = 20 * turns
    return found


def written(path: Path, sketch: Tensor) -> Path:
    """The moments of these inputs."""
    squares = 1 + sketch.square().sum(1)
    tensors = {"mean_square": squares, "sketch": sketch.T}
    save_file({f"{MODULE}.{k}": v.float().contiguous() for k, v in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("moments") / "m.safetensors", loud())


def heard(found: Fused) -> float:
    """The error of outputs, relative to what the adapter does to them: the root of tr(M C M^T), where
    inputs have C = 1 + L L^T of the loud directions L, and noise."""
    moved = (found.error, found.delta)
    error, effect = (m.square().sum() + (m @ loud()).square().sum() for m in moved)
    assert float(effect) > 0
    return math.sqrt(float(error / effect))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_outputs_are_nearer_with_moments(kind: str, moments: Path, tmp_path: Path) -> None:
    base = layer(tmp_path / "base", kind, ROWS, COLUMNS)
    plain = with_lora(base, tmp_path / "plain", 1e-2)
    found = with_lora(base, tmp_path / "found", 1e-2, calibration=str(moments))
    assert heard(found) < 0.8 * heard(plain)
    assert found.sub < (1e-5 if kind == "nf4" else 0.05), "the adapter arrives all the same"
    assert found.frob < 1.1 * plain.frob
    said = found.report.base["calibration"]
    assert said["layers"] == 1
    assert "calibration" not in found.report.options, "no path of a machine"


def test_moments_of_nothing_in_particular_change_little(tmp_path: Path) -> None:
    base = layer(tmp_path / "base", "nf4", ROWS, COLUMNS)
    save_file({f"{MODULE}.mean_square": torch.full((COLUMNS,), 3.0)}, tmp_path / "m.safetensors")
    plain = with_lora(base, tmp_path / "plain", 1e-2)
    found = with_lora(base, tmp_path / "found", 1e-2, calibration=str(tmp_path / "m.safetensors"))
    assert torch.allclose(found.after, plain.after, atol=1e-6)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((Path(__file__).parent / "models.py").read_text()[:3000], encoding="utf-8")
    return path


def fused(
    tiny: Tiny, out: Path, weight: float = 0.03, adapter: str = "lora-r8-cheaders", **options: Any
) -> FuseReport:
    spec = [InputSpec(str(tiny(adapter)), "a", weight)]
    return fuse(str(tiny("base")), spec, out, FuseOptions(**options))


def test_a_text_gives_the_bytes_of_its_moments(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    calibrate(str(tiny("base")), text, tmp_path / "m.safetensors", Calibration())
    nf4: dict[str, Any] = {"quant": "nf4", "allow": frozenset({"loss"})}
    nf4["adapter"] = "lora-r16-rslora-qv-perl"
    first = fused(tiny, tmp_path / "text", calibration=str(text), **nf4)
    fused(tiny, tmp_path / "moments", calibration=str(tmp_path / "m.safetensors"), **nf4)
    fused(tiny, tmp_path / "plain", **nf4)
    one, two, plain = (
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("text", "moments", "plain")
    )
    assert one == two
    assert one != plain
    assert int(first.base["calibration"]["tokens"]) > 1000


def test_a_calibrated_model_is_verified(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    out, some = tmp_path / "out", tmp_path / "some.txt"
    some.write_text(text.read_text(encoding="utf-8")[:1500], encoding="utf-8")
    fused(tiny, out, weight=0.3, calibration=str(some), quant="nf4", allow=frozenset({"loss"}))
    verdict = library.verify(
        out, library.Questions(str(tiny("base")), {"a": str(tiny("lora-r8-cheaders"))}, "cpu")
    )
    assert verdict.status == "pass", verdict.checks
    assert str(some) not in (out / "adaptmerge.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"nowhere.mean_square": torch.ones(8)}, "has moments of no layer that is fused into"),
        (
            {"model.layers.0.self_attn.q_proj.mean_square": torch.ones(7)},
            "q_proj: moments of 7 inputs, expected 128",
        ),
    ],
)
def test_moments_of_another_model_are_refused(
    tensors: dict[str, Tensor], what: str, tiny: Tiny, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=what):
        fused(tiny, tmp_path / "out", calibration=str(tmp_path / "m.safetensors"))
    assert not (tmp_path / "out").exists()


def test_what_is_assumed_is_said_and_fatal_under_strict(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    squares = {"model.layers.0.self_attn.q_proj.mean_square": torch.ones(128)}
    save_file(squares, path, {"base": "sampled-1:another"})
    report = fused(tiny, tmp_path / "out", calibration=str(path))
    said = "\n".join(str(note) for note in report.notes)
    assert "no moments of the inputs of 13 layers" in said
    assert "measured on a base with another fingerprint" in said
    with pytest.raises(AdaptmergeError, match="no moments of the inputs"):
        fused(tiny, tmp_path / "strict", calibration=str(path), strict=True)


def test_a_calibration_that_is_not_there_is_named(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("none.txt", "none.safetensors"):
        with pytest.raises((InputError, OutputError), match=name):
            fused(tiny, tmp_path / "out", calibration=str(tmp_path / name))


def test_an_existing_output_is_refused_before_anything_is_read(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        fused(tiny, tmp_path / "out", calibration=str(tmp_path / "none.txt"))


@pytest.mark.parametrize("name", ["text.txt", "m.safetensors"])
def test_it_is_refused_where_no_linear_layer_is_fused_into(
    name: str, tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    given = text if name == text.name else tmp_path / name
    if given != text:
        save_file({"model.layers.0.self_attn.q_proj.mean_square": torch.ones(128)}, given)
    spec = [InputSpec(str(tiny("lntuning-cheaders")), "a")]
    with pytest.raises(UsageError, match="no linear layer is fused into"):
        fuse(str(tiny("base")), spec, tmp_path / "out", FuseOptions(calibration=str(given)))
    assert not (tmp_path / "out").exists()


def test_a_plan_reads_no_text(tiny: Tiny, tmp_path: Path) -> None:
    options = FuseOptions(calibration=str(tmp_path / "none.txt"))
    plan = plan_fusion(str(tiny("base")), [InputSpec(str(tiny("lora-r8-perl")), "a")], options)
    assert plan.moments is not None
    assert plan.moments.file is None


def test_interrupted_work_with_other_moments_is_not_taken_up(tiny: Tiny, tmp_path: Path) -> None:
    spec = [InputSpec(str(tiny("lora-r8-perl")), "a")]
    keys = set()
    for size in (1.0, 2.0):
        squares = torch.ones(128)
        squares[0] = size
        path = tmp_path / f"{size}.safetensors"
        save_file({"model.layers.0.self_attn.q_proj.mean_square": squares}, path)
        plan = plan_fusion(str(tiny("base")), spec, FuseOptions(calibration=str(path)))
        keys.add(plan.key({}))
    assert len(keys) == 2
