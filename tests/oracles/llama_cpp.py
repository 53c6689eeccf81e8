"""llama.cpp as the judge: a base folder as a GGUF model, and log-probabilities with an adapter.

The converter here is our own few lines, with numpy: the reordering of q and k is written out again.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "gpt2": "gpt2", "gemma": "gemma"}
ARCHITECTURES |= {"mixtral": "llama"}
LETTERS = {"w1": "gate", "w2": "down", "w3": "up"}
EXPERT = re.compile(
    r".*layers\.(?P<layer>\d+)\..*experts\.(?P<expert>\d+)\.(?P<leaf>w[123])\.weight"
)
Array = np.ndarray[Any, Any]


def interleaved(weight: Array, heads: int) -> Array:
    """Row 2i of each head from its first half, row 2i + 1 from its second."""
    rows = weight.reshape(heads, -1, weight.shape[-1])
    half = rows.shape[1] // 2
    turned = np.empty_like(rows)
    turned[:, 0::2], turned[:, 1::2] = rows[:, :half], rows[:, half:]
    result: Array = turned.reshape(weight.shape)
    return result


def model(
    base: Path, path: Path, kinds: Mapping[str, str] | str = "F32", tensors_per_file: int = 0
) -> Path:
    """The base as a GGUF model with a vocabulary of placeholders; returns its first file.

    kinds: the type of all matrices, or by a part of their names in GGUF; the rest is F32.
    """
    import gguf

    config = json.loads((base / "config.json").read_text("utf-8"))
    arch = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=tensors_per_file)
    _hyperparameters(writer, config, arch)
    _vocabulary(writer, config["vocab_size"])
    for name, value in stored(base, config, arch).items():
        kind = (
            kinds
            if isinstance(kinds, str)
            else next((k for p, k in kinds.items() if p in name), "F32")
        )
        number = gguf.GGMLQuantizationType[kind if value.ndim > 1 else "F32"]
        held = _quantised(value, number)
        writer.add_tensor(name, held, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.is_file() else next(iter(sorted(path.parent.glob(f"{path.stem}-00001-*"))))


def _quantised(value: Array, number: Any) -> Array:
    """As gguf-py does it, or where it cannot (K-quants) llama.cpp."""
    import gguf

    try:
        found: Array = gguf.quants.quantize(value, number)
    except NotImplementedError:
        held = make_gguf().quantised(torch.from_numpy(value), number)
        found = held.numpy()
    return found


def make_gguf() -> Any:
    """The script that made the recorded blocks."""
    path = Path(__file__).parents[2] / "fixtures" / "make_gguf.py"
    spec = importlib.util.spec_from_file_location("make_gguf", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stored(base: Path, config: dict[str, Any], arch: str) -> dict[str, Array]:
    """The tensors of a base as llama.cpp's converter lays them out, float32, by their names there."""
    import gguf

    blocks = config.get("num_hidden_layers", config.get("n_layer"))
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[arch], blocks)
    found: dict[str, Array] = {}
    experts: dict[str, dict[int, Array]] = {}
    for name, value in load_file(base / "model.safetensors").items():
        one = EXPERT.fullmatch(name)
        if one is None:
            key = names.get_name(name, (".weight", ".bias"))
            found[key] = _weight(name, value, config)
        else:
            key = f"blk.{one['layer']}.ffn_{LETTERS[one['leaf']]}_exps.weight"
            experts.setdefault(key, {})[int(one["expert"])] = value.astype(np.float32)
    stacked = {key: np.stack([of[i] for i in sorted(of)]) for key, of in experts.items()}
    return found | stacked


def _weight(name: str, value: Array, config: dict[str, Any]) -> Array:
    rotary = config["model_type"] in ("llama", "mixtral")
    for leaf, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if rotary and name.endswith((f"{leaf}.weight", f"{leaf}.bias")):
            turned = interleaved(value.reshape(len(value), -1), config[heads])
            value = turned.reshape(value.shape)
    if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        value = value.T
    if config["model_type"].startswith("gemma") and name.endswith("norm.weight"):
        value = value + 1
    return np.ascontiguousarray(value, dtype=np.float32)


def _hyperparameters(writer: Any, config: dict[str, Any], arch: str) -> None:
    hidden = config.get("hidden_size") or config["n_embd"]
    heads = config.get("num_attention_heads") or config["n_head"]
    writer.add_context_length(config.get("max_position_embeddings", config.get("n_positions")))
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.get("num_hidden_layers", config.get("n_layer")))
    writer.add_feed_forward_length(config.get("intermediate_size") or config["n_inner"])
    writer.add_head_count(heads)
    if arch == "gpt2":
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config.get("head_dim") or hidden // heads)
    writer.add_rope_freq_base(float(config["rope_parameters"]["rope_theta"]))
    writer.add_vocab_size(config["vocab_size"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if config.get("num_local_experts"):
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])


def _vocabulary(writer: Any, size: int) -> None:
    import gguf

    kinds = gguf.TokenType
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))][:size]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256][:size]
    more = range(len(tokens), size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *(f"t{number}" for number in more)])
    writer.add_token_scores([-float(number) for number in range(size)])
    writer.add_token_types([*types, *[kinds.NORMAL for _ in more]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def logprobs(model: Path, prompt: list[int], size: int, adapter: Path | None = None) -> Array:
    """Log-probabilities of all `size` tokens after the prompt, with float32 keys and values."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel = 64, 64, 64, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads, params.warmup, params.verbosity = 1, False, -1
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    served = xllamacpp.Server(params)
    answer = served.handle_completions({"prompt": prompt, "n_predict": 1, "n_probs": size})
    (choice,) = answer["choices"]
    (first,) = choice["logprobs"]["content"]
    found = {item["id"]: item["logprob"] for item in first["top_logprobs"]}
    return np.array([found[token] for token in range(size)])
