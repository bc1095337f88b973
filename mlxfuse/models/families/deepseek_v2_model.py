"""DeepSeek V2 Lite in the class of DeepSeek V3, whose cache keeps the latent vectors.

mlx-lm 0.32's ``deepseek_v2`` computes the keys and values of every head for the whole cache and
has no place for the matrices that GGUF files have apart. What differs from V3 is the choice of
experts: by a softmax of their scores, without a bias.
"""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models import deepseek_v3
from mlx_lm.models.deepseek_v3 import ModelArgs

__all__ = ["Model", "ModelArgs"]


class Gate(deepseek_v3.MoEGate):
    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x [B, L, hidden_size] -> the chosen experts and their weights, [B, L, k] each."""
        scores = mx.softmax((x @ self.weight.T).astype(mx.float32), axis=-1)
        k = self.top_k
        inds = mx.stop_gradient(mx.argpartition(-scores, kth=k - 1, axis=-1)[..., :k])
        chosen = mx.take_along_axis(scores, inds, axis=-1)
        if self.norm_topk_prob:
            chosen = chosen / chosen.sum(axis=-1, keepdims=True)
        return inds, chosen * self.routed_scaling_factor


class Model(deepseek_v3.Model):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for layer in self.layers:
            if isinstance(layer.mlp, deepseek_v3.DeepseekV3MoE):
                layer.mlp.gate = Gate(args)
