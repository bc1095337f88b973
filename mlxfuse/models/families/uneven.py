"""Experts behind attention whose heads differ between layers with a window and those without:
MiMo V2, Step 3.5, Laguna.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...errors import GGUFError, UnsupportedError
from ..keys import Keys
from ..layers import check_kv_heads, layer_types, windows, with_router, with_windows
from ..pieces import (
    BARE_ROUTER,
    EXPERT_GROUPS,
    GROUPS,
    NORMS,
    QK_NORMS,
    SHARED,
    attention,
    biased_experts,
    mlp,
)
from ..rope import Rope
from ..table import Architecture, Config, Weight

SIGMOID = 2
_HEADS = ("attention.head_count", "attention.head_count_kv")
_MIMO_GROUPS = GROUPS | {"experts_gate_up": EXPERT_GROUPS["gate_up"]}
_GROUPS = _MIMO_GROUPS | SHARED


def _by_layer(key: Keys, config: Config, routed: Sequence[bool]) -> Config:
    """The sizes of each layer's heads, and whether it has experts or an MLP."""
    heads, kv_heads = (key.each(name, config.layers) for name in _HEADS)
    head, value = config.sizes["head"], config.sizes["value"]
    by_layer = []
    for many, kv, experts in zip(heads, kv_heads, routed, strict=True):
        check_kv_heads(key, many, kv)
        by_layer.append(
            {
                "heads": many,
                "kv_heads": kv,
                "q": many * head,
                "o": many * value,
                "kv": kv * head,
                "v": kv * value,
                "cache": kv * (head + value),
                **({"ff": 0} if experts else {"experts": 0, "shared_ff": 0}),
            }
        )
    return replace(config, by_layer=tuple(by_layer))


def _of_kind(key: Keys, config: Config, slides: Sequence[bool], size: str) -> tuple[int, int]:
    """A size of the layers without a window and of those with one, alike in each kind."""
    found: list[int] = []
    for kind in (False, True):
        sizes = {config.sizes_of(i)[size] for i, slide in enumerate(slides) if slide == kind} or {
            config.sizes[size]
        }
        if len(sizes) > 1:
            raise UnsupportedError(
                f"{key.name} with {sorted(sizes)} {size} in layers "
                f"{'with' if kind else 'without'} a sliding window; expected one number"
            )
        found += sizes
    return found[0], found[1]


def _both(key: Keys, slides: Sequence[bool]) -> None:
    """mlx-lm's class takes its masks from a layer of each kind."""
    if len(set(slides)) < 2:
        raise UnsupportedError(
            f"{key.name} whose layers all have a sliding window, or none; expected both kinds"
        )


def _sinks(key: Keys, slides: Sequence[bool], kind: bool) -> bool:
    """Whether the layers of a kind have sinks, all of them or none."""
    names = [f"blk.{i}.attn_sinks.weight" for i, slide in enumerate(slides) if slide == kind]
    there = {name in key.file.tensors for name in names}
    if len(there) > 1:
        raise UnsupportedError(
            f"{key.name} with attn_sinks in some of the layers "
            f"{'with' if kind else 'without'} a sliding window"
        )
    return there == {True}


def _mimo2(key: Keys, config: Config) -> Config:
    """Windows see with sinks; values are scaled."""
    routed, slides = with_router(key, config.layers), windows(key, config.layers)
    _both(key, slides)
    config = _by_layer(key, config, routed)
    window, rope = key.count("attention.sliding_window"), config.rope
    heads, kv_heads = (_of_kind(key, config, slides, size) for size in ("heads", "kv_heads"))
    base = key.positive("rope.freq_base_swa", rope.base)
    sinks = [_sinks(key, slides, kind) for kind in (False, True)]
    head, value = config.sizes["head"], config.sizes["value"]
    args = {
        "hybrid_layer_pattern": [int(slide) for slide in slides],
        "moe_layer_freq": [int(one) for one in routed],
        "add_full_attention_sink_bias": sinks[False],
        "add_swa_attention_sink_bias": sinks[True],
        "sliding_window_size": window,
        "n_shared_experts": None,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        # In llama.cpp whatever the file says.
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "layernorm_epsilon": config.args["norm_eps"],
        "swa_rope_theta": base,
        "num_attention_heads": heads[False],
        "num_key_value_heads": kv_heads[False],
        "swa_num_attention_heads": heads[True],
        "swa_num_key_value_heads": kv_heads[True],
        "v_head_dim": value,
        "swa_head_dim": head,
        "swa_v_head_dim": value,
        "attention_value_scale": key("attention.value_scale", float, 0.0) or None,
    }
    config = replace(config, args=config.args | args)
    return with_windows(config, slides, window, replace(rope, base=base), rope)


def _limits(key: Keys, name: str, layers: int) -> list[float]:
    """How far an MLP's activations may go in each layer, 0 for any distance."""
    full = f"{key.name}.{name}"
    return key.floats(full, layers) if full in key.file.metadata else [0.0] * layers


