"""Muse Glimmer: Gemma's four norms, a gate on attention, no rotation where there is no window."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...errors import GGUFError, UnsupportedError
from ...gguf.blocks import dequantize
from ..keys import Keys
from ..layers import layer_types, windows, with_windows
from ..pieces import GROUPS, attention, mlp
from ..table import Architecture, Config, Weight
from .gemma import GEMMA_NORMS, offset


def _muse_glimmer(key: Keys, config: Config) -> Config:
    slides = windows(key, config.layers, 4)
    window = key.count("attention.sliding_window")
    config = with_windows(config, slides, window, config.rope, None)
    args = {
        "sliding_window": window,
        "layer_types": layer_types(slides),
        "qk_scale_factor": _scale(key, config),
        "output_multiplier": key("logit_scale", float, 1.0),
        "final_logit_softcapping": key.positive("final_logit_softcapping"),
    }
    norms = (f"blk.{i}.attn_{n}_norm.weight" for i in range(config.layers) for n in "qk")
    return replace(config, args=config.args | args, unread=frozenset(norms))


def _scale(key: Keys, config: Config) -> float:
    """One number for all of the model's heads, which a file has as weights of the norms of q and k.

    Scores are products of the two, so theirs is the number. mlx-lm's class has no such weights.
    """
    found = set()
    for i in range(config.layers):
        scale = np.float32(1.0)
        for name in (f"blk.{i}.attn_{n}_norm.weight" for n in "qk"):
            tensor = key.file.tensors.get(name)
            if tensor is None or tensor.shape != (config.sizes["head"],):
                shape = None if tensor is None else tensor.shape
                raise GGUFError(
                    key.file.path, f"{name} has the shape {shape}; expected a head's size"
                )
            values = dequantize(key.file.read(tensor), tensor.format, tensor.shape)
            if np.any(values != values[0]):
                raise UnsupportedError(f"{name} is not one number for the whole head")
            scale = scale * values[0]
        found.add(float(scale))
    if len(found) > 1:
        raise UnsupportedError(f"attn_q_norm and attn_k_norm differ between layers: {found}")
    return found.pop()


ROWS = (
    Architecture(
        name="muse-glimmer",
        models="Muse Glimmer 30B",
        module="mlx_lm.models.muse_glimmer",
        layer={
            **offset(GEMMA_NORMS),
            **attention(),
            "attn_gate": Weight("self_attn.gate_proj", ("q", "embd")),
            **mlp(),
        },
        groups=GROUPS,
        rope_layout="paired",
        configure=_muse_glimmer,
    ),
)
