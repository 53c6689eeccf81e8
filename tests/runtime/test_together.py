"""One forward for several adapters computes what one forward each does, whatever they are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attached import assert_untouched, error, read_adapter, state
from peft_cases import CASES, PeftCase
from torch import nn

from adaptmerge.adapters.graph import Adapter
from adaptmerge.runtime import attach, called, outputs_of, outputs_of_each, twin


def alone(model: nn.Module, inputs: dict[str, torch.Tensor], adapter: Adapter) -> torch.Tensor:
    with attach(model, adapter):
        return outputs_of(model, inputs)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_each_computes_as_alone(case: PeftCase, tmp_path: Path) -> None:
    one, two = (read_adapter(case.build(tmp_path / str(n), seed=n)) for n in (1, 2))
    model, inputs = case.make_model(), case.example_inputs()
    before = state(model)
    y_base, y_one, y_two = outputs_of_each(model, inputs, (None, one, two))
    plain = outputs_of(model, inputs)
    assert error(y_one, alone(model, inputs, one), plain) < 1e-5
    assert error(y_two, alone(model, inputs, two), plain) < 1e-5
    torch.testing.assert_close(y_base, plain)
    assert_untouched(model, before)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_linears_are_called_once_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a streamed weight would be read for each of them."""
    case = CASES["plain"]
    model, inputs = case.make_model(), case.example_inputs()
    one, two = (read_adapter(case.build(tmp_path / str(n), seed=n)) for n in (1, 2))
    calls = 0

    def counted(*_: object) -> None:
        nonlocal calls
        calls += 1

    layer = model.get_submodule(one.edits[0].site.module)
    layer.register_forward_hook(counted)
    outputs_of_each(model, inputs, (None, one, two))
    assert calls == 1


def test_a_failing_forward_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    case = CASES["plain"]
    model, inputs = case.make_model(), case.example_inputs()
    adapter = read_adapter(case.build(tmp_path, seed=1))
    before = state(model)

    def fail(*_: object) -> None:
        raise ValueError("stopped")

    handle = model.get_submodule(adapter.edits[-1].site.module).register_forward_hook(fail)
    with pytest.raises(ValueError, match="stopped"):
        outputs_of_each(model, inputs, (None, adapter))
    handle.remove()
    assert_untouched(model, before)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_twins_share_weights_and_nothing_else() -> None:
    model = CASES["conv1d_gpt2"].make_model()
    other = twin(model)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(a is not b and a.data_ptr() == b.data_ptr() for a, b in pairs)
    tied = other.get_output_embeddings().weight is other.get_input_embeddings().weight  # type: ignore[operator]
    assert tied
    kept = model.get_submodule("lm_head")
    other.lm_head = nn.Linear(2, 2)
    assert model.get_submodule("lm_head") is kept


def test_modules_that_a_forward_leaves_out_are_known(tmp_path: Path) -> None:
    case = CASES["plain"]
    model, inputs = case.make_model(), case.example_inputs()
    adapter = read_adapter(case.build(tmp_path, seed=1))
    with called(model, adapter) as places:
        assert places
        assert not any(places.values())
        outputs_of(model, inputs)
        assert all(places.values())
    assert not any(module._forward_pre_hooks for module in model.modules())
