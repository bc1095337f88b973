"""Key-value caches that hold keys and values compressed, in mlx-lm's cache contract.

Tokens lie in three places, in the order of their positions::
    sink    the first ``keep`` tokens, as the model computed them
    rows    compressed, sealed in blocks of ``BLOCK`` tokens
    tail    the last ``RECENT`` tokens or more, as the model computed them

A token is quantised once, when the block it is in leaves the tail; so for the same keys and
values the codes, scales and tail are the same bits however many tokens came at a time. Keys and
values of a token and head are neighbours in each of the three arrays: a step that seals no block
writes one row.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache, create_attention_mask

from ...kernels.kv.compressed_sdpa import MAX_QUERIES
from ...kernels.kv.dequantize_kv import dequantize_kv
from ...kernels.kv.quantize_kv import quantize_kv
from ...kernels.kv.scheme import KVScheme, KVSide
from ...kernels.kv.sdpa_call import Scores
from ..sdpa import Mask, heads_in_turn
from .kept import Kept, kept_sdpa

Pair = tuple[mx.array, mx.array]


class CompressedKVCache(mlx_lm_cache._BaseCache):
    """Keys and values of one layer, of B sequences of the same length.

    Args:
        k_bits, v_bits: bits of a code, 4 or 8; 16 keeps keys or values in their own type.
        group_size: neighbouring values of a head that share a scale. Where that does not divide
            the head size, 32 does instead, and else a head is one group: see ``scheme``.
        rotate: quantise after a Hadamard rotation, which spreads what is large in few channels.
        keep: first tokens that are never compressed and that a window never drops.
        window: a token sees itself, the ``window - 1`` before it and the first ``keep``.
    """

    BLOCK: ClassVar[int] = 64
    RECENT: ClassVar[int] = 64
    CAPACITY: ClassVar[int] = RECENT + BLOCK + MAX_QUERIES  # of the tail
    STEP: ClassVar[int] = 256  # rows that are allocated at a time; a layer's are copied then
    decompresses = False  # at each step, as its layer does not `attend` to the rows where they lie
    SCRATCH: ClassVar[int] = 32 << 20  # bytes of decompressed keys and values; not measured

    def __init__(
        self,
        k_bits: int = 8,
        v_bits: int = 4,
        group_size: int = 64,
        rotate: bool = True,
        keep: int = 4,
        window: int | None = None,
    ) -> None:
        self.k_bits, self.v_bits, self.group_size = k_bits, v_bits, group_size
        self.rotate, self.keep, self.window = rotate, keep, window
        # A KVScheme and arrays, from the first token on that each of them is about.
        self.scheme: Any = None
        self.sink: Any = None
        self.rows: Any = None
        self.tail: Any = None
        self.offset = 0
        self._first = keep  # position of the first row
        self._sealed = 0  # rows in use
        self._kept = Kept()

    # --- mlx-lm's contract ----------------------------------------------------------------

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Pair:
        """Append keys and values [B, heads, L, head size]; return what the new tokens may see.

        What was sealed before comes decompressed, the new tokens as they were given.
        """
        self._prepare(keys, values)
        fetched = self._with_past(keys, values)
        self._append(keys, values)
        self.decompresses = True
        return fetched

    @property
    def state(self) -> tuple[Any, ...]:
        dims = (self.scheme.k.dim, self.scheme.v.dim) if self.scheme else (0, 0)
        settings = (self.k_bits, self.v_bits, self.group_size, self.rotate, self.keep, self.window)
        arrays = (self.sink, self.rows, self.tail)
        return (*arrays, self.offset, self._first, self._sealed, *settings, *dims)

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        self.sink, self.rows, self.tail, self.offset, self._first, self._sealed = state[:6]
        self.k_bits, self.v_bits, self.group_size, self.rotate, self.keep, self.window = state[6:12]
        self.scheme, (k_dim, v_dim) = None, state[12:]
        self._kept = Kept()
        plain = self.tail if self.tail is not None else self.sink
        if plain is not None:
            self.scheme = self._scheme(k_dim, v_dim, plain.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedKVCache:
        made: CompressedKVCache = type(self).from_state(copy.deepcopy(self.state, memo))
        return made

    def is_trimmable(self) -> bool:
        return self._first == self.keep  # nothing has left the window

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens; what remains keeps its bits."""
        n = min(self.offset, n)
        self.offset -= n
        self._sealed = min(self._sealed, max(0, self.offset - self._first))
        return n

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        if self.window is None:
            mask: Mask = create_attention_mask(N, self.offset, return_array, window_size)
            return mask
        window = min(window_size or self.window, self.window)
        if N == 1 and (window == self.window or self.offset < window):
            return None
        if not return_array and self.offset + N <= window:
            return "causal"
        return self.mask_array(N, window)

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.offset == 0

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.sink, self.rows, self.tail) if a is not None)

    @classmethod
    def merge(cls, caches: Sequence[CompressedKVCache]) -> Any:
        """A `BatchCompressedKVCache` of sequences of any lengths; ``caches`` stay as they are."""
        return mlx_lm_cache.BatchCompressedKVCache(copy.deepcopy(list(caches)))

    # --- beyond it ------------------------------------------------------------------------

    @classmethod
    def from_cache(cls, cache: KVCache | RotatingKVCache, **settings: Any) -> CompressedKVCache:
        """A compressed copy of what mlx-lm's cache holds.

        Args:
            settings: arguments of the class; ``keep`` and ``window`` are a RotatingKVCache's own.
        """
        rotating = isinstance(cache, RotatingKVCache)
        if rotating:
            settings |= {"keep": cache.keep, "window": cache.max_size - cache.keep}
        made = cls(**settings)
        if cache.keys is None:
            return made
        keys, values = cache.keys, cache.values
        if rotating:
            keys, values = cache._temporal_order(keys), cache._temporal_order(values)
        held = min(keys.shape[2], cache.offset)
        dropped = cache.offset - held
        if dropped and made.keep:
            made._append(keys[:, :, : made.keep], values[:, :, : made.keep])
        done = made.offset
        made.offset, made._first = made.offset + dropped, made._first + dropped
        made._append(keys[:, :, done:held], values[:, :, done:held])
        return made

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scores: Scores,
    ) -> mx.array:
        """Append keys and values, and attend to all that is held.

        Up to 8 queries read the compressed rows where they lie. For more, as many KV heads at a
        time are decompressed as ``SCRATCH`` bytes hold, but at least one: heads know nothing of
        each other, so nothing is to be merged.

        Args:
            queries: [B, query heads, L, head size]; keys and values as for `update_and_fetch`.
            scores: its mask is what `make_mask` made, or an array of the same form.

        Returns:
            [B, query heads, L, value head size] in the queries' type.
        """
        length, scheme = queries.shape[2], self._prepare(keys, values)
        if length > MAX_QUERIES:
            return self._attend_in_turn(queries, keys, values, scores)
        mask, window = scores.mask, None
        if mask is not None:
            mask = self._all_columns(mask)
        elif self._unseen and self.keep:  # the kernel's window would drop the sink
            mask = self._all_columns(self.mask_array(length, self.window))
        elif not scores.causal:
            window = self.window
        if mask is not scores.mask or window is not None:
            causal = scores.causal and mask is None
            scores = Scores(scores.scale, mask, causal, window, scores.softcap, scores.sinks)
        output, plain = kept_sdpa(
            self._kept,
            queries,
            scheme,
            self.rows,
            self._sealed,
            self.tail,
            self._tail_length,
            scores=scores,
            sink=self.sink,
            sink_length=min(self.offset, self.keep),
            fresh=(keys.astype(scheme.dtype), values.astype(scheme.dtype)),
        )
        self._store(plain)
        return output

    def _attend_in_turn(
        self, queries: mx.array, keys: mx.array, values: mx.array, scores: Scores
    ) -> mx.array:
        """`attend`, some KV heads after others, whose keys and values are decompressed first."""
        scheme = self.scheme
        token = keys.shape[0] * (scheme.k.dim + scheme.v.dim) * keys.dtype.size
        each = max(1, self.SCRATCH // ((self.columns + queries.shape[2]) * token))

        def past(heads: slice) -> Pair:
            return self._with_past(keys[:, heads], values[:, heads], heads)

        output = heads_in_turn(queries, keys.shape[1], each, past, scores)
        self._append(keys, values)
        return output

    @property
    def token_bytes(self) -> int:
        """Bytes of a compressed token of one sequence; 0 before the first token."""
        plain = self.tail if self.tail is not None else self.sink
        return 0 if plain is None else plain.shape[1] * self.scheme.row_bytes

    @property
    def columns(self) -> int:
        """Tokens held that a next one may see."""
        return min(self.offset, self.keep) + max(0, self.offset - self._first - self._unseen)

    def mask_array(self, length: int, window: int | None = None) -> mx.array:
        """bool [L, columns + L]: who of L new tokens sees what of `update_and_fetch`'s tokens."""
        mask: mx.array = create_causal_mask(length, self.columns)
        if window is None:
            return mask
        column = mx.arange(self.columns + length)
        near = mx.arange(self.columns, column.size)[:, None] < column + window
        return mask & (near | (column < self.keep))

    # --- inside ---------------------------------------------------------------------------

    @property
    def _tail_length(self) -> int:
        return max(0, self.offset - self._first - self._sealed)

    @property
    def _unseen(self) -> int:
        """Tokens behind the sink that no next one sees: they are dropped now and then."""
        return 0 if self.window is None else max(0, self.offset - self.window + 1 - self._first)

    def _all_columns(self, mask: mx.array) -> mx.array:
        """The mask with False for what is held and not seen."""
        if not self._unseen:
            return mask
        sink, rest = mx.split(mask, [min(self.offset, self.keep)], axis=-1)
        least = False if mask.dtype == mx.bool_ else -mx.inf
        gap = mx.full((*mask.shape[:-1], self._unseen), least, mask.dtype)
        return mx.concatenate([sink, gap, rest], axis=-1)

    def _scheme(self, k_dim: int, v_dim: int, dtype: mx.Dtype) -> KVScheme:
        def side(dim: int, bits: int) -> KVSide:
            group = next((g for g in (self.group_size, 32) if dim % g == 0), dim)
            return KVSide(dim, bits, group, rotate=self.rotate and bits < 16)

        scheme = KVScheme(side(k_dim, self.k_bits), side(v_dim, self.v_bits), dtype)
        scheme.check_packed()
        return scheme

    def _prepare(self, keys: mx.array, values: mx.array) -> KVScheme:
        """Seal what the tail has no room for beside the new tokens, before anything is read.

        MLX writes into an array in place where nobody else holds it, else it copies all of it. A
        Metal command buffer holds what it reads until it is done, and the step before may still
        be at work: it is waited for, once in ``BLOCK`` tokens.
        """
        if self.scheme is None:
            self.scheme = self._scheme(keys.shape[3], values.shape[3], keys.dtype)
        due, held = self._due(keys.shape[2]), self._tail_length
        if 0 < due <= held:
            mx.synchronize()
            tail = self.tail
            self._seal(tail[:, :, :due])
            self.tail = self._padded(tail[:, :, due:held])
        made: KVScheme = self.scheme
        return made

    def _due(self, length: int) -> int:
        """How many tokens are to be sealed once there are ``length`` more."""
        blocks = max(0, self.offset + length - self.keep - self.RECENT) // self.BLOCK
        return self.keep + blocks * self.BLOCK - self._first - self._sealed

    def _with_past(self, keys: mx.array, values: mx.array, heads: slice = slice(None)) -> Pair:
        """What a token after those held may see, of some KV heads, before new ``keys``."""
        pieces = []
        if self.sink is not None:
            pieces.append(self._split(self.sink[:, heads, : self.offset]))
        skip = self._unseen
        if skip < self._sealed:
            rows = self.rows[:, heads, skip : self._sealed]
            pieces.append(dequantize_kv(rows, self.scheme, keys.dtype))
        skip = max(0, skip - self._sealed)
        if skip < self._tail_length:
            pieces.append(self._split(self.tail[:, heads, skip : self._tail_length]))
        k, v = (list(x) for x in zip(*pieces, (keys, values), strict=True))
        return mx.concatenate(k, axis=2), mx.concatenate(v, axis=2)

    def _split(self, plain: mx.array) -> Pair:
        dim = self.scheme.k.dim
        return plain[..., :dim], plain[..., dim:]

    def _append(self, keys: mx.array, values: mx.array) -> None:
        self._prepare(keys, values)
        self._store(mx.concatenate([keys, values], axis=3).astype(self.scheme.dtype))

    def _store(self, plain: mx.array) -> None:
        """Append tokens [B, heads, L, key and value] to sink and tail, and seal what is due."""
        due, held, length = self._due(plain.shape[2]), self._tail_length, plain.shape[2]
        into_sink = min(max(0, self.keep - self.offset), length)
        if into_sink:
            self.sink = _write(self.sink, plain[:, :, :into_sink], self.offset, self.keep)
            plain = plain[:, :, into_sink:]
        self.offset += length
        if due <= 0:
            self.tail = _write(self.tail, plain, held, self.CAPACITY)
            return
        if held:
            plain = mx.concatenate([self.tail[:, :, :held], plain], axis=2)
        self._seal(plain[:, :, :due])
        self.tail = self._padded(plain[:, :, due:])
        mx.eval(self.tail)  # all of the new tokens would wait for it, in every layer

    def _padded(self, plain: mx.array) -> mx.array:
        return mx.pad(plain, [(0, 0), (0, 0), (0, self.CAPACITY - plain.shape[2]), (0, 0)])

    def _seal(self, plain: mx.array) -> None:
        """Compress the tokens that follow the rows, and append them."""
        dead = 0  # tokens from the first row on that no query sees any more
        if self.window is not None:
            dead = self.offset - MAX_QUERIES - self.window + 1 - self._first
            dead = min(max(0, dead), self._sealed + plain.shape[2])
        skip = max(0, dead - self._sealed)
        if skip == plain.shape[2]:
            self._first, self._sealed = self._first + dead, 0
            return
        packed = quantize_kv(*self._split(plain[:, :, skip:]), self.scheme)
        end = self._sealed + packed.shape[2]
        if self.rows is not None and not skip and end <= self.rows.shape[2]:
            self.rows[:, :, self._sealed : end] = packed
            self._sealed = end
            return
        parts = [packed]
        if dead < self._sealed:
            parts.insert(0, self.rows[:, :, dead : self._sealed])
        self._sealed = max(0, self._sealed - dead) + packed.shape[2]
        self._first += dead
        spare = (*packed.shape[:2], -self._sealed % self.STEP, packed.shape[3])
        self.rows = mx.concatenate([*parts, mx.zeros(spare, packed.dtype)], axis=2)
        del parts
        mx.eval(self.rows)  # the old rows are gone before the next layer's grow


def copied(rows: mx.array) -> mx.array:
    """Rows in a buffer of their own, not a view of a larger one, as `mx.contiguous` may give."""
    return mx.concatenate([rows, rows[:, :, :0]], axis=2)


def _write(into: mx.array | None, rows: mx.array, start: int, capacity: int) -> mx.array:
    if into is None:
        into = mx.zeros((*rows.shape[:2], capacity, rows.shape[3]), rows.dtype)
    if rows.shape[2] == capacity:
        return copied(rows)
    into[:, :, start : start + rows.shape[2]] = rows
    return into


# mlx-lm's load_prompt_cache and CacheList find the class of a cache by its name in their module.
mlx_lm_cache.CompressedKVCache = CompressedKVCache
