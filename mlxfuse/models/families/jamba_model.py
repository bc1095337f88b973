"""Jamba with experts where the file has them, whose weights are the softmax over all experts.

mlx-lm 0.32's ``jamba`` takes the softmax over the chosen experts, where the published model
(modeling_jamba.py) and llama.cpp take it over all of them; it tells the layers with experts by a
rule that holds for a period of two only; and its mixers take a batch's padding for tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models import jamba

from .selective_model import mix


@dataclass
class ModelArgs(jamba.ModelArgs):
    """``routed_layers`` says for each layer whether it has experts."""

    routed_layers: list[bool] = field(default_factory=list)


class MoeBlock(jamba.JambaSparseMoeBlock):
    def __call__(self, x: mx.array) -> mx.array:
        """x [N, L, hidden_size] -> the same shape."""
        gates = mx.softmax(self.router(x), axis=-1, precise=True)
        k = self.num_experts_per_tok
        inds = mx.stop_gradient(mx.argpartition(-gates, kth=k - 1, axis=-1)[..., :k])
        scores = mx.take_along_axis(gates, inds, axis=-1)
        y: mx.array = self.switch_mlp(x, inds)
        return (y * scores[..., None]).sum(axis=-2).astype(y.dtype)


class Mixer(jamba.JambaMambaMixer):
    def _norms(self, *parts: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        dt, B, C = parts
        return self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        """x [N, L, hidden_size] -> the same shape."""
        return mix(self, x, cache, self._norms)


class Model(jamba.Model):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for layer, routed in zip(self.layers, args.routed_layers, strict=True):
            if not layer.is_attn:
                layer.mamba = Mixer(args)
            layer.feed_forward = MoeBlock(args) if routed else jamba.JambaMLP(args)
