"""Models in the form of Llama: a norm before attention and before a gated MLP."""

from __future__ import annotations

from dataclasses import replace

from ..keys import Keys
from ..layers import without_rope
from ..pieces import GROUPS, NORMS, QK_NORMS, attention, mlp
from ..table import Architecture, Config


def _granite(key: Keys, config: Config) -> Config:
    """The scale of scores, 0 for the usual one; and whether positions are rotated at all.

    Granite 4's converter says by ``rope.scaling.finetuned`` that they are not.
    """
    scale = key("attention.scale", float, 0.0) or config.sizes["head"] ** -0.5
    config = replace(config, args=config.args | {"attention_multiplier": scale})
    if key.flag("rope.scaling.finetuned", True):
        return config
    return without_rope(config, range(config.layers))


def _smollm3(key: Keys, config: Config) -> Config:
    """Every fourth layer has no rotary embedding, in every file; no key says so."""
    return without_rope(config, range(3, config.layers, 4))


ROWS = (
    Architecture(
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
    ),
    # Mistral and SmolLM files say "llama" too. Their attention.sliding_window is not used,
    # as in llama.cpp: every layer sees the whole context.
    Architecture(
        name="llama",
        models="Llama 2 and 3, Mistral, SmolLM2, Yi, Vicuna",
        module="mlx_lm.models.llama",
        layer=NORMS | attention("optional", "optional") | mlp("optional"),
        groups=GROUPS,
        rope_layout="paired",
        rope_types=("linear", "yarn", "llama3"),
        metal_dtype="float16",
    ),
    # Channels of Qwen2.5-72B's residual stream leave float16's range (exllamav2 issue 627), and
    # its authors name bfloat16 as the type to run the family in.
    Architecture(
        name="qwen2",
        models="Qwen2, Qwen2.5, QwQ, DeepSeek-R1-Distill-Qwen",
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
        metal_dtype="float16",
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
