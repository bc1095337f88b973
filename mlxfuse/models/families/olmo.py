"""OLMo: a norm after attention and after the MLP, and none before them."""

from __future__ import annotations

from ..pieces import GROUPS, WIDE_QK_NORMS, attention, mlp
from ..table import Architecture, Weight

POST_NORMS = {
    "post_attention_norm": Weight("post_attention_layernorm", ("embd",)),
    "post_ffw_norm": Weight("post_feedforward_layernorm", ("embd",)),
}

ROWS = (
    Architecture(
        name="olmo2",
        models="OLMo 2",
        module="mlx_lm.models.olmo2",
        layer=attention() | WIDE_QK_NORMS | mlp() | POST_NORMS,
        groups=GROUPS,
    ),
)
