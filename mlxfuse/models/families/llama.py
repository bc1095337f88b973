"""Models in the form of Llama: a norm before attention and before a gated MLP."""

from __future__ import annotations

from dataclasses import replace

from ..keys import Keys
from ..layers import without_rope
from ..pieces import (
    EXPERT_GROUPS,
    GROUPS,
    NORMS,
    POST_ATTENTION_NORMS,
    QK_NORMS,
    QKV,
    attention,
    experts,
    mlp,
)
from ..table import Architecture, Config, Weight


def _granite(key: Keys, config: Config) -> Config:
    """The scale of scores, 0 for the usual one; and whether positions are rotated at all.

    Granite 4's converter says by ``rope.scaling.finetuned`` that they are not.
    """
    scale = key("attention.scale", float, 0.0) or config.sizes["head"] ** -0.5
    config = replace(config, args=config.args | {"attention_multiplier": scale})
    if key.flag("rope.scaling.finetuned", True):
        return config
    return without_rope(config, range(config.layers))


def _minicpm(key: Keys, config: Config) -> Config:
    """The converter writes hidden_size / dim_model_base as the logits' scale, which divides."""
    embd, layers = config.sizes["embd"], config.layers
    args = {
        "scale_emb": key("embedding_scale", float, 12.0),
        "scale_depth": key("residual_scale", float, 1.4 / layers**0.5) * layers**0.5,
        "dim_model_base": embd / key.positive("logit_scale", embd / 256),
    }
    return replace(config, args=config.args | args)


def _mistral3(key: Keys, config: Config) -> Config:
    """Queries grow with the position in steps of the original context, if the file says so."""
    original = key.count("rope.scaling.original_context_length", config.args[_CONTEXT])
    rope = {
        "rope_theta": config.rope.base,
        "rope_type": "default",
        "llama_4_scaling_beta": key("attention.temperature_scale", float, 0.0),
        "original_max_position_embeddings": original,
    }
    return replace(config, args=config.args | {"rope_parameters": rope})


_CONTEXT = "max_position_embeddings"


def _xielu(key: Keys, config: Config) -> Config:
    """The activation's numbers, which a file has in lists of one for each layer."""
    names = ("alpha_n", "alpha_p", "beta", "eps")
    values = {
        f"model.layers.{i}.mlp.act_fn.{name}": value
        for name in names
        for i, value in enumerate(key.floats(f"xielu.{name}", config.layers))
    }
    return replace(config, values=values)


def _smollm3(key: Keys, config: Config) -> Config:
    """Every fourth layer has no rotary embedding, in every file; no key says so."""
    return without_rope(config, range(3, config.layers, 4))


GRANITE = Architecture(
    name="granite",
    models="Granite 3, 4.0 micro and 350M",
    module="mlx_lm.models.granite",
    layer=NORMS | attention("optional", "optional") | mlp("optional"),
    groups=GROUPS,
    keys={
        "logits_scaling": ("logit_scale", 1.0),
        "residual_multiplier": ("residual_scale", 1.0),
        "embedding_multiplier": ("embedding_scale", 1.0),
    },
    rope_layout="paired",
    rope_types=("linear", "yarn", "llama3"),
    fixed_head=True,
    configure=_granite,
)

# Its files say "llama" too.
_MIXTRAL = Architecture(
    name="llama",
    module="mlx_lm.models.mixtral",
    layer={
        **NORMS,
        **attention("optional", "optional"),
        **experts("block_sparse_moe.gate", "block_sparse_moe.switch_mlp"),
    },
    groups=EXPERT_GROUPS,
    same={"intermediate_size": "expert_ff"},
    rope_layout="paired",
    rope_types=("linear", "yarn", "llama3"),
    whole_experts=True,
    fixed_head=True,
)

