"""The compressed cache: what it holds, whatever way it came in, and what mlx-lm asks of it."""

import copy
import itertools

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import (
    KVCache,
    RotatingKVCache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from mlxfuse.kernels.kv_scheme import KVScheme, KVSide, pack, unpack
from mlxfuse.nn.cache import CompressedKVCache

HEADS, K_DIM, V_DIM = 2, 64, 32
KEEP, RECENT, BLOCK = 4, CompressedKVCache.RECENT, CompressedKVCache.BLOCK


def stream(tokens: int, batch: int = 1, seed: int = 0, dtype: mx.Dtype = mx.float32):
    key = mx.random.key(seed)
    kv = mx.random.normal((batch, HEADS, tokens, K_DIM + V_DIM), key=key).astype(dtype)
    return kv[..., :K_DIM], kv[..., K_DIM:]


def feed(cache, keys, values, steps):
    """Append in pieces of the sizes of ``steps``, again and again."""
    start, sizes = 0, itertools.cycle(steps)
    while start < keys.shape[2]:
        stop = min(start + next(sizes), keys.shape[2])
        cache.update_and_fetch(keys[:, :, start:stop], values[:, :, start:stop])
        start = stop
    return cache


def same_bits(a, b) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and mx.array_equal(
        mx.view(a, mx.uint8), mx.view(b, mx.uint8)
    ).item()  # fmt: skip


def live(cache):
    """The parts of the arrays that are in use."""
    end, seen = cache._sealed, cache._unseen
    return (
        cache.sink[:, :, : cache.offset],
        cache.rows[:, :, min(seen, end) : end],
        cache.tail[:, :, max(0, seen - end) : cache._tail_length],
    )


def assert_same(a, b):
    assert a.offset == b.offset
    assert all(map(same_bits, live(a), live(b)))


@pytest.mark.parametrize("tokens", [700, 4 + 64 * 5, 1 + 64 * 4])
@pytest.mark.parametrize("steps", [(7,), (64,), (2048,), (5, 300, 1)])
def test_the_same_bits_however_many_tokens_come_at_a_time(tokens, steps):
    keys, values = stream(tokens)
    one = feed(CompressedKVCache(), keys, values, (1,))
    assert_same(feed(CompressedKVCache(), keys, values, steps), one)
    # Control: other values, other bits.
    other = feed(CompressedKVCache(), keys, values + 0.01, steps)
    assert not all(map(same_bits, live(other), live(one)))
