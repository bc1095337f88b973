"""Mamba-2 whose mixers' norms are of each group apart, as in the published code and llama.cpp.

mlx-lm 0.32's ``mamba2`` takes one norm over all groups, of which Codestral Mamba has eight, and
gives the norms before the mixers an epsilon of 1e-5 whatever the model says.
"""

from __future__ import annotations

import mlx.nn as nn
from mlx_lm.models import mamba2
from mlx_lm.models.mamba2 import ModelArgs
from mlx_lm.models.nemotron_h import MambaRMSNormGated

__all__ = ["Model", "ModelArgs"]


class Model(mamba2.Model):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        inner, eps = args.num_heads * args.head_dim, args.layer_norm_epsilon
        for layer in self.layers:
            layer.norm = nn.RMSNorm(args.hidden_size, eps)
            layer.mixer.norm = MambaRMSNormGated(inner, eps=eps, group_size=inner // args.n_groups)
