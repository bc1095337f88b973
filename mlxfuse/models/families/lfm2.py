"""LFM2: short convolutions, and attention in some layers."""

from __future__ import annotations

from dataclasses import replace

from ...errors import GGUFError
from ..keys import Keys
from ..layers import check_kv_heads, layer_types
from ..pieces import EXPERT_GROUPS, GROUPS, experts
from ..table import OUTER, Architecture, Config, Weight, Weights

_ATTENTION = {
    "attn_q": Weight("self_attn.q_proj", ("q", "embd"), heads="heads"),
    "attn_k": Weight("self_attn.k_proj", ("kv", "embd"), heads="kv_heads"),
    "attn_v": Weight("self_attn.v_proj", ("kv", "embd")),
    "attn_output": Weight("self_attn.out_proj", ("embd", "o")),
    "attn_q_norm": Weight("self_attn.q_layernorm", ("head",)),
    "attn_k_norm": Weight("self_attn.k_layernorm", ("head",)),
}
_CONV = {
    "shortconv.in_proj": Weight("conv.in_proj", ("conv_in", "embd")),
    "shortconv.conv": Weight("conv.conv", ("channels", "kernel")),
    "shortconv.out_proj": Weight("conv.out_proj", ("embd", "channels")),
}
_NORMS = {
    "attn_norm": Weight("operator_norm", ("embd",)),
    "ffn_norm": Weight("ffn_norm", ("embd",)),
}


def _mlp(gate: str, up: str, down: str) -> dict[str, Weight]:
    return {
        "ffn_gate": Weight(f"feed_forward.{gate}", ("ff", "embd")),
        "ffn_up": Weight(f"feed_forward.{up}", ("ff", "embd")),
        "ffn_down": Weight(f"feed_forward.{down}", ("embd", "ff")),
    }


def _lfm2(key: Keys, config: Config) -> Config:
    """A layer without key-value heads has a convolution in place of attention."""
    counts = key.each("attention.head_count_kv", config.layers)
    attends = [count > 0 for count in counts]
    heads = {count for count in counts if count}
    if len(heads) != 1:
        raise GGUFError(
            key.file.path,
            f"{key.name}.attention.head_count_kv is {counts}; expected one number "
            "where there is attention, in one layer at least, and 0 elsewhere",
        )
    (kv_heads,) = heads
    check_kv_heads(key, config.sizes["heads"], kv_heads)
    embd, head, kernel = config.sizes["embd"], config.sizes["head"], key.count("shortconv.l_cache")
    sizes = {
        "kv_heads": kv_heads,
        **dict.fromkeys(("kv", "v"), kv_heads * head),
        "cache": 2 * kv_heads * head,
        "channels": embd,
        "conv_in": 3 * embd,
        "kernel": kernel,
    }
    args = {
        "num_key_value_heads": kv_heads,
        "conv_bias": False,
        "conv_L_cache": kernel,
        "block_dim": embd,
        "block_ff_dim": config.sizes["ff"],
        "block_multiple_of": 1,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "layer_types": [
            "conv" if kind == "sliding_attention" else kind
            for kind in layer_types(not one for one in attends)
        ],
        "num_dense_layers": config.args.get("first_k_dense_replace", 0),
        "norm_topk_prob": True,
        "use_expert_bias": "experts" in config.sizes,
    }
    # The last inputs of the convolution, in float16.
    kept = {"cache": 0, "state": 2 * (kernel - 1) * embd}
    given = config.by_layer or ({},) * config.layers
    return replace(
        config,
        sizes=config.sizes | sizes,
        args=config.args | args,
        kinds=tuple("" if one else "convolution" for one in attends),
        ropes=tuple(config.rope if one else None for one in attends),
        by_layer=tuple(
            {**own, **({} if one else kept)} for own, one in zip(given, attends, strict=True)
        ),
    )


def _row(name: str, models: str, module: str, mlp: Weights) -> Architecture:
    """What the two have alike. The final norm is called the embedding's in files."""
    experts_too = {"experts_gate_up": EXPERT_GROUPS["gate_up"]} if "ffn_gate_inp" in mlp else {}
    return Architecture(
        name=name,
        models=models,
        module=module,
        outer={
            "token_embd": OUTER["token_embd"],
            "token_embd_norm": Weight("model.embedding_norm", ("embd",)),
        },
        layer={**_NORMS, **_ATTENTION, **mlp},
        other_layers={"convolution": {**_NORMS, **_CONV, **mlp}},
        groups=GROUPS | experts_too,
        uneven=("attention.head_count_kv",),
        gatings=(2,),
        fixed_head=True,
        configure=_lfm2,
    )


ROWS = (
    _row("lfm2", "LFM2 and LFM2.5, 230M to 2.6B", "mlx_lm.models.lfm2", _mlp("w1", "w3", "w2")),
    _row(
        "lfm2moe",
        "LFM2-8B-A1B, LFM2.5-8B-A1B",
        "mlx_lm.models.lfm2_moe",
        {
            **_mlp("gate_proj", "up_proj", "down_proj"),
            **experts("feed_forward.gate", "feed_forward.switch_mlp"),
            "exp_probs_b": Weight(
                "feed_forward.expert_bias",
                ("experts",),
                bare=True,
                float32=True,
                suffix=".bias",
                zero=True,
            ),
        },
    ),
)
