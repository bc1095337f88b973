"""GGUF architecture -> mlx-lm model, one table each. Data only: neither mlx nor mlx-lm is imported.

Tensor names are those of llama.cpp (``gguf-py/gguf/constants.py``), module paths those of mlx-lm.
Shapes are given by the names of sizes (see ``config.Config.sizes``), row-major.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Weight:
    """Where one GGUF tensor goes.

    module  path of the mlx-lm module, below ``model.layers.N.`` for a layer's tensor.
    shape   names of the sizes: one for a norm, two for a matrix, three for experts' matrices.
    bias    ``no``, ``optional`` or ``required``: whether NAME.bias may, must or must not be there.
    bare    ``module`` is no layer that has a weight but an array of its own.
    heads   name of the size that counts the heads whose rotary rows may be stored in pairs.
    tiled   name of the size that counts the rows of a value head, if its last rows are those of
            value heads, which the file has tiled over the key heads and mlx-lm next to each other.
    suffix  what follows the tensor's name.
    float32 a bare array that stays in float32.
    log     the file has ``-exp(x)`` of what the model wants.
    """

    module: str
    shape: tuple[str, ...]
    bias: str = "no"
    heads: str = ""
    bare: bool = False
    tiled: str = ""
    suffix: str = ".weight"
    float32: bool = False
    log: bool = False


_OUTER = {
    "token_embd": Weight("model.embed_tokens", ("vocab", "embd")),
    "output_norm": Weight("model.norm", ("embd",)),
    "output": Weight("lm_head", ("vocab", "embd")),
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One supported value of ``general.architecture``.

    name         as in the file.
    module       Python module with mlx-lm's ``Model`` and ``ModelArgs``.
    outer        tensors outside the layers.
    layer        tensors of one layer, named without ``blk.N.``.
    recurrent    those of a layer with a recurrence in place of attention, if there are such.
    groups       name -> tensors with the same input, which a fused kernel reads as one weight.
    paired_rope  rotary rows of q and k lie as pairs (2i, 2i+1) in the file and must be taken
                 apart into halves (i, i + head_dim/2), the order mlx-lm rotates.
    norm_offset  what the file's norm weights have on top of mlx-lm's.
    metal_dtype  activation type on Metal unless the caller says otherwise.
    rope_types   rotary scalings that are supported besides none.
    dense_too    files without experts are of it too, although its table has them.
    uneven       keys whose values may differ between layers.
    partial_rope part of a head may be rotated.
    may_tie      mlx-lm's class can use the embedding as its output head.
    args         fields of mlx-lm's ``ModelArgs`` that every file of the architecture has alike.
    """

    name: str
    module: str
    layer: Mapping[str, Weight]
    groups: Mapping[str, tuple[str, ...]]
    outer: Mapping[str, Weight] = field(default_factory=lambda: _OUTER)
    paired_rope: bool = False
    norm_offset: float = 0.0
    metal_dtype: str = "float16"
    rope_types: tuple[str, ...] = ("linear", "yarn")
    partial_rope: bool = False
    may_tie: bool = True
    dense_too: bool = False
    uneven: tuple[str, ...] = ()
    args: Mapping[str, object] = field(default_factory=dict)
    recurrent: Mapping[str, Weight] | None = None

    @property
    def experts(self) -> bool:
        """Whether its layers have experts."""
        return "ffn_gate_inp" in self.layer


_NORMS = {
    "attn_norm": Weight("input_layernorm", ("embd",)),
    "ffn_norm": Weight("post_attention_layernorm", ("embd",)),
}
# Gemma norms each branch before and after; its ffn_norm is not llama's.
_GEMMA_NORMS = {
    "attn_norm": Weight("input_layernorm", ("embd",)),
    "post_attention_norm": Weight("post_attention_layernorm", ("embd",)),
    "ffn_norm": Weight("pre_feedforward_layernorm", ("embd",)),
    "post_ffw_norm": Weight("post_feedforward_layernorm", ("embd",)),
}
_QK_NORMS = {
    "attn_q_norm": Weight("self_attn.q_norm", ("head",)),
    "attn_k_norm": Weight("self_attn.k_norm", ("head",)),
}
_QKV: dict[str, tuple[str, ...]] = {"qkv": ("attn_q", "attn_k", "attn_v")}
_GROUPS = _QKV | {"gate_up": ("ffn_gate", "ffn_up")}
_SHARED = {"shared_gate_up": ("ffn_gate_shexp", "ffn_up_shexp")}
_EXPERT_GROUPS = _QKV | {"gate_up": ("ffn_gate_exps", "ffn_up_exps")}


