"""Fused checkpoints, loaded again with each layout's own library: the logits are those of a model in
float32 that holds the values which the checkpoint stands for.

GPTQModel, which transformers loads GPTQ and AWQ with, and mlx-lm are in no extra: GPTQModel 7.7 asks for a
later torch than is pinned, but runs with it (`pip install --no-deps gptqmodel==7.7.0`, then `optimum`,
`mlx-lm`, `mlx[cpu]` and what an import of gptqmodel misses). Not here: HQQ, of which transformers 5.23
loads no checkpoint; bitsandbytes, which is in `tests/fuse/test_quantised.py` and `test_quantised_anew.py`.
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

from adaptmerge.bases.open import open_base
from adaptmerge.commands.fuse import FuseOptions, fuse
from adaptmerge.formats.inputs import InputSpec
from adaptmerge.schemes.view import view_of

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False}
TOKENS = torch.arange(64).view(2, 32)
RANK, GROUP, WEIGHT = 4, 32, 0.1
NEAR = 1e-3  # of the adapter's effect
HALF = 2.0**-10  # of the logits: GPTQModel dequantises to float16, or computes in it
WIDE_GROUP = 128


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).to(dtype).save_pretrained(folder)
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


def load_decompressed(folder: Path) -> torch.nn.Module:
    """Without the rounding of inputs that FP8_DYNAMIC asks for."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    model = load(folder)
    logits(model)  # the first forward decompresses
    return model.apply(quantization.disable_quantization)


