"""Gemma 2 with the sliding window that mlx-lm leaves out, and with right masks for batches.

In each run of ``sliding_window_pattern`` layers all but the last see ``sliding_window`` tokens,
themselves included (arXiv 2408.00118, section 2).

mlx-lm 0.32's ``gemma2.Attention`` adds the mask of a batch, ``[B, 1, L, K]``, to scores of shape
``[B, kv_heads, repeats, L, K]``: a batch fails, or, where B is the number of KV heads, each head
gets the mask of another sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models import gemma2
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache

from ...nn.sdpa import capped, sdpa


@dataclass
class ModelArgs(gemma2.ModelArgs):
    max_position_embeddings: int = 8192
    sliding_window: int = 4096
    sliding_window_pattern: int = 2


class Attention(gemma2.Attention):
    def __call__(self, x: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
        """x [B, L, hidden_size] -> the same shape.

        Args:
            mask: bool, [L, K] or [B, 1, L, K]; True where a query sees a key.
        """
        B, L, _ = x.shape
        queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        queries = queries.reshape(B, L, self.n_heads, -1).transpose(0, 2, 1, 3)
        keys = keys.reshape(B, L, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
        values = values.reshape(B, L, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
        if cache is not None:
            queries = self.rope(queries, offset=cache.offset)
            keys = self.rope(keys, offset=cache.offset)
            keys, values = cache.update_and_fetch(keys, values)
        else:
            queries = self.rope(queries)
            keys = self.rope(keys)
        output = sdpa(
            queries,
            keys,
            values,
            scale=self.scale,
            mask=mask,
            softcap=self.attn_logit_softcapping,
        )
        output = output.transpose(0, 2, 1, 3).reshape(B, L, -1)
        return self.o_proj(output)


class GemmaModel(gemma2.GemmaModel):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for layer in self.layers:
            layer.self_attn = Attention(args)

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

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        """inputs, token ids [B, L] -> logits [B, L, vocabulary]."""
        out = self.model.embed_tokens.as_linear(self.model(inputs, cache))
        return capped(out, self.final_logit_softcapping)

    def make_cache(self) -> list[KVCache | RotatingKVCache]:
        period = self.args.sliding_window_pattern
        return [
            KVCache()
            if i % period == period - 1
            else RotatingKVCache(max_size=self.args.sliding_window)
            for i in range(len(self.layers))
        ]
