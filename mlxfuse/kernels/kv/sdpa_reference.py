"""What `compressed_sdpa` computes, in MLX's own operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx

from .scheme import decoded, rotated
from .sdpa_call import Call


class _Tokens(NamedTuple):
    """Tokens of one kind: keys and values, float32, how many are in use, and their rotation.

    k, v    ``[B, Hkv, N, dim]``.
    used    ``[B]`` or ``[1]``, at most N.
    blocks  of the Hadamard rotation that keys and values are still in; 1 for none.
    """

    k: mx.array
    v: mx.array
    used: mx.array
    blocks: tuple[int, int] = (1, 1)


def reference(call: Call) -> list[mx.array]:
    """The meaning of the kernel: all keys at once, the unused ones masked."""
    q, how = call.q, call.scores
    batch, heads, queries, _ = q.shape
    grouped = how.scale * q.astype(mx.float32).reshape(batch, call.kv_heads, -1, q.shape[-1])
    products, values, places, used = [], [], [], []
    start = mx.zeros((1,), mx.int32)
    for tokens in _tokens(call):
        index = mx.arange(tokens.k.shape[2])
        inside = index < tokens.used[:, None]
        products.append(rotated(grouped, tokens.blocks[0]) @ tokens.k.swapaxes(-1, -2))
        # What lies beyond the length may be no number; 0 times that is none either.
        values.append((mx.where(inside[:, None, :, None], tokens.v, 0), tokens.blocks[1]))
        places.append(mx.broadcast_to(start[:, None] + index, (batch, index.size)))
        used.append(mx.broadcast_to(inside, (batch, index.size)))
        start = start + tokens.used
    place = mx.concatenate(places, axis=1)[:, None, None]
    seen = mx.concatenate(used, axis=1)[:, None, None] & _seen(call, place, start)
    scores = mx.concatenate(products, axis=-1).reshape(batch, heads, queries, -1)
    if how.softcap is not None:
        scores = how.softcap * mx.tanh(scores / how.softcap)
    p = _softmax(*_masked(how.mask, scores, seen, place), how.sinks)
    p = p.reshape(*grouped.shape[:3], -1)
    out, first = mx.array(0.0), 0
    for v, block in values:
        out = out + rotated(p[..., first : first + v.shape[2]] @ v, block)
        first += v.shape[2]
    out = out.reshape(batch, heads, queries, -1).astype(q.dtype)
    return [out] if call.fresh is None else [out, mx.concatenate(list(call.fresh), axis=-1)]


def _tokens(call: Call) -> Iterator[_Tokens]:
    """What is held, in the order of its positions."""
    scheme, counts = call.scheme, call.counts.reshape(-1, 4)

    def plain(rows: mx.array, length: mx.array) -> _Tokens:
        k, v = mx.split(rows.astype(mx.float32), [scheme.k.dim], axis=-1)
        return _Tokens(k, v, mx.minimum(length, rows.shape[2]))

    if call.sink is not None:
        yield plain(call.sink, counts[:, 2])
    if call.held is not None:
        k, v = _held(call)
        yield _Tokens(k, v, mx.minimum(counts[:, 0], k.shape[2]))
    if call.rows:
        capacity = max(rows.shape[2] for rows in call.rows)
        room = [[(0, 0), (0, 0), (0, capacity - rows.shape[2]), (0, 0)] for rows in call.rows]
        rows = mx.concatenate([mx.pad(r, n) for r, n in zip(call.rows, room, strict=True)])
        blocks = scheme.k_block, scheme.v_block
        yield _Tokens(*decoded(scheme, rows), mx.minimum(counts[:, 0], capacity), blocks)
    if call.tail is not None:
        yield plain(call.tail, counts[:, 1])
    if call.fresh is not None:
        yield plain(mx.concatenate(list(call.fresh), axis=-1), mx.array([call.q.shape[2]]))


def _held(call: Call) -> list[mx.array]:
    """Keys and values of arrays of their own, float32."""
    arrays = [a if a.dtype == mx.uint32 else a.astype(mx.float32) for a in call.held or ()]
    if len(arrays) == 2:
        return arrays
    return [
        mx.dequantize(codes, scales, biases, group_size=side.group, bits=side.bits)
        for side, (codes, scales, biases) in (
            (call.scheme.k, arrays[:3]),
            (call.scheme.v, arrays[3:]),
        )
    ]


def _seen(call: Call, place: mx.array, count: mx.array) -> mx.array:
    """Which query sees which key by their positions alone.

    Args:
        place: each key's position among its sequence's keys, of which there are ``count``.
    """
    how, queries = call.scores, call.q.shape[2]
    last = (count[:, None] - queries + mx.arange(queries))[:, None, :, None]
    seen = place >= call.counts.reshape(-1, 4)[:, 3].reshape(-1, 1, 1, 1)
    if how.causal:
        seen = seen & (place <= last)
    if how.window is not None:
        seen = seen & (place > last - how.window)
    return seen


def _masked(
    mask: mx.array | None, scores: mx.array, seen: mx.array, place: mx.array
) -> tuple[mx.array, mx.array]:
    """Scores and who sees what, with what the mask says of the keys at each place."""
    if mask is None:
        return scores, seen
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    seen = seen & (place < mask.shape[-1])
    at = mx.minimum(place, mask.shape[-1] - 1)
    lead = (scores.shape[0], *mask.shape[1:3])
    mask = mx.broadcast_to(mask, (*lead, mask.shape[-1]))
    mask = mx.take_along_axis(mask, mx.broadcast_to(at, (*lead, at.shape[-1])), axis=-1)
    if mask.dtype == mx.bool_:
        return scores, seen & mask
    return scores + mask.astype(mx.float32), seen


def _softmax(scores: mx.array, seen: mx.array, sinks: mx.array | None) -> mx.array:
    """Weights of the keys that are seen; zeros where a query sees none."""
    scores = mx.where(seen, scores, -mx.inf)
    most = scores.max(-1, keepdims=True)
    if sinks is not None:
        logits = sinks.astype(mx.float32).reshape(1, -1, 1, 1)
        most = mx.maximum(most, logits)
    most = mx.where(most == -mx.inf, 0, most)
    p = mx.exp(scores - most)
    total = p.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + mx.exp(logits - most)
    return p / mx.where(total == 0, 1, total)
