"""Fused checkpoints, loaded again by transformers with each layout's own library: the logits are those of a
model in float32 that holds the values which the checkpoint stands for.

Not here: GPTQ, AWQ and MLX, whose layers run on accelerators only; HQQ, of which transformers 5.23 loads no
checkpoint; bitsandbytes, which is in `tests/fuse/test_quantised.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from safetensors.torch import load_file, save_file

from adaptmerge.base import open_base
from adaptmerge.fuse import FuseOptions, fuse
from adaptmerge.inputs import InputSpec
from adaptmerge.quantised import view_of

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False}
TOKENS = torch.arange(64).view(2, 32)
RANK, GROUP, WEIGHT = 4, 32, 0.1
NEAR = 1e-3  # of the adapter's effect


def plain(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **options
    )
    return model.eval()


def load_fp8(folder: Path) -> torch.nn.Module:
    from transformers import FineGrainedFP8Config

    return load(folder, quantization_config=FineGrainedFP8Config(dequantize=True)).float()


def fp8(source: Path, folder: Path) -> None:
    from transformers.integrations import finegrained_fp8

    said = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    options = SimpleNamespace(weight_block_size=[128, 128], scale_fmt="float")
    quantiser = finegrained_fp8.Fp8Quantize(SimpleNamespace(quantization_config=options))
    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(source / "model.safetensors").items():
        tensors |= quantiser.convert({name: value}) if "_proj" in name else {name: value}
    folder.mkdir()
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors"
    )
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {**said, "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))


def torchao(source: Path, folder: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    load(source, quantization_config=config).save_pretrained(folder)  # type: ignore[operator]


def compressed_tensors(source: Path, folder: Path) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors import quantization

    weights = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    model: Any = load(source).requires_grad_(False)
    config = quantization.QuantizationConfig(config_groups=groups, ignore=["lm_head"])
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            blocks = module.weight.view(len(module.weight), -1, GROUP)
            args = module.quantization_scheme.weights
            scale, _ = quantization.utils.calculate_qparams(blocks.amin(2), blocks.amax(2), args)
            module.weight_scale.data.copy_(scale)
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


LAYOUTS: dict[str, tuple[Callable[[Path, Path], None], Callable[[Path], torch.nn.Module]]] = {
    "fp8 block": (fp8, load_fp8),
    "torchao": (torchao, load),
    "compressed-tensors": (compressed_tensors, load),
}


def adapter(folder: Path, source: Path) -> Path:
    sides, generator = {}, torch.Generator().manual_seed(1)
    for name, weight in load_file(source / "model.safetensors").items():
        if "_proj" in name:
            down = torch.randn(RANK, weight.shape[1], generator=generator)
            up = torch.randn(weight.shape[0], RANK, generator=generator)
            size = float((up @ down).norm()) * 2  # alpha / r of the config that `samples` writes
            sides[name.removesuffix(".weight")] = (down, up * (float(weight.norm()) / size))
    return samples.write(folder, sides)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TOKENS).logits.double()
    return found


def of_values(source: Path, folder: Path) -> torch.Tensor:
    """The logits of the plain model with the values that we read from a checkpoint."""
    view, model = view_of(open_base(str(folder))), load(source)
    assert view.packed
    for name in view.packed:
        model.get_parameter(name).data.copy_(view.base.tensors[name].read())
    return logits(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_computes_with_the_values_that_are_meant(layout: str, tmp_path: Path) -> None:
    make, reload = LAYOUTS[layout]
    source, base, out = plain(tmp_path / "plain"), tmp_path / "base", tmp_path / "out"
    make(source, base)
    spec = InputSpec(str(adapter(tmp_path / "adapter", source)), "a", WEIGHT)
    report = fuse(str(base), [spec], out, FuseOptions(allow=frozenset({"loss"})))
    assert report.adapters["a"].gain == pytest.approx(1, abs=0.05)
    before, wanted, found = logits(reload(base)), of_values(source, out), logits(reload(out))
    effect = (wanted - of_values(source, base)).norm()
    assert effect > 0.02 * wanted.norm()
    assert (found - wanted).norm() < NEAR * effect
    assert (found - before).norm() > 0.9 * effect
