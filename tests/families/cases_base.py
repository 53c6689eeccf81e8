"""Families that depend on the base, and those of biases and norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families.cases import LINEARS, QV, FamilyCase, noise
from torch import Tensor, nn

GPT2 = ["c_attn", "mlp.c_proj"]
BERT = ["query", "value"]
BIASED = ["q_proj", "v_proj", "o_proj"]  # of qwen2: the first two have biases
CONVS = ["conv", "point"]
WIDTHS = [*LINEARS, "up_proj"]  # inputs of 64 and 96
SINGLE = 1e-5  # where PEFT itself rounds to float32
# an SVD in float32 mixes neighbours by 2^-24 |W| / gap (here to 320) for each of sqrt(64) roundings:
SPLIT = 1e-4  # that is 1.5e-4 of a direction's size, which is 0.16 to 0.35 of the change


def strong(model: nn.Module) -> None:
    noise(model, 0.5)


def case(name: str, config: str, targets: list[str], **options: Any) -> FamilyCase:
    own = {key: options.pop(key) for key in list(options) if key in FamilyCase.__dataclass_fields__}
    return FamilyCase(name, config, {"target_modules": targets, **options}, **own)


OFT = (
    case("oft", "OFTConfig", LINEARS, oft_block_size=16),
    case("oft_exact", "OFTConfig", LINEARS, oft_block_size=8, use_cayley_neumann=False),
    *(
        case(f"oft_{n}_terms", "OFTConfig", QV, oft_block_size=8, num_cayley_neumann_terms=n)
        for n in (2, 3, 4, 7)
    ),
    case("oft_blocks", "OFTConfig", WIDTHS, r=8, oft_block_size=0),
    case("oft_adjusted", "OFTConfig", WIDTHS, oft_block_size=33),
    case("oft_adjusted_blocks", "OFTConfig", WIDTHS, r=5, oft_block_size=0),
    case("oft_shared", "OFTConfig", LINEARS, oft_block_size=16, block_share=True),
    case("oft_shared_blocks", "OFTConfig", WIDTHS, r=4, oft_block_size=0, block_share=True),
    case("oft_coft", "OFTConfig", LINEARS, oft_block_size=8, coft=True, eps=0.5),
    case(
        "oft_coft_shared",
        "OFTConfig",
        LINEARS,
        oft_block_size=8,
        coft=True,
        eps=0.3,
        block_share=True,
    ),
    case("oft_bias", "OFTConfig", BIASED, oft_block_size=8, model="qwen2", bias="oft_only"),
    case("oft_bert", "OFTConfig", BERT, oft_block_size=8, model="bert"),
    # an untrained OFT on a 3 x 3 convolution already changes PEFT's outputs: only 1 x 1 is read
    case("oft_conv", "OFTConfig", ["point"], oft_block_size=3, model="conv"),
    case("oft_embedding", "OFTConfig", ["embed_tokens", "q_proj"], oft_block_size=16),
)


class Kernel:
    """What PEFT's CUDA extension computes, without which it forgets all butterfly factors but one."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


class BoftCase(FamilyCase):
    """A case in which PEFT has its extension."""

    def build(self, folder: Path, seed: int = 0, **overrides: Any) -> Path:
        self._extend()
        return super().build(folder, seed, **overrides)

    def loaded(self, folder: Path) -> Any:
        self._extend()
        return super().loaded(folder)

    @staticmethod
    def _extend() -> None:
        from peft.tuners.boft import layer

        layer._FBD_CUDA = Kernel


def boft(name: str, targets: list[str], model: str = "llama", **options: Any) -> BoftCase:
    return BoftCase(name, "BOFTConfig", {"target_modules": targets, **options}, model)


