"""Qwen3.5 whose gated delta nets leave the value heads in the order of a GGUF file.

A file has the value heads tiled over the key heads (value head ``r * key_heads + k`` reads key
head k), mlx-lm has those of a key head next to each other. Rows can be put in mlx-lm's order
exactly; columns cannot, as a block of a quantised row may hold those of two heads. So the gate
and the output projection stay in the file's order, and the norm between the recurrence and them
goes from one to the other: it writes its result anyway, so that costs no dispatch.
"""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models import qwen3_5
from mlx_lm.models.activations import precise_swiglu
from mlx_lm.models.qwen3_5 import TextModelArgs as ModelArgs
from mlx_lm.models.qwen3_next import Qwen3NextRMSNormGated

__all__ = ["Model", "ModelArgs"]


class TilingNorm(Qwen3NextRMSNormGated):
    """mlx-lm's gated norm, from value heads next to each other to tiled ones."""

    def __init__(self, dims: int, eps: float, key_heads: int) -> None:
        super().__init__(dims, eps)
        self.key_heads = key_heads

    def __call__(self, hidden_states: mx.array, gate: mx.array) -> mx.array:
        """[B, L, value heads, D]; ``gate`` and the result have the heads tiled."""
        x = mx.fast.rms_norm(hidden_states, self.weight, self.eps)
        x = mx.unflatten(x, 2, (self.key_heads, -1)).swapaxes(2, 3)
        y: mx.array = precise_swiglu(hidden_states, gate.reshape(x.shape), x)
        return y.reshape(gate.shape)


class Model(qwen3_5.TextModel):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for layer in self.layers:
            if layer.is_linear:
                net = layer.linear_attn
                net.norm = TilingNorm(net.head_v_dim, args.rms_norm_eps, net.num_k_heads)
