"""Arrays over the pages of a mapped file, where MLX takes memory that others own."""

from __future__ import annotations

import math
import mmap
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

ALIGNMENT = 16
"""Bytes: kernels load as many at a time, so an array begins at a multiple of them."""

_PAGE = mmap.PAGESIZE
_MOST = 1 << 31  # elements along an axis of an MLX array


@cache
def shares() -> bool:
    """Whether MLX can use memory without a copy; tried on a page that is written afterwards."""
    page = np.frombuffer(mmap.mmap(-1, _PAGE), np.uint32)
    try:
        found = mx.from_dlpack(page, copy=False)
    except (TypeError, ValueError, RuntimeError):
        return False
    page[0] = 7
    return bool(found[0].item() == 7)


class MappedFiles:
    """Files of arrays, mapped read-only when the first of their arrays is asked for.

    The pages live as long as an array over them: MLX holds the map with each. A model keeps this
    object as well, so that no array is ever the last one over its pages: MLX could otherwise
    store an operation's result in them.
    """

    def __init__(self) -> None:
        self._words: dict[Path, mx.array | None] = {}

    def array(
        self, path: Path, start: int, dtype: mx.Dtype, shape: tuple[int, int]
    ) -> mx.array | None:
        """Rows that lie in a file from byte ``start`` on, or None where they must be read.

        They must where MLX copies, where they are not aligned, and in the last page of a file,
        which is not a whole one.
        """
        nbytes = math.prod(shape) * dtype.size
        if start % ALIGNMENT or not nbytes or nbytes // shape[0] % 4:
            return None
        if path not in self._words:
            self._words[path] = _words(path)
        words = self._words[path]
        if words is None or start + nbytes > 4 * words.size:
            return None
        rows = words[start // 4 : (start + nbytes) // 4].reshape(shape[0], -1)
        return rows.view(dtype)


def _words(path: Path) -> mx.array | None:
    """The whole pages of a file, uint32 ``[n]``; None where they cannot be had without a copy."""
    if not shares():
        return None
    try:
        count = path.stat().st_size // _PAGE * _PAGE // 4
        if not 0 < count < _MOST:
            return None
        return mx.from_dlpack(np.memmap(path, np.uint32, "r", shape=(count,)), copy=False)
    except (OSError, ValueError, RuntimeError):  # larger than one buffer of this GPU may be
        return None