BOFT = (
    boft("boft", LINEARS, boft_block_size=8),
    boft("boft_blocks", WIDTHS, boft_block_size=0, boft_block_num=8),
    *(
        boft(f"boft_{n}_factors", LINEARS, boft_block_size=4, boft_n_butterfly_factor=n)
        for n in (2, 3, 4)
    ),
    boft("boft_wide", WIDTHS, boft_block_size=0, boft_block_num=4, boft_n_butterfly_factor=2),
    boft("boft_bias", BIASED, "qwen2", boft_block_size=8, bias="boft_only"),
    boft("boft_bert", BERT, "bert", boft_block_size=8, boft_n_butterfly_factor=2),
    boft("boft_conv", CONVS, "conv", boft_block_size=3),
    boft("boft_conv_factors", ["point"], "conv", boft_block_size=2, boft_n_butterfly_factor=2),
)
HRA = (
    case("hra", "HRAConfig", LINEARS, r=4),
    case("hra_odd", "HRAConfig", LINEARS, r=3),
    case("hra_gs", "HRAConfig", LINEARS, r=4, apply_GS=True),
    case("hra_bias", "HRAConfig", BIASED, r=4, model="qwen2", bias="hra_only"),
    case("hra_bert", "HRAConfig", BERT, r=4, model="bert"),
    case("hra_conv", "HRAConfig", CONVS, r=4, model="conv"),
    case("hra_conv_gs", "HRAConfig", CONVS, r=3, apply_GS=True, model="conv"),
)
ROAD = (
    *(
        case(f"road_{n}", "RoadConfig", LINEARS, variant=f"road_{n}", group_size=16)
        for n in (1, 2, 4)
    ),
    *(
        case(
            f"road_{n}_bias", "RoadConfig", BIASED, variant=f"road_{n}", group_size=8, model="qwen2"
        )
        for n in (1, 2, 4)
    ),
    case("road_pairs", "RoadConfig", BERT, group_size=2, model="bert"),
)
GLORA = (
    case("glora", "GloraConfig", LINEARS, r=3),
    *(
        case(f"glora_{form}", "GloraConfig", LINEARS, config_A_B=form)
        for form in ("vector", "constant")
    ),
    *(
        case(
            f"glora_bias_{ab}_{c}_{de}",
            "GloraConfig",
            BIASED,
            r=3,
            config_A_B=ab,
            config_C=c,
            config_D_E=de,
            model="qwen2",
        )
        for ab, c, de in (
            ("lora", "lora", "constant"),
            ("vector", "vector", "vector"),
            ("constant", "none", "vector"),
        )
    ),
    case(
        "glora_bias_only",
        "GloraConfig",
        BIASED,
        r=3,
        config_A_B="none",
        config_D_E="none",
        model="qwen2",
        merges=False,  # nothing is added to the weights
    ),
    case("glora_bert", "GloraConfig", BERT, r=3, model="bert"),
)
# PEFT takes the base apart in float32
OSF = (
    case("osf", "OSFConfig", LINEARS, tolerance=SPLIT),
    case("osf_rank", "OSFConfig", LINEARS, effective_rank=20, tolerance=SPLIT),
    case("osf_share", "OSFConfig", LINEARS, effective_rank=0.25, tolerance=SPLIT),
    case(
        "osf_patterns",
        "OSFConfig",
        LINEARS,
        effective_rank=20,
        rank_pattern={"v_proj": 7},
        tolerance=SPLIT,
    ),
    case("osf_bias", "OSFConfig", BIASED, model="qwen2", tolerance=SPLIT),
    case("osf_bert", "OSFConfig", BERT, model="bert", tolerance=SPLIT),
)
PSOFT = (
    case("psoft", "PsoftConfig", LINEARS, r=6, psoft_alpha=9),
    case("psoft_pissa", "PsoftConfig", LINEARS, r=6, ab_svd_init="pissa_init"),
    case("psoft_lowrank", "PsoftConfig", LINEARS, r=6, psoft_svd="lowrank", random_seed=3),
    case(
        "psoft_rounds", "PsoftConfig", LINEARS, r=5, psoft_svd="lowrank", psoft_svd_lowrank_niter=2
    ),
    case("psoft_free", "PsoftConfig", LINEARS, r=6, psoft_orth=False),
    case("psoft_plain", "PsoftConfig", LINEARS, r=6, psoft_mag_a=False, psoft_mag_b=False),
    case("psoft_outer", "PsoftConfig", LINEARS, r=6, psoft_mag_a=False),
    case("psoft_inner", "PsoftConfig", LINEARS, r=6, psoft_mag_b=False),
    case("psoft_series", "PsoftConfig", LINEARS, r=6, use_cayley_neumann=True),
    case(
        "psoft_series_bound",
        "PsoftConfig",
        LINEARS,
        r=6,
        use_cayley_neumann=True,
        num_cayley_neumann_terms=7,
        cayley_neumann_eps=0.4,
    ),
    case("psoft_bias", "PsoftConfig", BIASED, r=6, model="qwen2"),
    case("psoft_bert", "PsoftConfig", BERT, r=6, model="bert"),
)
PEANUT = (
    case("peanut", "PeanutConfig", LINEARS, r=4, scaling=0.5),
    *(
        case(f"peanut_{depth}_{act}", "PeanutConfig", LINEARS, r=4, depth=depth, act_fn=act)
        for depth, act in ((1, "relu"), (2, "gelu"), (3, "silu"))
    ),
    case("peanut_bias", "PeanutConfig", BIASED, r=4, depth=1, act_fn="tanh", model="qwen2"),
    case("peanut_bert", "PeanutConfig", BERT, r=4, model="bert"),
)
# PEFT computes DEFT in float32 whatever the model is in
DEFT = (
    case("deft", "DeftConfig", LINEARS, r=4, tolerance=SINGLE),
    case("deft_alpha", "DeftConfig", LINEARS, r=4, alpha=7, tolerance=SINGLE),
    case(
        "deft_qr",
        "DeftConfig",
        LINEARS,
        r=4,
        alpha=7,
        decomposition_method="qr",
        tolerance=SINGLE,
    ),
    case("deft_para", "DeftConfig", LINEARS, r=4, para=True, tolerance=SINGLE),
    case(
        "deft_para_qr",
        "DeftConfig",
        LINEARS,
        r=4,
        para=True,
        decomposition_method="qr",
        tolerance=SINGLE,
    ),
    case("deft_wide", "DeftConfig", QV, r=40, alpha=7, tolerance=SINGLE),
    case("deft_bias", "DeftConfig", BIASED, r=4, model="qwen2", bias="deft_only", tolerance=SINGLE),
    case("deft_bert", "DeftConfig", BERT, r=4, model="bert", tolerance=SINGLE),
    case("deft_gpt2", "DeftConfig", GPT2, r=4, model="gpt2", fan_in_fan_out=True, tolerance=SINGLE),
)
# PEFT keeps in float32 what the layers of FROD share
FROD = (
    case("frod", "FrodConfig", LINEARS, progressbar=False, tolerance=SINGLE),
    case("frod_dense", "FrodConfig", LINEARS, progressbar=False, sparse_rate=0.3, tolerance=SINGLE),
    case("frod_seed", "FrodConfig", QV, progressbar=False, projection_prng_key=5, tolerance=SINGLE),
    case(
        "frod_ridge",
        "FrodConfig",
        QV,
        progressbar=False,
        regularization_alpha=0.1,
        tolerance=SINGLE,
    ),
    case("frod_bias", "FrodConfig", BIASED, progressbar=False, model="qwen2", tolerance=SINGLE),
    case(
        "frod_bert",
        "FrodConfig",
        [*BERT, "output.dense"],
        progressbar=False,
        model="bert",
        tolerance=SINGLE,
    ),
    case(
        "frod_gpt2",
        "FrodConfig",
        GPT2,
        progressbar=False,
        model="gpt2",
        fan_in_fan_out=True,
        tolerance=SINGLE,
    ),
)


