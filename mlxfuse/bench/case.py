"""What a table of calls is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

Calls = Sequence[Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one size.

    name     the format and the size.
    against  MLX's own operations that are beside it, and the format of their weights.
    ours     calls of the public function, with the same sizes on different arrays.
    mlx      calls of MLX's operations, likewise.
    """

    name: str
    against: str
    ours: Calls
    mlx: Calls


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the table is made for.

    matrices  rows and columns of weights.
    experts   their number, how many are chosen, rows and columns of each.
    heads     of queries, of keys, and their elements.
    tokens    in a key-value cache.
    rows      of activations.
    cold      bytes of arrays that are read before one is read again.
    """

    matrices: tuple[tuple[int, int], ...] = ((4096, 4096), (14336, 4096))
    experts: tuple[int, int, int, int] = (64, 8, 768, 2048)
    heads: tuple[int, int, int] = (32, 8, 128)
    tokens: tuple[int, ...] = (4096, 32768)
    rows: tuple[int, ...] = (1, 4, 512)
    cold: int = 256 << 20  # more than any cache of a Mac's chip holds

    def copies(self, nbytes: int) -> int:
        """Arrays of so many bytes that are more than ``cold``."""
        return max(1, min(64, math.ceil(self.cold / nbytes)))


SMALL = Sizes(((16, 512),), (4, 2, 16, 512), (4, 2, 64), (64,), (1, 4), 0)
"""For self-tests."""


def normal(*shape: int) -> mx.array:
    """Random float16, the same for a shape of so many values."""
    return mx.random.normal(shape, mx.float16, key=mx.random.key(math.prod(shape)))


def plural(count: int, what: str) -> str:
    """So many of them."""
    return f"{count} {what}{'s' * (count > 1)}"
