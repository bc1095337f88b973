"""Rows of a GGUF file -> `QuantizedWeight`: read, put in order, split into streams, in threads."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import numpy as np

from ..errors import ExportError
from ..gguf.exported import ExportedFile, stream_name
from ..gguf.relayout import Bytes, stream_shapes
from ..kernels.weight import FACTORS, Part, QuantizedWeight, Segment
from .mapped import MappedFiles
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

_READERS = ThreadPoolExecutor(2)


@dataclass
class Account:
    """What loading cost.

    seconds      wall-clock time of each step.
    dequantized  type without a kernel -> [weights, bytes in the file, bytes in memory].
    ways         ``mapped``, ``read`` or ``relaid`` -> bytes of weights in streams: over the pages
                 of an exported folder's files, read from them, or made out of a file's blocks.
    progress     called with the share of the weights that are in their places.
    """

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    dequantized: dict[str, list[int]] = field(default_factory=dict)
    ways: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    progress: Callable[[float], None] | None = None

    @contextmanager
    def time(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] += time.perf_counter() - start


class StreamLoader:
    """Reads weights into streams; it must be closed before its file is.

    Beside the streams, host memory holds one weight's bytes, and those of the next.
    """

    def __init__(self, file: GGUFFile, account: Account) -> None:
        self.file = file
        self.mapped = MappedFiles()
        self._account = account
        self._loaded: dict[Path, dict[str, mx.array]] = {}
        self._ahead: tuple[Group | None, list[Future[Bytes]]] = (None, [])

    def close(self) -> None:
        """Wait for what is being read."""
        for future in self._ahead[1]:
            future.cancel()
        wait(self._ahead[1])

    def weight(self, group: Group, after: Group | None = None) -> QuantizedWeight:
        """One part for each of the group's sources; those of one format share a segment.

        Args:
            after: the group whose bytes are read while this one's are put in order.

        Raises:
            GGUFError: the file has become shorter.
            ExportError: an exported folder's file cannot be read.
        """
        sources = group.sources
        columns, experts = sources[0].shape[-1], sources[0].experts
        first, rows = first_rows(sources)
        if self._in_streams(group):
            shapes = {f: stream_shapes(f, n * experts, columns) for f, n in rows.items()}
            streams = self._stored(cast("ExportedFile", self.file), group.key, shapes)
        else:
            streams = self._relaid(group, after, first, rows)
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

    def _in_streams(self, group: Group) -> bool:
        """Whether the file has all of the group's rows in the order of the streams."""
        part = any(s.kept or s.columns or s.matrices for s in group.sources)
        return isinstance(self.file, ExportedFile) and not part

    def _stored(
        self, file: ExportedFile, key: str, shapes: dict[Format, dict[str, tuple[int, int]]]
    ) -> dict[Format, Streams]:
        """The streams as an exported folder has them: mapped, or read straight into place."""
        found: dict[Format, Streams] = {}
        with self._account.time("read"):
            for format in shapes:
                found[format] = {}
                for stream in format.streams:
                    name = stream_name(key, format, stream.name)
                    path, start = file.place(name)
                    dtype = getattr(mx, stream.dtype)
                    array = self.mapped.array(path, start, dtype, shapes[format][stream.name])
                    way = "mapped"
                    if array is None:
                        way, array = "read", self._read(path, name)
                    self._account.ways[way] += array.nbytes
                    found[format][stream.name] = array
                try:
                    mx.eval(found[format])
                except RuntimeError as error:  # it has become shorter since it was opened
                    raise ExportError(f"{path}: cannot be read: {error}") from error
        return found

    def _read(self, path: Path, name: str) -> mx.array:
        """An array that MLX will read into memory of its own."""
        if path not in self._loaded:
            self._loaded[path] = cast("dict[str, mx.array]", mx.load(str(path)))
        return self._loaded[path].pop(name)

    def _bytes(self, group: Group) -> list[Future[Bytes]]:
        """Begin to read a group's rows."""
        return [_READERS.submit(s.bytes, self.file, mapped=False) for s in group.sources]

    def _relaid(
        self, group: Group, after: Group | None, first: list[int], rows: dict[Format, int]
    ) -> dict[Format, Streams]:
        """The streams made out of the file's blocks."""
        sources = group.sources
        columns, experts = sources[0].shape[-1], sources[0].experts
        with self._account.time("read"):
            if self._ahead[0] is not group:
                self.close()
                self._ahead = group, self._bytes(group)
            read = [future.result() for future in self._ahead[1]]
        more = after is not None and not self._in_streams(after)
        self._ahead = (after, self._bytes(after)) if after is not None and more else (None, [])
        with self._account.time("relayout"):
            made = {f: allocate(f, n * experts, columns) for f, n in rows.items()}
            # MLX arrays can be written through numpy: the streams are filled where they will stay.
            filled = {
                f: {name: np.asarray(array) for name, array in arrays.items()}
                for f, arrays in made.items()
            }
            for source, start in zip(sources, first, strict=True):
                fill(source, read.pop(0), filled[source.format], start, POOL)
        self._account.ways["relaid"] += sum(
            a.nbytes for arrays in made.values() for a in arrays.values()
        )
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
