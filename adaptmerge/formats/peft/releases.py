"""Which PEFT release knows which families and config fields: the dataclasses of 0.3.0 to 0.21.2.

No patch release changes one.
"""

from __future__ import annotations

from collections.abc import Mapping

# Releases before 0.4 read no safetensors.
RELEASES = tuple(f"0.{minor}" for minor in range(4, 22))
COMMON = {
    "0.3": "base_model_name_or_path inference_mode peft_type task_type",
    "0.4": "auto_mapping revision",
    "0.18": "peft_version",
}
# peft_type: release to the fields that it brought; the first is the one that the family came with.
FIELDS: Mapping[str, Mapping[str, str]] = {
    "ADALORA": {
        "0.3": "beta1 beta2 deltaT init_r orth_reg_weight rank_pattern target_r tfinal tinit "
        "total_step",
    },
    "ADAMSS": {
        "0.19": "asa_importance_beta asa_schedule_exponent asa_target_subspaces "
        "asa_uncertainty_beta final_warmup init_warmup init_weights layers_pattern "
        "layers_to_transform mask_interval modules_to_save num_subspaces r subspace_rank "
        "svd_threshold target_modules use_asa use_dynamic_rank",
        "0.20": "random_seed",
    },
    "ADAPTION_PROMPT": {"0.3": "adapter_layers adapter_len target_modules"},
    "BEFT": {"0.20": "init_weights modules_to_save target_modules"},
    "BOFT": {
        "0.11": "bias boft_block_num boft_block_size boft_dropout boft_n_butterfly_factor "
        "fan_in_fan_out init_weights layers_pattern layers_to_transform modules_to_save "
        "target_modules",
        "0.14": "exclude_modules",
    },
    "BONE": {
        "0.14": "bias exclude_modules init_weights layers_pattern layers_to_transform "
        "modules_to_save r target_modules",
    },
    "C3A": {
        "0.16": "bias block_size block_size_pattern init_weights layers_pattern "
        "layers_to_transform modules_to_save target_modules",
    },
    "CARTRIDGE": {
        "0.19": "modules_to_save num_attention_heads num_frozen_tokens num_layers "
        "num_transformer_submodules num_virtual_tokens token_dim",
    },
    "CPT": {
        "0.14": "cpt_mask cpt_token_ids cpt_tokens_type_mask num_attention_heads num_layers "
        "num_transformer_submodules num_virtual_tokens opt_loss_decay_factor "
        "opt_projection_epsilon opt_projection_format_epsilon opt_weighted_loss_type token_dim "
        "tokenizer_name_or_path",
        "0.17": "modules_to_save",
    },
    "DEFT": {
        "0.20": "alpha bias decomposition_method deft_dropout exclude_modules fan_in_fan_out "
        "init_scale init_weights layers_pattern layers_to_transform modules_to_save para r "
        "target_modules",
    },
    "DELORA": {
        "0.18": "bias delora_lambda exclude_modules init_weights lambda_pattern layers_pattern "
        "layers_to_transform module_dropout modules_to_save r rank_pattern target_modules",
    },
    "FOURIERFT": {
        "0.12": "bias fan_in_fan_out init_weights layers_pattern layers_to_transform "
        "modules_to_save n_frequency n_frequency_pattern random_loc_seed scaling target_modules",
        "0.14": "exclude_modules",
    },
    "FROD": {
        "0.20": "bias fan_in_fan_out frod_dropout init_weights layers_pattern layers_to_transform "
        "modules_to_save progressbar projection_prng_key regularization_alpha "
        "runtime_offload_base_weight save_projection sparse_rate target_modules",
    },
    "GLORA": {
        "0.20": "bias config_A_B config_C config_D_E init_weights modules_to_save r target_modules",
    },
    "GRALORA": {
        "0.19": "alpha bias fan_in_fan_out gralora_dropout gralora_k hybrid_r init_weights "
        "layers_pattern layers_to_transform modules_to_save r target_modules",
    },
    "HIRA": {
        "0.20": "exclude_modules fan_in_fan_out hira_dropout init_weights layers_pattern "
        "layers_to_transform modules_to_save r rank_pattern target_modules",
    },
    "HRA": {
        "0.12": "apply_GS bias init_weights layers_pattern layers_to_transform modules_to_save r "
        "target_modules",
        "0.14": "exclude_modules",
    },
    "IA3": {
        "0.4": "fan_in_fan_out feedforward_modules init_ia3_weights modules_to_save target_modules",
        "0.14": "exclude_modules",
    },
    "LILY": {
        "0.19": "exclude_modules init_weights layers_pattern layers_to_transform modules_to_save "
        "num_B r scaling stride_A target_modules",
    },
    "LN_TUNING": {"0.11": "modules_to_save target_modules", "0.14": "exclude_modules"},
    "LOHA": {
        "0.6": "alpha alpha_pattern init_weights layers_pattern layers_to_transform "
        "module_dropout modules_to_save r rank_dropout rank_pattern target_modules "
        "use_effective_conv2d",
        "0.14": "exclude_modules",
    },
    "LOKR": {
        "0.6": "alpha alpha_pattern decompose_both decompose_factor init_weights layers_pattern "
        "layers_to_transform module_dropout modules_to_save r rank_dropout rank_pattern "
        "target_modules use_effective_conv2d",
        "0.14": "exclude_modules rank_dropout_scale",
    },
    "LORA": {
        "0.3": "bias fan_in_fan_out init_lora_weights lora_alpha lora_dropout modules_to_save r "
        "target_modules",
        "0.4": "layers_pattern layers_to_transform",
        "0.6": "alpha_pattern rank_pattern",
        "0.7": "loftq_config megatron_config megatron_core",
        "0.8": "use_rslora",
        "0.9": "use_dora",
        "0.10": "layer_replication",
        "0.12": "runtime_config",
        "0.14": "eva_config exclude_modules lora_bias",
        "0.15": "corda_config trainable_token_indices",
        "0.16": "qalora_group_size use_qalora",
        "0.17": "target_parameters",
        "0.18": "alora_invocation_tokens arrow_config ensure_weight_tying",
        "0.19": "lora_ga_config use_bdlora",
        "0.20": "monteclora_config velora_config",
        "0.21": "kasa_config",
    },
    "MISS": {
        "0.17": "bias exclude_modules init_weights layers_pattern layers_to_transform mini_r "
        "miss_dropout modules_to_save r target_modules",
    },
    "MULTITASK_PROMPT_TUNING": {
        "0.6": "num_ranks num_tasks prompt_tuning_init_state_dict_path prompt_tuning_init_task",
    },
    "OFT": {
        "0.7": "alpha_pattern block_share coft eps init_weights layers_pattern "
        "layers_to_transform module_dropout modules_to_save r rank_pattern target_modules",
        "0.14": "bias exclude_modules fan_in_fan_out oft_block_size",
        "0.16": "num_cayley_neumann_terms use_cayley_neumann",
    },
    "OSF": {
        "0.18": "effective_rank init_weights modules_to_save rank_pattern target_modules "
        "target_svd_config",
    },
    "PEANUT": {
        "0.19": "act_fn depth exclude_modules init_weights layers_pattern layers_to_transform "
        "modules_to_save r scaling target_modules",
    },
    "POLY": {
        "0.8": "init_weights modules_to_save n_skills n_splits n_tasks poly_type r target_modules",
        "0.14": "exclude_modules",
    },
    "PREFIX_TUNING": {
        "0.3": "encoder_hidden_size num_attention_heads num_layers num_transformer_submodules "
        "num_virtual_tokens prefix_projection token_dim",
        "0.17": "modules_to_save",
        "0.19": "init_weights",
    },
    "PROMPT_TUNING": {
        "0.3": "num_attention_heads num_layers num_transformer_submodules num_virtual_tokens "
        "prompt_tuning_init prompt_tuning_init_text token_dim tokenizer_name_or_path",
        "0.7": "tokenizer_kwargs",
        "0.17": "modules_to_save",
    },
    "PSOFT": {
        "0.19": "ab_svd_init cayley_neumann_eps exclude_modules fan_in_fan_out init_weights "
        "layers_pattern layers_to_transform modules_to_save num_cayley_neumann_terms psoft_alpha "
        "psoft_dropout psoft_mag_a psoft_mag_b psoft_orth psoft_svd psoft_svd_lowrank_niter r "
        "target_modules use_cayley_neumann",
        "0.20": "random_seed",
    },
    "PVERA": {
        "0.19": "bias d_initial fan_in_fan_out init_weights layers_pattern layers_to_transform "
        "modules_to_save projection_prng_key pvera_dropout r sample_at_inference save_projection "
        "target_modules",
        "0.20": "generator_seed",
    },
    "P_TUNING": {
        "0.3": "encoder_dropout encoder_hidden_size encoder_num_layers "
        "encoder_reparameterization_type num_attention_heads num_layers "
        "num_transformer_submodules num_virtual_tokens token_dim",
        "0.17": "modules_to_save",
    },
    "RANDLORA": {
        "0.16": "bias fan_in_fan_out init_weights layers_pattern layers_to_transform "
        "modules_to_save projection_prng_key r randlora_alpha randlora_dropout save_projection "
        "sparse target_modules very_sparse",
    },
    "ROAD": {"0.18": "group_size init_weights modules_to_save target_modules variant"},
    "SHADOW": {
        "0.21": "auxiliary_loss_weight exclude_modules init_weights layers_pattern "
        "layers_to_transform modules_to_save r shadow_alpha shadow_dropout shadow_hidden_size "
        "shadow_intermediate_size shadow_model shadow_num_attention_heads "
        "shadow_num_hidden_layers share_embeddings target_modules update_hidden_size",
    },
    "SHIRA": {
        "0.17": "fan_in_fan_out init_weights mask_type modules_to_save r random_seed "
        "target_modules",
    },
    "SUPERTUNING": {
        "0.21": "init_weights lora_alpha lora_dropout modules_to_save r save_precomputed_indices "
        "select_top sparsity target_modules",
    },
    "TINYLORA": {
        "0.19": "bias fan_in_fan_out init_v_bound init_weights layers_pattern layers_to_transform "
        "modules_to_save projection_seed r save_projection target_modules tinylora_dropout u "
        "weight_tying",
    },
    "TRAINABLE_TOKENS": {"0.15": "init_weights target_modules token_indices"},
    "UNILORA": {
        "0.20": "bias fan_in_fan_out init_theta_d_bound init_weights layers_pattern "
        "layers_to_transform modules_to_save proj_seed r save_indices target_modules "
        "theta_d_length unilora_dropout",
    },
    "VBLORA": {
        "0.13": "bias fan_in_fan_out init_logits_std init_vector_bank_bound layers_pattern "
        "layers_to_transform modules_to_save num_vectors r save_only_topk_weights target_modules "
        "topk vblora_dropout vector_length",
        "0.14": "exclude_modules",
    },
    "VERA": {
        "0.11": "bias d_initial fan_in_fan_out init_weights layers_pattern layers_to_transform "
        "modules_to_save projection_prng_key r save_projection target_modules vera_dropout",
    },
    "WAVEFT": {
        "0.18": "bias exclude_modules fan_in_fan_out init_weights layers_pattern "
        "layers_to_transform modules_to_save n_frequency n_frequency_pattern "
        "proportional_parameters random_loc_seed scaling target_modules use_idwt wavelet_family",
    },
    "XLORA": {
        "0.12": "adapters enable_softmax enable_softmax_topk global_scaling_weight hidden_size "
        "layerwise_scalings scaling_pass_value softmax_temperature top_k_lora "
        "use_trainable_adapters xlora_depth xlora_dropout_p xlora_size",
    },
}
INHERITS = {"ADALORA": "LORA", "MULTITASK_PROMPT_TUNING": "PROMPT_TUNING"}
# The release that no longer has a family or a field of it.
GONE = {("BONE", ""): "0.19", ("OFT", "rank_pattern"): "0.15", ("OFT", "alpha_pattern"): "0.15"}
SUCCESSORS = {"BONE": "MISS"}
