"""Llama 4 in batches, and with the file's epsilon where queries and keys are normalised.

mlx-lm 0.32's ``llama4`` normalises by an epsilon of 1e-6, where the published model
(``Llama4TextL2Norm`` with ``rms_norm_eps``) and llama.cpp have 1e-5; its cache of a chunk cannot be
that of a batch; and a model of less than four layers has no layer for its mask.

The cache here keeps all tokens of a layer with chunks, as it may be compressed then.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import llama4
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache
from mlx_lm.models.llama4 import ModelArgs, TextArgs

__all__ = ["Model", "ModelArgs"]


def positions(length: int, cache: Any) -> mx.array:
    """Positions of the next tokens, int [length], or [B, length] for a batch of sequences."""
    offset = cache.offset if cache is not None else 0
    if isinstance(offset, mx.array) and offset.ndim:
        offset = offset[:, None]
    return mx.arange(length) + offset


def chunk_mask(h: mx.array, cache: Any, chunk: int) -> mx.array | str | None:
    """Which earlier tokens of their own chunk the tokens of ``h`` [B, L, hidden_size] see.

    Returns:
        bool [L, K] or, for a batch with padding, [B, 1, L, K]; what mlx-lm takes for all earlier
        tokens as long as there is one chunk.
    """
    length = h.shape[1]
    padding = getattr(cache, "left_padding", None)
    # A batch's cache counts its columns apart from the tokens of its sequences.
    before = cache._idx if padding is not None else cache.offset if cache is not None else 0
    if before + length <= chunk:
        whole: mx.array | str | None = create_attention_mask(h, cache)
        return whole
    asked, keys = positions(length, cache), mx.arange(before + length)
    if padding is not None:
        keys = keys - padding[:, None]
    asked, keys = asked[..., None], keys[..., None, :]
    seen = (keys >= 0) & (keys <= asked) & (keys // chunk == asked // chunk)
    return seen[:, None] if padding is not None else seen


class Attention(llama4.Attention):
    def __init__(self, args: TextArgs, layer_idx: int) -> None:
        super().__init__(args, layer_idx)
        self.epsilon = args.rms_norm_eps

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """x [B, L, hidden_size] -> the same shape."""
        B, L, _ = x.shape
        queries, keys, values = (
            projected.reshape(B, L, heads, -1).transpose(0, 2, 1, 3)
            for projected, heads in (
                (self.q_proj(x), self.n_heads),
                (self.k_proj(x), self.n_kv_heads),
                (self.v_proj(x), self.n_kv_heads),
            )
        )
        if self.use_rope:
            offset = cache.offset if cache is not None else 0
            queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if self.use_qk_norm:
            queries = mx.fast.rms_norm(queries, None, self.epsilon)
            keys = mx.fast.rms_norm(keys, None, self.epsilon)
        if self.attn_temperature_tuning and not self.use_rope:
            steps = mx.floor((positions(L, cache) + 1) / self.floor_scale)
            growth = 1 + self.attn_scale * mx.log(1 + steps)
            growth = growth[:, None, :, None] if growth.ndim == 2 else growth[:, None]
            queries = (queries * growth).astype(queries.dtype)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        output = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.scale, mask=mask
        )
        return self.o_proj(output.transpose(0, 2, 1, 3).reshape(B, L, -1))


class LlamaModel(llama4.LlamaModel):
    def __init__(self, args: TextArgs) -> None:
        super().__init__(args)
        for i, layer in enumerate(self.layers):
            layer.self_attn = Attention(args, i)

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        """inputs, token ids [B, L] -> hidden states [B, L, hidden_size]."""
        h = self.embed_tokens(inputs)
        caches = cache or [None] * len(self.layers)
        chunked = chunk_mask(h, caches[0], self.attention_chunk_size)
        whole = create_attention_mask(h, caches[-1])
        for layer, c in zip(self.layers, caches, strict=True):
            h = layer(h, chunked if layer.self_attn.use_rope else whole, cache=c)
        return self.norm(h)


class Model(llama4.Model):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        self.language_model.model = LlamaModel(args.text_config)

    def make_cache(self) -> list[KVCache]:
        return [KVCache() for _ in self.layers]
