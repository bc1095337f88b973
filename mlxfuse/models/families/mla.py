"""Latent attention: DeepSeek, Kimi K2, GLM-4.7-Flash, GLM-5, Mistral Small 4."""

from __future__ import annotations

from dataclasses import replace

from ...errors import GGUFError, UnsupportedError
from ..keys import Keys
from ..pieces import BARE_ROUTER, EXPERT_GROUPS, NORMS, SHARED, biased_experts, mlp
from ..table import Architecture, Config, Weight

SIGMOID, SOFTMAX = 2, 1

LATENT = {
    # With a latent vector of queries too, or without.
    "attn_q": Weight("self_attn.q_proj", ("whole_q", "embd")),
    "attn_q_a": Weight("self_attn.q_a_proj", ("q_lora", "embd")),
    "attn_q_a_norm": Weight("self_attn.q_a_layernorm", ("q_lora",)),
    "attn_q_b": Weight("self_attn.q_b_proj", ("q", "q_lora")),
    "attn_kv_a_mqa": Weight("self_attn.kv_a_proj_with_mqa", ("kv_a", "embd")),
    "attn_kv_a_norm": Weight("self_attn.kv_a_layernorm", ("kv_lora",)),
    "attn_k_b": Weight("self_attn.embed_q", ("heads", "kv_lora", "nope"), headed=True),
    "attn_v_b": Weight("self_attn.unembed_out", ("heads", "value", "kv_lora"), headed=True),
    "attn_output": Weight("self_attn.o_proj", ("embd", "o")),
}
_EXPERTS = biased_experts(BARE_ROUTER, "mlp.gate.e_score_correction_bias", "mlp.switch_mlp")
_KIMI_EXPERTS = biased_experts(
    Weight("mlp.gate", ("experts", "embd")), "mlp.e_score_correction_bias", "mlp.switch_mlp"
)
_MISTRAL_EXPERTS = {n: w for n, w in _KIMI_EXPERTS.items() if n != "exp_probs_b"}
_INDEXER = {
    "indexer.k_norm": Weight("self_attn.indexer.k_norm", ("index_head",), "required"),
    "indexer.proj": Weight("self_attn.indexer.weights_proj", ("index_heads", "embd")),
    "indexer.attn_k": Weight("self_attn.indexer.wk", ("index_head", "embd")),
    "indexer.attn_q_b": Weight("self_attn.indexer.wq_b", ("index_q", "q_lora")),
}


def latent(key: Keys, config: Config) -> Config:
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


def _softmax(key: Keys) -> bool:
    """Whether experts are chosen by a softmax of scores; without the key, but in GLM-4.7-Flash."""
    embedding = key.file.tensors.get("token_embd.weight")
    flash = key("block_count", int, 0) in (47, 48) and embedding and embedding.shape[0] == 154880
    return (key("expert_gating_func", int, 0) or (SIGMOID if flash else SOFTMAX)) == SOFTMAX


def _deepseek_v2(key: Keys, config: Config) -> Config:
    """Groups are judged by the best of their experts in the published code (``topk_method`` is
    ``group_limited_greedy``), by the best two in llama.cpp.
    """
    if config.args["n_group"] > 1:
        raise UnsupportedError(
            "deepseek2 whose experts are chosen by a softmax and by groups (DeepSeek V2, 236B); "
            "without groups they are supported (DeepSeek V2 Lite)"
        )
    return latent(key, config)


def _whole_log(key: Keys) -> None:
    """llama.cpp's scale of scores is the published one for one ``mscale_all_dim`` only, which all
    published models have.
    """
    name = "rope.scaling.yarn_log_multiplier"
    log = key(name, float, 0.0)
    if log and abs(log - 0.1) > 1e-6:
        raise UnsupportedError(f"{key.name}.{name} is {log:g}; expected 0.1, or none")


