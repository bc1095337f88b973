"""gpt-oss: experts, attention sinks, and a window in every other layer."""

from __future__ import annotations

from dataclasses import replace

from ...errors import UnsupportedError
from ..keys import Keys
from ..layers import layer_types, windows, with_windows
from ..pieces import EXPERT_GROUPS, POST_ATTENTION_NORMS, attention, experts
from ..table import Architecture, Config, Weight


def _gpt_oss(key: Keys, config: Config) -> Config:
    """Windows, of which mlx-lm needs a layer with and one without, and mlx-lm's own names."""
    slides = windows(key, config.layers, 2)
    if len(set(slides)) < 2:
        raise UnsupportedError(
            f"gpt-oss whose {config.layers} layers all have a sliding window, or all have none"
        )
    window = key.count("attention.sliding_window")
    args = {"sliding_window": window, "layer_types": layer_types(slides)}
    config = with_windows(config, slides, window, config.rope, config.rope)
    return replace(config, args=config.args | args)


ROWS = (
    # Its authors trained it in bfloat16 and say nothing of float16's range.
    Architecture(
        name="gpt-oss",
        models="gpt-oss-20b, gpt-oss-120b",
        module="mlx_lm.models.gpt_oss",
        layer={
            **POST_ATTENTION_NORMS,
            **attention("required", "required"),
            "attn_sinks": Weight("self_attn.sinks", ("heads",), bare=True),
            **experts("mlp.router", "mlp.experts", "required"),
        },
        groups=EXPERT_GROUPS,
        same={"num_local_experts": "experts", "intermediate_size": "expert_ff"},
        may_tie=False,
        configure=_gpt_oss,
    ),
)