class AdamssCase(FamilyCase):
    """A case in which PEFT's layers, which remember the dtype they were made in, know that of the model."""

    def loaded(self, folder: Path) -> Any:
        model = super().loaded(folder)
        for module in model.modules():
            if hasattr(module, "adamss_newB"):
                module.dtype = torch.float64
        return model


def adamss(name: str, targets: list[str], model: str = "llama", **options: Any) -> AdamssCase:
    return AdamssCase(name, "AdamssConfig", {"target_modules": targets, **options}, model)


ADAMSS = (
    adamss("adamss", LINEARS, r=8, num_subspaces=3, subspace_rank=2),
    adamss("adamss_seed", LINEARS, r=8, num_subspaces=4, random_seed=3),
    adamss("adamss_capped", LINEARS, r=100, num_subspaces=3, subspace_rank=40),
    adamss("adamss_dynamic", LINEARS, r=8, num_subspaces=3, subspace_rank=4, use_dynamic_rank=True),
    adamss("adamss_bias", BIASED, "qwen2", r=8, num_subspaces=3),
    adamss("adamss_bert", BERT, "bert", r=8, num_subspaces=3),
)
BEFT = (
    case("beft", "BeftConfig", ["q_proj", "v_proj"], model="qwen2"),
    case("beft_bert", "BeftConfig", BERT, model="bert"),
    # PEFT cannot merge where the base has no bias; its forward adds the vector all the same
    case("beft_new", "BeftConfig", BIASED, model="qwen2", merges=False),
)
LN_TUNING = (
    case("ln_tuning", "LNTuningConfig", ["input_layernorm", "model.norm"], randomise=strong),
    case("ln_tuning_gpt2", "LNTuningConfig", ["ln_1", "ln_f"], model="gpt2"),
    # PEFT's merge leaves the head of LN tuning in its wrapper
    case("ln_tuning_bert", "LNTuningConfig", ["LayerNorm"], model="bert", merges=False),
)
CASES = (
    *(*OFT, *BOFT, *HRA, *ROAD, *GLORA, *OSF, *PSOFT),
    *(*PEANUT, *DEFT, *FROD, *ADAMSS, *BEFT, *LN_TUNING),
)
