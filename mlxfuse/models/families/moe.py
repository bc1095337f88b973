"""Attention in every layer and experts in most: Mixtral, GLM-4.5, MiniMax-M2, dots, Ling, ..."""

from __future__ import annotations

from dataclasses import replace

from ...errors import UnsupportedError
from ..keys import Keys
from ..layers import FULL, SLIDING, layer_types, windows, with_windows
from ..pieces import (
    BARE_ROUTER,
    EXPERT_GROUPS,
    GROUPS,
    NORMS,
    POST_ATTENTION_NORMS,
    QK_NORMS,
    SHARED,
    WIDE_QK_NORMS,
    attention,
    biased_experts,
    experts,
    mlp,
    shared_expert,
)
from ..rope import Rope
from ..table import OUTER, Architecture, Config, Weight

SIGMOID, SOFTMAX = 2, 1
_BIAS = "mlp.gate.e_score_correction_bias"
# A layer has an MLP or experts.
_EITHER_GROUPS = GROUPS | SHARED | {"experts_gate_up": EXPERT_GROUPS["gate_up"]}


def _afmoe(key: Keys, config: Config) -> Config:
    """Layers that see everything rotate nothing."""
    slides = windows(key, config.layers, 4)
    window = key.count("attention.sliding_window")
    args = {
        "sliding_window": window,
        "layer_types": layer_types(slides),
        "num_dense_layers": config.args["first_k_dense_replace"],
        "route_norm": config.args["norm_topk_prob"],
        "route_scale": config.args["routed_scaling_factor"],
    }
    config = with_windows(config, slides, window, config.rope, None)
    return replace(config, args=config.args | args)


def _bailing(key: Keys, config: Config) -> Config:
    """The length of shared experts is that of one of them."""
    shared = config.sizes["shared_ff"] * key.count("expert_shared_count", 1)
    sigmoid = key("expert_gating_func", int) == SIGMOID
    args = {
        "moe_shared_expert_intermediate_size": shared,
        "num_shared_experts": 1,  # of that width: all of them side by side
        "score_function": "sigmoid" if sigmoid else "softmax",
    }
    sizes = config.sizes | {"shared_ff": shared}
    return replace(config, args=config.args | args, sizes=sizes)


def _exaone(key: Keys, config: Config) -> Config:
    """Layers that see everything rotate nothing."""
    slides = windows(key, config.layers, 4)
    window = key.count("attention.sliding_window")
    dense = config.args["first_k_dense_replace"]
    args = {
        "sliding_window": window,
        "layer_types": layer_types(slides),
        "is_moe_layer": [i >= dense for i in range(config.layers)],
    }
    config = with_windows(config, slides, window, config.rope, None)
    return replace(config, args=config.args | args)


def _ernie(key: Keys, config: Config) -> Config:
    step, dense = key("interleave_moe_layer_step", int, 1), config.args["first_k_dense_replace"]
    if step != 1:
        raise UnsupportedError(f"{key.name} with experts in every {step}th layer only")
    args = {
        "moe_num_experts": config.sizes["experts"],
        "moe_k": config.args["num_experts_per_tok"],
        "moe_layer_start_index": dense,
        "moe_num_shared_experts": config.args["num_shared_experts"],
    }
    return replace(config, args=config.args | args)


def _mellum(key: Keys, config: Config) -> Config:
    """Layers with a window rotate without scaling."""
    window = key("attention.sliding_window", int, 0)
    slides = windows(key, config.layers, 4) if window else [False] * config.layers
    if all(slides):
        raise UnsupportedError(f"{key.name} whose layers all have a sliding window")
    plain = Rope(config.rope.dims, config.rope.base)
    rope = {"rope_theta": config.rope.base}
    args = {
        "sliding_window": window,
        "layer_types": layer_types(slides),
        "rope_parameters": {FULL: rope, SLIDING: rope},
        "norm_topk_prob": True,  # in llama.cpp whatever the file says
    }
    config = with_windows(config, slides, window, plain, config.rope)
    return replace(config, args=config.args | args)


