"""Attention of a few queries over compressed keys and values: ``metal/compressed_sdpa.metal``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from ..runtime.kernel import Kernel, Launch
from . import small
from .scheme import FLOATS, KVScheme, KVSide
from .sdpa_call import HELD, Call, Scores
from .sdpa_program import geometry, merge_program, parts_program
from .sdpa_reference import reference
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


@dataclass(frozen=True, slots=True)
class Counts:
    """int32 ``[4]``: rows, tail and sink in use, and left padding, the same for all sequences."""

    array: mx.array


Length = mx.array | int | list[int] | Counts
Quantised = tuple[mx.array, mx.array, mx.array]
Rows = mx.array | Sequence[mx.array | None] | None


def compressed_sdpa(
    q: mx.array,
    scheme: KVScheme,
    rows: Rows,
    length: Length,
    tail: mx.array | None = None,
    tail_length: Length = 0,
    *,
    scores: Scores,
    sink: mx.array | None = None,
    sink_length: Length = 0,
    fresh: tuple[mx.array, mx.array] | None = None,
    left_padding: mx.array | None = None,
) -> tuple[mx.array, ...]:
    """``softmax(scale q k^T) v`` over keys and values that are mostly compressed.

    The keys of a sequence are, in this order, the first ``sink_length`` rows of ``sink``, the
    first ``length`` of ``rows``, the first ``tail_length`` of ``tail`` and those of ``fresh``: one
    softmax over all of them, in float32. Rows beyond a length are never looked at. The queries
    belong to the last ``L`` keys. A query that sees no key gives zeros.

    Args:
        q: ``[B, Hq, L, k_dim]``, float16, bfloat16 or float32; ``Hq`` a multiple of ``Hkv``.
        scheme: what a row of ``rows`` is.
        rows: uint32 ``[B, Hkv, capacity, scheme.row_words]``, ``capacity`` a multiple of 4; or
            None; or a list of those of each sequence, ``[1, Hkv, capacity, scheme.row_words]``
            or None, of at most `MAX_PLACES` sequences. One dispatch reads them all where they lie.
        length: rows in use: an integer, a list of ``B``, or an integer array of no dimension or
            ``[B]``; or `Counts`, which stands for all of these.
        tail: plain keys and values, not rotated, side by side in a row:
            ``[B, Hkv, rows, k_dim + v_dim]`` of the scheme's type; or None.
        tail_length: rows in use, as ``length``.
        scores: how keys are weighed.
        sink: the first tokens, as ``tail``.
        sink_length: rows in use, as ``length``.
        fresh: keys ``[B, Hkv, L, k_dim]`` and values ``[B, Hkv, L, v_dim]`` of the queries' own
            tokens, of the scheme's type, that are not in the tail yet.
        left_padding: integer ``[B]``: the first so many keys of a sequence are not seen.

    Returns:
        ``[B, Hq, L, v_dim]`` in ``q.dtype``. With ``fresh`` also ``[B, Hkv, L, k_dim + v_dim]``,
        its keys and values side by side: what is to be written into the tail. One dispatch makes
        both.

    Raises:
        ValueError: arguments whose shapes or types do not fit together.
    """
    call = Call(
        q=q,
        scheme=scheme,
        rows=_places(rows),
        counts=_counts(q, length, tail_length, sink_length, left_padding),
        tail=tail,
        sink=sink,
        fresh=fresh,
        scores=scores,
    )
    call.check()
    return tuple(KERNEL(call))


def plain_sdpa(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    length: Length,
    *,
    scores: Scores,
    left_padding: mx.array | None = None,
) -> mx.array:
    """`compressed_sdpa` over keys and values that are not compressed, for scores that
    `mx.fast.scaled_dot_product_attention` cannot weigh: those with a cap.

    Args:
        keys, values: ``[B, Hkv, capacity, dim]`` of the type of q: whole arrays of a cache, of
            which the first ``length`` rows are in use; none is copied.

    Returns:
        ``[B, Hq, L, v_dim]`` in ``q.dtype``.

    Raises:
        ValueError: arguments whose shapes or types do not fit together.
    """
    call = Call(
        q=q,
        scheme=_plain_scheme(keys, values),
        rows=(),
        counts=_counts(q, length, 0, 0, left_padding),
        tail=None,
        sink=None,
        fresh=None,
        scores=scores,
        held=(keys, values),
    )
    call.check()
    (output,) = KERNEL(call)
    return output


def refuse_plain(keys: mx.array, values: mx.array) -> str | None:
    """Why `plain_sdpa` has no kernel for such keys and values, or None."""
    if keys.dtype != values.dtype or keys.dtype not in FLOATS:
        return f"keys are {keys.dtype} and values {values.dtype}"
    if odd := [dim for dim in (keys.shape[-1], values.shape[-1]) if dim % 8]:
        return f"heads of {odd[0]} elements, which is no multiple of 8"
    return refuse_dims(_plain_scheme(keys, values))


def quantized_sdpa(
    q: mx.array,
    keys: Quantised,
    values: Quantised,
    length: Length,
    *,
    group_size: int,
    bits: int,
    scores: Scores,
) -> mx.array:
    """`compressed_sdpa` over what `mx.quantize` made of keys and values, in its arrays.

    Args:
        keys, values: codes, scales and biases, ``[B, Hkv, capacity, ...]``: whole arrays of a
            cache, of which the first ``length`` rows are in use; none is copied.
        group_size, bits: as of `mx.quantize`: 32, 64 or 128; 2, 3, 4, 5, 6 or 8.

    Returns:
        ``[B, Hq, L, v_dim]`` in ``q.dtype``.

    Raises:
        ValueError: arguments whose shapes or types do not fit together.
    """
    k, v = (KVSide(of[1].shape[-1] * group_size, bits, group_size) for of in (keys, values))
    call = Call(
        q=q,
        scheme=KVScheme(k, v, keys[1].dtype),
        rows=(),
        counts=_counts(q, length, 0, 0, None),
        tail=None,
        sink=None,
        fresh=None,
        scores=scores,
        held=(*keys, *values),
    )
    call.check()
    (output,) = KERNEL(call)
    return output


def _plain_scheme(keys: mx.array, values: mx.array) -> KVScheme:
    return KVScheme(KVSide(keys.shape[-1], 16), KVSide(values.shape[-1], 16), keys.dtype)


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
    if isinstance(length, Counts):
        return length.array
    if all(isinstance(n, int) for n in given.values()):
        return constants(tuple(given.values()))
    batch, columns = q.shape[0], []
    for name, value in given.items():
        assert not isinstance(value, Counts)
        array = (value if isinstance(value, mx.array) else mx.array(value)).reshape(-1)
        if array.shape not in ((1,), (batch,)):
            raise ValueError(f"{name}: expected one number or {batch}, found {array.shape}")
        columns.append(array.astype(mx.int32))
    many = max(a.size for a in columns)
    return mx.stack([mx.broadcast_to(a, (many,)) for a in columns], axis=-1).reshape(-1)


def _refuse(call: Call) -> str | None:
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


def _inputs(call: Call) -> dict[str, mx.array]:
    """What is given of the program's inputs that change from token to token."""
    k, v = call.fresh or (None, None)
    held = [a for a in call.rows if a.size]
    own = call.held or ()
    given = {"q": call.q, **dict(zip(HELD.get(len(own), ()), own, strict=True))}
    for i, rows in enumerate(call.rows if held else ()):
        # A sequence without rows has some other's, as Metal binds small arrays elsewhere.
        given["rows" if len(call.rows) == 1 else f"rows{i}"] = rows if rows.size else held[0]
    optional = {"tail": call.tail, "sink": call.sink, "k": k, "v": v, "mask": call.scores.mask}
    given |= {n: a for n, a in optional.items() if a is not None and a.size}
    return {**given, "counts": call.counts}


