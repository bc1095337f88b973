"""Rows of a GGUF file -> `QuantizedWeight`: read, put in order, split into streams, in threads."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..gguf.relayout import relayout, stream_shapes
from ..kernels.weight import Part, QuantizedWeight, Segment

if TYPE_CHECKING:
    from ..formats import Format
    from ..gguf.reader import GGUFFile
    from .plan import RowSource

POOL = ThreadPoolExecutor(os.cpu_count())
"""For the rows of a file; it starts a thread when there is work for one."""


@dataclass
class Account:
    """What loading cost.

    seconds      wall-clock time of each step.
    dequantized  type without a kernel -> [weights, bytes in the file, bytes in memory].
    """

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    dequantized: dict[str, list[int]] = field(default_factory=dict)

    @contextmanager
    def time(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] += time.perf_counter() - start


class StreamLoader:
    """Reads weights into streams. Beside the streams, host memory holds one weight's bytes."""

    def __init__(self, file: GGUFFile, account: Account) -> None:
        self.file = file
        self._account = account

    def weight(self, sources: Sequence[RowSource]) -> QuantizedWeight:
        """One part for each of ``sources``; those of one format share a segment.

        Raises:
            GGUFError: the file has become shorter.
        """
        columns = sources[0].shape[1]
        rows: dict[Format, int] = {}
        first = []
        for source in sources:
            first.append(rows.get(source.format, 0))
            rows[source.format] = first[-1] + source.shape[0]
        with self._account.time("read"):
            read = list(POOL.map(lambda s: s.bytes(self.file, mapped=False), sources))
        with self._account.time("relayout"):
            segments = {f: Segment(f, columns, allocate(f, n, columns)) for f, n in rows.items()}
            # MLX arrays can be written through numpy: the streams are filled where they will stay.
            filled = {
                f: {name: np.asarray(array) for name, array in segment.arrays.items()}
                for f, segment in segments.items()
            }
            for source, start in zip(sources, first, strict=True):
                data, order = read.pop(0), source.order()
                span = slice(start, start + source.shape[0])
                relayout(
                    data if order is None else data[order],
                    source.format,
                    {name: array[span] for name, array in filled[source.format].items()},
                    POOL,
                )
        return QuantizedWeight(
            tuple(
                Part(segments[source.format], start, source.shape[0])
                for source, start in zip(sources, first, strict=True)
            )
        )


def allocate(format: Format, rows: int, columns: int) -> dict[str, mx.array]:
    """The streams of so many rows, zeros; they can be written through ``numpy.asarray``."""
    shapes = stream_shapes(format, rows, columns)
    arrays = {s.name: mx.zeros(shapes[s.name], getattr(mx, s.dtype)) for s in format.streams}
    mx.eval(arrays)
    return arrays


def part_of(whole: QuantizedWeight, index: int) -> QuantizedWeight:
    """Part ``index`` alone, its arrays views of the rows."""
    part = whole.parts[index]
    segment = part.segment.take(slice(part.first, part.first + part.rows))
    mx.eval(dict(segment.arrays))
    return QuantizedWeight.whole(segment)
