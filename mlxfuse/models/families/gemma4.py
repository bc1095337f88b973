"""Gemma 4's metadata; numpy only.

Layers with a window and layers without have heads of different sizes. The last layers may read
the keys and values of an earlier layer of their kind, values may be the keys' projection, and
there may be experts and inputs of each layer's own. mlx-lm has one number for all layers of a kind
where llama.cpp has one for each layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import GGUFError, UnsupportedError
from ..keys import Keys
from ..layers import FULL, SLIDING, layer_types
from ..pieces import GROUPS, QK_NORMS, attention, mlp
from ..rope import Rope
from ..table import OUTER, Architecture, Config, Weight
from .gemma import GEMMA_NORMS

# Sizes are 0 in layers, and files, that have no such tensor.
_OUTER = {
    "per_layer_token_embd": Weight("model.embed_tokens_per_layer", ("vocab", "inputs")),
    "per_layer_model_proj": Weight("model.per_layer_model_projection", ("inputs", "embd")),
    "per_layer_proj_norm": Weight("model.per_layer_projection_norm", ("input",)),
}
_LAYER = {
    "attn_k_norm": Weight("self_attn.k_norm", ("k_head",)),
    "attn_v": Weight("self_attn.v_proj", ("v", "embd")),
    "layer_output_scale": Weight("layer_scalar", ("one",), bare=True),
    "inp_gate": Weight("per_layer_input_gate", ("input", "embd")),
    "proj": Weight("per_layer_projection", ("embd", "input")),
    "post_norm": Weight("post_per_layer_input_norm", ("input_embd",)),
    "ffn_gate_inp": Weight("router.proj", ("experts", "embd")),
    "ffn_gate_inp.scale": Weight("router.scale", ("expert_embd",), bare=True, suffix=""),
    "ffn_down_exps.scale": Weight("router.per_expert_scale", ("experts",), bare=True, suffix=""),
    "ffn_gate_exps": Weight("experts.switch_glu.gate_proj", ("experts", "expert_ff", "embd")),
    "ffn_up_exps": Weight("experts.switch_glu.up_proj", ("experts", "expert_ff", "embd")),
    "ffn_down_exps": Weight("experts.switch_glu.down_proj", ("experts", "embd", "expert_ff")),
    "pre_ffw_norm_2": Weight("pre_feedforward_layernorm_2", ("expert_embd",)),
    "post_ffw_norm_1": Weight("post_feedforward_layernorm_1", ("expert_embd",)),
    "post_ffw_norm_2": Weight("post_feedforward_layernorm_2", ("expert_embd",)),
}


def _gemma4(key: Keys, config: Config) -> Config:
    """The configuration, of which ``config`` has what all architectures have alike."""
    layers = config.layers
    slides = key.each("attention.sliding_window_pattern", layers, listed=True)
    kinds = layer_types(map(bool, slides))
    own = _own_layers(key, kinds)
    if FULL in kinds and not config.rope.factors:
        raise GGUFError(key.file.path, "rope_freqs.weight is missing")
    k_is_v = _k_is_v(key, kinds[:own])
    shape = _Shape(
        kinds,
        own,
        head=_head_sizes(key, config.sizes["head"]),
        kv_heads=_kv_heads(key, kinds, config.sizes["heads"], k_is_v),
        k_is_v=k_is_v,
        ff=_widths(key, layers, own),
        inputs=key("embedding_length_per_layer_input", int),
        window=key.count("attention.sliding_window"),
    )
    return replace(
        config,
        args=config.args | _args(key, config, shape),
        sizes=config.sizes | _outer_sizes(config, shape),
        ropes=_ropes(key, config, shape),
        by_layer=tuple(_layer_sizes(config, shape, i) for i in range(layers)),
        # Released files have what the layers' own keys and values would be made of.
        unread=frozenset(
            f"blk.{i}.{name}.weight"
            for i in range(own, layers)
            for name in ("attn_k", "attn_v", "attn_k_norm")
        ),
    )


@dataclass(frozen=True, slots=True)
class _Shape:
    """What Gemma 4's files say beside what all architectures have alike.

    kinds     of each layer: with a window or without.
    own       how many layers have keys and values of their own: the first ones.
    head      kind -> components of a head.
    kv_heads  kind -> heads of keys and values.
    k_is_v    layers without a window use the keys' projection as their values.
    ff        of each layer: the MLP's width.
    inputs    width of each layer's own input; 0 without.
    window    tokens that a layer with a window sees.
    """

    kinds: list[str]
    own: int
    head: dict[str, int]
    kv_heads: dict[str, int]
    k_is_v: bool
    ff: list[int]
    inputs: int
    window: int


def _args(key: Keys, config: Config, shape: _Shape) -> dict[str, Any]:
    return {
        "head_dim": shape.head[SLIDING],
        "global_head_dim": shape.head[FULL],
        "num_key_value_heads": shape.kv_heads[SLIDING],
        "num_global_key_value_heads": shape.kv_heads[FULL],
        "num_kv_shared_layers": config.layers - shape.own,
        "attention_k_eq_v": shape.k_is_v,
        "intermediate_size": shape.ff[0],
        "use_double_wide_mlp": shape.ff[-1] != shape.ff[0],
        "hidden_size_per_layer_input": shape.inputs,
        "vocab_size_per_layer_input": config.sizes["vocab"],
        "enable_moe_block": bool(config.sizes.get("experts", 0)),
        "top_k_experts": config.args.get("num_experts_per_tok"),
        "layer_types": shape.kinds,
        "sliding_window": shape.window,
        "final_logit_softcapping": key("final_logit_softcapping", float, 30.0) or None,
    }


def _outer_sizes(config: Config, shape: _Shape) -> dict[str, int]:
    """The sizes that all layers have alike."""
    embd, experts = config.sizes["embd"], config.sizes.get("experts", 0)
    return {
        "one": 1,
        "input": shape.inputs,
        "inputs": shape.inputs * config.layers,
        "input_embd": embd if shape.inputs else 0,
        "experts": experts,
        "expert_ff": config.sizes.get("expert_ff", 0),
        "expert_embd": embd if experts else 0,
    }


def _layer_sizes(config: Config, shape: _Shape, layer: int) -> dict[str, int]:
    kind = shape.kinds[layer]
    head, width = shape.head[kind], config.sizes["heads"] * shape.head[kind]
    kv = shape.kv_heads[kind] * head if layer < shape.own else 0
    return {
        "head": head,
        "kv_heads": shape.kv_heads[kind],
        "q": width,
        "o": width,
        "kv": kv,
        "cache": 2 * kv,
        "window": shape.window if kind == SLIDING else 0,
        "v": 0 if shape.k_is_v and kind == FULL else kv,
        "k_head": head if kv else 0,
        "ff": shape.ff[layer],
    }


def _ropes(key: Keys, config: Config, shape: _Shape) -> tuple[Rope, ...]:
    base = key.positive("rope.freq_base_swa", 10000.0)
    dims, head = key.count("rope.dimension_count_swa", config.rope.dims), shape.head[SLIDING]
    if dims % 2 or dims > head:
        raise GGUFError(
            key.file.path, f"{dims} rotary dimensions of a head of {head} with a window"
        )
    return tuple(config.rope if kind == FULL else Rope(dims, base) for kind in shape.kinds)


def _head_sizes(key: Keys, full: int) -> dict[str, int]:
    """Components of a head by the kind of layer; keys and values have equally many."""
    keys, values = (key.count(f"attention.{name}_length_swa") for name in ("key", "value"))
    if values != keys:
        raise UnsupportedError(f"heads of keys ({keys}) and values ({values}) differ in size")
    return {FULL: full, SLIDING: keys}


def _own_layers(key: Keys, kinds: list[str]) -> int:
    """How many layers have keys and values of their own: the first ones."""
    shared = key("attention.shared_kv_layers", int, 0)
    own = len(kinds) - shared
    if own < 1 or not set(kinds[own:]) <= set(kinds[:own]):
        raise GGUFError(
            key.file.path,
            f"{key.name}.attention.shared_kv_layers is {shared}; expected an earlier layer with "
            f"keys and values for each of the last {shared} of {len(kinds)}, with or without a "
            "window like it",
        )
    return own


def _k_is_v(key: Keys, kinds: list[str]) -> bool:
    """Whether layers without a window have no attn_v, by the layers with keys of their own."""
    tensors = key.file.tensors
    lacking = [i for i in range(len(kinds)) if f"blk.{i}.attn_v.weight" not in tensors]
    if lacking and lacking != [i for i, kind in enumerate(kinds) if kind == FULL]:
        raise UnsupportedError(
            f"blk.{lacking[0]}.attn_v.weight is missing; it may be in the layers without a sliding "
            "window, and then in all of them"
        )
    return bool(lacking)


def _kv_heads(key: Keys, kinds: list[str], heads: int, k_is_v: bool) -> dict[str, int]:
    name = "attention.head_count_kv"
    counts = key.each(name, len(kinds), heads)
    found = {}
    for kind in (FULL, SLIDING):
        of_kind = {n for n, k in zip(counts, kinds, strict=True) if k == kind} or set(counts)
        if len(of_kind) > 1:
            raise UnsupportedError(f"{name} differs between layers of a kind: {counts[:8]}")
        (found[kind],) = of_kind
        if found[kind] < 1 or heads % found[kind]:
            raise GGUFError(
                key.file.path,
                f"{heads} attention heads cannot share {found[kind]} key/value heads",
            )
    if found[FULL] != found[SLIDING] and not k_is_v:
        raise UnsupportedError(f"{name} differs between layers that all have attn_v: {counts[:8]}")
    return found


def _widths(key: Keys, layers: int, own: int) -> list[int]:
    """The MLPs': one, or twice as much where keys and values are another layer's."""
    ff = key.each("feed_forward_length", layers)
    double = 2 if ff[-1] != ff[0] else 1
    if ff[0] < 1 or ff != [ff[0]] * own + [double * ff[0]] * (layers - own):
        raise UnsupportedError(
            f"feed_forward_length is {ff[:8]}; expected one, or twice as much in the last "
            f"{layers - own} layers"
        )
    return ff


def proportional(config: Config, factors: NDArray[np.float64]) -> dict[str, Any]:
    """The rotations as MLX-LM has them: the first pairs as they are, the others not at all.

    Empty where the file has others, or does not rotate whole heads where there is a window.
    """
    rope = config.rope
    swa = next((r for r in config.ropes if r is not None and r != rope), None)
    rotated = int(np.sum(factors == 1))
    if swa is None or swa.dims != config.args["head_dim"] or rope.scale != 1.0:
        return {}
    if not np.all(factors[:rotated] == 1) or not np.all(factors[rotated:] >= 1e30):
        return {}
    whole = {"rope_theta": rope.base, "partial_rotary_factor": 2 * rotated / rope.dims}
    return {
        "type": "proportional",
        "full_attention": {"type": "proportional", **whole},
        "sliding_attention": {"type": "default", "rope_theta": swa.base},
    }


ROWS = (
    Architecture(
        name="gemma4",
        models="Gemma 4",
        module="mlx_lm.models.gemma4_text",
        outer={**OUTER, **_OUTER},
        layer=GEMMA_NORMS | attention() | QK_NORMS | mlp() | _LAYER,
        groups=GROUPS | {"experts_gate_up": ("ffn_gate_exps", "ffn_up_exps")},
        rope_types=("llama3",),
        dense_too=True,
        uneven=("attention.head_count_kv", "feed_forward_length"),
        configure=_gemma4,
    ),
)
