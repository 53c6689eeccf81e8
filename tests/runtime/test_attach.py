"""Attached adapters compute what their own framework computes, and leave the model as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attached import assert_untouched, error, read_adapter, state
from peft_cases import CASES, PeftCase, logits, peft_forward
from safetensors.torch import load_file
from torch import Tensor, nn

from adaptmerge.adapters.graph import Adapter, Site
from adaptmerge.adapters.stored_edits import Replace
from adaptmerge.adapters.weight_edits import Add
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.bases.open import open_base
from adaptmerge.errors import InputError
from adaptmerge.runtime import attach, load_model, outputs_of
from adaptmerge.tensors.dtypes import F32
from adaptmerge.tensors.refs import constant

TRAINED = [
    "lora-r8-shakespeare",
    "lora-r8-cheaders",
    "lora-r8-perl",
    "lora-r16-rslora-qv-perl",
    "lora-r4-dora-embed-cheaders",
    "ia3-shakespeare",
    "vera-r64-shakespeare",
    "loha-r4-shakespeare",
    "lokr-r4-perl",
    "oft-b16-cheaders",
    "lntuning-cheaders",
    "prefix-8-perl",
]


class Overridden(PeftCase):
    """A case with other options."""

    def __init__(self, case: PeftCase, overrides: dict[str, object]) -> None:
        def options(rank: int) -> dict[str, object]:
            return {**case.options(rank), **overrides}

        super().__init__(case.name, case.family, options)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_computes_what_peft_computes(case: PeftCase, tmp_path: Path) -> None:
    folder = case.build(tmp_path, seed=1)
    model, inputs = case.make_model(), case.example_inputs()
    before, y_base = state(model), logits(model, inputs)
    with attach(model, read_adapter(folder)):
        y = logits(model, inputs)
    assert error(y, peft_forward(case, folder), y_base) < 1e-5
    assert_untouched(model, before)
    assert torch.equal(logits(model, inputs), y_base)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("conv1d_gpt2", {"modules_to_save": ["c_fc"], "target_modules": ["c_attn"]}),
        ("conv1d_gpt2", {"use_dora": True}),
        ("conv2d", {"modules_to_save": ["line", "point"], "target_modules": ["conv"]}),
        ("conv2d", {"use_dora": True}),
        ("embedding", {"use_dora": True}),
        ("lora_bias", {"use_dora": True, "lora_bias": False}),
    ],
)
def test_computes_what_peft_computes_for_rarer_options(
    name: str, overrides: dict[str, object], tmp_path: Path
) -> None:
    test_computes_what_peft_computes(Overridden(CASES[name], overrides), tmp_path)


@pytest.mark.parametrize("name", TRAINED)
def test_computes_what_was_recorded(name: str, fixtures: Path) -> None:
    base = fixtures / "tinyllama" / "base"
    recording = load_file(fixtures / "recorded" / "tinyllama" / f"{name}.safetensors")
    inputs = {"input_ids": recording["input_ids"]}
    model = load_model(base)
    with attach(model, read_adapter(fixtures / "tinyllama" / name, open_base(str(base)))):
        y = outputs_of(model, inputs)
    assert error(y, recording["y"], recording["y_base"]) < 1e-5
    assert error(outputs_of(model, inputs), recording["y_base"], recording["y"]) < 1e-5


def lora(module: str, out: int, width: int, size: float = 0.1, param: str = "weight") -> Add:
    up, down = constant(size, (out, 2), F32), constant(size, (2, width), F32)
    return Add(Site(module, param), low_rank(up, down))


def test_restores_after_an_exception_inside_forward() -> None:
    case = CASES["conv2d"]
    model = case.make_model()
    before = state(model)
    adapter = Adapter("a", (lora("head", 5, 10), lora("point", 16, 12)))
    with attach(model, adapter):
        with pytest.raises(RuntimeError):
            model(torch.zeros(1, 3, 8))  # fails in the first layer
        with pytest.raises(RuntimeError):
            model.get_submodule("head")(torch.zeros(3, 3))  # fails in an edited layer
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert_untouched(model, before)


def test_restores_when_the_block_is_left_by_an_exception() -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    model = CASES["conv2d"].make_model()
    before = state(model)
    head = model.get_submodule("head")

    def run() -> None:
        with attach(model, Adapter("a", (lora("head", 5, 10),))):
            handle = head.register_forward_hook(interrupted, prepend=True)
            try:
                head(torch.zeros(1, 10))  # torch runs no hooks after an interrupt
            finally:
                handle.remove()

    with pytest.raises(KeyboardInterrupt):
        run()
    assert_untouched(model, before)


def test_names_all_modules_that_the_model_lacks() -> None:
    model = CASES["conv2d"].make_model()
    adapter = Adapter("a", (lora("left.q", 5, 10), lora("head", 5, 10), lora("v_proj", 5, 10)))
    with pytest.raises(InputError, match=r"left\.q, v_proj: is this adapter for another model"):  # noqa: SIM117
        with attach(model, adapter):
            pass


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lora("head", 5, 11), r"shape \[5, 10\], the adapter \[5, 11\]"),
        (lora("conv", 12, 3), r"shape \[12, 27\], the adapter \[12, 3\]"),
        (lora("head", 5, 1, param="scale"), "Linear has no scale"),
    ],
)
def test_names_edits_that_do_not_fit(edit: Add, message: str) -> None:
    model = CASES["conv2d"].make_model()
    with pytest.raises(InputError, match=message), attach(model, Adapter("a", (edit,))):
        pass


@pytest.mark.parametrize("wrap", [False, True])
def test_one_model_prefix_more_or_less(wrap: bool) -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.model = inner

        def forward(self, pixels: Tensor) -> Tensor:
            out: Tensor = self.model(pixels)
            return out

    case = CASES["conv2d"]
    inputs, inner = case.example_inputs(), case.make_model()
    with attach(inner, Adapter("a", (lora("head", 5, 10),))):
        expected = logits(inner, inputs)
    model, module = (Outer(inner), "head") if wrap else (inner, "model.head")
    with attach(model, Adapter("a", (lora(module, 5, 10),))):
        assert torch.equal(logits(model, inputs), expected)


def test_two_names_of_one_module_are_refused() -> None:
    model = CASES["conv2d"].make_model()
    adapter = Adapter("a", (lora("head", 5, 10), lora("model.head", 5, 10)))
    with pytest.raises(InputError, match="are not told apart"), attach(model, adapter):
        pass


def test_a_bias_that_the_base_lacks() -> None:
    up = nn.Linear(3, 4, bias=False)
    model = nn.ModuleDict({"up": up, "norm": nn.RMSNorm(4)})
    bias = Replace(Site("up", "bias"), constant(0.5, (4,), F32), "bias")
    x = torch.randn(2, 3)
    plain = up(x)
    with attach(model, Adapter("a", (bias,))):
        # a kernel may begin with the bias or end with it: one more rounding in float32, not 0.5
        torch.testing.assert_close(up(x), plain + 0.5)
    assert up._parameters == {"weight": up.weight, "bias": None}
    refused = Replace(Site("norm", "bias"), constant(0.5, (4,), F32), "bias")
    with pytest.raises(InputError, match="RMSNorm has no bias"):  # noqa: SIM117
        with attach(model, Adapter("a", (refused,))):
            pass


def test_edits_of_one_parameter_compose_and_contexts_nest() -> None:
    model = CASES["conv2d"].make_model()
    x = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    head = model.get_submodule("head")
    edit = lora("head", 5, 10)
    one, two = Adapter("a", (edit,)), Adapter("b", (edit, edit))
    with attach(model, two):
        expected = head(x)
    with attach(model, one), attach(model, one):
        torch.testing.assert_close(head(x), expected)


def test_tied_weights_are_edited_apart() -> None:
    case = CASES["conv1d_gpt2"]
    model, inputs = case.make_model(), case.example_inputs()
    hidden = model.get_submodule("transformer")
    plain = hidden(**inputs)[0]
    with attach(model, Adapter("a", (lora("lm_head", 128, 64),))):
        assert torch.equal(hidden(**inputs)[0], plain)  # the embedding is not edited
        assert not torch.equal(model.get_submodule("lm_head")(plain), plain @ embedding(model).T)


def embedding(model: nn.Module) -> Tensor:
    found: Tensor = model.get_submodule("transformer.wte").weight  # type: ignore[assignment]
    return found


def test_a_resized_vocabulary() -> None:
    case = CASES["head_llama"]
    model, inputs = case.make_model(), case.example_inputs()
    value = constant(0.01, (140, 64), F32)
    adapter = Adapter(
        "a", tuple(Replace(Site(m), value) for m in ("model.embed_tokens", "lm_head"))
    )
    with attach(model, adapter):
        assert logits(model, inputs).shape[-1] == 140
    assert logits(model, inputs).shape[-1] == 128
