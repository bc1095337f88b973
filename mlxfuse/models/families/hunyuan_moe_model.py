"""Hunyuan-A13B whose experts' weights add up to 1.

mlx-lm 0.32's ``hunyuan.MoeBlock`` takes the softmax over all experts and does not divide by the sum
over the chosen ones; the published model (modeling_hunyuan.py, ``topkgating``) and llama.cpp do.
"""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models import hunyuan
from mlx_lm.models.hunyuan import ModelArgs

__all__ = ["Model", "ModelArgs"]


class MoeBlock(hunyuan.MoeBlock):
    def __call__(self, x: mx.array) -> mx.array:
        """x [B, L, hidden_size] -> the same shape."""
        gates = mx.softmax(self.gate(x), axis=-1, precise=True)
        k = self.top_k
        inds = mx.stop_gradient(mx.argpartition(-gates, kth=k - 1, axis=-1)[..., :k])
        scores = mx.take_along_axis(gates, inds, axis=-1)
        scores = scores / scores.sum(axis=-1, keepdims=True)
        y = self.switch_mlp(x, inds)
        y = (y * scores[..., None].astype(mx.float32)).sum(axis=-2).astype(y.dtype)
        return y + self.shared_mlp(x)


class Model(hunyuan.Model):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for i, layer in enumerate(self.layers):
            layer.mlp = MoeBlock(args, i)
