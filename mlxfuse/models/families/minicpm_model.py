"""MiniCPM whose logits are divided when its output head is the embedding too.

mlx-lm 0.32 divides them by ``hidden_size / dim_model_base`` with a head of its own only; the
published model (modeling_minicpm.py) and llama.cpp do so with both.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import minicpm
from mlx_lm.models.minicpm import ModelArgs

__all__ = ["Model", "ModelArgs"]


class Model(minicpm.Model):
    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        """inputs, token ids [B, L] -> logits [B, L, vocab_size]."""
        if not self.args.tie_word_embeddings:
            return super().__call__(inputs, cache)
        out = self.model(inputs, cache) / (self.args.hidden_size / self.args.dim_model_base)
        return self.model.embed_tokens.as_linear(out)
