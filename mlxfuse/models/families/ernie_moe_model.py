"""ERNIE 4.5 with experts that are chosen by scores with a bias.

mlx-lm 0.32's ``ernie4_5_moe`` drops ``moe_statics.e_score_correction_bias``, which the published
21B and 300B models have; llama.cpp adds it to the scores for the choice alone.
"""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models import ernie4_5_moe
from mlx_lm.models.ernie4_5_moe import ModelArgs

__all__ = ["Model", "ModelArgs"]


class MoeMLP(ernie4_5_moe.Ernie4_5_MoeMLP):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        self.e_score_correction_bias = mx.zeros((args.moe_num_experts,))

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, L, hidden_size] -> the same shape."""
        gates = self.gate_act(self.gate(x).astype(mx.float32))
        k = self.k
        choice = gates + self.e_score_correction_bias
        inds = mx.stop_gradient(mx.argpartition(-choice, kth=k - 1, axis=-1)[..., :k])
        scores = mx.take_along_axis(gates, inds, axis=-1)
        scores = scores / mx.maximum(scores.sum(axis=-1, keepdims=True), 1e-12)
        y = self.switch_mlp(x, inds)
        y = (y * scores[..., None]).sum(axis=-2).astype(y.dtype)
        return y if self.shared_experts is None else y + self.shared_experts(x)


class Model(ernie4_5_moe.Model):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for layer in self.layers:
            if isinstance(layer.mlp, ernie4_5_moe.Ernie4_5_MoeMLP):
                layer.mlp = MoeMLP(args)
