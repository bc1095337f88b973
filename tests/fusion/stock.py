"""Small random models of mlx-lm, in the formats that mlx_lm.load gives."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 256,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
FORMATS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "affine4": {"bits": 4, "group_size": 64},
    "affine1": {"bits": 1, "group_size": 32},
    "affine8": {"bits": 8, "group_size": 32},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}
SCHEDULE = (11, 5, 1)


def make(name: str, form: str = "dense", dtype: mx.Dtype = mx.float32, **args: Any) -> nn.Module:
    """A model of ``mlx_lm.models.NAME`` with the same random weights every time."""
    module = import_module(f"mlx_lm.models.{name}")
    mx.random.seed(3)
    model: nn.Module = module.Model(
        module.ModelArgs.from_dict({"model_type": name, **SIZES, **args})
    )
    model.set_dtype(dtype)
    if FORMATS[form]:
        nn.quantize(model, **FORMATS[form])
    model.eval()
    mx.eval(model.parameters())
    return model


def logits(model: nn.Module, schedule: tuple[int, ...] = SCHEDULE, ids: int = 200) -> np.ndarray:
    """Of a prompt in a few calls, float32 [tokens, vocabulary]; its tokens are below ``ids``."""
    tokens = mx.array(np.random.RandomState(1).randint(0, ids, (1, sum(schedule))))
    rows, start, cache = [], 0, make_prompt_cache(model)
    for count in schedule:
        rows.append(model(tokens[:, start : start + count], cache=cache)[0].astype(mx.float32))
        mx.eval(rows[-1])
        start += count
    return np.array(mx.concatenate(rows))


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def parameters(model: nn.Module) -> dict[str, bytes]:
    """Name -> type, shape and bytes."""
    found: Any = tree_flatten(model.parameters())
    return {name: repr((a.dtype, a.shape)).encode() + bytes(memoryview(a)) for name, a in found}
