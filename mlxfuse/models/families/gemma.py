"""Gemma 1 to 3. The later two: norms before and after each branch, a window in most layers.

The residual stream leaves float16's range (65504): mlx-lm clips it there
(gemma3_text.clip_residual), and the authors trained and publish the models in bfloat16.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import UnsupportedError
from ..keys import Keys
from ..layers import period, windows, with_windows
from ..pieces import GROUPS, NORMS, QK_NORMS, attention, mlp
from ..rope import Rope
from ..table import OUTER, Architecture, Config, Weight, Weights

# ffn_norm is before the MLP here, and mlx-lm's post_attention_layernorm is what it says.
GEMMA_NORMS = {
    "attn_norm": Weight("input_layernorm", ("embd",)),
    "post_attention_norm": Weight("post_attention_layernorm", ("embd",)),
    "ffn_norm": Weight("pre_feedforward_layernorm", ("embd",)),
    "post_ffw_norm": Weight("post_feedforward_layernorm", ("embd",)),
}


def offset(weights: Weights) -> dict[str, Weight]:
    """The tensors with 1 on top of mlx-lm's weights where they are norms."""
    return {
        name: replace(weight, offset=1.0 if len(weight.shape) == 1 else 0.0)
        for name, weight in weights.items()
    }


# llama.cpp names no model size in a file; these layer counts mark the 27B models, which alone
# scale queries by the width of a head as if all heads filled the model.
_LAYERS_27B = {"gemma2": 46, "gemma3": 62}


def _gemma2(key: Keys, config: Config) -> Config:
    args = {
        "attn_logit_softcapping": key.positive("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": key.positive("final_logit_softcapping", 30.0),
    }
    base = key.positive("rope.freq_base_swa", config.rope.base)
    return _gemma(key, config, 4096, 2, replace(config.rope, base=base), args)


def _gemma3(key: Keys, config: Config) -> Config:
    if key("final_logit_softcapping", float, 0.0):
        raise UnsupportedError("gemma3 with a cap on its logits is not supported")
    # The rotary scaling of gemma3 is for its global layers alone.
    sliding = Rope(config.rope.dims, key.positive("rope.freq_base_swa", 10000.0))
    return _gemma(key, config, None, 6, sliding, {"rope_local_base_freq": sliding.base})


def _gemma(
    key: Keys,
    config: Config,
    window: int | None,
    turns: int,
    sliding: Rope,
    args: dict[str, Any],
) -> Config:
    """Query scale and sliding window, with llama.cpp's defaults for the latter.

    Args:
        window: that of a file that has no such key; None if its layers then see everything.
    """
    sizes, layers = config.sizes, config.layers
    name = "attention.sliding_window"
    width = key.count(name, window) if window else key.count_or_none(name)
    slides = windows(key, layers, turns) if width else [False] * layers
    large = layers == _LAYERS_27B[key.name]
    args |= {
        "query_pre_attn_scalar": sizes["embd"] // sizes["heads"] if large else sizes["head"],
        "sliding_window_pattern": period(key, slides, f"{name}_pattern"),
        **({"sliding_window": width} if width else {}),
    }
    config = with_windows(config, slides, width or 0, sliding, config.rope)
    return replace(config, args=config.args | args)


ROWS = (
    Architecture(
        name="gemma",
        models="Gemma 2B and 7B, CodeGemma",
        module="mlx_lm.models.gemma",
        outer=offset(OUTER),
        layer=offset(NORMS) | attention() | mlp(),
        groups=GROUPS,
        float16=False,
        rope_types=("linear",),
    ),
    Architecture(
        name="gemma2",
        models="Gemma 2",
        module="mlxfuse.models.families.gemma2_model",
        outer=offset(OUTER),
        layer=offset(GEMMA_NORMS) | attention() | mlp(),
        groups=GROUPS,
        float16=False,
        rope_types=("linear",),
        configure=_gemma2,
    ),
    Architecture(
        name="gemma3",
        models="Gemma 3, MedGemma",
        module="mlxfuse.models.families.gemma3_model",
        outer=offset(OUTER),
        layer=offset(GEMMA_NORMS | QK_NORMS) | attention() | mlp(),
        groups=GROUPS,
        float16=False,
        rope_types=("linear",),
        configure=_gemma3,
    ),
)
