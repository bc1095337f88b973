"""Gemma 2 with the sliding window that mlx-lm leaves out.

In each run of ``sliding_window_pattern`` layers all but the last see ``sliding_window`` tokens,
themselves included (arXiv 2408.00118, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models import gemma2
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache


@dataclass
class ModelArgs(gemma2.ModelArgs):
    max_position_embeddings: int = 8192
    sliding_window: int = 4096
    sliding_window_pattern: int = 2


class GemmaModel(gemma2.GemmaModel):
    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        """inputs, token ids [B, L] -> hidden states [B, L, hidden_size]."""
        h = self.embed_tokens(inputs) * self.args.hidden_size**0.5
        caches = cache or [None] * len(self.layers)
        window, period = self.args.sliding_window, self.args.sliding_window_pattern
        whole = create_attention_mask(h, caches[period - 1], return_array=True)
        sliding = create_attention_mask(h, caches[0], window_size=window, return_array=True)
        for i, (layer, c) in enumerate(zip(self.layers, caches, strict=True)):
            h = layer(h, whole if i % period == period - 1 else sliding, c)
        return self.norm(h)


class Model(gemma2.Model):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        self.model = GemmaModel(args)

    def make_cache(self) -> list[KVCache | RotatingKVCache]:
        period = self.args.sliding_window_pattern
        return [
            KVCache()
            if i % period == period - 1
            else RotatingKVCache(max_size=self.args.sliding_window)
            for i in range(len(self.layers))
        ]