def gptq(source: Path, folder: Path) -> None:
    """Columns in the order of a permutation, with zeros of their own, as the first version stores them."""
    pytest.importorskip("gptqmodel")
    from gptqmodel import QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    said = {"bits": 4, "group_size": GROUP, "sym": False, "desc_act": True}

    def packed(linear: torch.nn.Linear) -> Any:
        inputs, outputs = linear.in_features, linear.out_features
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(2)) // GROUP
        parts = [linear.weight[:, order == group] for group in range(inputs // GROUP)]
        scale, zero = scales_and_zeros(torch.stack(parts, 1), least=1)
        layer = TorchLinear(**said, in_features=inputs, out_features=outputs)
        layer.pack_original(linear, scale, zero, order.int())
        convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(**said))
        return layer

    said_there = {**said, "quant_method": "gptq", "checkpoint_format": "gptq"}
    save_packed(source, folder, packed, ("qweight", "qzeros", "scales", "g_idx"), said_there)


def awq(source: Path, folder: Path) -> None:
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    said = {"bits": 4, "group_size": WIDE_GROUP}

    def packed(linear: torch.nn.Linear) -> Any:
        scale, zero = scales_and_zeros(linear.weight.view(linear.out_features, -1, WIDE_GROUP))
        sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
        layer = AwqTorchLinear(**said, **sizes, sym=False, desc_act=False, register_buffers=True)
        layer.pack(linear, scale, zero)
        return layer

    said_there = {**said, "quant_method": "awq", "version": "gemm", "zero_point": True}
    save_packed(source, folder, packed, ("qweight", "qzeros", "scales"), said_there)


def scales_and_zeros(groups: torch.Tensor, least: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """For 4 bits, from the ends of groups (rows, groups, inputs of a group)."""
    low, high = groups.amin(2), groups.amax(2)
    scale = ((high - low) / 15).half().float()
    return scale, (-low / scale).round().clamp(least, 15)


def save_packed(
    source: Path,
    folder: Path,
    packed: Callable[[torch.nn.Linear], Any],
    parts: tuple[str, ...],
    said: dict[str, Any],
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(source / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = value
            continue
        linear = torch.nn.Linear(value.shape[1], value.shape[0], bias=False).requires_grad_(False)
        linear.weight.copy_(value)
        layer = packed(linear)
        module = name.removesuffix("weight")
        tensors |= {f"{module}{part}": getattr(layer, part).contiguous() for part in parts}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))


def load_gptq(folder: Path) -> torch.nn.Module:
    """In plain torch: other kernels are compiled first."""
    pytest.importorskip("gptqmodel")
    from transformers import GPTQConfig

    return load(folder, quantization_config=GPTQConfig(bits=4, backend="torch"))


def load_awq(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, AwqConfig

    config = AwqConfig(bits=4, group_size=WIDE_GROUP, backend="torch_awq")
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, quantization_config=config
    )
    return model.eval()


def mlx(source: Path, folder: Path) -> None:
    """All linear layers, the head and the embedding."""
    library = pytest.importorskip("mlx_lm.utils")
    model, config = library.load_model(source)
    model, config = library.quantize_model(model, config, group_size=64, bits=4)
    folder.mkdir()
    library.save_model(folder, model)
    library.save_config(config, folder / "config.json")


class Mlx(torch.nn.Module):
    """A model of mlx-lm, computed without an accelerator."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        import mlx.core
        from mlx_lm.utils import load_model

        mlx.core.set_default_device(mlx.core.cpu)
        self.held = load_model(folder)[0]

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        import mlx.core as mx
        import numpy as np

        found = self.held(mx.array(input_ids.numpy())).astype(mx.float32)
        return SimpleNamespace(logits=torch.from_numpy(np.array(found)))


Made = tuple[Callable[[Path, Path], None], Callable[[Path], torch.nn.Module], float | None]
LAYOUTS: dict[str, Made] = {  # how it is made, how it is loaded, the error where it is not NEAR
    "fp8 block": (fp8, load_fp8, None),
    "torchao": (torchao, load, None),
    "compressed-tensors": (compressed_tensors, load, None),
    "gptq": (gptq, load_gptq, HALF),
    "awq": (awq, load_awq, HALF),
    "mlx": (mlx, Mlx, None),
}


def adapter(folder: Path, source: Path) -> Path:
    sides, generator = {}, torch.Generator().manual_seed(1)
    for name, weight in load_file(source / "model.safetensors").items():
        if "_proj" in name:
            down = torch.randn(RANK, weight.shape[1], generator=generator)
            up = torch.randn(weight.shape[0], RANK, generator=generator)
            size = float((up @ down).norm()) * 2  # alpha / r of the config that `samples` writes
            sides[name.removesuffix(".weight")] = (down, up * (float(weight.float().norm()) / size))
    return samples.write(folder, sides)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TOKENS).logits.double()
    return found


def of_values(source: Path, folder: Path) -> torch.Tensor:
    """The logits of the plain model with the values that we read from a checkpoint."""
    view, model = view_of(open_base(str(folder))), load(source)
    assert view.coded
    for name in view.coded:
        model.get_parameter(name).data.copy_(view.values.tensors[name].read())
    return logits(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_libraries_compute_with_the_values_that_are_meant(layout: str, tmp_path: Path) -> None:
    make, reload, rounded = LAYOUTS[layout]
    source, base, out = plain(tmp_path / "plain"), tmp_path / "base", tmp_path / "out"
    make(source, base)
    spec = InputSpec(str(adapter(tmp_path / "adapter", source)), "a", WEIGHT)
    report = fuse(str(base), [spec], out, FuseOptions(allow=frozenset({"loss"})))
    assert report.adapters["a"].gain == pytest.approx(1, abs=0.05)
    before, wanted, found = logits(reload(base)), of_values(source, out), logits(reload(out))
    effect = (wanted - of_values(source, base)).norm()
    assert effect > 0.02 * wanted.norm()
    assert (found - wanted).norm() < (rounded * wanted.norm() if rounded else NEAR * effect)
    assert (found - before).norm() > 0.9 * effect


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("quant", ["int4-g128", "int8-channel", "fp8-channel", "gptq-int4-g128"])
def test_what_is_quantised_anew_is_loaded(quant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """All weights have the values that are meant, to the bit, and the model computes with them."""
    source, out = plain(tmp_path / "plain", dtype), tmp_path / "out"
    given = adapter(tmp_path / "adapter", source)
    options = FuseOptions(quant=quant, allow=frozenset({"loss"}))
    report = fuse(str(source), [InputSpec(str(given), "a", WEIGHT)], out, options)
    assert report.adapters["a"].gain == pytest.approx(1, abs=0.01)
    by_gptq = quant.startswith("gptq")
    model, wanted = (load_gptq if by_gptq else load_decompressed)(out), of_values(source, out)
    packed = view_of(open_base(str(out))).values.tensors
    for name, value in weights(model, by_gptq).items():
        assert torch.equal(value, packed[name].read().to(value.dtype)), name
    effect = (logits(with_adapter(load(source), given)) - logits(load(source))).norm()
    assert effect > 0.02 * wanted.norm()
    apart = (logits(model) - wanted).norm()
    assert apart < (HALF * wanted.norm() if by_gptq else NEAR * effect)


def weights(model: torch.nn.Module, by_gptq: bool) -> dict[str, torch.Tensor]:
    """What the library makes of every quantised weight."""
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        layer: Any = module
        if name.endswith("_proj"):
            value = layer.dequantize_weight().T if by_gptq else layer.weight.detach()
            found[f"{name}.weight"] = value
    assert len(found) == 7 * SIZES["num_hidden_layers"]
    return found


@torch.no_grad()
def with_adapter(model: torch.nn.Module, given: Path) -> torch.nn.Module:
    for module, delta in samples.deltas(given).items():
        model.get_parameter(f"{module}.weight").add_(WEIGHT * delta)
    return model