def _mistral4(key: Keys, config: Config) -> Config:
    """Queries grow with the position, in steps of a length that has a key of its own."""
    _whole_log(key)
    config = latent(key, config)
    scaling = config.args["rope_scaling"] or {}
    rope = {
        **scaling,
        "type": "yarn" if scaling else "default",
        "rope_theta": config.rope.base,
        "llama_4_scaling_beta": key("attention.temperature_scale", float, 0.0),
        "original_max_position_embeddings": key("attention.temperature_length", int, 0)
        or config.args["max_position_embeddings"],
    }
    shared = config.args["n_shared_experts"] or None
    args = {"rope_parameters": rope, "n_shared_experts": shared}
    return replace(config, args=config.args | args)


def _indexed(key: Keys, config: Config) -> Config:
    """An indexer in each layer chooses the tokens that it attends to."""
    _whole_log(key)
    config = latent(key, config)
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
        "indexer_rope_interleave": False,
    }
    return replace(config, sizes=config.sizes | sizes, args=config.args | args)


def _glm_dsa(key: Keys, config: Config) -> Config:
    """From GLM-5.2 on, layers use the choice of an earlier one; llama.cpp tells by the context."""
    config, layers = _indexed(key, config), config.layers
    default = [1] * layers
    if config.args["max_position_embeddings"] >= 1 << 20:
        default = [int(i < 2 or i % 4 == 2) for i in range(layers)]
    name = "attention.indexer.types"
    listed = f"{key.name}.{name}" in key.file.metadata
    types = key.each(name, layers) if listed else default
    if not types[0]:
        raise GGUFError(key.file.path, f"{key.name}.{name} is 0 for layer 0; expected 1")
    args = {
        "rope_parameters": {
            "rope_theta": config.rope.base,
            "rope_type": "default",
            **(config.args["rope_scaling"] or {}),
        },
        "indexer_rope_interleave": True,
        "own_indexers": [bool(one) for one in types],
    }
    # One number for each token of a layer that has no indexer, as keys.
    cache = config.sizes["cache"] - config.sizes["index_head"]
    without = {"index_heads": 0, "index_head": 0, "index_q": 0, "cache": cache + 1}
    given = config.by_layer or ({},) * layers
    return replace(
        config,
        args=config.args | args,
        by_layer=tuple(
            {**own, **({} if one else without)} for own, one in zip(given, types, strict=True)
        ),
    )


def _kimi_linear(key: Keys, config: Config) -> Config:
    """Layers without key-value heads have a delta net with a decay of each channel."""
    if key("attention.q_lora_rank", int, 0):
        raise UnsupportedError("kimi-linear with a latent vector of queries (q_lora_rank)")
    config, layers = latent(key, config), config.layers
    counts = key.each("attention.head_count_kv", layers)
    if not 0 < sum(count > 0 for count in counts) < layers:
        raise UnsupportedError(
            f"kimi-linear whose layers are all of one kind: {key.name}.attention.head_count_kv is "
            f"{counts[:8]}; expected 0 where there is a delta net, and heads where there is none"
        )
    heads, head = config.sizes["heads"], key.count("kda.head_dim")
    kernel = key.count("ssm.conv_kernel")
    inner = heads * head
    sizes = {"kda_head": head, "kda_heads": heads, "kda": inner, "kernel": kernel}
    args = {
        "linear_attn_config": {
            "kda_layers": [i + 1 for i, count in enumerate(counts) if not count],
            "num_heads": heads,
            "head_dim": head,
            "short_conv_kernel_size": kernel,
        },
        "model_max_length": config.args["max_position_embeddings"],
        "num_experts_per_token": config.args["num_experts_per_tok"],
        "moe_renormalize": True,  # in llama.cpp whatever the file says
        "moe_router_activation_func": "softmax" if _softmax(key) else "sigmoid",
        "num_expert_group": config.args["n_group"],
        "mla_use_nope": True,
    }
    # The last inputs of three convolutions in float16, and a float32 matrix for each head.
    kept = {"cache": 0, "state": 3 * 2 * (kernel - 1) * inner + 4 * inner * head}
    given = config.by_layer or ({},) * layers
    return replace(
        config,
        sizes=config.sizes | sizes,
        args=config.args | args,
        ropes=(None,) * layers,
        kinds=tuple("" if count else "delta" for count in counts),
        by_layer=tuple(
            {**own, **({} if count else kept)} for own, count in zip(given, counts, strict=True)
        ),
    )


