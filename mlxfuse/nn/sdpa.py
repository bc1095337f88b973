"""Plain attention: MLX's own, and the one with capped scores that it lacks."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

Mask = mx.array | str | None
"""As mlx-lm's models have it: an array, ``causal``, or None where all is seen."""


def sdpa(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: Mask = None,
    sinks: mx.array | None = None,
    softcap: float | None = None,
) -> mx.array:
    """``mx.fast.scaled_dot_product_attention``; with ``softcap`` c, and then without ``sinks``,
    scores go through ``c * tanh(score / c)`` before they are masked (Gemma 2).
    """
    if softcap is None:
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask=mask, sinks=sinks
        )
    batch, heads, length, size = queries.shape
    queries = queries.reshape(batch, keys.shape[1], -1, length, size) * scale
    scores = queries @ keys[:, :, None].swapaxes(-1, -2)
    scores = _capped(scores, softcap).reshape(batch, heads, length, -1)
    if isinstance(mask, str):
        mask = create_causal_mask(length, keys.shape[2] - length)
    if isinstance(mask, mx.array) and mask.dtype == mx.bool_:
        scores = mx.where(mask, scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))
    elif isinstance(mask, mx.array):
        scores = scores + mask
    if sinks is not None:
        column = mx.broadcast_to(sinks.astype(scores.dtype)[:, None, None], (*scores.shape[:3], 1))
        scores = mx.concatenate([scores, column], axis=-1)
    weights = mx.softmax(scores, precise=True, axis=-1)[..., : keys.shape[2]]
    output = weights.reshape(batch, keys.shape[1], -1, length, keys.shape[2]) @ values[:, :, None]
    return output.reshape(batch, heads, length, -1)


@partial(mx.compile, shapeless=True)
def _capped(scores: mx.array, softcap: float) -> mx.array:
    """One dispatch, whose shape grows with every token."""
    return mx.tanh(scores / softcap) * softcap


def mask_of(mask: Mask, heads: slice) -> Mask:
    """The mask of some heads, if it has one for each."""
    if isinstance(mask, mx.array) and mask.ndim > 2 and mask.shape[-3] > 1:
        return mask[..., heads, :, :]
    return mask
