"""GLM-4: norms before and after each branch, gate and up in one tensor, half of a head rotated."""

from __future__ import annotations

from dataclasses import replace

from ..keys import Keys
from ..pieces import QKV, attention
from ..table import Architecture, Config, Weight


def _glm4(key: Keys, config: Config) -> Config:
    """Converters put the rotary rows of the models that see pictures into halves."""
    if f"{key.name}.rope.dimension_sections" in key.file.metadata:
        return replace(config, rope=replace(config.rope, pairs=False))
    return config


ROWS = (
    Architecture(
        name="glm4",
        models="GLM-4-9B, GLM-4-32B, GLM-Z1, the text of GLM-4.1V-9B and GLM-4.6V-Flash",
        module="mlx_lm.models.glm4",
        layer={
            "attn_norm": Weight("input_layernorm", ("embd",)),
            "post_attention_norm": Weight("post_self_attn_layernorm", ("embd",)),
            "ffn_norm": Weight("post_attention_layernorm", ("embd",)),
            "post_ffw_norm": Weight("post_mlp_layernorm", ("embd",)),
            **attention("optional"),
            "ffn_up": Weight("mlp.gate_up_proj", ("gate_up", "embd")),
            "ffn_down": Weight("mlp.down_proj", ("embd", "ff")),
        },
        groups=QKV | {"gate_up": ("ffn_up",)},
        rope_layout="interleaved",
        partial_rope=True,
        may_tie=False,
        configure=_glm4,
    ),
)
