"""Attention of a few queries over compressed keys and values: ``metal/compressed_sdpa.metal``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from ..runtime.kernel import Kernel, Launch
from . import small
from .scheme import FLOATS, KVScheme, decoded, rotated
from .sdpa_program import geometry, merge_program, parts_program
from .source import constants, refuse_dims

MAX_QUERIES = 8
"""Queries of a sequence up to which the kernel runs; above, keys and values are better
dequantised once and given to `mx.fast.scaled_dot_product_attention`."""

SPLIT_TOKENS = (128, 2048)
MAX_SPLITS = 256
"""Fewest and most tokens of capacity for each split of a sequence; the most splits."""

MAX_PLACES = 16
"""Sequences whose rows may lie in arrays of their own: Metal binds 31 buffers."""

# Threadgroups for the packed tokens, by the last letter of the GPU's architecture: base, Pro, Max
# and Ultra chips have some 10, 20, 40 and 80 cores. Not measured on a Mac.
_THREADGROUPS = {"p": 128, "g": 256, "s": 512, "c": 512, "d": 1024}

Length = mx.array | int | list[int]
Rows = mx.array | Sequence[mx.array | None] | None


def compressed_sdpa(
    q: mx.array,
    scheme: KVScheme,
    rows: Rows,
    length: Length,
    tail: mx.array | None = None,
    tail_length: Length = 0,
    *,
    scale: float,
    sink: mx.array | None = None,
    sink_length: Length = 0,
    fresh: tuple[mx.array, mx.array] | None = None,
    mask: mx.array | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: mx.array | None = None,
    softcap: float | None = None,
    left_padding: mx.array | None = None,
) -> tuple[mx.array, ...]:
    """``softmax(scale q k^T) v`` over keys and values that are mostly compressed.

    The keys of a sequence are, in this order, the first ``sink_length`` rows of ``sink``, the
    first ``length`` of ``rows``, the first ``tail_length`` of ``tail`` and those of ``fresh``: one
    softmax over all of them, in float32. Rows beyond a length are never looked at. The queries
    belong to the last ``L`` keys. Scores are capped, then masked. A query that sees no key gives
    zeros.

    Args:
        q: ``[B, Hq, L, k_dim]``, float16, bfloat16 or float32; ``Hq`` a multiple of ``Hkv``.
        scheme: what a row of ``rows`` is.
        rows: uint32 ``[B, Hkv, capacity, scheme.row_words]``, ``capacity`` a multiple of 4; or
            None; or a list of those of each sequence, ``[1, Hkv, capacity, scheme.row_words]``
            or None, of at most `MAX_PLACES` sequences. One dispatch reads them all where they lie.
        length: rows in use: an integer, a list of ``B``, or an integer array of no dimension or
            ``[B]``.
        tail: plain keys and values, not rotated, side by side in a row:
            ``[B, Hkv, rows, k_dim + v_dim]`` of the scheme's type; or None.
        tail_length: rows in use, as ``length``.
        scale: finite; multiplies ``q k^T``.
        sink: the first tokens, as ``tail``.
        sink_length: rows in use, as ``length``.
        fresh: keys ``[B, Hkv, L, k_dim]`` and values ``[B, Hkv, L, v_dim]`` of the queries' own
            tokens, of the scheme's type, that are not in the tail yet.
        mask: boolean (True: seen) or floating point (added to the scores), of a shape that
            broadcasts to ``[B, Hq, L, keys]``, but for its last axis, which has an entry for
            each key. Keys beyond its end are not seen.
        causal: query ``i`` does not see keys after its own, which is the ``i - L``-th from the end.
        window: a query sees no key that is ``window`` or more before its own.
        sinks: ``[Hq]``, logits that take part in the softmax without a value.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        left_padding: integer ``[B]``: the first so many keys of a sequence are not seen.

    Returns:
        ``[B, Hq, L, v_dim]`` in ``q.dtype``. With ``fresh`` also ``[B, Hkv, L, k_dim + v_dim]``,
        its keys and values side by side: what is to be written into the tail. One dispatch makes
        both.

    Raises:
        ValueError: arguments whose shapes or types do not fit together.
    """
    call = _Call(
        q=q,
        scheme=scheme,
        rows=_places(rows),
        counts=_counts(q, length, tail_length, sink_length, left_padding),
        tail=tail,
        sink=sink,
        fresh=fresh,
        scale=scale,
        mask=mask,
        causal=causal,
        window=window,
        sinks=sinks,
        softcap=softcap,
    )
    call.check()
    return tuple(KERNEL(call))


def _places(rows: Rows) -> tuple[mx.array, ...]:
    """None, one array for all sequences, or one for each."""
    if rows is None or isinstance(rows, mx.array):
        return () if rows is None else (rows,)
    found = [array for array in rows if array is not None]
    if not found:
        return ()
    empty = found[0][:, :, :0]
    return tuple(empty if array is None else array for array in rows)


def _counts(
    q: mx.array, length: Length, tail: Length, sink: Length, left: mx.array | None
) -> mx.array:
    """int32 ``[4]``, or ``[4 B]`` where sequences differ: rows, tail and sink in use, padding."""
    given = {
        "length": length,
        "tail_length": tail,
        "sink_length": sink,
        "left": 0 if left is None else left,
    }
    if all(isinstance(n, int) for n in given.values()):
        return constants(tuple(given.values()))
    batch, columns = q.shape[0], []
    for name, value in given.items():
        array = (value if isinstance(value, mx.array) else mx.array(value)).reshape(-1)
        if array.shape not in ((1,), (batch,)):
            raise ValueError(f"{name}: expected one number or {batch}, found {array.shape}")
        columns.append(array.astype(mx.int32))
    many = max(a.size for a in columns)
    return mx.stack([mx.broadcast_to(a, (many,)) for a in columns], axis=-1).reshape(-1)


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one attention."""

    q: mx.array
    scheme: KVScheme
    rows: tuple[mx.array, ...]
    counts: mx.array
    tail: mx.array | None
    sink: mx.array | None
    fresh: tuple[mx.array, mx.array] | None
    scale: float
    mask: mx.array | None
    causal: bool
    window: int | None
    sinks: mx.array | None
    softcap: float | None

    @property
    def kv_heads(self) -> int:
        held = (*self.rows, self.tail, self.sink, *(self.fresh or ()))
        found: int = next(a.shape[1] for a in held if a is not None)
        return found

    def check(self) -> None:
        scheme, q = self.scheme, self.q
        if q.ndim != 4 or q.shape[-1] != scheme.k.dim:
            raise ValueError(f"q: expected [B, Hq, L, {scheme.k.dim}], found {q.shape}")
        if q.dtype not in FLOATS:
            raise ValueError(f"q: expected float16, bfloat16 or float32, found {q.dtype}")
        batch, heads, queries, _ = q.shape
        plain = scheme.k.dim + scheme.v.dim
        k, v = self.fresh or (None, None)
        held = (
            *(("rows", rows, mx.uint32, scheme.row_words) for rows in self.rows),
            ("tail", self.tail, scheme.dtype, plain),
            ("sink", self.sink, scheme.dtype, plain),
            ("k", k, scheme.dtype, scheme.k.dim),
            ("v", v, scheme.dtype, scheme.v.dim),
        )
        if not any(array is not None and array.size for _, array, _, _ in held):
            raise ValueError("attention needs rows, a tail, a sink or fresh keys and values")
        for name, array, dtype, width in held:
            if array is None:
                continue
            many = queries if name in "kv" else array.shape[2] if array.ndim == 4 else "rows"
            of = 1 if name == "rows" and len(self.rows) > 1 else batch
            expected = (of, self.kv_heads, many, width)
            if array.dtype != dtype or array.shape != expected:
                raise ValueError(
                    f"{name}: expected {dtype} {expected}, found {array.dtype} {array.shape}"
                )
        if heads % self.kv_heads:
            raise ValueError(f"{heads} heads of queries for {self.kv_heads} of keys")
        if len(self.rows) > 1 and len(self.rows) != batch:
            raise ValueError(f"rows: expected one array or {batch}, found {len(self.rows)}")
        if odd := [rows.shape[2] for rows in self.rows if rows.shape[2] % 4]:
            raise ValueError(f"rows: expected a capacity that is a multiple of 4, found {odd[0]}")
        if self.sinks is not None and self.sinks.shape != (heads,):
            raise ValueError(f"sinks: expected ({heads},), found {self.sinks.shape}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window: expected at least 1, found {self.window}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap: expected more than 0, found {self.softcap}")
        if self.mask is not None:
            shape = self.mask.shape
            lead = (1,) * (4 - len(shape)) + shape[:-1]
            fits = all(m in (1, n) for m, n in zip(lead, q.shape[:3], strict=False))
            if not 1 <= len(shape) <= 4 or not fits:
                raise ValueError(
                    f"mask: expected a shape that broadcasts to ({batch}, {heads}, {queries}, "
                    f"keys), found {shape}"
                )
            if self.mask.dtype not in (mx.bool_, *FLOATS):
                raise ValueError(f"mask: expected bool or floating point, found {self.mask.dtype}")


