"""Folders of valid files, each made once when it is first asked for: what mutations begin with.

A folder may hold adapters `a` and `b`, the `base` they belong to, a `tuned` one, what commands have made
of them (`merged`, `fused`, `extracted`), and a `recipe.yaml`: what is there says which commands fit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import console
import torch
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
TINY = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
Make = Callable[[Path], None]
ADAPTERS = ("a", "b")


UNFIT_FOR_GGUF = {
    *("lora_bias", "bias_lora_only", "bias_all", "bias_all_gpt2"),
    *("dora", "head_llama", "head_bert", "tokens"),
}


def succeeds(*arguments: object) -> bool:
    """Runs a command that may refuse what is asked."""
    return console.run(*map(str, arguments)).code == 0


def command(*arguments: object) -> None:
    """Runs a command that must succeed."""
    outcome = console.run(*map(str, arguments))
    assert outcome.code == 0, outcome.stderr + outcome.stdout


def base_of(folder: Path) -> tuple[object, ...]:
    """The option that names the base, if it is a model with a config."""
    return ("--base", folder / "base") if (folder / "base" / "config.json").exists() else ()


def recipe(folder: Path) -> None:
    """A recipe that merges all adapters of a folder, with most of what a recipe may say."""
    names = [path.name for path in sorted(folder.iterdir()) if path.stem in ADAPTERS]
    said = {
        "inputs": [
            {"source": f"./{name}", "name": Path(name).stem, "weight": 0.5} for name in names
        ],
        "method": "linear",
        "sites": [{"match": "*q_proj", "weights": {"a": 0.4, "b": [0.1, 0.9]}}],
        "ranks": "per-site",
        "allow": ["base"],
        "heads": "average",
        **({"base": "./base"} if base_of(folder) else {}),
    }
    (folder / "recipe.yaml").write_text(json.dumps(said, indent=1), encoding="utf-8")


def two_of_a_family(name: str) -> Make:
    """Two adapters as PEFT saves them, and their base."""

    def make(folder: Path) -> None:
        from families.cases import all_cases

        case = all_cases()[name]
        case.save_base(folder / "base")
        case.build(folder / "a")
        case.build(folder / "b", seed=1)
        recipe(folder)

    return make


def two_loras(name: str) -> Make:
    def make(folder: Path) -> None:
        from peft_cases import CASES

        case = CASES[name]
        case.save_base(folder / "base")
        case.build(folder / "a", seed=1)
        case.build(folder / "b", seed=2, rank=3)
        recipe(folder)

    return make


def converted(source: str, form: str, suffix: str = "") -> Make:
    """What another folder has, its adapters converted."""

    def make(folder: Path) -> None:
        held = made(source)
        if (held / "base").exists():
            shutil.copytree(held / "base", folder / "base")
        for name in ADAPTERS:
            given = ("--to", form, "-o", folder / f"{name}{suffix}", *base_of(folder))
            command("convert", held / name, *given)
        recipe(folder)

    return make


def pickled(source: str) -> Make:
    """Weights as torch.save writes them."""

    def make(folder: Path) -> None:
        shutil.copytree(made(source), folder, dirs_exist_ok=True)
        for path in folder.glob("[ab]/adapter_model.safetensors"):
            torch.save(load_file(path), path.with_suffix(".bin"))
            path.unlink()

    return make


def bare(source: str) -> Make:
    """Single files without a config beside them."""

    def make(folder: Path) -> None:
        for name in ADAPTERS:
            path = made(source) / name / "adapter_model.safetensors"
            shutil.copyfile(path, folder / f"{name}.safetensors")

    return make


def merged(source: str, *options: str) -> Make:
    """An output of two adapters, beside them; of one where two have no merge."""

    def make(folder: Path) -> None:
        shutil.copytree(made(source), folder, dirs_exist_ok=True)
        given = (*base_of(folder), "-o", folder / "merged")
        both = [folder / name for name in ADAPTERS]
        if not succeeds("combine", *both, *options, *given):
            command("combine", both[0], *given)

    return make


def fused(source: str, *options: str) -> Make:
    """An adapter in the weights of its base, beside both."""

    def make(folder: Path) -> None:
        shutil.copytree(made(source), folder, dirs_exist_ok=True)
        lenient = ("--allow", "base,loss", *options)
        command("fuse", folder / "base", folder / "a", "-o", folder / "fused", *lenient)

    return make


def extracted(folder: Path) -> None:
    """Two full checkpoints and the LoRA between them."""
    from made import model

    model(folder / "base", 0.0)
    model(folder / "tuned", 1.0)
    command("extract", folder / "base", folder / "tuned", "--rank", 2, "-o", folder / "extracted")


def recorded(source: Path, other: str = "", base: Path | None = None) -> Make:
    """An adapter of the fixtures, once more or with another one."""

    def make(folder: Path) -> None:
        shutil.copytree(source, folder / "a")
        shutil.copytree(source.parent / other if other else source, folder / "b")
        if base is not None:
            shutil.copytree(base, folder / "base")
        recipe(folder)

    return make


def cut_tiny(name: str, other: str) -> Make:
    """Adapters of a trained model, its base and tokenizer, of two layers."""

    def make(folder: Path) -> None:
        from fuse.tiny import cut

        for place, held in (("a", name), ("b", other), ("base", "base")):
            cut(FIXTURES / "tinyllama" / held, folder / place)
        recipe(folder)

    return make


def lora_for(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """Two small LoRAs for these matrices."""
    import samples

    for seed, name in enumerate(ADAPTERS):
        generator = torch.Generator().manual_seed(seed)
        sides = {
            module: (
                torch.randn(2, weight.shape[1], generator=generator),
                0.01 * torch.randn(weight.shape[0], 2, generator=generator),
            )
            for module, weight in expected.items()
            if weight.ndim == 2
        }
        samples.write(folder / name, sides)


def quantised(name: str) -> Make:
    """A base in a quantised layout, as its own package wrote it."""

    def make(folder: Path) -> None:
        shutil.copytree(FIXTURES / "quantised" / name, folder / "base")
        lora_for(folder, load_file(folder / "base" / "expected.safetensors"))
        (folder / "base" / "expected.safetensors").unlink()

    return make


def bitsandbytes(kind: str) -> Make:
    def make(folder: Path) -> None:
        from fuse.layers import MODULE, layer

        layer(folder / "base", kind, 24, 64)
        lora_for(folder, {MODULE: torch.empty(24, 64)})

    return make


def gguf_model(kind: str) -> Make:
    """A base as llama.cpp's converter writes it."""

    def make(folder: Path) -> None:
        from fuse.models import llama_base
        from oracles import llama_cpp

        plain = llama_base(folder / "plain", torch.float32)
        (folder / "base").mkdir()
        llama_cpp.model(plain, folder / "base" / "model.gguf", kind)
        shutil.rmtree(plain)
        lora_for(folder, {name: torch.empty(64, 64) for name in (TINY[0],)})

    return make


