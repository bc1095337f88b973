"""Gated MLPs and decoder layers of mlx-lm's models with fewer dispatches."""

from __future__ import annotations

from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from .attention import project


class FusedMLP(nn.Module):
    """Takes the place of the class of an mlx-lm ``MLP`` whose ``gate_proj`` and ``up_proj``, or
    ``gate_up_proj``, became ``gate_up``.
    """

    activation: ClassVar[str] = "swiglu"

    def __call__(self, x: mx.array, *, residual: mx.array | None = None) -> mx.array:
        """x [..., hidden_size] -> the same shape, with ``residual`` added."""
        return project(self.down_proj, self.gate_up.gated(x, self.activation), residual)


class FusedGeluMLP(FusedMLP):
    """Gemma's, with the tanh form of GELU."""

    activation = "geglu_tanh"


class FusedBlock(nn.Module):
    """Takes the place of the class of an mlx-lm ``TransformerBlock`` of a `FusedAttention` and a
    `FusedMLP`, to which it hands its two residual additions.
    """

    def __call__(
        self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None
    ) -> mx.array:
        """x [B, L, hidden_size] -> the same shape."""
        h = self.self_attn(self.input_layernorm(x), mask, cache, residual=x)
        return self.mlp(self.post_attention_layernorm(h), residual=h)
