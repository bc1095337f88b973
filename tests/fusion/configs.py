"""Tiny random models, one for each class that mlx-lm ships.

A class takes the fields of `TINY` that it knows, and what it needs beyond (`CONFIGS`). A window
is 8 tokens. Left out are bitnet, kimi_k3, muse_spark and prism_hadamard_qwen35, which need a GPU
or files, and olmo, which needs another package.
"""

from __future__ import annotations

import importlib
from typing import Any
from zlib import crc32

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

VOCABULARY = 64

# What a checkpoint's weights may be, by mlx-lm's names of the parameters.
FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "affine4": {"bits": 4, "group_size": 64},
    "affine4-g32": {"bits": 4, "group_size": 32},
    "affine8": {"bits": 8, "group_size": 64},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}
# Every size is a multiple of 64 where a matrix multiplies, so that each format fits.
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "rotary_dim": 8,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_qkv_bias": True,
    "use_qk_norm": True,
    "qk_norm": True,
    "post_norm": True,
    "tie_word_embeddings": False,
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"), 1e-5),
    # Multipliers.
    "logits_scaling": 2.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "dim_model_base": 32,
    "scale_depth": 1.4,
    "scale_emb": 2.0,
    # Experts.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "num_shared_expert"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size"), 64),
    "moe_num_experts": 4,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "decoder_sparse_step": 1,
    "moe_layer_freq": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "use_expert_bias": True,
    # Latent attention and its index.
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "index_topk": 2,  # so that the four tokens that dispatches are counted with exceed it
    # Linear attention, state spaces and convolutions.
    "layer_group_size": 2,
    "group_norm_size": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "conv_kernel": 4,
    "conv_bias": False,
    "conv_L_cache": 3,
    "use_conv_bias": True,
    "state_size": 16,
    "ssm_state_size": 16,
    "time_step_rank": 8,
    "time_step_limit": (0.001, 100.0),
    "n_groups": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    # GPT-2's names.
    "num_layers": 2,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
    "n_ctx": 64,
    "n_inner": 128,
}

SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
ROPE = {"rope_theta": 10000.0}
YARN = {"type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7}
LLAMA4_ROPE = {
    **ROPE,
    **YARN,
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 8,
}
GEMMA3 = {"sliding_window_pattern": 2, "query_pre_attn_scalar": 16}
GEMMA4 = {
    **SLIDING,
    "num_kv_shared_layers": 2,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "rope_parameters": {"sliding_attention": ROPE, "full_attention": {"rope_theta": 1e6}},
}
LFM2 = {
    "full_attn_idxs": [1, 3],
    "block_dim": 64,
    "block_multiple_of": 64,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
}
LONGCAT = {
    "ffn_hidden_size": 128,
    "expert_ffn_hidden_size": 64,
    "zero_expert_num": 1,
    "zero_expert_type": "identity",
    "attention_method": "MLA",
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}

# The 31 that are used most.
_PLAIN_USED = """
    ernie4_5 falcon_h1 gemma glm4 glm4_moe gpt_oss granite internlm2
    mamba2 mixtral olmo2 phi3 qwen2 qwen3 qwen3_5_moe qwen3_moe qwen3_next smollm3
    starcoder2
"""
USED: dict[str, dict[str, Any]] = {name: {} for name in _PLAIN_USED.split()} | {
    "cohere2": {"sliding_window_pattern": 2},
    # Experts of one group of two, by the best of it and by the sum of its two best.
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 2, "rope_scaling": YARN},
    "deepseek_v3": {"n_group": 2},
    "exaone4": {"sliding_window_pattern": "LG"},
    "gemma2": {"head_dim": 32},  # the least that the kernel for capped scores takes
    "gemma3_text": GEMMA3,
    "gemma4_text": GEMMA4,
    "lfm2": LFM2,
    "llama": {"tie_word_embeddings": True},
    "ministral3": {**SLIDING, "rope_parameters": LLAMA4_ROPE},
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "-", "E"]},
    "qwen3_5": {"num_experts": 0},
}
_PLAIN = """
    Klear apertus bailing_hybrid bailing_moe bailing_moe_linear bailing_moe_v3 cohere
    deepseek deepseek_v32 dots1 ernie4_5_moe exaone glm glm4_moe_lite gpt2 gpt_bigcode gptj
    granitemoe helium hunyuan_v1_dense internlm3 iquestloopcoder kimi_k25 kimi_vl laguna
    mamba mimo minicpm minimax mistral3 muse_glimmer nanbeige nanochat olmo3 olmoe phi
    phimoe pixtral qwen2_moe qwen2_vl qwen3_vl qwen3_vl_moe seed_oss solar_open
    stablelm talkie telechat3 youtu_llm
"""
CONFIGS: dict[str, dict[str, Any]] = USED | {name: {} for name in _PLAIN.split()}
CONFIGS |= {
    "afm7": {"hidden_dim": 64, "num_layers": 4, "num_kv_reuse_layers": 2},
    "afmoe": SLIDING,
    "baichuan_m1": {"sliding_window_layers": [1, 3], "conv_window": 2},
    "dbrx": {
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, **ROPE},
    },
    "exaone_moe": {**SLIDING, "is_moe_layer": [False, True, True, True]},
    "gemma3": GEMMA3,
    "gemma3n": {
        **GEMMA4,
        "rope_local_base_freq": 10000.0,
        "final_logit_softcapping": 30.0,
        "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0],
        "altup_num_inputs": 4,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 16,
    },
    "gemma4": GEMMA4,
    "glm_moe_dsa": {"rope_parameters": ROPE},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan": {
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 2.0},
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_linear": {
        "linear_attn_config": {
            "kda_layers": [1, 2, 4],
            "full_attn_layers": [3],
            "num_heads": 4,
            "head_dim": 32,
            "short_conv_kernel_size": 4,
        },
        "model_max_length": 64,
    },
    "lfm2-vl": LFM2,
    "lfm2_moe": LFM2,
    "lille-130m": {"block_size": 64, "n_kv_heads": 2},
    "llama4": {
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 128,
        "attention_chunk_size": 8,
        "interleave_moe_layer_step": 2,
    },
    "llama4_text": {"intermediate_size_mlp": 128, "no_rope_layers": [1, 1, 1, 0]},
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": LONGCAT,
    "mellum": {
        **SLIDING,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0, 1],
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 8,
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
        "v_head_dim": 16,
    },
    "minicpm3": {"rope_scaling": {"original_max_position_embeddings": 8}},
    "mistral4": {"rope_parameters": LLAMA4_ROPE},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "num_hidden_layers": 2,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 3.0}},
        ],
    },
    "olmo_hybrid": {
        "linear_allow_neg_eigval": True,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "openelm": {
        "num_transformer_layers": 2,
        "model_dim": 64,
        "ffn_dim_divisor": 32,
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 2.0],
    },
    "phixtral": {"num_vocab": VOCABULARY, "model_dim": 64},
    "plamo": {"n_shared_head": 2},
    "plamo2": {"hidden_size_per_head": 16},
    "plamo3": {"window_size": 8, "sliding_window_pattern": 2},
    "qwen": {"kv_channels": 16},
    "recurrent_gemma": {
        "num_key_value_heads": 1,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": 8,
        "block_types": ["recurrent", "attention"],
    },
    "rwkv7": dict.fromkeys(
        ("a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim", "decay_low_rank_dim"), 16
    ),
    "spark2_5": {"rope_parameters": {"sliding_attention": {}, "full_attention": {}}},
    "step3p5": {"num_attention_groups": 2, "moe_top_k": 2, "share_expert_dim": 64},
}


def config(name: str) -> dict[str, Any]:
    """The ``config.json`` of the tiny model of ``mlx_lm.models.NAME``."""
    own = {**TINY, **CONFIGS[name], "model_type": name}
    return {**own, "text_config": own}


def build(name: str, form: str = "float32", **own: Any) -> nn.Module:
    """The tiny model of ``mlx_lm.models.NAME`` with weights of a form: the same bits each time.

    ``own`` are fields of its configuration that are not as above.
    """
    module = importlib.import_module(f"mlx_lm.models.{name}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config(name) | own))
    random = np.random.RandomState(crc32(name.encode()))
    weights = []
    for path, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            bound = (3 / array.shape[-1]) ** 0.5 if array.ndim else 1
            low, high = (-bound, bound) if array.ndim > 1 else (0.5, 1.5)
            array = mx.array(random.uniform(low, high, array.shape).astype(np.float32))
        weights.append((path, array))
    model.update(tree_unflatten(weights))
    if FORMS[form]:
        group = FORMS[form]["group_size"]
        nn.quantize(
            model,
            **FORMS[form],
            class_predicate=lambda _, m: (
                hasattr(m, "to_quantized") and m.weight.shape[-1] % group == 0
            ),
        )
    model.eval()
    mx.eval(model.parameters())
    return model
