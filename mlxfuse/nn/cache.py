"""A key-value cache that holds keys and values compressed, in mlx-lm's cache contract.

Tokens lie in three places, in the order of their positions::

    sink             the first ``keep`` tokens, as the model computed them
    rows             compressed, sealed in blocks of ``BLOCK`` tokens
    tail             the last ``RECENT`` tokens or more, as the model computed them

A token is quantised once, when the block it is in leaves the tail; so for the same keys and
values codes, scales and tail are the same bits however many came at a time. Keys and values of
a token and head are neighbours in every one of the three arrays: a step that seals no block
writes one row. Arrays are written before they are read in a step, because MLX copies a whole
array that it writes to while somebody still reads it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache, create_attention_mask

from ._kv import KVScheme, pack, unpack

Pair = tuple[mx.array, mx.array]


class CompressedKVCache(mlx_lm_cache._BaseCache):
    """Keys and values of one layer, [B, heads, tokens, head size] each.

    Args:
        k_bits, v_bits: bits of a code, 4 or 8; 16 keeps keys or values as they are.
        group_size: values of a head that share a scale. Where it does not divide the head size
            32 does its work, and else the whole head is one group; see ``scheme``.
        rotate: quantise after a Hadamard rotation, which spreads a channel's outliers.
        keep: first tokens that are never compressed and that a window never drops.
        window: a token sees itself, the ``window - 1`` before it and the first ``keep``.
    """

    BLOCK: ClassVar[int] = 64
    RECENT: ClassVar[int] = 64
    STEP: ClassVar[int] = 256
    QUERIES: ClassVar[int] = 8  # at most, in what the decode kernel attends to at a time

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
        self.scheme: KVScheme | None = None
        self.sink: mx.array | None = None
        self.rows: mx.array | None = None
        self.tail: mx.array | None = None
        self.offset = 0
        self._first = keep  # position of the first row
        self._sealed = 0  # rows in use

    # --- mlx-lm's contract ----------------------------------------------------------------

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Pair:
        """Append [B, heads, L, head size] each; return what is held, decompressed.

        The new tokens come back as they were given. With a window, L = 1 gives what the token
        sees and nothing else.
        """
        return self._update(keys, values, self._begin(keys.shape[2]))

    @property
    def state(self) -> tuple[Any, ...]:
        dims = (self.scheme.k_dim, self.scheme.v_dim) if self.scheme else (0, 0)
        settings = (self.k_bits, self.v_bits, self.group_size, self.rotate, self.keep, self.window)
        arrays = (self.sink, self.rows, self.tail)
        return (*arrays, self.offset, self._first, self._sealed, *settings, *dims)

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        self.sink, self.rows, self.tail, self.offset, self._first, self._sealed = state[:6]
        self.k_bits, self.v_bits, self.group_size, self.rotate = state[6:10]
        self.keep, self.window, k_dim, v_dim = state[10:]
        self.scheme = self._scheme(k_dim, v_dim) if k_dim else None

    def is_trimmable(self) -> bool:
        return self._first == self.keep  # no token has left the window

    def trim(self, n: int) -> int:
        n = min(self.offset, n)
        self.offset -= n
        self._sealed = min(self._sealed, max(0, self.offset - self._first))
        return n

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        if self.window is None:
            return create_attention_mask(N, self.offset, return_array, window_size)
        window = min(window_size or self.window, self.window)
        if N == 1 and (window == self.window or self.offset < window):
            return None
        if not return_array and self.offset + N <= window:
            return "causal"
        return self._mask(N, window)

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.offset == 0

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.sink, self.rows, self.tail) if a is not None)

    @classmethod
    def merge(cls, caches: Sequence[CompressedKVCache]) -> BatchCompressedKVCache:
        """One cache for a batch of sequences of different lengths; ``caches`` stay as they are."""
        return BatchCompressedKVCache(copy.deepcopy(list(caches)))

    # --- beyond it ------------------------------------------------------------------------

    @classmethod
    def from_cache(cls, cache: KVCache | RotatingKVCache, **settings: Any) -> CompressedKVCache:
        """A compressed copy of what mlx-lm's cache holds; ``settings`` as for the class."""
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
        if dropped:
            made._append(keys[:, :, : made.keep], values[:, :, : made.keep])
            made.offset, made._first = made.offset + dropped, made._first + dropped
            held, keys, values = (
                held - made.keep,
                keys[:, :, made.keep :],
                values[:, :, made.keep :],
            )
        made._append(keys[:, :, :held], values[:, :, :held])
        return made

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Append keys and values, and attend to all that is held.

        Args:
            queries: [B, query heads, L, head size]; keys and values as for `update_and_fetch`.
            mask: what `make_mask` made for L, or an array of the same form.
            sinks: a learned logit for each query head.

        Returns:
            [B, query heads, L, value head size] in the type of the queries.
        """
        keys, values = self.update_and_fetch(keys, values)
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask=mask, sinks=sinks
        )

    # --- inside ---------------------------------------------------------------------------

    @property
    def _tail_length(self) -> int:
        return max(0, self.offset - self._first - self._sealed)

    def _begin(self, length: int) -> int:
        """Position of the first token after the sink that ``length`` new tokens are given."""
        if self.window is None or length > 1:
            return self._first
        return max(self._first, self.offset - self.window + 1)

    def _columns(self, begin: int) -> int:
        """Tokens held from ``begin`` on, and the sink's."""
        return min(self.offset, self.keep) + max(0, self.offset - begin)

    def _mask(self, length: int, window: int | None = None) -> mx.array:
        """[L, columns]: who sees what of that which `update_and_fetch` returns."""
        past = self._columns(self._begin(length))
        mask = create_causal_mask(length, past)
        if window is not None:
            column = mx.arange(past + length)
            near = mx.arange(past, past + length)[:, None] < column + window
            mask = mask & (near | (column < self.keep))
        return mask

    def _scheme(self, k_dim: int, v_dim: int) -> KVScheme:
        groups = (group_of(dim, self.group_size) for dim in (k_dim, v_dim))
        return KVScheme(self.k_bits, self.v_bits, k_dim, v_dim, *groups, self.rotate)

    def _update(self, keys: mx.array, values: mx.array, begin: int) -> Pair:
        past = self._past(begin, keys)
        self._append(keys, values)
        if not past:
            return keys, values
        k, v = zip(*past, (keys, values), strict=True)
        return mx.concatenate(k, axis=2), mx.concatenate(v, axis=2)

    def _past(self, begin: int, fresh: mx.array) -> list[Pair]:
        """What is held from ``begin`` on, piece by piece, decompressed."""
        pieces = []
        if self.scheme is None:
            return []
        if self.sink is not None:
            pieces.append(self._split(self.sink[:, :, : self.offset]))
        skip = begin - self._first
        if skip < self._sealed:
            # Without the dependency MLX may decompress all layers before the first is used.
            rows = mx.depends(self.rows, fresh)
            pieces.append(unpack(rows[:, :, skip : self._sealed], self.scheme, fresh.dtype))
        skip = max(0, skip - self._sealed)
        if skip < self._tail_length:
            pieces.append(self._split(self.tail[:, :, skip : self._tail_length]))
        return pieces

    def _split(self, kv: mx.array) -> Pair:
        dim = self.scheme.k_dim
        return kv[..., :dim], kv[..., dim:]

    def _append(self, keys: mx.array, values: mx.array) -> None:
        if self.scheme is None:
            self.scheme = self._scheme(keys.shape[3], values.shape[3])
        kv = mx.concatenate([keys, values], axis=3)
        into_sink = min(max(0, self.keep - self.offset), kv.shape[2])
        if into_sink:
            self.sink = _write(self.sink, kv[:, :, :into_sink], self.offset, self.keep)
            kv = kv[:, :, into_sink:]
        held, capacity = self._tail_length, self.RECENT + self.BLOCK + self.QUERIES
        self.offset += keys.shape[2]
        blocks = max(0, self.offset - self.keep - self.RECENT) // self.BLOCK
        seal = self.keep + blocks * self.BLOCK - self._first - self._sealed
        if seal <= 0 and held + kv.shape[2] <= capacity:
            self.tail = _write(self.tail, kv, held, capacity)
            return
        if held:
            kv = mx.concatenate([self.tail[:, :, :held], kv], axis=2)
        if seal > 0:
            self._seal(kv[:, :, :seal])
            kv = kv[:, :, seal:]
        self.tail = mx.pad(kv, [(0, 0), (0, 0), (0, capacity - kv.shape[2]), (0, 0)])

    def _seal(self, kv: mx.array) -> None:
        """Compress kv, the tokens that follow the rows, and append them."""
        dead = 0  # rows, and tokens of kv, that neither the current nor later queries see
        if self.window is not None:
            dead = max(0, self.offset - self.QUERIES - self.window + 1 - self._first)
            dead = min(dead, self._sealed + kv.shape[2])
        skip = max(0, dead - self._sealed)
        kv = kv[:, :, skip:]
        packed = pack(kv, self.scheme)
        end = self._sealed + kv.shape[2]
        if self.rows is not None and not skip and end <= self.rows.shape[2]:
            self.rows[:, :, self._sealed : end] = packed
            self._sealed = end
            return
        parts = [packed]
        if dead < self._sealed:
            parts.insert(0, self.rows[:, :, dead : self._sealed])
        self._first += dead
        self._sealed = max(0, self._sealed - dead) + kv.shape[2]
        spare = -self._sealed % self.STEP
        parts.append(mx.zeros((*packed.shape[:2], spare, packed.shape[3]), packed.dtype))
        self.rows = mx.concatenate(parts, axis=2)


