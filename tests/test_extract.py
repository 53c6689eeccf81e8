"""Extraction: two full checkpoints to a LoRA, against torch.linalg.svd, the tuned model and PEFT."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import copies
import pytest
import torch
from console import run
from peft_cases import CASES, MODELS, logits, token_inputs
from safetensors.torch import load_file, save_file

from adaptmerge.adapters.graph import Site
from adaptmerge.adapters.weight_edits import delta_on
from adaptmerge.algebra import sketch
from adaptmerge.algebra.fit import Budget, allot
from adaptmerge.bases.base import Base
from adaptmerge.bases.open import open_base
from adaptmerge.commands.combine import Options, combine
from adaptmerge.commands.extract import Extraction, extract, open_tuned
from adaptmerge.commands.extract.tuned import Wanted
from adaptmerge.commands.verify import Questions, verify
from adaptmerge.errors import AdaptmergeError, CannotStore, InputError, UsageError
from adaptmerge.formats.inputs import InputSpec, open_input
from adaptmerge.outputs.report import load_report

RANK = 4
WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]
LOGITS = 3e-4  # of 6 in float32: 800 roundings of 2^-24; a vector that is lost moves them by 0.1


def low_rank(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """A random delta of rank RANK, for every matrix of a stack."""
    *stack, rows, columns = shape
    up = torch.randn(*stack, rows, RANK, generator=generator)
    return 0.05 * up @ torch.randn(*stack, RANK, columns, generator=generator)


def with_lora(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every matrix changed by a low-rank delta, vectors as they are."""
    return value + low_rank(value.shape, generator) if value.ndim > 1 else value


def with_all(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every parameter changed."""
    if value.ndim > 1:
        return with_lora(name, value, generator)
    return value + 0.1 * torch.randn(value.shape, generator=generator)


def with_noise(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every parameter changed by a delta of full rank."""
    return value + 0.05 * torch.randn(value.shape, generator=generator)


Change = Callable[[str, torch.Tensor, torch.Generator], torch.Tensor]


def pair(
    folder: Path, family: str = "llama", change: Change = with_lora, dtype: Any = None
) -> tuple[Path, Path]:
    """A base and a tuned model saved by transformers."""
    model: Any = copies.fresh(MODELS[family])
    model = model if dtype is None else model.to(dtype)
    base, tuned = folder / "base", folder / "tuned"
    model.save_pretrained(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(change(name, parameter.float(), generator))
    model.save_pretrained(tuned)
    return base, tuned


def changed(folder: Path, change: Callable[[Tensors], Tensors], **config: Any) -> None:
    """A checkpoint with other tensors and config entries."""
    tensors = change(load_file(folder / WEIGHTS))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **config}))


def rank(number: int, **options: Any) -> Extraction:
    return Extraction(budget=Budget(rank=number), **options)


def deltas(base: Path, tuned: Path) -> dict[str, torch.Tensor]:
    """tuned - base by site in float64, matrices only."""
    adapter = open_tuned(str(tuned), open_base(str(base)), Wanted()).adapter
    return {str(e.site): e.factor.dense() for e in adapter.edits if hasattr(e, "factor")}