def _attention(bias: str = "no", output_bias: str = "no") -> dict[str, Weight]:
    return {
        "attn_q": Weight("self_attn.q_proj", ("q", "embd"), bias, "heads"),
        "attn_k": Weight("self_attn.k_proj", ("kv", "embd"), bias, "kv_heads"),
        "attn_v": Weight("self_attn.v_proj", ("kv", "embd"), bias),
        "attn_output": Weight("self_attn.o_proj", ("embd", "o"), output_bias),
    }


def _mlp(bias: str = "no") -> dict[str, Weight]:
    return {
        "ffn_gate": Weight("mlp.gate_proj", ("ff", "embd"), bias),
        "ffn_up": Weight("mlp.up_proj", ("ff", "embd"), bias),
        "ffn_down": Weight("mlp.down_proj", ("embd", "ff"), bias),
    }


def _experts(router: str, switch: str, bias: str = "no") -> dict[str, Weight]:
    up, down = ("experts", "expert_ff", "embd"), ("experts", "embd", "expert_ff")
    return {
        "ffn_gate_inp": Weight(f"mlp.{router}", ("experts", "embd"), bias),
        "ffn_gate_exps": Weight(f"mlp.{switch}.gate_proj", up, bias),
        "ffn_up_exps": Weight(f"mlp.{switch}.up_proj", up, bias),
        "ffn_down_exps": Weight(f"mlp.{switch}.down_proj", down, bias),
    }


_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": Weight("mlp.shared_expert_gate", ("one", "embd")),
    "ffn_gate_shexp": Weight("mlp.shared_expert.gate_proj", ("shared_ff", "embd")),
    "ffn_up_shexp": Weight("mlp.shared_expert.up_proj", ("shared_ff", "embd")),
    "ffn_down_shexp": Weight("mlp.shared_expert.down_proj", ("embd", "shared_ff")),
}

