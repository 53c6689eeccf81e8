"""Seeds, orders, filters, tasks and parts of adapters: what the contract of all families does not ask."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families.cases import LINEARS, FamilyCase, all_cases
from peft_cases import logits
from safetensors.torch import load_file, save_file

from adaptmerge import runtime
from adaptmerge.adapters.families.waveft import FILTERS
from adaptmerge.adapters.graph import Adapter
from adaptmerge.adapters.weight_edits import factor_of, family_of
from adaptmerge.bases.open import open_base
from adaptmerge.commands.combine import Options, combine
from adaptmerge.errors import AdaptmergeError, CannotMerge, InputError
from adaptmerge.formats.inputs import InputSpec, open_input, parse_input
from adaptmerge.formats.peft.order import ORDERS, in_model_order
from adaptmerge.merging.weights import SiteRule

pytest.importorskip("peft")

POLY = FamilyCase(
    "poly",
    "PolyConfig",
    {"target_modules": LINEARS, "r": 3, "n_tasks": 3, "n_skills": 4, "n_splits": 2},
)


class Made:
    """A case's adapter and base on disk."""

    def __init__(self, case: FamilyCase, folder: Path) -> None:
        self.case, self.path = case, case.build(folder / "adapter")
        self.base = case.save_base(folder / "base")

    def read(self, path: Path | None = None, *, base: bool = True, **spec: Any) -> Adapter:
        opened = open_base(str(self.base)) if base else None
        return open_input(InputSpec(str(path or self.path), **spec), opened).adapter

    def run(self, adapter: Adapter) -> torch.Tensor:
        model = self.case.base_model().double()
        with runtime.attach(model, adapter):
            return logits(model, self.case.inputs())

    def combined(self, out: Path, *specs: InputSpec, **options: Any) -> Path:
        inputs = list(specs) or [InputSpec(str(self.path), name="a")]
        combine(inputs, out, Options(base=str(self.base), **options))
        return out

    def changed(self, out: Path, tensors: dict[str, Any], config: dict[str, Any]) -> Path:
        """A copy with some tensors (by the ends of their names; None removes) and fields changed."""
        out.mkdir()
        held = load_file(self.path / "adapter_model.safetensors")
        for end, change in tensors.items():
            for key in [key for key in held if key.endswith(end)]:
                value = change(held[key]) if change else None
                held.pop(key)
                if value is not None:
                    held[key] = value.contiguous()
        save_file(held, out / "adapter_model.safetensors")
        before = json.loads((self.path / "adapter_config.json").read_text())
        (out / "adapter_config.json").write_text(json.dumps({**before, **config}))
        return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    @cache
    def build(name: str) -> Made:
        case = POLY if name == "poly" else all_cases()[name]
        return Made(case, tmp_path_factory.mktemp(name))

    return build


def shortened(value: torch.Tensor) -> torch.Tensor:
    return value[..., :-1]


Change = Callable[[torch.Tensor], torch.Tensor] | None
# What is wrong with an adapter, and what is said of it.
DAMAGED: list[tuple[str, dict[str, Change], dict[str, Any], str]] = [
    ("vera", {"q_proj.vera_lambda_b": None}, {}, "q_proj: vera_lambda_b is missing, found only"),
    ("vera", {"vera_lambda_d": shortened}, {}, "vera_lambda_d has 5 values"),
    ("vera", {"vera_B": lambda v: v[:40]}, {}, r"is for a weight of \[64, 64\], but"),
    ("vera", {"vera_A": None}, {}, "not both stored, but save_projection is true"),
    ("vera", {}, {"save_projection": False}, "so that PEFT would draw others"),
    (
        "vera",
        {},
        {"projection_mode": "x"},
        "projection_mode is 'x', which this version does not know",
    ),
    ("pvera", {}, {"sample_at_inference": True}, "every forward of this adapter is random"),
    ("randlora", {"randlora_gamma": shortened}, {}, "but r = 7 makes them"),
    ("randlora", {"v_proj.randlora_B": lambda v: v + 1}, {}, "its copy of randlora_B is not"),
    ("randlora", {}, {"save_projection": False}, "so that PEFT would draw others"),
    ("fourier", {"spectrum": shortened}, {}, r"shape \[49\], but by n_frequency there are 50"),
    (
        "fourier",
        {},
        {"random_loc_seed": None},
        "random_loc_seed is null",
    ),
    ("fourier", {"spectrum": lambda v: v.repeat(99)}, {"n_frequency": 4950}, "more than the 2048"),
    ("fourier", {}, {"n_frequency_pattern": {"(": 3}}, r"'\(' is no regular expression"),
    ("wave", {}, {"n_frequency_pattern": 3}, "n_frequency_pattern is 3: expected an object"),
    ("wave", {}, {"scaling": "much"}, "scaling is 'much': expected a number"),
    ("randlora", {}, {"r": 0}, "r is 0: expected a whole number of at least 1"),
    ("unilora", {}, {"proj_seed": -1}, "proj_seed is -1: expected a whole number from 0 on"),
    ("wave", {}, {"n_frequency_pattern": {"q_proj": 7}}, "by n_frequency there are 7"),
    ("wave", {}, {"wavelet_family": "coif5"}, "'coif5', with which PEFT's own forward fails"),
    ("vblora", {"vector_bank": None}, {}, "base_model.vblora_vector_bank is missing"),
    ("vblora", {}, {"num_vectors": 10}, r"has shape \[9, 16\], but the config says \[10, 16\]"),
    ("vblora", {"logits_A": shortened}, {}, r"the last of 9 \(num_vectors\)"),
    ("vblora", {}, {"topk": 10}, "topk is 10: expected 1 to num_vectors, 9"),
    ("vblora_topk", {}, {"save_only_topk_weights": False}, "so that PEFT would not read it"),
    ("vblora_topk", {"A_topk_weights": None}, {}, "vblora_logits_A_topk_weights is missing"),
    ("unilora", {"theta_d": shortened}, {}, "but theta_d_length is 70"),
    ("unilora", {}, {"save_indices": True}, "save_indices is true, but no indices are stored"),
    ("unilora", {}, {"target_modules": "all-linear"}, "since the file itself names none"),
    ("unilora", {}, {"target_modules": ["nowhere"]}, "selects no module of the base"),
    ("unilora", {}, {"target_modules": ["norm"]}, "model.norm, which has no matrix in the base"),
    ("unilora_saved", {"scales_A": None}, {}, "unilora_scales_A is missing"),
    ("unilora_saved", {"indices_A": shortened}, {}, "shapes do not fit together for r = 3"),
    ("tinylora", {"tinylora_v.3": None}, {}, "which weight_tying = 0.0 does not make of them"),
    ("tinylora", {}, {"u": 6}, "do not fit together for u = 6"),
    ("tinylora", {}, {"save_projection": False}, "so that PEFT would draw another"),
    ("poly", {}, {"n_tasks": 4}, "as the config says"),
    ("poly", {}, {"poly_type": "soft"}, "poly_type is 'soft': expected 'poly'"),
    ("poly", {"q_proj.poly_lora_B": None}, {}, "poly_lora_B is missing, found only"),
]


