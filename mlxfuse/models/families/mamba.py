"""Mamba-2 layers beside attention: Nemotron 3, Granite 4 hybrids, Falcon-H1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ...errors import GGUFError, UnsupportedError
from ..keys import Keys
from ..layers import check_kv_heads, with_router
from ..pieces import EXPERT_GROUPS, GROUPS, NORMS, QKV, attention, experts, mlp
from ..table import OUTER, Architecture, Config, Weight
from .llama import GRANITE


def mixer(path: str, wide: bool = False) -> dict[str, Weight]:
    """A Mamba-2 mixer below a layer; the rows of its input are z, x, B, C and dt in both.

    Args:
        wide: its norm, if it has one, is over all groups of heads together.
    """
    heads = ("ssm_heads",)
    gated = Weight(f"{path}.norm", ("ssm_width" if wide else "ssm_inner",), optional=wide)
    return {
        "ssm_in": Weight(f"{path}.in_proj", ("ssm_in", "embd"), "optional"),
        "ssm_conv1d": Weight(f"{path}.conv1d", ("ssm_conv", "kernel"), "optional"),
        "ssm_dt": Weight(f"{path}.dt_bias", heads, bare=True, suffix=".bias", float32=True),
        "ssm_a": Weight(f"{path}.A_log", heads, bare=True, suffix="", float32=True, log=True),
        "ssm_d": Weight(f"{path}.D", heads, bare=True, suffix="", float32=True),
        "ssm_norm": gated,
        "ssm_out": Weight(f"{path}.out_proj", ("embd", "ssm_inner"), "optional"),
    }


def mamba(key: Keys, config: Config) -> Config:
    """The mixer's sizes, by llama.cpp's names: the time step rank is that of its heads."""
    inner, heads = key.count("ssm.inner_size"), key.count("ssm.time_step_rank")
    groups, state = key.count("ssm.group_count"), key.count("ssm.state_size")
    kernel = key.count("ssm.conv_kernel")
    if inner % heads or heads % groups:
        raise GGUFError(
            key.file.path,
            f"{heads} heads in {groups} groups for an ssm.inner_size of {inner}; expected "
            "multiples",
        )
    conv = inner + 2 * groups * state
    sizes = {
        "ssm_inner": inner,
        "ssm_width": inner,
        "ssm_heads": heads,
        "ssm_groups": groups,
        "ssm_bc": groups * state,
        "ssm_conv": conv,
        "ssm_in": inner + conv + heads,
        "kernel": kernel,
        # The last inputs of the convolution in float16, and a float32 matrix for each head.
        "ssm_state": 2 * (kernel - 1) * conv + 4 * inner * state,
    }
    head = inner // heads
    args = {
        # Nemotron's names
        "mamba_num_heads": heads,
        "mamba_head_dim": head,
        "ssm_state_size": state,
        "conv_kernel": kernel,
        "n_groups": groups,
        # Granite's and Falcon's
        "mamba_n_heads": heads,
        "mamba_d_head": head,
        "mamba_d_state": state,
        "mamba_d_conv": kernel,
        "mamba_n_groups": groups,
        "mamba_d_ssm": inner,
        **dict.fromkeys(("use_conv_bias", "mamba_conv_bias"), True),
        **dict.fromkeys(("mamba_proj_bias", "use_bias"), False),
        # mlx-lm's default for Granite bounds the time step, which llama.cpp does not.
        "time_step_limit": (0.0, math.inf),
    }
    return replace(config, sizes=config.sizes | sizes, args=config.args | args)


def with_kinds(key: Keys, config: Config, kinds: Sequence[str]) -> Config:
    """Sizes of each layer by its kind: empty with attention, ``mamba`` with a mixer."""
    counts = key.each("attention.head_count_kv", config.layers)
    heads = {count for count in counts if count} or {config.sizes["heads"]}
    if len(heads) > 1:
        raise UnsupportedError(f"{key.name}.attention.head_count_kv differs: {counts[:8]}")
    (kv_heads,) = heads
    check_kv_heads(key, config.sizes["heads"], kv_heads)
    kv = kv_heads * config.sizes["head"]
    kept = {
        "": {"cache": 2 * kv},
        "mamba": {"cache": 0, "state": config.sizes["ssm_state"]},
    }
    given = config.by_layer or ({},) * config.layers
    return replace(
        config,
        sizes=config.sizes | {"kv_heads": kv_heads, "kv": kv, "v": kv},
        args=config.args | {"num_key_value_heads": kv_heads},
        kinds=tuple(kinds),
        by_layer=tuple(
            {**own, **kept.get(kind, {"cache": 0})} for own, kind in zip(given, kinds, strict=True)
        ),
    )


def _nemotron_h(key: Keys, config: Config) -> Config:
    """One mixer in each layer, told by the heads and widths that the file lists; no rotation."""
    config = mamba(key, config)
    layers = config.layers
    attends = key.each("attention.head_count_kv", layers)
    widths = key.each("feed_forward_length", layers)
    kinds = []
    for kv_heads, width, routed in zip(attends, widths, with_router(key, layers), strict=True):
        kinds.append("" if kv_heads else "experts" if routed else "mlp" if width else "mamba")
    letters = {"": "*", "experts": "E", "mlp": "-", "mamba": "M"}
    latent = key("moe_latent_size", int, 0)
    sizes = {
        "expert_in": latent or config.sizes["embd"],
        "latent": latent,
    }
    args = {
        "hybrid_override_pattern": [letters[kind] for kind in kinds],
        "layer_norm_epsilon": config.args["norm_eps"],
        "moe_latent_size": latent or None,
        "moe_shared_expert_intermediate_size": config.sizes.get("shared_ff"),
        "n_shared_experts": 1 if config.sizes.get("shared_ff") else None,
    }
    config = replace(
        config,
        sizes=config.sizes | sizes,
        args=config.args | args,
        ropes=(None,) * layers,
        by_layer=(),
    )
    return with_kinds(key, config, kinds)


def _granite_hybrid(key: Keys, config: Config) -> Config:
    assert GRANITE.configure
    config = mamba(key, GRANITE.configure(key, config))
    if key.count("ssm.group_count") > 1:
        raise UnsupportedError(
            "granitehybrid whose mixers' norms are of several groups: mlx-lm's is of one"
        )
    attends = [count > 0 for count in key.each("attention.head_count_kv", config.layers)]
    args = {
        "layer_types": ["attention" if one else "mamba" for one in attends],
        "position_embedding_type": "rope" if config.rope_of(0) else "nope",
        "shared_intermediate_size": config.sizes.get("shared_ff"),
        "num_local_experts": config.sizes.get("experts"),
    }
    ropes = [config.rope_of(i) if one else None for i, one in enumerate(attends)]
    config = replace(config, args=config.args | args, ropes=tuple(ropes))
    if "experts" not in config.sizes:
        config.sizes.update({"experts": 0, "expert_ff": 0, "shared_ff": 0, "shared_rows": 0})
    else:
        config.sizes.update({"ff": 0, "shared_rows": 2 * config.sizes["shared_ff"]})
    return with_kinds(key, config, ["" if one else "mamba" for one in attends])


def _falcon_h1(key: Keys, config: Config) -> Config:
    """Both mixers in every layer. Files have the model's multipliers in the weights."""
    config = mamba(key, config)
    ones = (*("attention_in", "attention_out", "embedding", "key", "lm_head", "ssm_in", "ssm_out"),)
    args = {
        **{f"{name}_multiplier": 1.0 for name in ones},
        "mlp_multipliers": [1.0, 1.0],
        "ssm_multipliers": [1.0] * 5,
    }
    sizes = config.sizes | {"state": config.sizes["ssm_state"]}
    return replace(config, sizes=sizes, args=config.args | args)