# Sizes are 0 in layers, and files, that have no such tensor.
_GEMMA4_OUTER = {
    "per_layer_token_embd": Weight("model.embed_tokens_per_layer", ("vocab", "inputs")),
    "per_layer_model_proj": Weight("model.per_layer_model_projection", ("inputs", "embd")),
    "per_layer_proj_norm": Weight("model.per_layer_projection_norm", ("input",)),
}
_GEMMA4 = {
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

# A layer's kind tells what its attn_qkv is: here the input of a gated delta net, else q, k and v.
_DELTA_NET = {
    "attn_qkv": Weight("linear_attn.in_proj_qkv", ("conv", "embd"), tiled="value_head"),
    "attn_gate": Weight("linear_attn.in_proj_z", ("values", "embd")),
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
    "ssm_out": Weight("linear_attn.out_proj", ("embd", "values")),
}
_POST_ATTENTION_NORMS = {
    "attn_norm": _NORMS["attn_norm"],
    "post_attention_norm": Weight("post_attention_layernorm", ("embd",)),
}


def _qwen35(name: str, mlp: dict[str, Weight], groups: dict[str, tuple[str, ...]]) -> Architecture:
    """What the two have alike.

    A delta net's state grows with the context and is read out before its norm: over a long one the
    product leaves float16's range (github.com/vllm-project/vllm/issues/54308).
    """
    return Architecture(
        name=name,
        module="mlxfuse.models.families.qwen35",
        layer={**_POST_ATTENTION_NORMS, **_attention(), **_QK_NORMS, **mlp},
        recurrent={**_POST_ATTENTION_NORMS, **_DELTA_NET, **mlp},
        groups=groups | {"in_proj": ("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha")},
        metal_dtype="bfloat16",
        rope_types=("linear",),
        partial_rope=True,
    )


ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (
        # Mistral and SmolLM files say "llama" too. Their attention.sliding_window is not used,
        # as in llama.cpp: every layer sees the whole context.
        Architecture(
            name="llama",
            module="mlx_lm.models.llama",
            layer=_NORMS | _attention("optional", "optional") | _mlp("optional"),
            groups=_GROUPS,
            paired_rope=True,
            rope_types=("linear", "yarn", "llama3"),
        ),
        # Channels of Qwen2.5-72B's residual stream leave float16's range (exllamav2 issue 627), and
        # its authors name bfloat16 as the type to run the family in.
        Architecture(
            name="qwen2",
            module="mlx_lm.models.qwen2",
            layer=_NORMS | _attention("required") | _mlp(),
            groups=_GROUPS,
            metal_dtype="bfloat16",
        ),
        Architecture(
            name="qwen3",
            module="mlx_lm.models.qwen3",
            layer=_NORMS | _attention() | _QK_NORMS | _mlp(),
            groups=_GROUPS,
        ),
        Architecture(
            name="qwen2moe",
            module="mlx_lm.models.qwen2_moe",
            layer=_NORMS | _attention("required") | _experts("gate", "switch_mlp") | _SHARED_EXPERT,
            groups=_EXPERT_GROUPS | _SHARED,
            metal_dtype="bfloat16",
            may_tie=False,
        ),
        # Both projects normalise the weights of a token's experts in every qwen3moe and in no
        # qwen2moe; llama.cpp reads no key for it.
        Architecture(
            name="qwen3moe",
            module="mlx_lm.models.qwen3_moe",
            layer=_NORMS | _attention() | _QK_NORMS | _experts("gate", "switch_mlp"),
            groups=_EXPERT_GROUPS,
            args={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": ()},
        ),
        # Its authors trained it in bfloat16 and say nothing of float16's range.
        Architecture(
            name="gpt-oss",
            module="mlx_lm.models.gpt_oss",
            layer={
                **_POST_ATTENTION_NORMS,
                **_attention("required", "required"),
                "attn_sinks": Weight("self_attn.sinks", ("heads",), bare=True),
                **_experts("router", "experts", "required"),
            },
            groups=_EXPERT_GROUPS,
            metal_dtype="bfloat16",
            may_tie=False,
        ),
        # Gemma's residual stream leaves float16's range (65504): mlx-lm clips it there
        # (gemma3_text.clip_residual) and its authors trained and publish it in bfloat16.
        Architecture(
            name="gemma2",
            module="mlxfuse.models.families.gemma2",
            layer=_GEMMA_NORMS | _attention() | _mlp(),
            groups=_GROUPS,
            norm_offset=1.0,
            metal_dtype="bfloat16",
            rope_types=("linear",),
        ),
        Architecture(
            name="gemma3",
            module="mlxfuse.models.families.gemma3",
            layer=_GEMMA_NORMS | _attention() | _QK_NORMS | _mlp(),
            groups=_GROUPS,
            norm_offset=1.0,
            metal_dtype="bfloat16",
            rope_types=("linear",),
        ),
        Architecture(
            name="gemma4",
            module="mlx_lm.models.gemma4_text",
            outer={**_OUTER, **_GEMMA4_OUTER},
            layer=_GEMMA_NORMS | _attention() | _QK_NORMS | _mlp() | _GEMMA4,
            groups=_GROUPS | {"experts_gate_up": ("ffn_gate_exps", "ffn_up_exps")},
            metal_dtype="bfloat16",
            rope_types=("llama3",),
            dense_too=True,
            uneven=("attention.head_count_kv", "feed_forward_length"),
        ),
        Architecture(
            name="phi3",
            module="mlx_lm.models.phi3",
            layer={
                **_NORMS,
                "attn_qkv": Weight("self_attn.qkv_proj", ("qkv", "embd")),
                "attn_output": Weight("self_attn.o_proj", ("embd", "q")),
                "ffn_up": Weight("mlp.gate_up_proj", ("gate_up", "embd")),
                "ffn_down": Weight("mlp.down_proj", ("embd", "ff")),
            },
            groups={"qkv": ("attn_qkv",), "gate_up": ("ffn_up",)},
            rope_types=("linear", "longrope"),
            partial_rope=True,
        ),
        _qwen35("qwen35", _mlp(), _GROUPS),
        _qwen35(
            "qwen35moe",
            _experts("gate", "switch_mlp") | _SHARED_EXPERT,
            _EXPERT_GROUPS | _SHARED,
        ),
    )
}
