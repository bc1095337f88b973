"""Mamba's selective state spaces: Mamba and Falcon Mamba, Mamba-2, and Jamba beside attention."""

from __future__ import annotations

from dataclasses import replace

from ...errors import GGUFError, UnsupportedError
from ..keys import Keys
from ..layers import with_router
from ..pieces import EXPERT_GROUPS, GROUPS, attention, experts, mlp
from ..table import OUTER, Architecture, Config, Weight
from .mamba import mamba, mixer, with_kinds

_OUTER = {
    "token_embd": Weight("backbone.embeddings", ("vocab", "embd")),
    "output_norm": Weight("backbone.norm_f", ("embd",)),
    "output": OUTER["output"],
}
_NORM = {"attn_norm": Weight("norm", ("embd",))}


def _selective(path: str) -> dict[str, Weight]:
    """A mixer of the first kind: a channel has states of its own, and a time step."""
    channels, states = ("ssm_channels",), ("ssm_channels", "ssm_columns")
    return {
        "ssm_in": Weight(f"{path}.in_proj", ("ssm_xz", "embd")),
        "ssm_conv1d": Weight(f"{path}.conv1d", ("ssm_channels", "kernel"), "required"),
        "ssm_x": Weight(f"{path}.x_proj", ("ssm_x", "ssm_channels")),
        "ssm_dt": Weight(f"{path}.dt_proj", ("ssm_channels", "ssm_rank"), "required"),
        "ssm_a": Weight(f"{path}.A_log", states, bare=True, suffix="", float32=True, log=True),
        "ssm_d": Weight(f"{path}.D", channels, bare=True, suffix="", float32=True),
        "ssm_out": Weight(f"{path}.out_proj", ("embd", "ssm_channels")),
    }


def _sizes(key: Keys, config: Config) -> dict[str, int]:
    inner, state = key.count("ssm.inner_size"), key.count("ssm.state_size")
    rank, kernel = key.count("ssm.time_step_rank"), key.count("ssm.conv_kernel")
    return {
        "ssm_channels": inner,
        "ssm_columns": state,
        "ssm_rank": rank,
        "ssm_xz": 2 * inner,
        "ssm_x": rank + 2 * state,
        "kernel": kernel,
        # The last inputs of the convolution in float16, and float32 states of each channel.
        "ssm_state": 2 * (kernel - 1) * inner + 4 * inner * state,
    }


def _recurrent(config: Config) -> Config:
    """Every layer keeps a state and nothing else, and rotates nothing."""
    kept = {"cache": 0, "state": config.sizes["ssm_state"]}
    return replace(config, ropes=(None,) * config.layers, by_layer=(kept,) * config.layers)


def _mamba1(key: Keys, config: Config) -> Config:
    sizes = _sizes(key, config)
    args = {
        "intermediate_size": sizes["ssm_channels"],
        "state_size": sizes["ssm_columns"],
        "time_step_rank": sizes["ssm_rank"],
        "conv_kernel": sizes["kernel"],
        "use_bias": False,
        "use_conv_bias": True,
        "use_bcdt_rms": key.flag("ssm.dt_b_c_rms", False),
        "mixer_rms_eps": config.args["norm_eps"],
    }
    return _recurrent(
        replace(config, sizes=config.sizes | sizes, args=config.args | args),
    )


def _mamba2(key: Keys, config: Config) -> Config:
    config = mamba(key, config)
    args = {
        "num_heads": config.sizes["ssm_heads"],
        "head_dim": config.args["mamba_head_dim"],
        "intermediate_size": config.sizes["ssm_inner"],
        "state_size": config.args["ssm_state_size"],
        "layer_norm_epsilon": config.args["norm_eps"],
        "time_step_rank": config.sizes["ssm_heads"],
    }
    return _recurrent(replace(config, args=config.args | args))


def _jamba(key: Keys, config: Config) -> Config:
    """Layers with key-value heads have attention, and those with a router have experts."""
    sizes, layers = _sizes(key, config), config.layers
    counts = key.each("attention.head_count_kv", layers)
    kinds = ["" if count else "mamba" for count in counts]
    if len(set(kinds)) < 2:
        raise UnsupportedError(
            f"{key.name} whose layers are all of one kind: {key.name}.attention.head_count_kv is "
            f"{counts[:8]}; expected 0 for the layers with a mixer, and heads for those that attend"
        )
    if sizes["ssm_channels"] % config.sizes["embd"]:
        raise GGUFError(
            key.file.path,
            f"{key.name}.ssm.inner_size is {sizes['ssm_channels']}; expected a multiple of "
            f"embedding_length, {config.sizes['embd']}",
        )
    routed = with_router(key, layers)
    args = {
        "attn_layer_offset": 0,
        "attn_layer_period": 1,
        "expert_layer_offset": 0,
        "expert_layer_period": 1,
        "layers_block_type": ["attention" if not kind else "mamba" for kind in kinds],
        "routed_layers": routed,
        "mamba_d_conv": sizes["kernel"],
        "mamba_d_state": sizes["ssm_columns"],
        "mamba_dt_rank": sizes["ssm_rank"],
        "mamba_expand": sizes["ssm_channels"] // config.sizes["embd"],
        "num_experts": config.sizes.get("experts", 0),
        "num_experts_per_tok": config.args.get("num_experts_per_tok", 0),
    }
    dense = {"experts": 0, "expert_ff": 0}
    config = replace(
        config,
        sizes=dense | config.sizes | sizes,
        args=config.args | args,
        ropes=(None,) * layers,
        by_layer=tuple({"ff": 0} if one else dense for one in routed),
    )
    return with_kinds(key, config, kinds)


_JAMBA = {
    "attn_norm": Weight("input_layernorm", ("embd",)),
    "ffn_norm": Weight("pre_ff_layernorm", ("embd",)),
    **mlp(at="feed_forward"),
    **experts("feed_forward.router", "feed_forward.switch_mlp"),
}

ROWS = (
    Architecture(
        name="jamba",
        models="Jamba 1.5 to 1.7, mini and large, Jamba Reasoning 3B",
        module="mlxfuse.models.families.jamba_model",
        outer={**OUTER, "output_norm": Weight("model.final_layernorm", ("embd",))},
        layer=_JAMBA | attention(),
        other_layers={
            "mamba": {
                **_JAMBA,
                **_selective("mamba"),
                "ssm_dt_norm": Weight("mamba.dt_layernorm", ("ssm_rank",)),
                "ssm_b_norm": Weight("mamba.b_layernorm", ("ssm_columns",)),
                "ssm_c_norm": Weight("mamba.c_layernorm", ("ssm_columns",)),
            }
        },
        groups=GROUPS | {"experts_gate_up": EXPERT_GROUPS["gate_up"]},
        uneven=("attention.head_count_kv",),
        whole_experts=True,
        dense_too=True,
        fixed_head=True,
        configure=_jamba,
    ),
    Architecture(
        name="mamba",
        models="Mamba, Falcon Mamba",
        module="mlxfuse.models.families.selective_model",
        outer=_OUTER,
        layers_at="backbone.layers",
        layer=_NORM | _selective("mixer"),
        groups={},
        attention_free=True,
        configure=_mamba1,
    ),
    Architecture(
        name="mamba2",
        models="Mamba-2, Codestral Mamba",
        module="mlxfuse.models.families.mamba2_model",
        outer=_OUTER,
        layers_at="backbone.layers",
        layer=_NORM | mixer("mixer"),
        groups={},
        attention_free=True,
        configure=_mamba2,
    ),
)