def _by_scores(key: Keys) -> Architecture | None:
    return _DEEPSEEK_V2 if _softmax(key) else None


_DELTA = {
    **{f"attn_{n}": Weight(f"self_attn.{n}_proj", ("kda", "embd")) for n in "qkv"},
    **{f"ssm_conv1d_{n}": Weight(f"self_attn.{n}_conv.conv", ("kda", "kernel")) for n in "qkv"},
    "ssm_f_a": Weight("self_attn.f_a_proj", ("kda_head", "embd")),
    "ssm_f_b": Weight("self_attn.f_b_proj", ("kda", "kda_head")),
    "ssm_g_a": Weight("self_attn.g_a_proj", ("kda_head", "embd")),
    "ssm_g_b": Weight("self_attn.g_b_proj", ("kda", "kda_head")),
    "ssm_beta": Weight("self_attn.b_proj", ("kda_heads", "embd")),
    "ssm_a": Weight(
        "self_attn.A_log", ("kda_heads",), bare=True, suffix="", float32=True, log=True
    ),
    "ssm_dt": Weight("self_attn.dt_bias", ("kda",), bare=True, suffix=".bias", float32=True),
    "ssm_norm": Weight("self_attn.o_norm", ("kda_head",)),
    "attn_output": Weight("self_attn.o_proj", ("embd", "kda")),
}
_DEEPSEEK = Architecture(
    name="deepseek2",
    models="GLM-4.7-Flash, DeepSeek V2 Lite, V3, V3.1 and R1, Kimi K2",
    module="mlx_lm.models.deepseek_v3",
    layer=NORMS | LATENT | mlp() | _EXPERTS,
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
    configure=latent,
    choose=_by_scores,
)
# Its files say "deepseek2" too.
_DEEPSEEK_V2: Architecture = replace(
    _DEEPSEEK,
    module="mlxfuse.models.families.deepseek_v2_model",
    gatings=(SOFTMAX,),
    configure=_deepseek_v2,
    choose=None,
)
_INDEXED = replace(_DEEPSEEK, layer={**_DEEPSEEK.layer, **_INDEXER}, choose=None)
_DSA_ARGS = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}

ROWS = (
    _DEEPSEEK,
    replace(
        _INDEXED,
        name="deepseek32",
        models="DeepSeek V3.2",
        module="mlx_lm.models.deepseek_v32",
        args=_DSA_ARGS,
        configure=_indexed,
    ),
    replace(
        _INDEXED,
        name="glm-dsa",
        models="GLM-5, GLM-5.1, GLM-5.2",
        module="mlxfuse.models.families.glm_dsa_model",
        args=_DSA_ARGS,
        configure=_glm_dsa,
    ),
    replace(
        _DEEPSEEK,
        name="kimi-linear",
        models="Kimi Linear 48B-A3B",
        module="mlx_lm.models.kimi_linear",
        layer=NORMS | LATENT | mlp() | _KIMI_EXPERTS,
        other_layers={"delta": NORMS | _DELTA | mlp() | _KIMI_EXPERTS},
        groups={**_DEEPSEEK.groups, "qkv": ("attn_q", "attn_k", "attn_v")},
        args={},
        uneven=("attention.head_count_kv",),
        gatings=(SIGMOID, SOFTMAX),
        configure=_kimi_linear,
        choose=None,
    ),
    replace(
        _DEEPSEEK,
        name="mistral4",
        models="Mistral Small 4",
        module="mlx_lm.models.mistral4",
        layer=NORMS | LATENT | mlp() | _MISTRAL_EXPERTS,
        args={},
        gatings=(SOFTMAX,),
        configure=_mistral4,
        choose=None,
    ),
)