def group_of(dim: int, wanted: int) -> int:
    """The group size nearest to the wanted one that divides a head."""
    return next((g for g in (wanted, 32) if dim % g == 0), dim)


def _write(into: mx.array | None, rows: mx.array, start: int, capacity: int) -> mx.array:
    if into is None:
        into = mx.zeros((*rows.shape[:2], capacity, rows.shape[3]), rows.dtype)
    into[:, :, start : start + rows.shape[2]] = rows
    return into


class BatchCompressedKVCache(mlx_lm_cache._BaseCache):
    """Compressed caches of the sequences of a batch, each with its own length.

    Every sequence keeps its own cache, so a batch gives bit for bit what its sequences give one
    by one, and joining or leaving one moves no token. Padding is never stored.
    """

    def __init__(self, caches: Sequence[CompressedKVCache]) -> None:
        self.caches = list(caches)
        self._left: list[int] | None = None  # tokens to come of right-padded prompts

    @property
    def offset(self) -> mx.array:
        return mx.array([c.offset for c in self.caches])

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        if left_padding is not None and any(left_padding):
            raise ValueError("compressed caches take right-padded prompts only")
        if right_padding is not None and any(right_padding):
            self._left = list(lengths or ())

    def finalize(self) -> None:
        self._left = None

    def _valid(self, length: int) -> list[int]:
        """How many of ``length`` tokens are no padding, for each sequence, counted down."""
        if self._left is None:
            return [length] * len(self.caches)
        valid = [min(length, left) for left in self._left]
        self._left = [left - n for left, n in zip(self._left, valid, strict=True)]
        return valid

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """[B, 1, N, columns]: every sequence's own mask, columns aligned to the right."""
        masks = [c._mask(N, _least(window_size, c.window)) for c in self.caches]
        columns = max(m.shape[1] for m in masks)
        masks = [mx.pad(m, [(0, 0), (columns - m.shape[1], 0)]) for m in masks]
        return mx.stack(masks)[:, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Pair:
        length = keys.shape[2]
        begins = [c._begin(length) for c in self.caches]
        columns = max(c._columns(b) for c, b in zip(self.caches, begins, strict=True))
        columns += length
        fetched = []
        for i, (cache, n) in enumerate(zip(self.caches, self._valid(length), strict=True)):
            left = columns - length - cache._columns(begins[i])
            pad = [(0, 0), (0, 0), (left, length - n), (0, 0)]
            k, v = keys[i : i + 1, :, :n], values[i : i + 1, :, :n]
            k, v = cache._update(k, v, begins[i])
            fetched.append((mx.pad(k, pad), mx.pad(v, pad)))
        k, v = zip(*fetched, strict=True)
        return mx.concatenate(k), mx.concatenate(v)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: mx.array,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """As `CompressedKVCache.attend`; rows of padding are 0."""
        length = queries.shape[2]
        outputs = []
        for i, (cache, n) in enumerate(zip(self.caches, self._valid(length), strict=True)):
            q, k, v = (x[i : i + 1, :, :n] for x in (queries, keys, values))
            start = mask.shape[3] - length - cache._columns(cache._begin(length))
            own = mask[i : i + 1, :, :n, start : mask.shape[3] - length + n]
            output = cache.attend(q, k, v, scale=scale, mask=own, sinks=sinks)
            outputs.append(mx.pad(output, [(0, 0), (0, 0), (0, length - n), (0, 0)]))
        return mx.concatenate(outputs)

    @property
    def state(self) -> list[tuple[Any, ...]]:
        return [c.state for c in self.caches]

    @state.setter
    def state(self, state: Sequence[Sequence[Any]]) -> None:
        self.caches = [CompressedKVCache.from_state(s) for s in state]
        self._left = None

    def filter(self, batch_indices: Sequence[int]) -> None:
        self.caches = [self.caches[i] for i in batch_indices]

    def extend(self, other: BatchCompressedKVCache) -> None:
        self.caches += other.caches

    def extract(self, idx: int) -> CompressedKVCache:
        return copy.deepcopy(self.caches[idx])

    def is_trimmable(self) -> bool:
        return all(c.is_trimmable() for c in self.caches)

    def trim(self, n: int) -> int:
        return min(c.trim(n) for c in self.caches)

    def size(self) -> int:
        return max(c.size() for c in self.caches)

    def empty(self) -> bool:
        return all(c.empty() for c in self.caches)

    @property
    def nbytes(self) -> int:
        return sum(c.nbytes for c in self.caches)


def _least(*windows: int | None) -> int | None:
    return min((w for w in windows if w is not None), default=None)


# mlx-lm's load_prompt_cache and CacheList find the class of a cache by its name in their module.
for _class in (CompressedKVCache, BatchCompressedKVCache):
    setattr(mlx_lm_cache, _class.__name__, _class)
