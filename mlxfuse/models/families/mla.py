"""Latent attention: DeepSeek V3 and R1, Kimi K2, GLM-4.7-Flash, GLM-5."""

from __future__ import annotations

from dataclasses import replace

from ...errors import GGUFError, UnsupportedError
from ..keys import Keys
from ..pieces import BARE_ROUTER, EXPERT_GROUPS, NORMS, SHARED, biased_experts, mlp
from ..table import Architecture, Config, Weight

SIGMOID = 2

_LATENT = {
    # With a latent vector of queries too, or without.
    "attn_q": Weight("self_attn.q_proj", ("whole_q", "embd")),
    "attn_q_a": Weight("self_attn.q_a_proj", ("q_lora", "embd")),
    "attn_q_a_norm": Weight("self_attn.q_a_layernorm", ("q_lora",)),
    "attn_q_b": Weight("self_attn.q_b_proj", ("q", "q_lora")),
    "attn_kv_a_mqa": Weight("self_attn.kv_a_proj_with_mqa", ("kv_a", "embd")),
    "attn_kv_a_norm": Weight("self_attn.kv_a_layernorm", ("kv_lora",)),
    "attn_k_b": Weight("self_attn.embed_q", ("heads", "kv_lora", "nope"), dense=True),
    "attn_v_b": Weight("self_attn.unembed_out", ("heads", "value", "kv_lora"), dense=True),
    "attn_output": Weight("self_attn.o_proj", ("embd", "o")),
}
_EXPERTS = biased_experts(BARE_ROUTER, "mlp.gate.e_score_correction_bias", "mlp.switch_mlp")
_INDEXER = {
    "indexer.k_norm": Weight("self_attn.indexer.k_norm", ("index_head",), "required"),
    "indexer.proj": Weight("self_attn.indexer.weights_proj", ("index_heads", "embd")),
    "indexer.attn_k": Weight("self_attn.indexer.wk", ("index_head", "embd")),
    "indexer.attn_q_b": Weight("self_attn.indexer.wq_b", ("index_q", "q_lora")),
}


def _latent(key: Keys, config: Config) -> Config:
    """Sizes, and what of YaRN is the scale of scores.

    llama.cpp's converter writes a tenth of the published ``mscale_all_dim``. Its magnitude of the
    rotated parts is 1 then; scores are multiplied by ``(0.1 mscale_all_dim ln(factor) + 1)^2``.
    """
    sizes, rope = config.sizes, config.rope
    queries = key("attention.q_lora_rank", int, 0)
    lora, nope = key.count("attention.kv_lora_rank"), sizes["head"] - rope.dims
    if nope < 1:
        raise GGUFError(
            key.file.path, f"{rope.dims} rotary dimensions of a head of {sizes['head']}"
        )
    sizes = sizes | {
        "q_lora": queries,
        "whole_q": 0 if queries else sizes["q"],
        "kv_lora": lora,
        "kv_a": lora + rope.dims,
        "nope": nope,
        "cache": lora + rope.dims,
    }
    scaling = None
    log = 10 * key("rope.scaling.yarn_log_multiplier", float, 0.0)
    if rope.yarn and log:
        scaling = {"type": "default", "factor": rope.factor, "mscale_all_dim": log}
        rope = replace(rope, scale=1.0)
    args = {
        "q_lora_rank": queries or None,
        "kv_lora_rank": lora,
        "qk_rope_head_dim": rope.dims,
        "qk_nope_head_dim": nope,
        "v_head_dim": sizes["value"],
        "rope_scaling": scaling,
    }
    return replace(config, sizes=sizes, args=config.args | args, rope=rope)


def _deepseek2(key: Keys, config: Config) -> Config:
    """Without the key llama.cpp takes a softmax of scores, but for GLM-4.7-Flash."""
    flash = config.layers in (47, 48) and config.sizes["vocab"] == 154880
    if not key("expert_gating_func", int, 0) and not flash:
        raise UnsupportedError(
            "deepseek2 whose experts are chosen by a softmax (DeepSeek V2); those of a sigmoid are "
            "supported (DeepSeek V3 and R1, Kimi K2, GLM-4.7-Flash)"
        )
    return _latent(key, config)


def _glm_dsa(key: Keys, config: Config) -> Config:
    """Every layer with an indexer of its own: GLM-5 and 5.1, which llama.cpp tells by the context.

    In the later ones layers share the choice of an earlier one, which mlx-lm's class cannot.
    """
    if config.args["max_position_embeddings"] >= 1 << 20:
        raise UnsupportedError("glm-dsa whose layers share an indexer (GLM-5.2 and later)")
    config = _latent(key, config)
    heads, head = (
        key.count("attention.indexer.head_count"),
        key.count("attention.indexer.key_length"),
    )
    sizes = {"index_heads": heads, "index_head": head, "index_q": heads * head}
    sizes["cache"] = config.sizes["cache"] + head
    args = {
        "index_n_heads": heads,
        "index_head_dim": head,
        "index_topk": key.count("attention.indexer.top_k"),
        "rope_parameters": {"rope_theta": config.rope.base, "rope_type": "default"},
        "indexer_rope_interleave": True,
    }
    return replace(config, sizes=config.sizes | sizes, args=config.args | args)


_DEEPSEEK = Architecture(
    name="deepseek2",
    models="GLM-4.7-Flash, DeepSeek V3, V3.1 and R1, Kimi K2",
    module="mlx_lm.models.deepseek_v3",
    layer=NORMS | _LATENT | mlp() | _EXPERTS,
    groups={"gate_up": ("ffn_gate", "ffn_up"), **SHARED}
    | {"experts_gate_up": EXPERT_GROUPS["gate_up"]},
    args={"topk_method": "noaux_tc"},
    rope_layout="interleaved",
    yarn_log=10.0,
    partial_rope=True,
    latent=True,
    gatings=(SIGMOID,),
    groups_too=True,
    may_tie=False,
    configure=_deepseek2,
)

ROWS = (
    _DEEPSEEK,
    replace(
        _DEEPSEEK,
        name="glm-dsa",
        models="GLM-5, GLM-5.1",
        module="mlx_lm.models.glm_moe_dsa",
        layer={**_DEEPSEEK.layer, **_INDEXER},
        args={"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
        configure=_glm_dsa,
    ),
)