ROWS = (
    Architecture(
        name="apertus",
        models="Apertus",
        module="mlx_lm.models.apertus",
        layer={
            "attn_norm": Weight("attention_layernorm", ("embd",)),
            "ffn_norm": Weight("feedforward_layernorm", ("embd",)),
            **attention(),
            **QK_NORMS,
            "ffn_up": Weight("mlp.up_proj", ("ff", "embd")),
            "ffn_down": Weight("mlp.down_proj", ("embd", "ff")),
        },
        groups=QKV,
        args={"post_norm": False, "qk_norm": True},
        rope_types=("linear", "yarn", "llama3"),
        fixed_head=True,
        configure=_xielu,
    ),
    Architecture(
        name="ernie4_5",
        models="ERNIE-4.5-0.3B",
        module="mlx_lm.models.ernie4_5",
        layer=NORMS | attention("optional", "optional") | mlp(),
        groups=GROUPS,
        args={"use_bias": False},
        rope_layout="interleaved",
    ),
    GRANITE,
    replace(
        GRANITE,
        name="granitemoe",
        models="Granite 3 1B-A400M and 3B-A800M",
        module="mlx_lm.models.granitemoe",
        layer={
            **NORMS,
            **attention("optional", "optional"),
            **experts("block_sparse_moe.router.layer", "block_sparse_moe.switch_mlp"),
        },
        groups=EXPERT_GROUPS,
        same={"intermediate_size": "expert_ff"},
        whole_experts=True,
    ),
    Architecture(
        name="hunyuan-dense",
        models="Hunyuan 0.5B to 7B, HY-MT1.5",
        module="mlx_lm.models.hunyuan_v1_dense",
        layer={
            **NORMS,
            **attention("optional", "optional"),
            # After the rotation, unlike others'.
            "attn_q_norm": Weight("self_attn.query_layernorm", ("head",)),
            "attn_k_norm": Weight("self_attn.key_layernorm", ("head",)),
            **mlp(),
        },
        groups=GROUPS,
    ),
    Architecture(
        name="internlm2",
        models="InternLM2, InternLM2.5",
        module="mlx_lm.models.llama",
        layer=NORMS | attention("optional", "optional") | mlp(),
        groups=GROUPS,
        rope_layout="paired",
    ),
    # Mistral and SmolLM files say "llama" too. Their attention.sliding_window is not used,
    # as in llama.cpp: every layer sees the whole context.
    Architecture(
        name="llama",
        models="Llama 2 and 3, Mistral, Mixtral, SmolLM2, Yi, Vicuna",
        module="mlx_lm.models.llama",
        layer=NORMS | attention("optional", "optional") | mlp("optional"),
        groups=GROUPS,
        rope_layout="paired",
        rope_types=("linear", "yarn", "llama3"),
        float16=True,
        choose=lambda key: _MIXTRAL if key("expert_count", int, 0) else None,
    ),
    Architecture(
        name="minicpm",
        models="MiniCPM 1B, 2B and MiniCPM4",
        module="mlxfuse.models.families.minicpm_model",
        layer=NORMS | attention("optional", "optional") | mlp(),
        groups=GROUPS,
        rope_layout="paired",
        rope_types=("linear", "yarn", "llama3", "longrope"),
        fixed_head=True,
        configure=_minicpm,
    ),
    Architecture(
        name="mistral3",
        models="Devstral Small 2, Ministral 3, Mistral Small 3.1 and 3.2",
        module="mlx_lm.models.ministral3",
        layer=NORMS | attention("optional", "optional") | mlp("optional"),
        groups=GROUPS,
        rope_layout="paired",
        rope_types=("linear", "yarn", "llama3"),
        yarn_log=1.0,
        configure=_mistral3,
    ),
    # Channels of Qwen2.5-72B's residual stream leave float16's range (exllamav2 issue 627), and
    # its authors name bfloat16 as the type to run the family in.
    Architecture(
        name="qwen2",
        models="Qwen2, Qwen2.5, QwQ, DeepSeek-R1-Distill-Qwen",
        module="mlx_lm.models.qwen2",
        layer=NORMS | attention("optional") | mlp(),
        groups=GROUPS,
        float16=False,
        fixed_head=True,
    ),
    # For text alone the three axes of positions are equal: the rotation is qwen2's.
    Architecture(
        name="qwen2vl",
        models="the text of Qwen2-VL and Qwen2.5-VL",
        module="mlx_lm.models.qwen2",
        layer=NORMS | attention("optional") | mlp(),
        groups=GROUPS,
        fixed_head=True,
    ),
    Architecture(
        name="qwen3",
        models="Qwen3",
        module="mlx_lm.models.qwen3",
        layer=NORMS | attention() | QK_NORMS | mlp(),
        groups=GROUPS,
        float16=True,
    ),
    # As qwen2vl. llama.cpp leaves two of the 64 pairs of a real model unrotated, whose wavelength
    # is longer than any context: its rule for the axes gives them to a fourth one, which is 0.
    Architecture(
        name="qwen3vl",
        models="the text of Qwen3-VL",
        module="mlx_lm.models.qwen3",
        layer=NORMS | attention() | QK_NORMS | mlp(),
        groups=GROUPS,
    ),
    Architecture(
        name="seed_oss",
        models="Seed-OSS-36B",
        module="mlx_lm.models.seed_oss",
        layer=POST_ATTENTION_NORMS | attention("optional") | mlp(),
        groups=GROUPS,
    ),
    Architecture(
        name="smollm3",
        models="SmolLM3",
        module="mlx_lm.models.smollm3",
        layer=NORMS | attention("optional", "optional") | mlp(),
        groups=GROUPS,
        rope_layout="paired",
        configure=_smollm3,
    ),
)
