"""Plain attention: MLX's own, and the one with capped scores that it lacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, KVCache, RotatingKVCache

from ..kernels import backend
from ..kernels.kv.compressed_sdpa import MAX_QUERIES, plain_sdpa, refuse_plain
from ..kernels.kv.sdpa_call import Scores

Mask = mx.array | str | None
"""As mlx-lm's models have it: an array, ``causal``, or None where all is seen."""

SCRATCH = 64 << 20
"""Bytes of capped scores that are written at once, if the keys are not too many for a query of
each head; not measured on a Mac."""

# What they give are the first rows of their arrays.
_PLAIN = (KVCache, RotatingKVCache, BatchKVCache, BatchRotatingKVCache)


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
    """``mx.fast.scaled_dot_product_attention``; with ``softcap`` c scores go through
    ``c * tanh(score / c)`` before they are masked (Gemma 2), for some queries after others where
    they would take more than `SCRATCH` bytes.
    """
    if softcap is None:
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask=mask, sinks=sinks
        )
    batch, heads, length, _ = queries.shape
    past = keys.shape[2] - length
    each = max(1, SCRATCH // (batch * heads * keys.shape[2] * queries.dtype.size))
    outputs = []
    for first in range(0, length, each):
        some, seen = slice(first, first + each), keys.shape[2]
        if isinstance(mask, str):
            seen = min(past + first + each, seen)
            rows = create_causal_mask(seen - past - first, past + first)
        else:
            rows = mask
            if mask is not None and mask.ndim > 1 and mask.shape[-2] > 1:
                rows = mask[..., some, :]
        made = _of_capped(
            queries[:, :, some], keys[:, :, :seen], values[:, :, :seen], scale, rows, sinks, softcap
        )
        outputs.append(made)
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def _of_capped(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array | None,
    sinks: mx.array | None,
    softcap: float,
) -> mx.array:
    batch, heads, length, size = queries.shape
    queries = queries.reshape(batch, keys.shape[1], -1, length, size) * scale
    scores = queries @ keys[:, :, None].swapaxes(-1, -2)
    scores = capped(scores, softcap).reshape(batch, heads, length, -1)
    if mask is not None and mask.dtype == mx.bool_:
        scores = mx.where(mask, scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        column = mx.broadcast_to(sinks.astype(scores.dtype)[:, None, None], (*scores.shape[:3], 1))
        scores = mx.concatenate([scores, column], axis=-1)
    weights = mx.softmax(scores, precise=True, axis=-1)[..., : keys.shape[2]]
    output = weights.reshape(batch, keys.shape[1], -1, length, keys.shape[2]) @ values[:, :, None]
    return output.reshape(batch, heads, length, -1)


def capped_sdpa(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    *,
    scale: float,
    mask: Mask,
    softcap: float,
) -> mx.array:
    """`sdpa` with a cap, in one kernel where there are few queries.

    Args:
        cache: what gave keys and values; the kernel reads its arrays where they lie.
    """
    many = queries.shape[2] > MAX_QUERIES
    if many or not backend().takes("compressed_sdpa", refuse_plain(keys, values)):
        return sdpa(queries, keys, values, scale=scale, mask=mask, softcap=softcap)
    length = keys.shape[2]
    if type(cache) in _PLAIN:
        keys, values = cache.keys, cache.values
    scores = Scores.of(mask, scale, softcap)
    return plain_sdpa(queries, keys, values, length, scores=scores)


@partial(mx.compile, shapeless=True)
def capped(scores: mx.array, softcap: float) -> mx.array:
    """``softcap * tanh(scores / softcap)`` in one dispatch, of a shape that may grow."""
    return mx.tanh(scores / softcap) * softcap


def heads_in_turn(
    queries: mx.array,
    kv_heads: int,
    each: int,
    held: Callable[[slice], tuple[mx.array, mx.array]],
    scores: Scores,
) -> mx.array:
    """`sdpa` of ``each`` KV heads after others: heads know nothing of each other.

    Args:
        held: the keys and values of some KV heads.
        scores: without a window.
    """
    shared = queries.shape[1] // kv_heads
    mask: Mask = "causal" if scores.causal and scores.mask is None else scores.mask
    outputs = []
    for first in range(0, kv_heads, each):
        rows = slice(first * shared, (first + each) * shared)
        made = sdpa(
            queries[:, rows],
            *held(slice(first, first + each)),
            scale=scores.scale,
            mask=_mask_of(mask, rows),
            sinks=None if scores.sinks is None else scores.sinks[rows],
            softcap=scores.softcap,
        )
        outputs.append(made)
    return mx.concatenate(outputs, axis=1)


def _mask_of(mask: Mask, heads: slice) -> Mask:
    """The mask of some heads, if it has one for each."""
    if isinstance(mask, mx.array) and mask.ndim > 2 and mask.shape[-3] > 1:
        return mask[..., heads, :, :]
    return mask
