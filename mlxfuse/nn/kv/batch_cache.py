"""The compressed caches of a batch of sequences."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from ...kernels.kv.compressed_sdpa import MAX_PLACES, MAX_QUERIES, compressed_sdpa
from ...kernels.kv.sdpa_call import Scores
from .cache import CompressedKVCache, Pair, copied


class BatchCompressedKVCache(mlx_lm_cache._BaseCache):
    """Compressed caches of the sequences of a batch, each of its own length.

    A sequence keeps its own compressed rows, so to join or to leave a batch moves none of them and
    padding is never stored. What is plain, the first tokens and the last ones, lies side by side
    while the batch decodes: one dispatch attends to the rows of all sequences where they lie, one
    puts its parts together, one writes the new tokens. A batch gives bit for bit what its
    sequences give one by one.
    """

    # The last masks that any of these caches made, by window: `attend` needs not look at them.
    _made: ClassVar[dict[int | None, mx.array]] = {}

    def __init__(self, caches: Sequence[CompressedKVCache]) -> None:
        self._caches = list(caches)
        self._plain: tuple[mx.array | None, mx.array] | None = None  # sinks and tails
        self._left: list[int] | None = None  # tokens to come of right-padded prompts

    @property
    def caches(self) -> list[CompressedKVCache]:
        """The caches of the sequences, each with all of its own tokens."""
        if self._plain is not None:
            for i, cache in enumerate(self._caches):
                cache.sink, cache.tail = (
                    None if x is None else copied(x[i : i + 1]) for x in self._plain
                )
            self._plain = None
        return self._caches

    @caches.setter
    def caches(self, caches: Sequence[CompressedKVCache]) -> None:
        self._caches, self._plain = list(caches), None

    @property
    def offset(self) -> mx.array:
        return mx.array([c.offset for c in self._caches])

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        if left_padding is not None and any(left_padding):
            raise ValueError("compressed caches expect prompts padded on the right, not the left")
        if lengths is not None and right_padding is not None and any(right_padding):
            self._left = list(lengths)

    def finalize(self) -> None:
        self._left = None

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """bool [B, 1, N, columns]: the sequences' own masks, their columns aligned at the end."""
        masks = [c.mask_array(N, _least(window_size, c.window)) for c in self._caches]
        columns = max(m.shape[1] for m in masks)
        padded = [mx.pad(m, [(0, 0), (columns - m.shape[1], 0)]) for m in masks]
        made: mx.array = mx.stack(padded)[:, None]
        self._made[window_size] = made
        return made

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Pair:
        length = keys.shape[2]
        columns = [c.columns for c in self.caches]
        fetched = []
        for i, (cache, n) in enumerate(zip(self.caches, self._take(length), strict=True)):
            k, v = cache.update_and_fetch(keys[i : i + 1, :, :n], values[i : i + 1, :, :n])
            pad = [(0, 0), (0, 0), (max(columns) - columns[i], length - n), (0, 0)]
            fetched.append((mx.pad(k, pad), mx.pad(v, pad)))
        return mx.concatenate([k for k, _ in fetched]), mx.concatenate([v for _, v in fetched])

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scores: Scores,
    ) -> mx.array:
        """As `CompressedKVCache.attend`, with the mask of this cache; padding gives zeros."""
        length, mask = queries.shape[2], scores.mask
        assert mask is not None
        window = next((w for w, made in self._made.items() if made is mask), -1)
        if window != -1 and self._together(length):
            window = _least(window, self._caches[0].window)
            near = Scores(scores.scale, None, True, window, scores.softcap, scores.sinks)
            return self._attend(queries, keys, values, near)
        outputs = []
        for i, (cache, n) in enumerate(zip(self.caches, self._take(length), strict=True)):
            if not n:
                shape = (1, queries.shape[1], length, values.shape[3])
                outputs.append(mx.zeros(shape, queries.dtype))
                continue
            stop = mask.shape[3] - length + n
            own = mask[i : i + 1, :, :n, stop - n - cache.columns : stop]
            q, k, v = (x[i : i + 1, :, :n] for x in (queries, keys, values))
            made = cache.attend(q, k, v, replace(scores, mask=own))
            outputs.append(mx.pad(made, [(0, 0), (0, 0), (0, length - n), (0, 0)]))
        return mx.concatenate(outputs)

    def _together(self, length: int) -> bool:
        """Whether one dispatch can do it: a few tokens of each, of caches that are alike."""
        first = self._caches[0]
        return (
            length <= MAX_QUERIES
            and self._left is None
            and 1 < len(self._caches) <= MAX_PLACES
            and first.scheme is not None
            and all(
                c.scheme == first.scheme
                and (c.keep, c.window) == (first.keep, first.window)
                and c.offset >= c.keep
                and not (c.keep and c._unseen)  # the kernel's window would drop the sink
                and c._due(length) <= c._tail_length
                for c in self._caches
            )
        )

    def _attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scores: Scores,
    ) -> mx.array:
        length, scheme = queries.shape[2], self._caches[0].scheme
        if any(c._due(length) > 0 for c in self._caches):
            for i, cache in enumerate(self.caches):
                cache._prepare(keys[i : i + 1], values[i : i + 1])
        sink, tail = self._plain or self._side_by_side(keys)
        held = [c._tail_length for c in self._caches]
        output, plain = compressed_sdpa(
            queries,
            scheme,
            [c.rows for c in self._caches],
            [c._sealed for c in self._caches],
            tail,
            held,
            scores=scores,
            sink=sink,
            sink_length=[c.keep for c in self._caches],
            fresh=(keys.astype(scheme.dtype), values.astype(scheme.dtype)),
        )
        at = mx.array([[n + i for i in range(length)] for n in held])[:, None, :, None]
        at = mx.broadcast_to(at, plain.shape)
        self._plain = sink, mx.put_along_axis(tail, at, plain, axis=2)
        for cache in self._caches:
            cache.offset += length
        return output

    def _side_by_side(self, keys: mx.array) -> tuple[mx.array | None, mx.array]:
        """Sinks and tails of all sequences as one array each; the caches have none then."""
        scheme, heads = self._caches[0].scheme, keys.shape[1]
        shape = (1, heads, CompressedKVCache.CAPACITY, scheme.k.dim + scheme.v.dim)
        empty = mx.zeros(shape, scheme.dtype)
        tails = [empty if c.tail is None else c.tail for c in self._caches]
        sinks = [c.sink for c in self._caches if c.sink is not None]
        for cache in self._caches:
            cache.sink = cache.tail = None
        return mx.concatenate(sinks) if sinks else None, mx.concatenate(tails)

    def _take(self, length: int) -> list[int]:
        """How many of the next ``length`` tokens of each sequence are no padding."""
        if self._left is None:
            return [length] * len(self._caches)
        taken = [min(length, left) for left in self._left]
        self._left = [left - n for left, n in zip(self._left, taken, strict=True)]
        return taken

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
        return all(c.is_trimmable() for c in self._caches)

    def trim(self, n: int) -> int:
        n = min(n, *(c.offset for c in self._caches))
        return min(c.trim(n) for c in self._caches)

    def size(self) -> int:
        return max(c.size() for c in self._caches)

    def empty(self) -> bool:
        return all(c.empty() for c in self._caches)

    @property
    def nbytes(self) -> int:
        plain = (x.nbytes for x in self._plain or () if x is not None)
        return sum(c.nbytes for c in self._caches) + sum(plain)


def _least(*windows: int | None) -> int | None:
    return min((w for w in windows if w is not None), default=None)


# mlx-lm finds the class of a cache by its name there.
mlx_lm_cache.BatchCompressedKVCache = BatchCompressedKVCache