@pytest.mark.parametrize(("name", "tensors", "config", "said"), DAMAGED)
def test_what_does_not_fit_together_is_said(
    name: str,
    tensors: dict[str, Change],
    config: dict[str, Any],
    said: str,
    made: Callable[[str], Made],
    tmp_path: Path,
) -> None:
    found = made(name)
    path = found.changed(tmp_path / "damaged", tensors, config)
    with pytest.raises(InputError, match=said):
        found.read(path)


@pytest.mark.parametrize("name", ["vera_drawn", "pvera_drawn", "randlora_drawn", "unilora"])
def test_without_a_base_what_it_would_tell_is_asked_for(
    name: str, made: Callable[[str], Made]
) -> None:
    with pytest.raises(InputError, match="pass --base DIR"):
        made(name).read(base=False)


@pytest.mark.parametrize("name", ["tinylora", "tinylora_tied", "tinylora_one"])
def test_stored_random_matrices_tell_the_order_of_modules(
    name: str, made: Callable[[str], Made]
) -> None:
    """So no base and no list of architectures is needed."""
    found = made(name)
    error = (found.run(found.read(base=False)) - found.case.truth(found.path)).norm()
    assert error < 1e-9


def test_an_order_that_nothing_tells_is_refused(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    for name in ("tinylora_drawn", "unilora"):
        found = made(name)
        with pytest.raises(InputError, match="pass --base DIR"):
            found.read(base=False)
        config = json.loads((found.base / "config.json").read_text())
        strange = tmp_path / name
        strange.mkdir()
        (strange / "config.json").write_text(json.dumps({**config, "model_type": "strange"}))
        (strange / "model.safetensors").symlink_to(found.base / "model.safetensors")
        with pytest.raises(InputError, match=r"known(: | architectures: )llama"):
            open_input(InputSpec(str(found.path)), open_base(str(strange)))


PARTS = ["vera_drawn", "pvera_drawn", "randlora_drawn", "unilora", "fourier", "wave_share"]


@pytest.mark.parametrize("name", [*PARTS, "tinylora_drawn", "tinylora_tied", "vblora_topk"])
def test_a_part_of_an_adapter_is_drawn_as_the_whole_was(
    name: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    """Without its largest modules a seed would give others: then the values are written."""
    found = made(name)
    rules = (SiteRule("down_proj", {"a": 0.0}),)
    out = found.combined(tmp_path / "out", rules=rules)
    whole = found.read()
    part = whole.with_edits(e for e in whole.edits if not e.site.module.endswith("down_proj"))
    expected, effect = found.run(part), (found.run(part) - found.case.plain()).norm()
    assert (found.case.truth(out) - expected).norm() < 1e-6 * effect
    again = found.read(out)
    assert (found.run(again) - expected).norm() < 1e-6 * effect
    assert {family_of(edit) for edit in again.edits} == {family_of(part.edits[0])}


@pytest.mark.parametrize("name", ["vera_shapes", "randlora", "fourier", "vblora", "tinylora_tied"])
def test_two_are_summed_as_loras(name: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    found = made(name)
    other = found.case.build(tmp_path / "other", seed=1)
    specs = (InputSpec(str(found.path), "a", 0.5), InputSpec(str(other), "b", -0.25))
    full = name in ("randlora", "fourier")  # of full rank: no LoRA without a budget
    out = found.combined(tmp_path / "out", *specs, target="native" if full else None)
    deltas: dict[str, Any] = {}
    for path, weight in ((found.path, 0.5), (other, -0.25)):
        before = found.case.base_model().double().state_dict()
        after = found.case.merged(path)
        for key, value in before.items():
            deltas[key] = deltas.get(key, 0) + weight * (after[key] - value)
    base = open_base(str(found.base))
    for edit in found.read(out).edits:
        factor = factor_of(edit)
        assert factor is not None
        assert family_of(edit) == ("" if full else "lora")
        key = f"{edit.site.module}.weight"
        assert base.weight(edit.site) is not None
        assert (factor.dense() - deltas[key]).norm() < 1e-5 * deltas[key].norm()


def test_one_shared_matrix_cannot_be_two(made: Callable[[str], Made], tmp_path: Path) -> None:
    """Adapters of other seeds at other modules pass as they are, but not into one file."""
    found = made("vera")
    seeded: dict[str, Any] = {"projection_prng_key": 5, "target_modules": ["o_proj"]}
    other = found.case.build(tmp_path / "other", **seeded)
    specs = (InputSpec(str(found.path), "a", 1.0), InputSpec(str(other), "b", 1.0))
    with pytest.raises(AdaptmergeError, match="stored once for all modules, here are several"):
        found.combined(tmp_path / "out", *specs)
    same = found.case.build(tmp_path / "same", target_modules=["o_proj"])
    out = found.combined(tmp_path / "both", specs[0], InputSpec(str(same), "b", 1.0))
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "VERA"


def test_filters_are_those_of_peft() -> None:
    from peft.tuners.waveft.wavelet import Wavelet, wavelist

    assert set(wavelist()) - set(FILTERS) == {"haar", "coif5"}
    for name, taps in FILTERS.items():
        theirs = Wavelet(name).rec_lo
        assert len(theirs) == len(taps)
        assert max(abs(a - b) for a, b in zip(theirs, taps, strict=True)) < 5e-12


DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@pytest.mark.parametrize("kind", ORDERS)
def test_orders_are_those_of_the_models(kind: str, tmp_path: Path) -> None:
    """Eleven layers, so that their numbers are not sorted as text."""
    from transformers import CONFIG_MAPPING, AutoModel
    from transformers.pytorch_utils import Conv1D

    config: Any = CONFIG_MAPPING[kind]()
    for name in DEPTHS:
        if hasattr(config, name):
            setattr(config, name, 11)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    found = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
    layers = [name for name in found if any(part.isdecimal() for part in name.split("."))]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    base = open_base(str(tmp_path))
    assert len(layers) >= 44
    assert in_model_order(base, sorted(layers)) == layers


def test_of_poly_a_task_is_a_lora(made: Callable[[str], Made], tmp_path: Path) -> None:
    found = made("poly")
    model: Any = found.case.loaded(found.path)
    inputs = found.case.inputs()
    for task in range(3):
        ids = torch.full((len(inputs["input_ids"]),), task)
        with torch.no_grad():
            truth = model(**inputs, task_ids=ids).logits
        effect = (truth - found.case.plain()).norm()
        adapter = found.read(task=task)
        assert (found.run(adapter) - truth).norm() < 1e-9 * effect
        out = found.combined(tmp_path / str(task), parse_input(f"{found.path}?task={task}"))
        assert {family_of(edit) for edit in found.read(out).edits} == {"lora"}
        assert (found.case.truth(out) - truth).norm() < 1e-5 * effect


def test_poly_is_kept_whole_and_merged_by_task(made: Callable[[str], Made], tmp_path: Path) -> None:
    found = made("poly")
    out = found.combined(tmp_path / "out")
    before, after = (load_file(p / "adapter_model.safetensors") for p in (found.path, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    native = found.combined(tmp_path / "native", target="native")
    assert found.read(native).edits[0].kind == "poly"
    whole = InputSpec(str(found.path), "a", 0.5)
    with pytest.raises(CannotMerge, match=r"tasks 0 to 2: name one, as in ADAPTER\?task=0"):
        found.combined(tmp_path / "half", whole)
    with pytest.raises(InputError, match=r"\?task=3: expected one of its tasks, 0 to 2"):
        found.read(task=3)
    with pytest.raises(AdaptmergeError, match=r"ADAPTER\?task=0"):
        found.run(found.read())


def test_the_bases_dtype_rounds_the_scales_of_unilora(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    found = made("unilora")
    base = open_base(str(found.base)).path
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text((base / "config.json").read_text())
    held = load_file(base / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in held.items()}, half / "model.safetensors")
    adapter = open_input(InputSpec(str(found.path)), open_base(str(half))).adapter
    assert any("rounded to bf16" in note.what for note in adapter.notes)