def sharded(folder: Path) -> None:
    """A base in several files with an index."""
    from fuse.models import llama_base

    llama_base(folder / "base", shard="60KB")
    lora_for(folder, {TINY[0]: torch.empty(64, 64), TINY[1]: torch.empty(96, 64)})


def interrupted(folder: Path) -> None:
    """What a fusion leaves that was killed after its second piece."""
    sharded(folder)
    child = os.fork()
    if not child:
        _die_while_fusing(folder)
    os.waitpid(child, 0)
    assert list(folder.glob(".out*")), "the fusion left nothing to go on with"


def _die_while_fusing(folder: Path) -> None:
    """Never returns."""
    from adaptmerge.commands.fuse import FuseOptions, fuse
    from adaptmerge.formats.inputs import InputSpec

    def die(done: int, total: int) -> None:
        if done > 1:
            os._exit(0)

    try:
        options = FuseOptions(jobs=1, allow=frozenset({"base", "loss"}))
        fuse(str(folder / "base"), [InputSpec(str(folder / "a"))], folder / "out", options, die)
    finally:
        os._exit(1)


def calibrated(folder: Path) -> None:
    """A base with a tokenizer, and what flows into its layers."""
    cut_tiny("lora-r8-perl", "lora-r8-cheaders")(folder)
    (folder / "text.txt").write_text("my $x = shift; print $x;\n" * 40, encoding="utf-8")
    given = ("--tokens", 128, "--rank", 4, "-o", folder / "moments.safetensors")
    command("calibrate", folder / "base", folder / "text.txt", *given)


def training_run(folder: Path) -> None:
    """Checkpoints of one training, of which the last is also one with heads."""
    import samples

    for number in (10, 20):
        samples.adapter(folder / "a" / f"checkpoint-{number}", number)
    heads = {f"{samples.PREFIX}score.weight": torch.ones(3, 9)}
    samples.adapter(folder / "b", 3, tensors=heads, modules_to_save=["score"], task_type="SEQ_CLS")
    recipe(folder)


def gated(folder: Path) -> None:
    """Edits that only this project's own format holds, in a file of an earlier version."""
    shutil.copytree(FIXTURES / "earlier" / "native-mixed", folder / "a")
    shutil.copytree(FIXTURES / "earlier" / "native-vera", folder / "b")
    recipe(folder)


