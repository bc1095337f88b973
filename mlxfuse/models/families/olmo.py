"""Norms after attention and after the MLP, and none before them: OLMo 2 and 3, EXAONE 4."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..keys import Keys
from ..layers import layer_types, windows, with_windows
from ..pieces import GROUPS, QK_NORMS, WIDE_QK_NORMS, attention, mlp
from ..rope import Rope
from ..table import Architecture, Config, Weight

_POST_NORMS = {
    "post_attention_norm": Weight("post_attention_layernorm", ("embd",)),
    "post_ffw_norm": Weight("post_feedforward_layernorm", ("embd",)),
}


def _sliding_rope(key: Keys, config: Config) -> Rope:
    """The rotary embedding of layers with a window, without the scaling of the others."""
    return Rope(config.rope.dims, key.positive("rope.freq_base_swa", config.rope.base))


def _olmo3(key: Keys, config: Config) -> Config:
    slides = windows(key, config.layers, 4)
    window = key.count("attention.sliding_window")
    args = {"sliding_window": window, "layer_types": layer_types(slides)}
    config = with_windows(config, slides, window, _sliding_rope(key, config), config.rope)
    return replace(config, args=config.args | args)


def _exaone4(key: Keys, config: Config) -> Config:
    """Windows in the 32B alone, which llama.cpp knows by its 64 layers; the other layers of such
    a model rotate nothing.
    """
    args: dict[str, Any] = {
        "rope_scaling": None,
        "sliding_window": None,
        "sliding_window_pattern": None,
    }
    if config.layers == 64:
        slides = windows(key, config.layers, 4)
        window = key.count("attention.sliding_window", 4096)
        config = with_windows(config, slides, window, config.rope, None)
        pattern = "".join("L" if slide else "G" for slide in slides)
        args |= {"sliding_window": window, "sliding_window_pattern": pattern}
    return replace(config, args=config.args | args)


_OLMO2 = Architecture(
    name="olmo2",
    models="OLMo 2, OLMo 3, OLMo 3.1",
    module="mlx_lm.models.olmo2",
    layer=attention() | WIDE_QK_NORMS | mlp() | _POST_NORMS,
    groups=GROUPS,
)
# OLMo 3's files say the same name.
_OLMO3 = replace(_OLMO2, module="mlx_lm.models.olmo3", configure=_olmo3)

ROWS = (
    Architecture(
        name="exaone4",
        models="EXAONE 4.0",
        module="mlx_lm.models.exaone4",
        layer=attention() | QK_NORMS | mlp() | _POST_NORMS,
        groups=GROUPS,
        rope_types=("linear", "yarn", "llama3"),
        configure=_exaone4,
    ),
    replace(
        _OLMO2,
        choose=lambda key: _OLMO3 if key("attention.sliding_window", int, 0) else None,
    ),
)
