"""Nemotron-H whose mixers leave a batch's padding out of their states.

mlx-lm 0.32's ``nemotron_h`` does not give ``ssm_update`` the lengths of prompts that are padded on
the right, as its ``granitemoehybrid`` does: the states of the shorter ones are wrong from then on.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import nemotron_h
from mlx_lm.models.nemotron_h import ModelArgs
from mlx_lm.models.ssm import ssm_update

__all__ = ["Model", "ModelArgs"]


class Mixer(nemotron_h.NemotronHMamba2Mixer):
    def _ssm(
        self,
        hidden_states: mx.array,
        B: mx.array,
        C: mx.array,
        dt: mx.array,
        cache: Any,
        mask: mx.array | None,
    ) -> mx.array:
        """hidden_states [B, L, heads * head size] -> the same shape."""
        batch_size, seq_len, _ = hidden_states.shape
        hidden_states = hidden_states.reshape(batch_size, seq_len, self.num_heads, self.head_dim)
        B = B.reshape(batch_size, seq_len, self.n_groups, self.ssm_state_size)
        C = C.reshape(batch_size, seq_len, self.n_groups, self.ssm_state_size)
        if cache:
            state = cache[1]
            lengths = cache.lengths
        else:
            state, lengths = None, None
        y, state = ssm_update(
            hidden_states,
            self.A_log,
            B,
            C,
            self.D.astype(hidden_states.dtype),
            dt,
            self.dt_bias,
            state,
            self.time_step_limit,
            mask,
            lengths,
        )
        if cache:
            cache[1] = state
        return y.reshape(batch_size, seq_len, self.intermediate_size)


class Model(nemotron_h.Model):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for layer in self.layers:
            if layer.block_type == "M":
                layer.mixer = Mixer(args)