def _nemotron_row(name: str, models: str) -> Architecture:
    norm = {"attn_norm": Weight("norm", ("embd",))}
    plain = {
        "ffn_up": Weight("mixer.up_proj", ("ff", "embd"), "optional"),
        "ffn_down": Weight("mixer.down_proj", ("embd", "ff"), "optional"),
    }
    up, down = ("experts", "expert_ff", "expert_in"), ("experts", "expert_in", "expert_ff")
    bias = Weight(
        "mixer.gate.e_score_correction_bias",
        ("experts",),
        bare=True,
        float32=True,
        suffix=".bias",
        zero=True,
    )
    routed = {
        "ffn_gate_inp": Weight("mixer.gate.weight", ("experts", "embd"), bare=True),
        "exp_probs_b": bias,
        "ffn_up_exps": Weight("mixer.switch_mlp.fc1", up),
        "ffn_down_exps": Weight("mixer.switch_mlp.fc2", down),
        "ffn_up_shexp": Weight("mixer.shared_experts.up_proj", ("shared_ff", "embd")),
        "ffn_down_shexp": Weight("mixer.shared_experts.down_proj", ("embd", "shared_ff")),
        "ffn_latent_down": Weight("mixer.fc1_latent_proj", ("latent", "embd")),
        "ffn_latent_up": Weight("mixer.fc2_latent_proj", ("embd", "latent")),
    }
    mixed = {
        name: replace(weight, module=weight.module.replace("self_attn", "mixer"))
        for name, weight in attention("optional", "optional").items()
    }
    layers = {"mamba": norm | mixer("mixer"), "mlp": norm | plain, "experts": norm | routed}
    return Architecture(
        name=name,
        models=models,
        module="mlxfuse.models.families.nemotron_h_model",
        outer={
            "token_embd": Weight("backbone.embeddings", ("vocab", "embd")),
            "output_norm": Weight("backbone.norm_f", ("embd",)),
            "output": OUTER["output"],
        },
        layers_at="backbone.layers",
        layer=norm | mixed,
        other_layers=layers,
        groups=QKV,
        uneven=("attention.head_count_kv", "attention.head_count", "feed_forward_length"),
        partial_rope=True,
        gatings=(2,),
        groups_too=True,
        dense_too=True,
        may_tie=False,
        configure=_nemotron_h,
    )


