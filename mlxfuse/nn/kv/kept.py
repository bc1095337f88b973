"""Attention over caches as graphs that are kept: its checks and launches are made once.

What a step of a cache gives to the kernel differs from token to token in values alone, and from
layer to layer in arrays, so that all layers of a model share a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import mlx.core as mx

from ...kernels import backend
from ...kernels.kv.compressed_sdpa import Counts, Quantised, compressed_sdpa, quantized_sdpa
from ...kernels.kv.scheme import KVScheme
from ...kernels.kv.sdpa_call import Scores
from ...kernels.kv.source import constants
from ...kernels.runtime import self_test
from ..kept_graph import Piece


class _Step:
    """A function of arrays and what else it reads; one object for equal ones."""

    __slots__ = ("function", "settings")
    known: ClassVar[dict[tuple[Any, ...], _Step]] = {}

    def __init__(self, function: Callable[..., Any], settings: tuple[Any, ...]) -> None:
        self.function, self.settings = function, settings

    @classmethod
    def of(
        cls, function: Callable[..., Any], settings: tuple[Any, ...], arrays: Sequence[mx.array]
    ) -> _Step:
        """The kernel of a new one is tested."""
        step = cls.known.get((function, settings))
        if step is None:
            if backend().reason is None:
                self_test.check(self_test.calls(lambda: function(*settings, *arrays)))
            step = cls.known[function, settings] = cls(function, settings)
        return step


def _made(step: _Step, *arrays: mx.array) -> Any:
    return step.function(*step.settings, *arrays)


_GRAPHS = Piece(_made, ())


class Kept:
    """The graph of a cache's last step, which is most often the next one's too."""

    __slots__ = ("_step",)

    def __init__(self) -> None:
        self._step: _Step | None = None

    def __call__(
        self, function: Callable[..., Any], settings: tuple[Any, ...], *arrays: mx.array
    ) -> Any:
        """``function(*settings, *arrays)``; its kernel is tested before it is first used.

        Args:
            settings: all that the function reads besides the arrays, their lengths too.
        """
        scores: Scores = settings[0]
        if scores.mask is not None or scores.sinks is not None or not backend().keeps:
            return function(*settings, *arrays)
        step = self._step
        if step is None or step.settings != settings or step.function is not function:
            self._step = step = _Step.of(function, settings, arrays)
        return _GRAPHS(step, *arrays)


def kept_sdpa(
    kept: Kept,
    q: mx.array,
    scheme: KVScheme,
    rows: mx.array | None,
    length: int,
    tail: mx.array | None,
    tail_length: int,
    *,
    scores: Scores,
    sink: mx.array | None,
    sink_length: int,
    fresh: tuple[mx.array, mx.array],
) -> tuple[mx.array, mx.array]:
    """`compressed_sdpa` of one sequence's cache, or of several of the same length."""
    counts = constants((length, tail_length, sink_length, 0))
    held = [a for a in (rows, tail, sink) if a is not None]
    capacity = 0 if rows is None else rows.shape[2]
    there = rows is not None, tail is not None, sink is not None
    settings = scores, scheme, there, capacity
    output, plain = kept(_packed, settings, q, counts, *fresh, *held)
    return output, plain


def _packed(
    scores: Scores,
    scheme: KVScheme,
    there: tuple[bool, ...],
    capacity: int,
    q: mx.array,
    counts: mx.array,
    k: mx.array,
    v: mx.array,
    *held: mx.array,
) -> tuple[mx.array, ...]:
    rest = iter(held)
    rows, tail, sink = (next(rest) if here else None for here in there)
    used = Counts(counts)
    return compressed_sdpa(q, scheme, rows, used, tail, sink=sink, fresh=(k, v), scores=scores)


def kept_quantized_sdpa(
    kept: Kept,
    q: mx.array,
    keys: Quantised,
    values: Quantised,
    length: int,
    *,
    group_size: int,
    bits: int,
    scores: Scores,
) -> mx.array:
    """`quantized_sdpa` of one sequence's cache, or of several of the same length."""
    counts = constants((length, 0, 0, 0))
    settings = scores, group_size, bits, keys[0].shape[2]
    found: mx.array = kept(_codes, settings, q, counts, *keys, *values)
    return found


def _codes(
    scores: Scores,
    group_size: int,
    bits: int,
    capacity: int,
    q: mx.array,
    counts: mx.array,
    *held: mx.array,
) -> mx.array:
    codes, scales, biases, *more = held
    values = more[0], more[1], more[2]
    return quantized_sdpa(
        q,
        (codes, scales, biases),
        values,
        Counts(counts),
        group_size=group_size,
        bits=bits,
        scores=scores,
    )
