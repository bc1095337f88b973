"""Attention of mlx-lm's models with q, k and v in one dispatch and the residual in o's."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

from .quantized import QuantizedLinear
from .sdpa import sdpa


def project(linear: nn.Module, x: mx.array, residual: mx.array | None) -> mx.array:
    """``linear(x) + residual``, in one dispatch where the linear is quantised."""
    if isinstance(linear, QuantizedLinear):
        return linear(x, residual=residual)
    y = linear(x)
    return y if residual is None else residual + y


class FusedAttention(nn.Module):
    """Takes the place of the class of an mlx-lm ``Attention`` whose ``q_proj``, ``k_proj`` and
    ``v_proj``, or ``qkv_proj``, became ``qkv``; everything else of the instance stays.
    """

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | str | None = None,
        cache: Any = None,
        *,
        residual: mx.array | None = None,
    ) -> mx.array:
        """x [B, L, hidden_size] -> the same shape, with ``residual`` added."""
        batch, length, _ = x.shape
        queries, keys, values = self.qkv.split(x)
        queries = self._heads(queries, self.n_heads, "q_norm")
        keys = self._heads(keys, self.n_kv_heads, "k_norm")
        values = self._heads(values, self.n_kv_heads, "")
        if cache is not None:
            queries = self.rope(queries, offset=cache.offset)
            keys = self.rope(keys, offset=cache.offset)
        else:
            queries, keys = self.rope(queries), self.rope(keys)
        output = self._attend(queries, keys, values, mask, cache)
        output = output.transpose(0, 2, 1, 3).reshape(batch, length, -1)
        return project(self.o_proj, output, residual)

    def _heads(self, x: mx.array, heads: int, norm: str) -> mx.array:
        """[B, L, heads * D] -> [B, heads, L, D]."""
        x = x.reshape(*x.shape[:2], heads, -1)
        if norm in self:  # qwen3 and gemma3
            x = self[norm](x)
        return x.transpose(0, 2, 1, 3)

    def _attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        mask: mx.array | str | None,
        cache: Any,
    ) -> mx.array:
        if hasattr(cache, "attend"):
            return cache.attend(queries, keys, values, scale=self.scale, mask=mask)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        return scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.scale, mask=mask
        )


class FusedSoftcapAttention(FusedAttention):
    """Gemma 2's: scores go through ``softcap * tanh(scores / softcap)``."""

    def _attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        mask: mx.array | str | None,
        cache: Any,
    ) -> mx.array:
        softcap = self.attn_logit_softcapping
        if hasattr(cache, "attend"):
            return cache.attend(queries, keys, values, scale=self.scale, mask=mask, softcap=softcap)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        return sdpa(queries, keys, values, scale=self.scale, mask=mask, softcap=softcap)