def diffusers(folder: Path) -> None:
    """A file of a pipeline, and one of another training script."""
    values = {
        f"unet.down_blocks.0.attn1.to_q.lora_{side}.weight": torch.ones(4, 4) for side in "AB"
    }
    save_file(values, folder / "a.safetensors", {"lora_adapter_metadata": '{"unet.r": 4}'})
    kohya = {
        f"lora_unet_x.{leaf}": torch.ones(4, 4) for leaf in ("lora_up.weight", "lora_down.weight")
    }
    save_file({**kohya, "lora_unet_x.alpha": torch.tensor(2.0)}, folder / "b.safetensors")


def _of_families() -> Iterator[tuple[str, Make]]:
    from families.cases import all_cases

    for name in all_cases():
        own = f"family {name}"
        yield own, two_of_a_family(name)
        yield f"native {name}", converted(own, "native")
        yield f"pickled {name}", pickled(own)
        yield f"merged {name}", merged(own, "--to", "native", "--heads", "average")


def _of_loras() -> Iterator[tuple[str, Make]]:
    from peft_cases import CASES

    for name, case in CASES.items():
        own = f"lora {name}"
        yield own, two_loras(name)
        yield f"native {own}", converted(own, "native")
        yield f"pickled {own}", pickled(own)
        yield f"bare {own}", bare(own)
        yield f"merged {own}", merged(own, "--heads", "average", "--ranks", "per-site")
        if case.has_config:
            yield f"fused {own}", fused(own)
        if case.has_config and name not in UNFIT_FOR_GGUF:
            yield f"gguf {own}", converted(own, "gguf", ".gguf")


def _of_bases() -> Iterator[tuple[str, Make]]:
    for path in sorted((FIXTURES / "quantised").iterdir()):
        own = f"quantised {path.name}"
        yield own, quantised(path.name)
        if path.name != "mxfp4":  # holds experts, which its LoRAs do not name as the base does
            yield f"fused {own}", fused(own, "--max-loss", "100")
    for kind in ("nf4", "nf4,double", "fp4", "fp4,double", "int8"):
        yield f"bitsandbytes {kind}", bitsandbytes(kind)
        yield f"fused bitsandbytes {kind}", fused(f"bitsandbytes {kind}", "--max-loss", "100")
    for kind in ("F16", "BF16", "Q8_0", "Q4_0", "Q5_1"):
        yield f"model {kind}", gguf_model(kind)
        yield f"fused model {kind}", fused(f"model {kind}", "--max-loss", "100")
    for quant in ("nf4", "int8", "int8-channel", "fp8-channel"):
        yield f"anew {quant}", fused("lora plain", "--quant", quant, "--max-loss", "100")
    yield "sharded", sharded
    yield "fused sharded", fused("sharded", "--rounding", "adaptive")
    yield "interrupted", interrupted
    yield "calibrated", calibrated


def _of_fixtures() -> Iterator[tuple[str, Make]]:
    hub = FIXTURES / "adapterhub"
    for path in sorted(hub.glob("*/*/adapter_config.json")):
        name = path.parent.relative_to(hub).as_posix()
        yield f"adapterhub {name}", recorded(path.parent, base=path.parents[1] / "base")
    for path in sorted((FIXTURES / "earlier").glob("*/graph.json")):
        yield f"earlier {path.parent.name}", recorded(path.parent)
    for path in sorted((FIXTURES / "tinyllama").glob("*-*")):
        if path.name != "lora-r8-perl":
            yield f"trained {path.name}", cut_tiny(path.name, "lora-r8-perl")
    yield "classifiers", recorded(FIXTURES / "classifiers" / "kind", "language")


def _others() -> Iterator[tuple[str, Make]]:
    yield "extracted", extracted
    yield "training run", training_run
    yield "gated", gated
    yield "diffusers", diffusers
    for method in ("linear", "cat", "svd"):
        yield f"method {method}", merged("lora plain", "--method", method)
    yield "separate heads", merged("lora head_llama", "--heads", "separate")
    yield "concatenated heads", merged("lora head_llama", "--heads", "concat")


@cache
def kinds() -> dict[str, dict[str, Make]]:
    """All folders by what they are and their name."""
    return {
        "families": dict(_of_families()),
        "loras": dict(_of_loras()),
        "bases": dict(_of_bases()),
        "fixtures": dict(_of_fixtures()),
        "others": dict(_others()),
    }


class Store:
    """Where folders are kept once they are made."""

    root: Path | None = None


def made(name: str) -> Path:
    """The folder of this name."""
    assert Store.root is not None, "say first where folders are kept"
    folder = Store.root / name.replace(" ", "_").replace("/", "_").replace(",", "_")
    if not folder.exists():
        makers = {name: make for group in kinds().values() for name, make in group.items()}
        building = folder.with_name(f"{folder.name}.{os.getpid()}")
        building.mkdir(parents=True)
        makers[name](building)
        try:
            building.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(building)
    return folder