ROWS = (
    Architecture(
        name="afmoe",
        models="Trinity Nano, Mini and Large",
        module="mlx_lm.models.afmoe",
        layer={
            "attn_norm": Weight("input_layernorm", ("embd",)),
            "post_attention_norm": Weight("post_attention_layernorm", ("embd",)),
            "ffn_norm": Weight("pre_mlp_layernorm", ("embd",)),
            "post_ffw_norm": Weight("post_mlp_layernorm", ("embd",)),
            **attention(),
            "attn_gate": Weight("self_attn.gate_proj", ("q", "embd")),
            **QK_NORMS,
            **mlp(),
            **biased_experts(
                Weight("mlp.router.gate", ("experts", "embd")), "mlp.expert_bias", "mlp.experts"
            ),
        },
        groups=_EITHER_GROUPS,
        gatings=(SIGMOID,),
        configure=_afmoe,
    ),
    Architecture(
        name="bailingmoe2",
        models="Ling and Ring 2.0, mini and flash",
        module="mlx_lm.models.bailing_moe",
        outer={**OUTER, "token_embd": Weight("model.word_embeddings", ("vocab", "embd"))},
        layer={
            **NORMS,
            "attn_qkv": Weight("attention.query_key_value", ("qkv", "embd"), "optional"),
            "attn_output": Weight("attention.dense", ("embd", "o")),
            "attn_q_norm": Weight("attention.query_layernorm", ("head",)),
            "attn_k_norm": Weight("attention.key_layernorm", ("head",)),
            **mlp(),
            **biased_experts(
                Weight("mlp.gate.gate_proj", ("experts", "embd")),
                "mlp.gate.expert_bias",
                "mlp.switch_mlp",
            ),
        },
        attention_at="attention",
        groups=_EITHER_GROUPS | {"qkv": ("attn_qkv",)},
        args={"use_qk_norm": True, "moe_router_enable_expert_bias": True},
        partial_rope=True,
        fixed_head=True,
        gatings=(SIGMOID, SOFTMAX),
        groups_too=True,
        configure=_bailing,
    ),
    Architecture(
        name="dots1",
        models="dots.llm1",
        module="mlx_lm.models.dots1",
        layer={
            **NORMS,
            **attention(),
            **QK_NORMS,
            **mlp(),
            **biased_experts(BARE_ROUTER, _BIAS, "mlp.experts"),
        },
        groups=_EITHER_GROUPS,
        gatings=(SIGMOID,),
    ),
    Architecture(
        name="ernie4_5-moe",
        models="ERNIE-4.5-21B-A3B and 300B-A47B",
        module="mlxfuse.models.families.ernie_moe_model",
        layer={
            **NORMS,
            **attention("optional", "optional"),
            **mlp(),
            **biased_experts(
                Weight("mlp.gate", ("experts", "embd")),
                "mlp.e_score_correction_bias",
                "mlp.switch_mlp",
            ),
        },
        groups=_EITHER_GROUPS,
        args={"use_bias": False},
        rope_layout="interleaved",
        configure=_ernie,
    ),
    Architecture(
        name="exaone-moe",
        models="K-EXAONE-236B-A23B",
        module="mlx_lm.models.exaone_moe",
        layer={
            **NORMS,
            **attention(),
            **QK_NORMS,
            **mlp(),
            **biased_experts(BARE_ROUTER, _BIAS, "mlp.switch_mlp"),
        },
        groups=_EITHER_GROUPS,
        rope_types=("linear", "yarn", "llama3"),
        gatings=(SIGMOID,),
        configure=_exaone,
    ),
    Architecture(
        name="glm4moe",
        models="GLM-4.5, 4.6 and 4.7, GLM-4.5-Air, the text of GLM-4.5V and 4.6V",
        module="mlx_lm.models.glm4_moe",
        layer={
            **POST_ATTENTION_NORMS,
            **attention("optional"),
            **{name: replace(norm, optional=True) for name, norm in QK_NORMS.items()},
            **mlp(),
            **biased_experts(BARE_ROUTER, _BIAS, "mlp.switch_mlp"),
        },
        groups=_EITHER_GROUPS,
        args={"rope_scaling": None},
        present={"use_qk_norm": "blk.0.attn_q_norm.weight"},
        partial_rope=True,
        gatings=(SIGMOID,),
        may_tie=False,
    ),
    Architecture(
        name="hunyuan-moe",
        models="Hunyuan-A13B",
        module="mlxfuse.models.families.hunyuan_moe_model",
        layer={
            **NORMS,
            **attention("optional", "optional"),
            "attn_q_norm": Weight("self_attn.query_layernorm", ("head",)),
            "attn_k_norm": Weight("self_attn.key_layernorm", ("head",)),
            **experts("mlp.gate.wg", "mlp.switch_mlp"),
            **shared_expert("mlp.shared_mlp"),
        },
        groups=EXPERT_GROUPS | SHARED,
        args={
            "use_mixed_mlp_moe": True,
            "num_shared_expert": 1,
            "use_qk_norm": True,
            "use_cla": False,
            "cla_share_factor": 1,
            "rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"},
        },
        same={"intermediate_size": "shared_ff"},
        whole_experts=True,
        fixed_head=True,
        configure=lambda key, config: replace(
            config, args=config.args | {"moe_topk": config.args["num_experts_per_tok"]}
        ),
    ),
    Architecture(
        name="mellum",
        models="Mellum 2 12B-A2.5B",
        module="mlx_lm.models.mellum",
        layer=NORMS | attention() | QK_NORMS | experts("mlp.gate", "mlp.switch_mlp"),
        groups=EXPERT_GROUPS,
        configure=_mellum,
    ),
    Architecture(
        name="minimax-m2",
        models="MiniMax-M2, M2.1 and M2.5",
        module="mlx_lm.models.minimax",
        layer={
            **NORMS,
            **attention(),
            **WIDE_QK_NORMS,
            **experts("block_sparse_moe.gate", "block_sparse_moe.switch_mlp"),
            "exp_probs_b": Weight(
                "block_sparse_moe.e_score_correction_bias",
                ("experts",),
                bare=True,
                float32=True,
                suffix=".bias",
            ),
        },
        groups=EXPERT_GROUPS,
        args={"shared_intermediate_size": 0},
        same={"intermediate_size": "expert_ff", "rotary_dim": "rotary"},
        partial_rope=True,
        whole_experts=True,
        gatings=(SIGMOID,),
    ),
    Architecture(
        name="olmoe",
        models="OLMoE-1B-7B",
        module="mlx_lm.models.olmoe",
        layer=NORMS | attention() | WIDE_QK_NORMS | experts("mlp.gate", "mlp.switch_mlp"),
        groups=EXPERT_GROUPS,
        args={"norm_topk_prob": False},  # in both projects whatever the file says
        same={"intermediate_size": "expert_ff"},
        whole_experts=True,
    ),
)
