"""Rows of a file's tensor, in the order in which a model wants them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..gguf.blocks import dequantize

if TYPE_CHECKING:
    from ..formats import Format
    from ..gguf.reader import GGUFFile, Tensor

Ranges = tuple[tuple[int, int], ...]
"""``[first, last + 1)`` of consecutive things, one range after the other in ascending order."""

# Of rows of which only some columns are kept, so many bytes are read at a time.
_PIECE = 32 << 20


@dataclass(frozen=True, slots=True)
class RowSource:
    """Consecutive rows of one tensor, in the order in which the model wants them.

    start, stop  rows of the tensor, of a stack of experts' matrices of each; for a vector its
                 elements.
    swap         if not empty, the last rows are ``[a, b, c, d]`` and have to become
                 ``[a, c, b, d]``. Rows are whole blocks in every GGUF type, so the order is
                 changed on the file's bytes and is exact.
    factor       what the rows are multiplied by: a vector of one number, or of one for each
                 expert; None for 1.

    Where several machines share a model, each has a part:

    kept         which of the rows, counted in the model's order from ``start``; empty for all.
    columns      which columns of them, whole blocks; empty for all.
    matrices     which of the matrices of a stack; empty for all.
    """

    tensor: Tensor
    start: int
    stop: int
    swap: tuple[int, ...] = ()
    factor: Tensor | None = None
    kept: Ranges = ()
    columns: Ranges = ()
    matrices: Ranges = ()

    @property
    def format(self) -> Format:
        return self.tensor.format

    @property
    def count(self) -> int:
        """Rows, of each expert if there are any."""
        return length(self.kept) or self.stop - self.start

    @property
    def shape(self) -> tuple[int, ...]:
        lead, last = self.tensor.shape[:-2], self.tensor.shape[1:][-1:]
        lead = (self.experts,) if lead else lead
        return (*lead, self.count, *((length(self.columns),) if self.columns else last))

    @property
    def experts(self) -> int:
        """Matrices one after the other in the tensor: 1, or as many as it has experts."""
        stacked = self.tensor.shape[0] if len(self.tensor.shape) == 3 else 1
        return length(self.matrices) or stacked

    @property
    def row_bytes(self) -> int:
        """Bytes in the file of what is kept of a row."""
        return self.format.row_bytes(self.shape[-1] if len(self.shape) > 1 else 1)

    @property
    def nbytes(self) -> int:
        """Bytes in the file of what is kept."""
        return self.experts * self.count * self.row_bytes

    def factors(self, file: GGUFFile) -> NDArray[np.float32] | None:
        """What each row is multiplied by, float32 ``[experts * rows, 1]``, or None for 1."""
        if self.factor is None:
            return None
        stacked = self.tensor.shape[0] if len(self.tensor.shape) == 3 else 1
        values = dequantize(file.read(self.factor), self.factor.format, (stacked, 1))
        return np.repeat(values[list(indices(self.matrices or ((0, stacked),)))], self.count, 0)

    def spans(self) -> list[slice]:
        """Where the rows are among all of the tensor's: slices of consecutive ones, ascending."""
        stacked = self.tensor.shape[0] if len(self.tensor.shape) == 3 else 1
        height = self.tensor.rows // stacked
        runs = [(self.start, self.stop)]
        if self.kept:
            rows = np.sort(self._rows())
            ends = np.flatnonzero(np.diff(rows) > 1) + 1
            runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, ends)]
        return [
            slice(matrix * height + start, matrix * height + stop)
            for matrix in indices(self.matrices or ((0, stacked),))
            for start, stop in runs
        ]

    def _rows(self) -> NDArray[np.intp]:
        """The file's row, in its matrix, of each row that is kept, in the model's order."""
        rows = np.arange(self.start, self.stop)
        if self.swap:
            last = rows[len(rows) - math.prod(self.swap) :]
            last[:] = last.reshape(self.swap).swapaxes(1, 2).ravel()
        return np.concatenate([rows[a:b] for a, b in self.kept]) if self.kept else rows

    def order(self) -> NDArray[np.intp] | None:
        """Index among `bytes` of each row of the model, or None if they are in the same order."""
        if not self.swap:
            return None
        rows = self._rows()
        return np.searchsorted(np.sort(rows), rows)

    def bytes(self, file: GGUFFile, *, mapped: bool) -> NDArray[np.uint8]:
        """The rows in the file's order, uint8 [rows, bytes a row], expert after expert.

        A view if ``mapped``, but for a part of every expert and for a part of the columns.
        """
        tensor = self.tensor
        if len(tensor.shape) == 1:
            data = file.view(tensor) if mapped else file.read(tensor)
            return data.reshape(tensor.shape[0], -1)[np.sort(self._rows())]
        if self.columns:
            return self._columns(file)
        whole = self.count == tensor.shape[-2] and not self.matrices
        spans = [slice(None)] if whole else self.spans()
        if mapped:
            rows = file.view(tensor).reshape(tensor.rows, tensor.row_bytes)
            return rows[spans[0]] if len(spans) == 1 else np.concatenate([rows[s] for s in spans])
        read = [file.read(tensor, span) for span in spans]
        return (read[0] if len(read) == 1 else np.concatenate(read)).reshape(-1, tensor.row_bytes)

    def _columns(self, file: GGUFFile) -> NDArray[np.uint8]:
        """`bytes` of some columns: whole rows are read, a piece at a time."""
        tensor, block = self.tensor, self.format.block_size
        found = np.empty((self.experts * self.count, self.row_bytes), np.uint8)
        step, at = max(1, _PIECE // tensor.row_bytes), 0
        for span in self.spans():
            for start in range(span.start, span.stop, step):
                rows = slice(start, min(start + step, span.stop))
                data = file.read(tensor, rows).reshape(-1, tensor.row_bytes)
                out, left = found[at : at + len(data)], 0
                for first, end in self.columns:
                    a, b = (c // block * self.format.type_size for c in (first, end))
                    out[:, left : left + b - a] = data[:, a:b]
                    left += b - a
                at += len(data)
        return found


def length(ranges: Ranges) -> int:
    """How many things they hold."""
    return sum(end - first for first, end in ranges)


def indices(ranges: Ranges) -> Iterable[int]:
    """Each of them."""
    return (i for first, end in ranges for i in range(first, end))