def stored(output: Path, base: Path) -> dict[str, torch.Tensor]:
    adapter = open_input(InputSpec(str(output)), open_base(str(base))).adapter
    return {str(e.site): e.factor.dense() for e in adapter.edits if hasattr(e, "factor")}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def peft_outputs(base: Path, adapter: Path, rows: int | None = None) -> torch.Tensor:
    """What PEFT's own loading of an adapter computes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: torch.nn.Module = PeftModel.from_pretrained(model, adapter).eval()
        return logits(loaded, token_inputs())


def outputs(model: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(model).eval(), token_inputs())


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


# --- the range finder against torch.linalg.svd


def matrix(sigma: torch.Tensor, rows: int = 480) -> torch.Tensor:
    """A random matrix with these singular values, float32."""
    generator = torch.Generator().manual_seed(5)
    sides = [torch.randn(n, len(sigma), generator=generator).double() for n in (rows, len(sigma))]
    left, right = (torch.linalg.qr(side).Q for side in sides)
    found: torch.Tensor = ((left * sigma) @ right.T).float()
    return found


STEPS = torch.arange(1, 401, dtype=torch.float64)
SPECTRA = {
    "flat": torch.ones(400, dtype=torch.float64),
    "slow": STEPS**-0.3,
    "decaying": 1 / STEPS,
    "exponential": torch.exp(-STEPS / 10),
    "stairs": torch.where(STEPS <= 10, 10.0, 1.0).double(),
    "random": torch.linalg.svdvals(
        torch.randn(480, 400, generator=torch.Generator().manual_seed(2))
    ),
}


@cache
def spectral(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix of a spectrum, and its singular values."""
    given = matrix(SPECTRA[name].double())
    return given, torch.linalg.svdvals(given.double())


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [1, 8, 40])
def test_truncation_is_within_one_percent_of_the_best(name: str, k: int) -> None:
    given, sigma = spectral(name)
    best = float(sigma[k:].norm())
    found = sketch.leading(given, k, seed=3)
    error = sketch.residual(given, *found.balanced(k))
    assert not found.whole
    assert best * (1 - 1e-5) <= error <= best * 1.01
    assert found.squared_tail(k) ** 0.5 == pytest.approx(error, rel=1e-3)


def test_a_finder_that_does_not_settle_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch, "NEAR", 0.0)
    found = sketch.leading(matrix(SPECTRA["random"].double()), 8, seed=3)
    assert found.whole


def test_large_ranks_are_exact() -> None:
    assert sketch.leading(matrix(SPECTRA["slow"]), 100, seed=3).whole


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_budget_keeps_the_fewest_values(name: str, share: float) -> None:
    given, sigma = spectral(name)
    tails = sigma.square().flip(0).cumsum(0).flip(0)
    fewest = int((tails > share * tails[0]).sum())
    found = sketch.enough(given, share, seed=3)
    assert found.within(share * sketch.squared_norm(given)) - fewest in (0, 1)
    values = sketch.spectrum(given, share, seed=3)
    known = torch.tensor(values.sigma).square().sum() + values.rest
    assert float(known) == pytest.approx(float(tails[0]), rel=1e-5)


def test_what_is_in_no_spectrum_counts_as_lost() -> None:
    spectra = {"a": [4.0, 2.0], "b": [3.0, 1.0]}
    assert allot(spectra, Budget(energy=0.8)) == {"a": 1, "b": 1}
    assert allot(spectra, Budget(energy=0.8), beside=3.0) == {"a": 2, "b": 1}


def test_seed_is_of_the_name_alone() -> None:
    assert sketch.seed_of("a") == sketch.seed_of("a") != sketch.seed_of("b")


# --- laws


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral", "qwen2_moe"])
def test_a_lora_is_recovered_and_peft_computes_the_tuned_model(family: str, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, family, with_all)
    report = extract(str(base), str(tuned), tmp_path / "out", rank(2 * RANK))
    meant, found = deltas(base, tuned), stored(tmp_path / "out", base)
    assert {site: relative(found[site], delta) for site, delta in meant.items()} == pytest.approx(
        dict.fromkeys(meant, 0.0), abs=1e-5
    )
    assert report.totals.truncation == 0.0
    wanted = outputs(tuned)
    assert float((peft_outputs(base, tmp_path / "out") - wanted).abs().max()) < LOGITS
    verdict = verify(tmp_path / "out", Questions(str(base), {"tuned": str(tuned)}))
    assert verdict.status == "pass", verdict


