"""What `calibrate` measures, against transformers' own forward of the same tokens; and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fuse.made_models import quantised_base
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptmerge.bases.open import open_base
from adaptmerge.commands.calibrate import Calibration, calibrate, pieces_of
from adaptmerge.errors import InputError, OutputError, UsageError
from adaptmerge.rounding.input_moments import Moments, leading_rows, metric_of, open_moments

F64 = torch.float64
TOKENS, RANK = 2048, 16
Q, K, DOWN = (
    f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
)


@pytest.fixture(scope="module")
def base(fixtures: Path) -> Path:
    return fixtures / "tinyllama" / "base"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve thousand characters of this project's own source."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        (Path(__file__).parent / "strategies.py").read_text()[:12000] * 2, encoding="utf-8"
    )
    return path


@pytest.fixture(scope="module")
def measured(base: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moments") / "m.safetensors"
    calibrate(str(base), text, out, Calibration(TOKENS, RANK, "cpu"))
    return out


def moments_in_transformers(model: Any, pieces: Tensor) -> dict[str, Tensor]:
    """C = mean of x x^T (in, in) of the modules looked at, float64, from one forward of all tokens."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def heard(_: Any, given: tuple[Tensor, ...]) -> None:
            x = given[0].double().reshape(-1, given[0].shape[-1])
            found[name] = x.T @ x / len(x)

        return heard

    for name in (Q, K, DOWN):
        model.get_submodule(name).register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model(input_ids=pieces)
    return found


@pytest.fixture(scope="module")
def expected(base: Path, text: Path) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return moments_in_transformers(model, pieces_of(open_base(str(base)), text, TOKENS))


@pytest.mark.parametrize("module", [Q, K, DOWN])
def test_moments_are_those_of_transformers(
    module: str, measured: Path, expected: dict[str, Tensor]
) -> None:
    tensors, wanted = load_file(measured), expected[module]
    squares, sketch = (
        tensors[f"{module}.mean_square"].double(),
        tensors[f"{module}.sketch"].double(),
    )
    assert torch.allclose(squares, wanted.diagonal(), rtol=1e-4, atol=0)
    assert sketch.shape == (RANK, wanted.shape[0])
    left = torch.linalg.eigvalsh(wanted - sketch.T @ sketch)
    largest = torch.linalg.eigvalsh(wanted).flip(0)
    assert float(left[0]) > -1e-5 * float(largest[0]), "the sketch is more than there is"
    best = float(largest[:RANK].sum())
    assert float(sketch.square().sum()) > 0.99 * best, "directions that matter are not in it"
    assert best < 0.9999 * float(largest.sum()), "the rank is not what limits it: no proof"