def _step35(key: Keys, config: Config) -> Config:
    """Layers that see everything rotate half of what the others do."""
    routed, slides = with_router(key, config.layers), windows(key, config.layers)
    config = _by_layer(key, config, routed)
    window, rope = key.count("attention.sliding_window"), config.rope
    heads, kv_heads = (_of_kind(key, config, slides, size) for size in ("heads", "kv_heads"))
    dims = key.count("rope.dimension_count_swa", rope.dims)
    if rope.dims % 4 or dims % 2 or dims > config.sizes["head"]:
        raise GGUFError(
            key.file.path,
            f"{rope.dims} rotary dimensions, of which layers without a window rotate half, and "
            f"{dims} of a head of {config.sizes['head']} in those with one",
        )
    sliding = Rope(dims, key.positive("rope.freq_base_swa", rope.base))
    experts = [str(i) for i, one in enumerate(routed) if one]
    args = {
        "num_attention_heads": heads[False],
        "num_attention_groups": kv_heads[False],
        "attention_other_setting": {
            "num_attention_heads": heads[True],
            "num_attention_groups": kv_heads[True],
        },
        "layer_types": layer_types(slides),
        "sliding_window": window,
        "moe_num_experts": config.sizes["experts"],
        "moe_top_k": config.args["num_experts_per_tok"],
        "moe_router_scaling_factor": config.args["routed_scaling_factor"],
        "norm_expert_weight": config.args["norm_topk_prob"],
        "share_expert_dim": config.sizes["shared_ff"],
        "moe_layers_enum": ",".join(experts),
        "swiglu_limits": _limits(key, "swiglu_clamp_exp", config.layers),
        "swiglu_limits_shared": _limits(key, "swiglu_clamp_shexp", config.layers),
    }
    config = replace(config, args=config.args | args)
    return with_windows(config, slides, window, sliding, replace(rope, dims=rope.dims // 2))


def _laguna(key: Keys, config: Config) -> Config:
    """The first of four layers sees everything, by rotations of its own."""
    layers, rope = config.layers, config.rope
    window = key("attention.sliding_window", int, 0)
    name = "attention.sliding_window_pattern"
    if not window:
        slides = [False] * layers
    elif isinstance(key.file.metadata.get(f"{key.name}.{name}"), np.ndarray):
        slides = windows(key, layers)
    else:
        period = key.count(name, 4)
        slides = [i % period > 0 for i in range(layers)]
    if all(slides):
        raise UnsupportedError(f"{key.name} whose layers all have a sliding window")
    routed = with_router(key, config.layers)
    config = _by_layer(key, config, routed)
    heads = [sizes["heads"] for sizes in config.by_layer]
    gate = key.file.tensors.get("blk.0.attn_gate.weight")
    if gate is not None and gate.shape[0] != heads[0]:
        raise UnsupportedError(
            f"{key.name} with gates of {gate.shape[0]} rows for {heads[0]} heads (Laguna M.1): "
            "a gate of each head is supported (Laguna XS.2)"
        )
    args = {
        "layer_types": layer_types(slides),
        "mlp_layer_types": ["sparse" if one else "dense" for one in routed],
        "num_attention_heads_per_layer": heads,
        "sliding_window": window or None,
        "moe_routed_scaling_factor": config.args["routed_scaling_factor"],
    }
    if not config.args["norm_topk_prob"]:
        raise UnsupportedError(f"{key.name} whose experts' weights do not add up to 1")
    base = key.positive("rope.freq_base_swa", rope.base)
    sliding = Rope(key.count("rope.dimension_count_swa", rope.dims), base)
    config = replace(config, args=config.args | args)
    return with_windows(config, slides, window, sliding, rope)


_BIAS = "mlp.gate.e_score_correction_bias"
_GATE = {"attn_gate": Weight("self_attn.g_proj", ("heads", "embd"))}
_MIMO_EXPERTS = {
    name: weight
    for name, weight in biased_experts(BARE_ROUTER, _BIAS, "mlp.switch_mlp").items()
    if not name.endswith("shexp")
}

ROWS = (
    Architecture(
        name="laguna",
        models="Laguna XS.2",
        module="mlx_lm.models.laguna",
        layer={
            **NORMS,
            **attention(),
            **QK_NORMS,
            **_GATE,
            **mlp(),
            **biased_experts(
                Weight("mlp.gate.proj", ("experts", "embd")),
                _BIAS,
                "mlp.switch_mlp",
                "mlp.shared_expert",
            ),
        },
        groups=_GROUPS,
        partial_rope=True,
        gatings=(SIGMOID,),
        uneven=_HEADS,
        configure=_laguna,
    ),
    Architecture(
        name="mimo2",
        models="MiMo V2 Flash, MiMo V2.5",
        module="mlx_lm.models.mimo_v2_flash",
        layer={
            **NORMS,
            **attention(),
            "attn_sinks": Weight(
                "self_attn.attention_sink_bias", ("heads",), bare=True, optional=True
            ),
            **mlp(),
            **_MIMO_EXPERTS,
        },
        groups=_MIMO_GROUPS,
        partial_rope=True,
        value_heads=True,
        gatings=(SIGMOID,),
        uneven=_HEADS,
        may_tie=False,
        configure=_mimo2,
    ),
    Architecture(
        name="step35",
        models="Step 3.5 Flash",
        module="mlx_lm.models.step3p5",
        layer={
            **NORMS,
            **attention(),
            **QK_NORMS,
            **_GATE,
            **mlp(),
            **biased_experts(
                Weight("mlp.gate.gate", ("experts", "embd")),
                "mlp.gate.router_bias",
                "mlp.switch_mlp",
                "mlp.share_expert",
            ),
        },
        groups=_GROUPS,
        rope_types=("llama3",),
        partial_rope=True,
        gatings=(SIGMOID,),
        uneven=_HEADS,
        may_tie=False,
        configure=_step35,
    ),
)