@pytest.mark.parametrize("budget", [{"rank": 3}, {"energy": 0.9}, {"max_error": 0.2}], ids=str)
@pytest.mark.parametrize("per_site", [False, True])
def test_errors_are_those_of_the_svd(
    budget: dict[str, Any], per_site: bool, tmp_path: Path
) -> None:
    base, tuned = pair(tmp_path, change=with_noise)
    asked = Budget(**budget, per_site=per_site)
    report = extract(str(base), str(tuned), tmp_path / "out", Extraction(budget=asked))
    meant, found = deltas(base, tuned), stored(tmp_path / "out", base)
    spectra = {site: torch.linalg.svdvals(delta) for site, delta in meant.items()}
    lines = {line.site: line for line in report.sites if line.kind == "add"}
    for site, delta in meant.items():
        assert lines[site].error == pytest.approx(relative(found[site], delta), rel=1e-3)
        best = float(spectra[site][lines[site].rank :].norm())
        assert lines[site].truncation == pytest.approx(best, rel=1e-2)
    whole = sum(float(sigma.square().sum()) for sigma in spectra.values())
    lost = sum(line.truncation**2 for line in lines.values())
    assert report.totals.truncation == pytest.approx((lost / whole) ** 0.5, rel=1e-6)
    if asked.surveyed:
        values = torch.cat(list(spectra.values())).sort().values
        cut = int((values.square().cumsum(0) <= asked.allowed_loss * whole).sum())
        assert sum(line.rank or 0 for line in lines.values()) == len(values) - cut
    elif asked.spectral:
        assert all(
            line.truncation <= asked.allowed_loss**0.5 * line.norm for line in lines.values()
        )
    else:
        assert {line.rank for line in lines.values()} == {3}
    assert verify(tmp_path / "out", Questions(str(base), {"tuned": str(tuned)})).status == "pass"


@pytest.mark.parametrize("asked", [Budget(rank=8), Budget(energy=0.8), Budget(max_error=0.3)])
def test_large_matrices_use_the_finder_and_compete(asked: Budget, tmp_path: Path) -> None:
    base, tuned = wide(tmp_path)
    report = extract(str(base), str(tuned), tmp_path / "out", Extraction(budget=asked))
    meant = deltas(base, tuned)
    spectra = {site: torch.linalg.svdvals(delta) for site, delta in meant.items()}
    for line in report.sites:
        best = float(spectra[line.site][line.rank :].norm())
        assert line.truncation <= 1.01 * best
    if asked.spectral:
        values = torch.cat(list(spectra.values())).sort().values.square()
        cut = int((values.cumsum(0) <= asked.allowed_loss * values.sum()).sum())
        assert abs(sum(line.rank or 0 for line in report.sites) - (len(values) - cut)) <= 1