def test_a_quantised_base_is_measured_on_what_its_weights_stand_for(
    base: Path, text: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from adaptmerge.schemes.view import open_values

    folder = quantised_base(base, tmp_path / "base", "nf4")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder / name)
    calibrate(str(folder), text, tmp_path / "m.safetensors", Calibration(TOKENS, RANK, "cpu"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    values = open_values(str(folder))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values.tensors:
                parameter.copy_(values.tensors[name].read())
    wanted = moments_in_transformers(model, pieces_of(open_base(str(base)), text, TOKENS))
    found = load_file(tmp_path / "m.safetensors")
    for module in (Q, DOWN):
        assert torch.allclose(
            found[f"{module}.mean_square"].double(), wanted[module].diagonal(), rtol=1e-4, atol=0
        )


def test_pieces_begin_as_texts_do_and_are_from_all_over(base: Path, text: Path) -> None:
    pieces = pieces_of(open_base(str(base)), text, TOKENS)
    assert pieces.shape == (4, 512)
    assert pieces[:, 0].unique().tolist() == [0], "the token that texts begin with"
    assert len({tuple(piece.tolist()) for piece in pieces}) == 4


def test_the_same_text_gives_the_same_bytes(
    base: Path, text: Path, measured: Path, tmp_path: Path
) -> None:
    calibrate(str(base), text, tmp_path / "m.safetensors", Calibration(TOKENS, RANK, "cpu"))
    assert (tmp_path / "m.safetensors").read_bytes() == measured.read_bytes()


def test_leading_rows_are_the_leading_part() -> None:
    rows = torch.randn(20, 12, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = leading_rows(rows, 5)
    _, sigma, right = torch.linalg.svd(rows, full_matrices=False)
    wanted = right[:5].T * sigma[:5].square() @ right[:5]
    assert torch.allclose(found.T @ found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"too short", "tokens, expected 128 or more"), (b"\xff\xfe\x00" * 99, "is not UTF-8 text")],
)
def test_what_is_no_text_is_refused(content: bytes, what: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(InputError, match=what):
        calibrate(str(base), tmp_path / "text", tmp_path / "m.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_base_without_a_tokenizer_is_refused(base: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(base / name, tmp_path / "base" / name)
    with pytest.raises(InputError, match="tokenizer"):
        calibrate(str(tmp_path / "base"), text, tmp_path / "m.safetensors")


def test_an_output_is_not_replaced_unasked(base: Path, text: Path, measured: Path) -> None:
    before = measured.read_bytes()
    with pytest.raises(OutputError, match="exists"):
        calibrate(str(base), text, measured)
    with pytest.raises(UsageError, match="--tokens"):
        calibrate(str(base), text, measured, Calibration(tokens=3, force=True))
    assert measured.read_bytes() == before


def moments(folder: Path, **tensors: Tensor) -> dict[str, Moments]:
    path = folder / "m.safetensors"
    save_file({f"layer.{name}": value for name, value in tensors.items()}, path)
    return dict(open_moments(path).modules)


def test_all_that_is_wrong_in_a_file_is_said_at_once(tmp_path: Path) -> None:
    save_file(
        {"a.mean_square": torch.ones(2, 2), "b.sketch": torch.ones(2, 4), "c.other": torch.ones(4)}
        | {"d.mean_square": torch.ones(4), "d.sketch": torch.ones(2, 3)},
        tmp_path / "m.safetensors",
    )
    with pytest.raises(InputError) as caught:
        open_moments(tmp_path / "m.safetensors")
    said = "\n".join(caught.value.problems)
    for what in (
        "a.mean_square: shape [2, 2]",
        "b.mean_square is not",
        "c.other",
        "d.sketch: shape [2, 3]",
    ):
        assert what in said


def test_moments_of_another_version_are_refused(tmp_path: Path) -> None:
    save_file({"a.mean_square": torch.ones(4)}, tmp_path / "m.safetensors", {"version": "2"})
    with pytest.raises(InputError, match="version 2, expected 1"):
        open_moments(tmp_path / "m.safetensors")


def test_a_truncated_file_is_refused(measured: Path, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(measured.read_bytes()[:-100])
    with pytest.raises(InputError, match="m.safetensors"):
        open_moments(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("squares", "sketch", "what"),
    [
        ([1.0, -1.0], [[0.0, 0.0]], "below zero"),
        ([1.0, float("nan")], [[0.0, 0.0]], "not finite"),
        ([1.0, 1.0], [[2.0, 0.0]], "less than the sketch"),
        ([1.0, 1.0], [[float("inf"), 0.0]], "not finite"),
    ],
)
def test_moments_that_none_can_have_are_refused(
    squares: list[float], sketch: list[list[float]], what: str, tmp_path: Path
) -> None:
    one = moments(tmp_path, mean_square=torch.tensor(squares), sketch=torch.tensor(sketch))["layer"]
    with pytest.raises(InputError, match=what):
        metric_of(one, 4)


def test_errors_nowhere_count_less_than_without_moments(tmp_path: Path) -> None:
    squares = torch.tensor([100.0, 1.0, 0.0, 0.1])
    sketch = torch.tensor([[9.9, 0.1, 0.0, 0.0]])
    found = metric_of(moments(tmp_path, mean_square=squares, sketch=sketch)["layer"], 4)
    assert found is not None
    assert float(found.diagonal.min()) >= 1
    assert float(found.sketch.abs().max()) > 1


def test_a_layer_that_nothing_flows_into_has_no_metric(tmp_path: Path) -> None:
    assert metric_of(moments(tmp_path, mean_square=torch.zeros(4))["layer"], 4) is None


def test_a_gguf_model_is_measured_with_its_own_tokenizer(
    base: Path, text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    from oracles import llama_cpp
    from transformers import AutoModelForCausalLM

    path = llama_cpp.model(base, tmp_path / "m.gguf")
    calibrate(str(path), text, tmp_path / "m.safetensors", Calibration(TOKENS, RANK, "cpu"))
    pieces = pieces_of(open_base(str(path)), text, TOKENS)
    assert pieces[:, 0].unique().tolist() == [1], "the token that texts begin with there"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted, found = moments_in_transformers(model, pieces), load_file(tmp_path / "m.safetensors")
    for module in (Q, DOWN):
        assert torch.allclose(
            found[f"{module}.mean_square"].double(), wanted[module].diagonal(), rtol=1e-4, atol=0
        )
