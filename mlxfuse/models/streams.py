"""Rows of a GGUF file -> `QuantizedWeight`: read, put in order, split into streams, in threads."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import numpy as np

from ..errors import ExportError
from ..gguf.exported import ExportedFile, stream_name
from ..gguf.relayout import stream_shapes
from ..kernels.weight import FACTORS, Part, QuantizedWeight, Segment
from .plan import fill, first_rows

if TYPE_CHECKING:
    from pathlib import Path

    from ..formats import Format
    from ..gguf.reader import GGUFFile
    from .plan import Group
    from .rows import RowSource

Streams = dict[str, mx.array]

POOL = ThreadPoolExecutor(os.cpu_count())
"""For the rows of a file; it starts a thread when there is work for one."""


@dataclass
class Account:
    """What loading cost.

    seconds      wall-clock time of each step.
    dequantized  type without a kernel -> [weights, bytes in the file, bytes in memory].
    progress     called with the share of the weights that are in their places.
    """

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    dequantized: dict[str, list[int]] = field(default_factory=dict)
    progress: Callable[[float], None] | None = None

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
        self._loaded: dict[Path, dict[str, mx.array]] = {}

    def weight(self, group: Group) -> QuantizedWeight:
        """One part for each of the group's sources; those of one format share a segment.

        Raises:
            GGUFError: the file has become shorter.
            ExportError: an exported folder's file cannot be read.
        """
        sources = group.sources
        columns = sources[0].shape[-1]
        first, rows = first_rows(sources)
        part = any(s.kept or s.columns or s.matrices for s in sources)
        if isinstance(self.file, ExportedFile) and not part:
            streams = self._stored(self.file, group.key, list(rows))
        else:
            streams = self._relaid(sources, first, rows, columns)
        lead = sources[0].shape[:-2]  # experts
        for source, start in zip(sources, first, strict=True):
            _note_factors(streams[source.format], source, self.file, start, rows[source.format])
        segments = {
            f: Segment(
                f, columns, {n: a.reshape(*lead, rows[f], a.shape[-1]) for n, a in arrays.items()}
            )
            for f, arrays in streams.items()
        }
        return QuantizedWeight(
            tuple(
                Part(segments[source.format], start, source.count)
                for source, start in zip(sources, first, strict=True)
            )
        )

    def _stored(
        self, file: ExportedFile, key: str, formats: Sequence[Format]
    ) -> dict[Format, Streams]:
        """The streams as an exported folder has them, read once and straight into place."""
        found = {}
        with self._account.time("read"):
            for format in formats:
                arrays = {}
                for stream in format.streams:
                    name = stream_name(key, format, stream.name)
                    path = file.path_of(name)
                    if path not in self._loaded:
                        self._loaded[path] = cast("dict[str, mx.array]", mx.load(str(path)))
                    arrays[stream.name] = self._loaded[path].pop(name)
                try:
                    mx.eval(arrays)
                except RuntimeError as error:  # it has become shorter since it was opened
                    raise ExportError(f"{path}: cannot be read: {error}") from error
                found[format] = arrays
        return found

    def _relaid(
        self, sources: Sequence[RowSource], first: list[int], rows: dict[Format, int], columns: int
    ) -> dict[Format, Streams]:
        """The streams made out of the file's blocks."""
        experts = sources[0].experts
        with self._account.time("read"):
            read = list(POOL.map(lambda s: s.bytes(self.file, mapped=False), sources))
        with self._account.time("relayout"):
            made = {f: allocate(f, n * experts, columns) for f, n in rows.items()}
            # MLX arrays can be written through numpy: the streams are filled where they will stay.
            filled = {
                f: {name: np.asarray(array) for name, array in arrays.items()}
                for f, arrays in made.items()
            }
            for source, start in zip(sources, first, strict=True):
                fill(source, read.pop(0), filled[source.format], start, POOL)
        return made


def _note_factors(
    arrays: Streams, source: RowSource, file: GGUFFile, start: int, rows: int
) -> None:
    """Put the factor of a source's rows into that of the format's, where there is one."""
    factors = source.factors(file)
    if factors is not None:
        if FACTORS not in arrays:
            arrays[FACTORS] = mx.ones((source.experts * rows, 1))
        whole = np.asarray(arrays[FACTORS]).reshape(source.experts, rows, 1)
        whole[:, start : start + source.count] = factors.reshape(source.experts, -1, 1)


def allocate(format: Format, rows: int, columns: int) -> dict[str, mx.array]:
    """The streams of so many rows, zeros; they can be written through ``numpy.asarray``."""
    shapes = stream_shapes(format, rows, columns)
    arrays = {s.name: mx.zeros(shapes[s.name], getattr(mx, s.dtype)) for s in format.streams}
    mx.eval(arrays)
    return arrays


def part_of(whole: QuantizedWeight, index: int) -> QuantizedWeight:
    """Part ``index`` alone, its arrays views of the rows.

    Of experts the whole arrays: rows of each would not be contiguous, and MLX would copy them.
    """
    part = whole.parts[index]
    if whole.experts is not None:
        return whole.split()[index]
    segment = part.segment.take(slice(part.first, part.first + part.rows))
    mx.eval(dict(segment.arrays))
    return QuantizedWeight.whole(segment)
