"""Gemma 3 with its embedding scaled by sqrt(hidden_size) in the activation type.

mlx-lm rounds that factor to bfloat16 for every type, which moves float32 logits off llama.cpp's by
a mean KLD of 1e-4 in a model of 62 layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models import gemma3_text
from mlx_lm.models.base import create_attention_mask


@dataclass
class ModelArgs(gemma3_text.ModelArgs):
    tie_word_embeddings: bool = True


class Gemma3Model(gemma3_text.Gemma3Model):
    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """inputs, token ids [B, L] -> hidden states [B, L, hidden_size]."""
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        h = h * self.args.hidden_size**0.5
        caches = cache or [None] * len(self.layers)
        period = self.sliding_window_pattern
        whole = create_attention_mask(h, caches[period - 1])
        sliding = create_attention_mask(h, caches[0], window_size=self.window_size)
        for i, (layer, c) in enumerate(zip(self.layers, caches, strict=True)):
            h = layer(h, whole if i % period == period - 1 else sliding, c)
        return self.norm(h)


class Model(gemma3_text.Model):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        self.model = Gemma3Model(args)
        if args.tie_word_embeddings:  # mlx-lm learns it from the names of the weights
            self.tie_word_embeddings = True
            self.pop("lm_head")
