"""The activations of `mlxfuse.kernels.matmul.quantized_matmul`, with MLX-LM's own operations."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu, swiglu_oai

GATED: dict[str, Callable[[mx.array, mx.array], mx.array]] = {
    "swiglu": swiglu,
    "geglu": lambda gate, up: nn.gelu(gate) * up,
    "geglu_tanh": lambda gate, up: nn.gelu_approx(gate) * up,
    "swiglu_clipped": swiglu_oai,
}
PLAIN: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "gelu_tanh": nn.gelu_approx,
    "relu2": nn.relu2,
}