def _reference(call: _Call) -> list[mx.array]:
    """The meaning of the kernel: all keys at once, the unused ones masked."""
    scheme, q = call.scheme, call.q
    batch, heads, queries, _ = q.shape
    grouped = call.scale * q.astype(mx.float32).reshape(batch, call.kv_heads, -1, q.shape[-1])
    products, values, places, used = [], [], [], []
    start = mx.zeros((1,), mx.int32)
    counts = call.counts.reshape(-1, 4)
    capacity = max((rows.shape[2] for rows in call.rows), default=0)
    held = [
        mx.pad(rows, [(0, 0), (0, 0), (0, capacity - rows.shape[2]), (0, 0)]) for rows in call.rows
    ]
    fresh = None if call.fresh is None else mx.concatenate(list(call.fresh), axis=-1)
    for name, rows, length in (
        ("sink", call.sink, counts[:, 2]),
        ("rows", mx.concatenate(held) if held else None, counts[:, 0]),
        ("tail", call.tail, counts[:, 1]),
        ("fresh", fresh, mx.array([queries])),
    ):
        if rows is None:
            continue
        packed = name == "rows"
        if packed:
            k, v = decoded(scheme, rows)
        else:
            k, v = mx.split(rows.astype(mx.float32), [scheme.k.dim], axis=-1)
        index = mx.arange(rows.shape[2])
        length = mx.minimum(length, rows.shape[2])
        inside = index < length[:, None]
        own = rotated(grouped, scheme.k_block) if packed else grouped
        products.append(own @ k.swapaxes(-1, -2))
        # What lies beyond the length may be no number; 0 times that is none either.
        v = mx.where(inside[:, None, :, None], v, 0)
        values.append((v, scheme.v_block if packed else 1))
        places.append(mx.broadcast_to(start[:, None] + index, (batch, index.size)))
        used.append(mx.broadcast_to(inside, (batch, index.size)))
        start = start + length
    place = mx.concatenate(places, axis=1)[:, None, None]
    seen = mx.concatenate(used, axis=1)[:, None, None]
    last = (start[:, None] - queries + mx.arange(queries))[:, None, :, None]
    if call.causal:
        seen = seen & (place <= last)
    if call.window is not None:
        seen = seen & (place > last - call.window)
    seen = seen & (place >= counts[:, 3].reshape(-1, 1, 1, 1))
    scores = mx.concatenate(products, axis=-1).reshape(batch, heads, queries, -1)
    if call.softcap is not None:
        scores = call.softcap * mx.tanh(scores / call.softcap)
    if call.mask is not None:
        mask = call.mask.reshape((1,) * (4 - call.mask.ndim) + call.mask.shape)
        seen = seen & (place < mask.shape[-1])
        at = mx.minimum(place, mask.shape[-1] - 1)
        lead = (batch, *mask.shape[1:3])
        mask = mx.broadcast_to(mask, (*lead, mask.shape[-1]))
        mask = mx.take_along_axis(mask, mx.broadcast_to(at, (*lead, at.shape[-1])), axis=-1)
        if mask.dtype == mx.bool_:
            seen = seen & mask
        else:
            scores = scores + mask.astype(mx.float32)
    scores = mx.where(seen, scores, -mx.inf)
    most = scores.max(-1, keepdims=True)
    if call.sinks is not None:
        logits = call.sinks.astype(mx.float32).reshape(1, heads, 1, 1)
        most = mx.maximum(most, logits)
    most = mx.where(most == -mx.inf, 0, most)
    p = mx.exp(scores - most)
    total = p.sum(-1, keepdims=True)
    if call.sinks is not None:
        total = total + mx.exp(logits - most)
    p = (p / mx.where(total == 0, 1, total)).reshape(*grouped.shape[:3], -1)
    out, first = mx.array(0.0), 0
    for v, block in values:
        out = out + rotated(p[..., first : first + v.shape[2]] @ v, block)
        first += v.shape[2]
    out = out.reshape(batch, heads, queries, -1).astype(q.dtype)
    return [out] if fresh is None else [out, fresh]


