"""Qwen3.5: gated delta nets, and attention in every fourth layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...errors import GGUFError, UnsupportedError
from ..keys import Keys
from ..layers import period
from ..pieces import (
    EXPERT_GROUPS,
    GROUPS,
    POST_ATTENTION_NORMS,
    QK_NORMS,
    SHARED,
    SHARED_EXPERT,
    attention,
    experts,
    mlp,
)
from ..table import Architecture, Config, Weight

# A layer's kind tells what its attn_qkv is: here the input of a gated delta net, else q, k and v.
_DELTA_NET = {
    "attn_qkv": Weight("linear_attn.in_proj_qkv", ("conv", "embd"), tiled="value_head"),
    "attn_gate": Weight("linear_attn.in_proj_z", ("tiled_values", "embd")),
    "ssm_beta": Weight("linear_attn.in_proj_b", ("value_heads", "embd"), tiled="one"),
    "ssm_alpha": Weight("linear_attn.in_proj_a", ("value_heads", "embd"), tiled="one"),
    "ssm_conv1d": Weight("linear_attn.conv1d", ("conv", "kernel"), tiled="value_head"),
    "ssm_a": Weight(
        "linear_attn.A_log",
        ("value_heads",),
        bare=True,
        tiled="one",
        suffix="",
        float32=True,
        log=True,
    ),
    "ssm_dt": Weight(
        "linear_attn.dt_bias",
        ("value_heads",),
        bare=True,
        tiled="one",
        suffix=".bias",
        float32=True,
    ),
    "ssm_norm": Weight("linear_attn.norm", ("value_head",)),
    "ssm_out": Weight("linear_attn.out_proj", ("embd", "tiled_values")),
}


# Qwen3-Next's value heads are in mlx-lm's order; of two small matrices the rows take turns.
_UNTILED = {
    name: replace(weight, tiled="", shape=tuple(n.removeprefix("tiled_") for n in weight.shape))
    for name, weight in _DELTA_NET.items()
} | {
    "ssm_beta": Weight("linear_attn.in_proj_b", ("value_heads", "embd"), dense=True),
    "ssm_alpha": Weight("linear_attn.in_proj_a", ("value_heads", "embd"), dense=True),
}


def _qwen35(key: Keys, config: Config) -> Config:
    """Sizes of the gated delta net, and which layers have one.

    llama.cpp's names: the state size is that of a head of keys and of values, the group count
    that of key heads, the time step rank that of value heads.
    """
    if "blk.0.ssm_in.weight" in key.file.tensors:
        raise UnsupportedError(
            f"{key.name} with blk.0.ssm_in.weight: the file is from before llama.cpp stored the "
            "delta nets' queries, keys and values apart from their gates; convert the model again"
        )
    head, kernel = key.count("ssm.state_size"), key.count("ssm.conv_kernel")
    key_heads, value_heads = key.count("ssm.group_count"), key.count("ssm.time_step_rank")
    inner, path = key.count("ssm.inner_size"), key.file.path
    if value_heads % key_heads or inner != value_heads * head:
        raise GGUFError(
            path,
            f"{value_heads} value heads of {head} for {key_heads} key heads; expected a multiple, "
            f"and an ssm.inner_size of {value_heads * head}, not {inner}",
        )
    turns = _attention_period(key, config)
    conv = 2 * key_heads * head + inner
    sizes = config.sizes | {
        "one": 1,
        "q": 2 * config.sizes["q"],  # each head of q is followed by a gate
        "key_heads": key_heads,
        "value_heads": value_heads,
        "value_head": head,
        "keys": key_heads * head,
        "values": inner,
        "tiled_values": inner,
        "conv": conv,
        "kernel": kernel,
    }
    rope = config.rope
    args = {
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": head,
        "linear_value_head_dim": head,
        "linear_conv_kernel_dim": kernel,
        "full_attention_interval": turns,
        "rope_parameters": {
            "type": "default",
            "rope_theta": rope.base,
            "partial_rotary_factor": rope.dims / config.sizes["head"],
        },
    }
    recurrent = [(i + 1) % turns != 0 for i in range(config.layers)]
    # The last inputs of the convolution in float16, and a float32 matrix for each value head.
    kept = {"cache": 0, "state": 2 * (kernel - 1) * conv + 4 * inner * head}
    return replace(
        config,
        sizes=sizes,
        args=config.args | args,
        kinds=tuple("delta net" if one else "" for one in recurrent),
        ropes=tuple(None if one else rope for one in recurrent),
        by_layer=tuple(kept if one else {} for one in recurrent),
    )


def _attention_period(key: Keys, config: Config) -> int:
    """The last of so many layers has attention, the others a gated delta net."""
    layers, name = config.layers, "attention.recurrent_layers"
    if isinstance(key.file.metadata.get(f"{key.name}.{name}"), np.ndarray):
        return period(key, [bool(kind) for kind in key.each(name, layers)], name)
    turns = key.count("full_attention_interval", 4)
    if not 1 < turns <= layers:
        raise UnsupportedError(f"{key.name} without layers of both kinds: attention every {turns}")
    return turns


def _row(
    name: str, models: str, mlp: dict[str, Weight], groups: dict[str, tuple[str, ...]]
) -> Architecture:
    """What the two have alike.

    A delta net's state grows with the context and is read out before its norm: over a long one the
    product leaves float16's range (github.com/vllm-project/vllm/issues/54308).
    """
    return Architecture(
        name=name,
        models=models,
        module="mlxfuse.models.families.qwen35_model",
        layer={**POST_ATTENTION_NORMS, **attention(), **QK_NORMS, **mlp},
        other_layers={"delta net": {**POST_ATTENTION_NORMS, **_DELTA_NET, **mlp}},
        groups=groups | {"in_proj": ("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha")},
        args={"norm_topk_prob": True},  # in both projects whatever the file says
        rope_types=("linear",),
        partial_rope=True,
        float16=False,
        configure=_qwen35,
    )


_EXPERTS = experts("mlp.gate", "mlp.switch_mlp") | SHARED_EXPERT

ROWS = (
    _row("qwen35", "Qwen3.5, Qwen3.6 and Qwen3.8 without experts", mlp(), GROUPS),
    _row(
        "qwen35moe",
        "Qwen3.5-35B-A3B, Qwen3.6-35B-A3B",
        _EXPERTS,
        EXPERT_GROUPS | SHARED,
    ),
    replace(
        _row("qwen3next", "Qwen3-Next, Qwen3-Coder-Next", _EXPERTS, {}),
        module="mlxfuse.models.families.qwen3next_model",
        other_layers={"delta net": {**POST_ATTENTION_NORMS, **_UNTILED, **_EXPERTS}},
        groups=EXPERT_GROUPS | SHARED | {"in_proj": ("attn_qkv", "attn_gate")},
    ),
)
