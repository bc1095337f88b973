"""Small cases of the kernels for compressed keys and values, for their self-tests."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from .scheme import KVScheme, pack
from .sdpa_call import WHOLE_TOKENS

if TYPE_CHECKING:
    from .sdpa_call import Call as Attention

# Packed, plain and first tokens: more than one run, and no multiple of that.
_PACKED, _PLAIN, _FIRST = 12, 8, 4
_SEED = 20


def attention(call: Attention) -> tuple[Attention]:
    """The same heads and queries over a few random tokens."""
    random = np.random.default_rng(_SEED)
    lead = call.q.shape[0], call.kv_heads

    def normal(dtype: mx.Dtype, *shape: int) -> mx.array:
        return mx.array(random.standard_normal(shape, np.float32)).astype(dtype)

    queries, scheme = call.q.shape[2], call.scheme
    dims = scheme.k.dim, scheme.v.dim
    small = replace(
        call,
        q=normal(call.q.dtype, *call.q.shape),
        counts=mx.array([_PACKED - 1, _PLAIN - 1, _FIRST - 1, 0] * (call.counts.size // 4)),
    )
    if call.rows:
        batch = call.rows[0].shape[0]
        k, v = (normal(scheme.dtype, batch, lead[1], _PACKED, dim) for dim in dims)
        small = replace(small, rows=(pack(scheme, k, v),) * len(call.rows))
    if call.held is not None:  # of a split call enough to be split again
        many = _PACKED if call.whole else WHOLE_TOKENS + _PACKED
        held: list[mx.array] = []
        for side in (scheme.k, scheme.v):
            x = normal(scheme.dtype, *lead, many, side.dim)
            codes = side.quantized
            held += mx.quantize(x, group_size=side.group, bits=side.bits) if codes else [x]
        small = replace(small, held=tuple(held))
    if call.tail is not None:
        small = replace(small, tail=normal(scheme.dtype, *lead, _PLAIN, sum(dims)))
    if call.sink is not None:
        small = replace(small, sink=normal(scheme.dtype, *lead, _FIRST, sum(dims)))
    if call.fresh is not None:
        k, v = (normal(scheme.dtype, *lead, queries, dim) for dim in dims)
        small = replace(small, fresh=(k, v))
    how = call.scores
    if how.sinks is not None:
        how = replace(how, sinks=mx.zeros_like(how.sinks))
    if how.mask is not None:
        keys = _PACKED + _PLAIN + _FIRST + queries
        how = replace(how, mask=mx.ones((*how.mask.shape[:-1], keys), how.mask.dtype))
    return (replace(small, scores=how),)


def _tokens(scheme: KVScheme, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    random = np.random.default_rng(_SEED)
    k, v = (
        mx.array(random.standard_normal((1, 1, _PACKED, side.dim), np.float32)).astype(dtype)
        for side in (scheme.k, scheme.v)
    )
    return k, v


def quantize(k: mx.array, v: mx.array, scheme: KVScheme) -> tuple[mx.array, mx.array, KVScheme]:
    return (*_tokens(scheme, k.dtype), scheme)


def dequantize(
    rows: mx.array, scheme: KVScheme, dtype: mx.Dtype
) -> tuple[mx.array, KVScheme, mx.Dtype]:
    return pack(scheme, *_tokens(scheme, mx.float32)), scheme, dtype