def _refuse(call: _Call) -> str | None:
    if call.q.shape[2] > MAX_QUERIES:
        return f"more than {MAX_QUERIES} queries"
    if len(call.rows) > MAX_PLACES:
        return f"rows of more than {MAX_PLACES} sequences"
    return refuse_dims(call.scheme)


def _splits(capacity: int, kv_heads: int) -> int:
    """Parts that the packed tokens of a sequence are read in: enough for all of the GPU's cores."""
    fewest, most = SPLIT_TOKENS
    wanted = max(-(-_threadgroups() // kv_heads), -(-capacity // most))
    return max(1, min(-(-capacity // fewest), wanted, MAX_SPLITS))


@cache
def _threadgroups() -> int:
    info = mx.device_info() if mx.metal.is_available() else {}
    return _THREADGROUPS.get(str(info.get("architecture", ""))[-1:], _THREADGROUPS["s"])


def _inputs(call: _Call) -> dict[str, mx.array]:
    """What is given of the program's inputs that change from token to token."""
    k, v = call.fresh or (None, None)
    held = [a for a in call.rows if a.size]
    given = {"q": call.q}
    for i, rows in enumerate(call.rows if held else ()):
        # A sequence without rows has some other's, as Metal binds small arrays elsewhere.
        given["rows" if len(call.rows) == 1 else f"rows{i}"] = rows if rows.size else held[0]
    optional = {"tail": call.tail, "sink": call.sink, "k": k, "v": v, "mask": call.mask}
    given |= {n: a for n, a in optional.items() if a is not None and a.size}
    return {**given, "counts": call.counts}


def _launch(call: _Call) -> Launch:
    q, scheme = call.q, call.scheme
    batch, heads, queries, _ = q.shape
    rows = heads // call.kv_heads * queries
    shape = geometry(rows, scheme)
    inputs = _inputs(call)
    capacities = [a.shape[2] for a in call.rows] or [0]
    splits = [_splits(n, call.kv_heads) if any(capacities) else 0 for n in capacities]
    parts = max(splits) + any(n in inputs for n in ("tail", "sink", "k"))
    sizes = (
        *(queries, rows, call.kv_heads, max(splits), int(call.causal), call.window or 0),
        *(0 if a is None else a.shape[2] for a in (call.tail, call.sink)),
        *_mask_strides(call.mask),
        4 if call.counts.size > 4 else 0,
        2 if len(capacities) > 1 else 0,
        *(n for pair in zip(capacities, splits, strict=True) for n in pair),
    )
    held = batch * call.kv_heads
    plain = scheme.k.dim + scheme.v.dim
    fresh = () if call.fresh is None else ((batch, call.kv_heads, queries, plain),)

    def merge(outputs: list[mx.array]) -> Launch:
        sinks = () if call.sinks is None else (call.sinks,)
        threads = min(scheme.v.dim, 128)
        return Launch(
            program=merge_program(scheme.v.dim, bool(sinks), threads),
            arrays=(*outputs, *sinks, constants((rows, parts, queries, heads))),
            grid=(threads, batch * heads * queries, 1),
            threadgroup=(threads, 1, 1),
            template=(("T", q.dtype),),
            shapes=((batch, heads, queries, scheme.v.dim),),
            dtypes=(q.dtype,),
        )

    numbers = constants((call.scale, call.softcap or 0.0), mx.float32)
    return Launch(
        program=parts_program(scheme, tuple(n for n in inputs if n not in ("q", "counts")), shape),
        arrays=(*inputs.values(), constants(sizes), numbers),
        grid=(parts * shape.threads, -(-rows // (shape.rows * shape.groups)), held),
        threadgroup=(shape.threads, 1, 1),
        template=(("T", q.dtype),),
        shapes=((held, parts, rows, scheme.v.dim), (held, parts, rows, 2), *fresh),
        dtypes=(mx.float32, mx.float32, *[scheme.dtype] * len(fresh)),
        then=merge,
        extra=len(fresh),
    )


def _mask_strides(mask: mx.array | None) -> tuple[int, ...]:
    """Keys, and the strides of batch, head and query."""
    if mask is None:
        return 2**31 - 1, 0, 0, 0
    *lead, keys = (1,) * (4 - mask.ndim) + mask.shape
    strides = (lead[1] * lead[2] * keys, lead[2] * keys, keys)
    return (keys, *(s if n > 1 else 0 for n, s in zip(lead, strides, strict=True)))


KERNEL = Kernel("compressed_sdpa", _launch, _refuse, _reference, small.attention)
