"""The compressed caches of a batch of sequences."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from .cache import CompressedKVCache, Pair


class BatchCompressedKVCache(mlx_lm_cache._BaseCache):
    """Compressed caches of the sequences of a batch, each of its own length.

    A sequence keeps its own cache, so a batch gives bit for bit what its sequences give one by
    one, to join or to leave it moves no token, and padding is never stored. The price is an
    attention for each sequence; one for all would need their rows in one array, which is copied
    whenever one of them joins, leaves or needs more room.
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
            raise ValueError("compressed caches expect prompts padded on the right, not the left")
        if lengths is not None and right_padding is not None and any(right_padding):
            self._left = list(lengths)

    def finalize(self) -> None:
        self._left = None

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """bool [B, 1, N, columns]: the sequences' own masks, their columns aligned at the end."""
        masks = [c.mask_array(N, _least(window_size, c.window)) for c in self.caches]
        columns = max(m.shape[1] for m in masks)
        return mx.stack([mx.pad(m, [(0, 0), (columns - m.shape[1], 0)]) for m in masks])[:, None]

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
        *,
        scale: float,
        mask: mx.array,
        sinks: mx.array | None = None,
        softcap: float | None = None,
    ) -> mx.array:
        """As `CompressedKVCache.attend`, with the mask of this cache; padding gives zeros."""
        length = queries.shape[2]
        outputs = []
        for i, (cache, n) in enumerate(zip(self.caches, self._take(length), strict=True)):
            if not n:
                shape = (1, queries.shape[1], length, values.shape[3])
                outputs.append(mx.zeros(shape, queries.dtype))
                continue
            stop = mask.shape[3] - length + n
            own = mask[i : i + 1, :, :n, stop - n - cache.columns : stop]
            q, k, v = (x[i : i + 1, :, :n] for x in (queries, keys, values))
            made = cache.attend(q, k, v, scale=scale, mask=own, sinks=sinks, softcap=softcap)
            outputs.append(mx.pad(made, [(0, 0), (0, 0), (0, length - n), (0, 0)]))
        return mx.concatenate(outputs)

    def _take(self, length: int) -> list[int]:
        """How many of the next ``length`` tokens of each sequence are no padding."""
        if self._left is None:
            return [length] * len(self.caches)
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
        return all(c.is_trimmable() for c in self.caches)

    def trim(self, n: int) -> int:
        n = min(n, *(c.offset for c in self.caches))
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


# mlx-lm finds the class of a cache by its name there.
mlx_lm_cache.BatchCompressedKVCache = BatchCompressedKVCache
