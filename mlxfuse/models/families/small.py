"""What some architectures say beside the keys that all have alike; numpy only.

A family's function takes the configuration with what all have alike and gives its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import GGUFError, UnsupportedError
from ..keys import Keys
from ..rope import Rope
from .gemma4 import gemma4

if TYPE_CHECKING:
    from ..config import Config

# llama.cpp names no model size in a file; these layer counts mark the 27B models, which alone
# scale queries by the width of a head as if all heads filled the model.
_LAYERS_27B = {"gemma2": 46, "gemma3": 62}


def _gemma2(key: Keys, config: Config) -> Config:
    rope = config.rope
    args = {
        "attn_logit_softcapping": key.positive("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": key.positive("final_logit_softcapping", 30.0),
    }
    swa = replace(rope, base=key.positive("rope.freq_base_swa", rope.base))
    return replace(config, args=config.args | _gemma(key, config, 4096, 2) | args, rope_swa=swa)


def _gemma3(key: Keys, config: Config) -> Config:
    if key("final_logit_softcapping", float, 0.0):
        raise UnsupportedError("gemma3 with a cap on its logits is not supported")
    # The rotary scaling of gemma3 is for its global layers alone.
    swa = Rope(config.rope.dims, key.positive("rope.freq_base_swa", 10000.0))
    args = {"rope_local_base_freq": swa.base}
    return replace(config, args=config.args | _gemma(key, config, None, 6) | args, rope_swa=swa)


def _gemma(key: Keys, config: Config, window: int | None, period: int) -> dict[str, Any]:
    """Query scale and sliding window, with llama.cpp's defaults for the latter."""
    sizes, layers = config.sizes, config.layers
    large = layers == _LAYERS_27B[key.name]
    return {
        "query_pre_attn_scalar": sizes["embd"] // sizes["heads"] if large else sizes["head"],
        "sliding_window": key.count("attention.sliding_window", window),
        "sliding_window_pattern": _window_period(key, layers, period),
    }


def _gpt_oss(key: Keys, config: Config) -> Config:
    """Windows, of which mlx-lm needs a layer with and one without, and mlx-lm's own names."""
    period = _window_period(key, config.layers, 2)
    if period == 1:
        raise UnsupportedError("gpt-oss without a layer that has a sliding window")
    kinds = ("sliding_attention", "full_attention")
    args = {
        "num_local_experts": config.sizes["experts"],
        "intermediate_size": config.sizes["expert_ff"],
        "sliding_window": key.count("attention.sliding_window"),
        "layer_types": [kinds[i % period == period - 1] for i in range(config.layers)],
    }
    return replace(config, args=config.args | args)


def _qwen35(key: Keys, config: Config) -> Config:
    """Sizes of the gated delta net, and which layers have one.

    llama.cpp's names: the state size is that of a head of keys and of values, the group count
    that of key heads, the time step rank that of value heads.
    """
    head, kernel = key.count("ssm.state_size"), key.count("ssm.conv_kernel")
    key_heads, value_heads = key.count("ssm.group_count"), key.count("ssm.time_step_rank")
    inner, path = key.count("ssm.inner_size"), key.file.path
    if value_heads % key_heads or inner != value_heads * head:
        raise GGUFError(
            path,
            f"{value_heads} value heads of {head} for {key_heads} key heads; expected a multiple, "
            f"and an ssm.inner_size of {value_heads * head}, not {inner}",
        )
    period = _attention_period(key, config)
    sizes = config.sizes | {
        "one": 1,
        "q": 2 * config.sizes["q"],  # each head of q is followed by a gate
        "key_heads": key_heads,
        "value_heads": value_heads,
        "value_head": head,
        "values": inner,
        "conv": 2 * key_heads * head + inner,
        "kernel": kernel,
    }
    rope = config.rope
    args = {
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": head,
        "linear_value_head_dim": head,
        "linear_conv_kernel_dim": kernel,
        "full_attention_interval": period,
        "rope_parameters": {
            "type": "default",
            "rope_theta": rope.base,
            "partial_rotary_factor": rope.dims / config.sizes["head"],
        },
    }
    if "experts" in sizes:
        args["norm_topk_prob"] = True  # in both projects whatever the file says
    recurrent = frozenset(i for i in range(config.layers) if (i + 1) % period)
    return replace(config, sizes=sizes, args=config.args | args, recurrent=recurrent)


def _attention_period(key: Keys, config: Config) -> int:
    """The last of so many layers has attention, the others a gated delta net."""
    layers, name = config.layers, "attention.recurrent_layers"
    kinds = key.file.metadata.get(f"{key.name}.{name}")
    if isinstance(kinds, np.ndarray):
        period = _period(kinds, layers)
        if period is None:
            raise UnsupportedError(f"{key.name}.{name} has no period")
    else:
        period = key.count("full_attention_interval", 4)
    if not 1 < period <= layers:
        raise UnsupportedError(f"{key.name} without layers of both kinds: attention every {period}")
    return period


def _window_period(key: Keys, layers: int, default: int) -> int:
    """The last of so many layers sees the whole context, the others a window."""
    pattern = key.file.metadata.get(f"{key.name}.attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        period = _period(pattern, layers)
        if period is None:
            raise UnsupportedError("an irregular attention.sliding_window_pattern")
    else:
        period = key.count("attention.sliding_window_pattern", default)
    if period > layers:
        raise UnsupportedError(f"{layers} layers, none of which sees the whole context")
    return period


def _period(pattern: np.ndarray, layers: int) -> int | None:
    """The p for which layer i slides exactly if ``i % p < p - 1``, if there is one."""
    slides = pattern[:layers].astype(bool)
    if slides.size != layers or slides.all():
        return None
    period = int(np.argmin(slides)) + 1
    regular = np.arange(layers) % period < period - 1
    return period if np.array_equal(slides, regular) else None


FAMILIES: dict[str, Callable[[Keys, Config], Config]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma4": gemma4,
    "gpt-oss": _gpt_oss,
    "qwen35": _qwen35,
    "qwen35moe": _qwen35,
}
