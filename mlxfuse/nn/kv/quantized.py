"""Attention over mlx-lm's own quantised caches: ``mlx_lm.generate --kv-bits``.

mlx-lm multiplies twice by quantised matrices and writes down the scores between them. Here a few
queries read the codes where they lie, in one kernel; for more, some heads after others are
dequantised and given to `mx.fast.scaled_dot_product_attention`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import QuantizedKVCache

from ...kernels import backend
from ...kernels.kv.compressed_sdpa import MAX_QUERIES, refuse_plain
from ...kernels.kv.sdpa_call import Scores
from ..sdpa import heads_in_turn
from .cache import CompressedKVCache, Pair
from .kept import Kept, kept_quantized_sdpa

# Layers whose caches are alike take turns.
_KEPT = Kept()


def attends(cache: Any) -> bool:
    """Whether `attend` knows the cache: a compressed one of ours, or mlx-lm's quantised one."""
    return hasattr(cache, "attend") or type(cache) is QuantizedKVCache


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scores: Scores
) -> mx.array:
    """Append keys and values to the cache, and attend to all that it holds.

    Args:
        cache: one that `attends`.
        queries: [B, query heads, L, head size]; keys and values [B, heads, L, head size].

    Returns:
        [B, query heads, L, value head size] in the queries' type.
    """
    if hasattr(cache, "attend"):
        own: mx.array = cache.attend(queries, keys, values, scores)
        return own
    cache.update_and_fetch(keys, values)
    how = {"group_size": cache.group_size, "bits": cache.bits}
    few = queries.shape[2] <= MAX_QUERIES
    if few and backend().takes("compressed_sdpa", refuse_plain(keys, values)):
        return kept_quantized_sdpa(
            _KEPT,
            queries,
            tuple(cache.keys),
            tuple(cache.values),
            cache.offset,
            scores=scores,
            **how,
        )

    def held(heads: slice) -> Pair:
        made = [
            mx.dequantize(*(array[:, heads, : cache.offset] for array in arrays), **how)
            for arrays in (cache.keys, cache.values)
        ]
        return made[0], made[1]

    token = keys.shape[0] * (keys.shape[3] + values.shape[3]) * keys.dtype.size
    each = max(1, CompressedKVCache.SCRATCH // (cache.offset * token))
    return heads_in_turn(queries, keys.shape[1], each, held, scores)