_GRANITE_MLP = {
    **mlp("optional"),
    **experts("block_sparse_moe.router.layer", "block_sparse_moe.switch_mlp"),
    "ffn_gate_up_shexp": Weight("shared_mlp.input_linear", ("shared_rows", "embd")),
    "ffn_down_shexp": Weight("shared_mlp.output_linear", ("embd", "shared_ff")),
}

ROWS = (
    Architecture(
        name="falcon-h1",
        models="Falcon-H1, Falcon-H1R",
        module="mlx_lm.models.falcon_h1",
        outer={**OUTER, "output_norm": Weight("model.final_layernorm", ("embd",))},
        layer={
            "attn_norm": Weight("input_layernorm", ("embd",)),
            # llama.cpp's converter leaves the suffix off.
            "ffn_norm": Weight("pre_ff_layernorm", ("embd",), suffix=""),
            **attention("optional", "optional"),
            **mixer("mamba", wide=True),
            "ffn_gate": Weight("feed_forward.gate_proj", ("ff", "embd"), "optional"),
            "ffn_up": Weight("feed_forward.up_proj", ("ff", "embd"), "optional"),
            "ffn_down": Weight("feed_forward.down_proj", ("embd", "ff"), "optional"),
        },
        groups=GROUPS,
        present={"mamba_rms_norm": "blk.0.ssm_norm.weight"},
        rope_types=("linear", "yarn", "llama3"),
        configure=_falcon_h1,
    ),
    replace(
        GRANITE,
        name="granitehybrid",
        models="Granite 4.0 H micro, tiny and small",
        module="mlx_lm.models.granitemoehybrid",
        layer={**NORMS, **attention("optional", "optional"), **_GRANITE_MLP},
        other_layers={"mamba": {**NORMS, **mixer("mamba"), **_GRANITE_MLP}},
        groups=GROUPS | {"experts_gate_up": EXPERT_GROUPS["gate_up"]},
        same={},
        uneven=("attention.head_count_kv", "feed_forward_length"),
        whole_experts=True,
        dense_too=True,
        configure=_granite_hybrid,
    ),
    _nemotron_row("nemotron_h", "Nemotron Nano 9B v2, Nemotron-H"),
    _nemotron_row("nemotron_h_moe", "Nemotron 3 Nano 30B-A3B and Super"),
)