def wide(folder: Path) -> tuple[Path, Path]:
    """Two checkpoints of a model of two matrices, one of which has most of the delta."""
    base, tuned = folder / "base", folder / "tuned"
    generator = torch.Generator().manual_seed(4)
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(2)]
    before = {name: torch.randn(480, 400, generator=generator) for name in names}
    sigmas = (10 * SPECTRA["exponential"], SPECTRA["decaying"])
    after = {name: before[name] + matrix(s) for name, s in zip(names, sigmas, strict=True)}
    for path, tensors in ((base, before), (tuned, after)):
        path.mkdir()
        save_file(tensors, path / WEIGHTS)
        (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return base, tuned


@pytest.mark.parametrize("options", [["--rank", "3"], ["--energy", "0.9"]], ids=str)
def test_bytes_do_not_depend_on_jobs(options: list[str], tmp_path: Path) -> None:
    base, tuned = wide(tmp_path)
    before = [hashes(base), hashes(tuned)]
    found = []
    for jobs in ("1", "2"):
        output = tmp_path / jobs / "out"
        made = run("extract", str(base), str(tuned), *options, "--jobs", jobs, "-o", str(output))
        assert made.code == 0, made.stderr
        found.append(hashes(output))
    assert found[0] == found[1]
    assert [hashes(base), hashes(tuned)] == before


# --- what is not a matrix, and vocabularies


def test_norms_and_biases_are_kept_whole(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, "gpt2", with_all)
    report = extract(str(base), str(tuned), tmp_path / "out", rank(RANK))
    whole = {line.module for line in report.sites if line.kind == "replace"}
    assert {"transformer.ln_f", "transformer.h.0.attn.c_attn"} <= whole
    less = extract(str(base), str(tuned), tmp_path / "less", rank(RANK, vectors="skip"))
    assert {line.kind for line in less.sites} == {"add"}
    assert any(
        n.kind == "dropped" and "vectors that differ are left out" in n.what for n in less.notes
    ), less.notes
    with pytest.raises(AdaptmergeError, match="vectors that differ are left out"):
        extract(str(base), str(tuned), tmp_path / "x", rank(RANK, vectors="skip", strict=True))
    assert verify(tmp_path / "less", Questions(str(base), {"tuned": str(tuned)})).status == "pass"


@pytest.mark.parametrize("embeddings", ["full", "skip"])
def test_embeddings_as_asked(embeddings: str, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, "gpt2")
    report = extract(str(base), str(tuned), tmp_path / "out", rank(RANK, embeddings=embeddings))
    kinds = {line.module: line.kind for line in report.sites}
    names = ("transformer.wte", "transformer.wpe", "lm_head")
    if embeddings == "full":
        assert {kinds[name] for name in names} == {"replace"}
        wanted = outputs(tuned)
        assert float((peft_outputs(base, tmp_path / "out") - wanted).abs().max()) < LOGITS
    else:
        assert not kinds.keys() & set(names)
        assert any(note.kind == "dropped" for note in report.notes)


def test_a_tied_base_and_an_untied_tuned_model(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, "gpt2")
    shutil.copytree(tuned, tmp_path / "untied")

    def untie(tensors: Tensors) -> Tensors:
        return {**tensors, "lm_head.weight": tensors["transformer.wte.weight"] + 0.1}

    changed(tmp_path / "untied", untie, tie_word_embeddings=False)
    extract(str(base), str(tmp_path / "untied"), tmp_path / "out", rank(RANK + 1))
    found = stored(tmp_path / "out", base)
    assert relative(found["lm_head"], found["transformer.wte"] + 0.1) < 1e-4
    wanted = outputs(tmp_path / "untied")
    assert float((peft_outputs(base, tmp_path / "out") - wanted).abs().max()) < LOGITS
    back = rank(RANK + 1)
    extract(str(tmp_path / "untied"), str(base), tmp_path / "back", back)
    other = stored(tmp_path / "back", tmp_path / "untied")
    assert relative(other["lm_head"], -found["lm_head"]) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_resized_vocabulary_is_kept_whole(family: str, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, family)

    def grow(tensors: Tensors) -> Tensors:
        names = ("lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight")
        added = {n: torch.cat([tensors[n], torch.ones(3, 64)]) for n in names if n in tensors}
        return {**tensors, **added}

    changed(tuned, grow, vocab_size=131)
    report = extract(str(base), str(tuned), tmp_path / "out", rank(RANK))
    whole = {line.module for line in report.sites if line.kind == "replace"}
    assert whole == {"lm_head", "model.embed_tokens" if family == "llama" else "transformer.wte"}
    assert any("131 rows and the base 128" in note.what for note in report.notes)
    wanted = outputs(tuned)
    assert float((peft_outputs(base, tmp_path / "out", 131) - wanted).abs().max()) < LOGITS
    assert verify(tmp_path / "out", Questions(str(base), {"tuned": str(tuned)})).status == "pass"


def test_an_embedding_of_a_class_that_is_not_known_is_noted(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, "bert")
    for folder in (base, tuned):
        changed(folder, dict, architectures=["OurOwn"], model_type="of_our_own")
    report = extract(str(base), str(tuned), tmp_path / "out", rank(RANK))
    assert any(n.kind == "assumed" and "has no class of this model" in n.what for n in report.notes)


def test_an_added_head_is_kept_whole_with_its_labels(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, "bert")
    changed(base, lambda t: {n: v for n, v in t.items() if not n.startswith("classifier")})
    changed(tuned, dict, id2label={"0": "good", "1": "bad", "2": "ugly"})
    report = extract(str(base), str(tuned), tmp_path / "out", rank(RANK))
    assert report.output["heads"][0]["labels"] == ["good", "bad", "ugly"]
    adapter = open_input(InputSpec(str(tmp_path / "out"))).adapter
    assert adapter.labels["classifier"].names == ("good", "bad", "ugly")
    with pytest.raises(InputError, match="attention.self.key.weight is in the tuned model only"):
        changed(
            base, lambda t: {n: v for n, v in t.items() if "layer.1.attention.self.key" not in n}
        )
        extract(str(base), str(tuned), tmp_path / "x", rank(RANK))


def test_experts_stacked_or_one_by_one(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, "mixtral")
    extract(str(base), str(tuned), tmp_path / "one", rank(RANK, experts="per-expert"))
    found = stored(tmp_path / "one", base)
    assert "model.layers.0.block_sparse_moe.experts.2.w1" in found
    verdict = verify(tmp_path / "one", Questions(str(base), {"tuned": str(tuned)}))
    checks = {check.name: check.status for check in verdict.checks}
    assert checks["weights"] == "pass"


@pytest.mark.parametrize("layout", ["fused", "per-expert"])
def test_experts_of_a_stacked_checkpoint(layout: str, tmp_path: Path) -> None:
    """gpt-oss stacks experts as (experts, in, out) and has vectors in modules of other modules."""
    base, tuned = pair(tmp_path, "gpt_oss")
    if layout == "per-expert":
        with pytest.raises(AdaptmergeError, match="no known spelling one by one"):
            extract(str(base), str(tuned), tmp_path / "out", rank(RANK, experts=layout))
        return
    extract(str(base), str(tuned), tmp_path / "out", rank(RANK))
    wanted = outputs(tuned)
    assert float((peft_outputs(base, tmp_path / "out") - wanted).abs().max()) < LOGITS


def test_a_parameter_of_a_module_with_modules_is_refused(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, "gpt_oss", with_all)
    with pytest.raises(CannotStore, match="self_attn: a parameter of its own differs"):
        extract(str(base), str(tuned), tmp_path / "out", rank(RANK))


def test_names_without_the_prefix_of_the_tuned_model(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, "gpt2")
    changed(base, lambda t: {n.removeprefix("transformer."): v for n, v in t.items()})
    extract(str(base), str(tuned), tmp_path / "out", rank(RANK))
    assert "transformer.h.0.attn.c_attn" in stored(tmp_path / "out", base)


def test_convolutions(tmp_path: Path) -> None:
    folders = [CASES["conv2d"].save_base(tmp_path / name) for name in ("base", "tuned")]
    for folder in folders:
        (folder / "config.json").write_text(json.dumps({"model_type": "conv"}))
    generator = torch.Generator().manual_seed(1)

    def tune(tensors: Tensors) -> Tensors:
        return {n: with_noise(n, v, generator) for n, v in tensors.items()}

    changed(folders[1], tune)
    base, tuned = folders
    extract(str(base), str(tuned), tmp_path / "out", rank(30))
    meant, found = deltas(base, tuned), stored(tmp_path / "out", base)
    assert meant["conv"].shape == (12, 27)
    assert all(relative(found[site], meant[site]) < 1e-5 for site in ("conv", "point", "line"))


# --- dtypes


def test_a_narrow_checkpoint_says_what_may_be_rounding(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, change=with_lora, dtype=torch.bfloat16)
    report = extract(str(base), str(tuned), tmp_path / "out", rank(RANK, dtype="fp32"))
    (note,) = [note for note in report.notes if "rounding of the tuned checkpoint" in note.what]
    assert "bf16" in note.what
    noise = report.output["checkpoint_rounding"]
    assert 1e-3 < noise < 0.1
    assert report.totals.error == pytest.approx(noise, rel=0.3)
    plain = extract(str(base), str(tuned), tmp_path / "own", rank(RANK))
    assert plain.output["dtype"] == "bf16"
    assert plain.totals.rounding > 0


def test_a_cast_alone_is_no_change(tmp_path: Path) -> None:
    """Most of a model that is saved in a narrower dtype than its base is rounding and nothing else."""
    base, tuned = pair(tmp_path)
    before, name = load_file(base / WEIGHTS), "model.layers.0.self_attn.q_proj.weight"
    changed(tuned, lambda t: {n: (t if n == name else before)[n].bfloat16() for n in t})
    report = extract(str(base), str(tuned), tmp_path / "out", rank(RANK))
    assert [line.site for line in report.sites] == [name.removesuffix(".weight")]
    assert any("base's values, rounded to the dtype" in note.what for note in report.notes)
    assert verify(tmp_path / "out", Questions(str(base), {"tuned": str(tuned)})).status == "pass"


def test_deltas_are_formed_in_float32_of_mixed_dtypes(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    changed(base, lambda t: {n: v.bfloat16() for n, v in t.items()})
    extract(str(base), str(tuned), tmp_path / "out", rank(64))
    name = "model.layers.0.self_attn.q_proj"
    before, after = (load_file(f / WEIGHTS)[f"{name}.weight"].double() for f in (base, tuned))
    assert relative(stored(tmp_path / "out", base)[name], after - before) < 1e-5


# --- outputs and wrong input


def test_other_targets(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, change=with_all)
    extract(str(base), str(tuned), tmp_path / "out", rank(RANK, target="native"))
    assert (tmp_path / "out" / "graph.json").is_file()
    with pytest.raises(CannotStore, match="no place for replace edits"):
        extract(str(base), str(tuned), tmp_path / "out.gguf", rank(RANK))
    options = rank(RANK, vectors="skip", ranks="uniform")
    report = extract(str(base), str(tuned), tmp_path / "out.gguf", options)
    assert report.format == "gguf"
    extract(str(base), str(tuned), tmp_path / "one.safetensors", options)
    meant, found = deltas(base, tuned), stored(tmp_path / "one.safetensors", base)
    assert all(relative(found[site], delta) < 1e-5 for site, delta in meant.items())


def quantised(base: Path, tuned: Path) -> None:
    changed(base, dict, quantization_config={"quant_method": "gptq"})


def other_shapes(base: Path, tuned: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    changed(tuned, lambda t: {**t, name: torch.ones(90, 64)})


def damaged(base: Path, tuned: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    changed(tuned, lambda t: {**t, name: torch.full_like(t[name], torch.nan)})


def whole_numbers(base: Path, tuned: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    changed(tuned, lambda t: {**t, name: t[name].to(torch.int8)})


def complex_numbers(base: Path, tuned: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    changed(base, lambda t: {**t, name: t[name].to(torch.complex64)})


def the_same(base: Path, tuned: Path) -> None:
    shutil.rmtree(tuned)
    shutil.copytree(base, tuned)


WRONG = {
    quantised: r"is quantised \(gptq\)",
    other_shapes: r"up_proj.weight is \[96, 64\] in the base and \[90, 64\] in the tuned",
    damaged: "up_proj: holds NaN or infinity in the tuned model",
    whole_numbers: "up_proj.weight is i8 in the tuned model: expected floating",
    complex_numbers: "input_layernorm.weight holds c64 values: expected real numbers",
    the_same: "nothing differs: it holds the same values as the base",
    lambda b, t: changed(
        t, dict, model_type="mistral"
    ): "is a mistral model and the base base is a llama",
    lambda b, t: (t / WEIGHTS).unlink(): "has no weights",
    lambda b, t: (t / "config.json").unlink(): "is not a model:",
}


@pytest.mark.parametrize("damage", WRONG, ids=lambda f: f.__name__)
def test_wrong_input_is_one_sentence(damage: Callable[[Path, Path], Any], tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    damage(base, tuned)
    with pytest.raises(InputError, match=WRONG[damage]) as caught:
        extract(str(base), str(tuned), tmp_path / "out", rank(RANK))
    assert len(caught.value.problems) == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_tensor_is_assumed_unchanged(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    changed(tuned, lambda t: {n: v for n, v in t.items() if n != "model.norm.weight"})
    report = extract(str(base), str(tuned), tmp_path / "out", rank(RANK))
    assert any("has no model.norm" in note.what for note in report.notes)


@pytest.mark.parametrize(
    "options",
    [{}, {"embeddings": "half"}, {"vectors": "lora"}, {"ranks": "odd"}, {"dtype": "int8"}],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], tmp_path: Path) -> None:
    budget = Budget(rank=1) if options else Budget()
    with pytest.raises(UsageError):
        extract("base", "tuned", tmp_path / "out", Extraction(budget=budget, **options))


def test_verify_finds_what_is_wrong(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    output = tmp_path / "out"
    extract(str(base), str(tuned), output, rank(2))
    with pytest.raises(InputError, match="pass --base DIR"):
        verify(output)
    path = output / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    save_file({**tensors, name: 1.5 * tensors[name]}, path, {"format": "pt"})
    found = run("verify", str(output), "--base", str(base), "--input", f"tuned={tuned}")
    assert found.code == 3
    changed(tuned, lambda t: {n: 2 * v for n, v in t.items()})
    found = run("verify", str(output), "--base", str(base), "--input", f"tuned={tuned}")
    assert (
        found.code,
        "is not the model that was extracted from" in " ".join(found.stdout.split()),
    ) == (3, True)


def test_the_report_explains_each_site(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, change=with_noise)
    extract(str(base), str(tuned), tmp_path / "out", rank(2))
    report = load_report(tmp_path / "out")
    assert report.base is not None
    assert report.base["fingerprint"] == open_base(str(base)).fingerprint
    assert report.inputs[0]["fingerprint"] == open_base(str(tuned)).fingerprint
    shown = run("explain", str(tmp_path / "out"), "layers.0.self_attn.q_proj").stdout
    assert "rank 2" in shown
    assert "truncation" in shown


# --- convert ADAPTER --rank | --energy | --max-error


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_dora_of_lower_rank_has_the_error_that_is_said(kept: int, tmp_path: Path) -> None:
    """Measured on W' = m / |W + BA| (W + BA), not on BA alone."""
    case = CASES["dora"]
    adapter, base = case.build(tmp_path / "dora", seed=3), case.save_base(tmp_path / "base")
    options = Options(budget=Budget(rank=kept), base=str(base))
    report = combine([InputSpec(str(adapter))], tmp_path / "out", options, command="convert")
    model = open_base(str(base))
    meant, found = (_effects(path, model) for path in (adapter, tmp_path / "out"))
    for line in report.sites:
        assert line.rank == kept
        assert line.error == pytest.approx(
            relative(found[line.module], meant[line.module]), rel=1e-4
        )
        assert line.error > 1e-3


def _effects(path: Path, base: Base) -> dict[str, torch.Tensor]:
    """What each edit adds to the base's weight, dense: W' - W."""
    adapter = open_input(InputSpec(str(path)), base).adapter
    found = {}
    for site, edits in adapter.sites().items():
        weight = base.weight(Site(site.module))
        assert weight is not None
        found[site.module] = delta_on(edits, weight).dense()
    return found


@pytest.mark.parametrize("energy", [0.5, 0.75, 0.9, 0.99])
def test_energy_keeps_exactly_the_fewest_values(energy: float, tmp_path: Path) -> None:
    adapter = CASES["plain"].build(tmp_path / "lora", seed=3, rank=8)
    options = Options(budget=Budget(energy=energy, per_site=True))
    report = combine([InputSpec(str(adapter))], tmp_path / "out", options, command="convert")
    edits = open_input(InputSpec(str(adapter))).adapter.edits
    for line, edit in zip(report.sites, sorted(edits, key=lambda e: str(e.site)), strict=True):
        assert str(edit.site) == line.site
        sigma = torch.linalg.svdvals(edit.factor.dense()).square()  # type: ignore[attr-defined]
        kept = sigma.cumsum(0) / sigma.sum()
        assert line.rank == int((kept < energy).sum()) + 1
        assert line.error**2 == pytest.approx(1 - float(kept[line.rank - 1]), rel=1e-3, abs=1e-9)