def _launch(call: Call) -> Launch:
    q, scheme, how = call.q, call.scheme, call.scores
    batch, heads, queries, _ = q.shape
    rows = heads // call.kv_heads * queries
    shape = geometry(rows, scheme)
    inputs = _inputs(call)
    capacities = call.capacities
    splits = [_splits(n, call.kv_heads) if any(capacities) else 0 for n in capacities]
    if call.whole:
        splits = [1]
    parts = max(splits) + any(n in inputs for n in ("tail", "sink", "k"))
    sizes = (
        *(queries, rows, call.kv_heads, max(splits), int(how.causal), how.window or 0),
        *(0 if a is None else a.shape[2] for a in (call.tail, call.sink)),
        *_mask_strides(how.mask),
        4 if call.counts.size > 4 else 0,
        2 if len(capacities) > 1 else 0,
        *(n for pair in zip(capacities, splits, strict=True) for n in pair),
    )
    held = batch * call.kv_heads
    plain = scheme.k.dim + scheme.v.dim
    fresh = () if call.fresh is None else ((batch, call.kv_heads, queries, plain),)

    def merge(outputs: list[mx.array]) -> Launch:
        sinks = () if how.sinks is None else (how.sinks,)
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

    numbers = constants((how.scale, how.softcap or 0.0), mx.float32)
    names = tuple(n for n in inputs if n not in ("q", "counts"))
    outputs = (held, parts, rows, scheme.v.dim), (held, parts, rows, 2)
    return Launch(
        program=parts_program(scheme, names, shape, whole=call.whole),
        arrays=(*inputs.values(), constants(sizes), numbers),
        grid=(parts * shape.threads, -(-rows // (shape.rows * shape.groups)), held),
        threadgroup=(shape.threads, 1, 1),
        template=(("T", q.dtype),),
        shapes=((batch, heads, queries, scheme.v.dim),) if call.whole else (*outputs, *fresh),
        dtypes=(q.dtype,) if call.whole else (mx.float32,) * 2 + (scheme.dtype,) * len(fresh),
        then=None if call.whole else merge,
        extra=len(fresh),
    )


def _mask_strides(mask: mx.array | None) -> tuple[int, ...]:
    """Keys, and the strides of batch, head and query."""
    if mask is None:
        return 2**31 - 1, 0, 0, 0
    *lead, keys = (1,) * (4 - mask.ndim) + mask.shape
    strides = (lead[1] * lead[2] * keys, lead[2] * keys, keys)
    return (keys, *(s if n > 1 else 0 for n, s in zip(lead, strides, strict=True)))


KERNEL = Kernel("compressed_sdpa", _launch, _refuse, reference, small.attention)
