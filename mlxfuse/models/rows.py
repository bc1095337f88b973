"""Rows of a file's tensor, in the order in which a model wants them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..gguf.blocks import dequantize

if TYPE_CHECKING:
    from ..formats import Format
    from ..gguf.reader import GGUFFile, Tensor


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
    """

    tensor: Tensor
    start: int
    stop: int
    swap: tuple[int, ...] = ()
    factor: Tensor | None = None

    @property
    def format(self) -> Format:
        return self.tensor.format

    @property
    def count(self) -> int:
        """Rows, of each expert if there are any."""
        return self.stop - self.start

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.tensor.shape[:-2], self.count, *self.tensor.shape[1:][-1:])

    @property
    def experts(self) -> int:
        """Matrices one after the other in the tensor: 1, or as many as it has experts."""
        return self.tensor.shape[0] if len(self.tensor.shape) == 3 else 1

    @property
    def nbytes(self) -> int:
        """Bytes in the file of a matrix's rows."""
        return self.experts * self.count * self.tensor.row_bytes

    def factors(self, file: GGUFFile) -> NDArray[np.float32] | None:
        """What each row is multiplied by, float32 ``[experts * rows, 1]``, or None for 1."""
        if self.factor is None:
            return None
        values = dequantize(file.read(self.factor), self.factor.format, (self.experts, 1))
        return np.repeat(values, self.count, axis=0)

    def spans(self) -> list[slice]:
        """Where the rows are among all of the tensor's, one slice for each expert."""
        height = self.tensor.rows // self.experts
        return [
            slice(expert * height + self.start, expert * height + self.stop)
            for expert in range(self.experts)
        ]

    def order(self) -> NDArray[np.intp] | None:
        """Index of the file's row for each row of the model, or None if they are the same."""
        if not self.swap:
            return None
        rows = np.arange(self.count)
        last = rows[self.count - math.prod(self.swap) :]
        last[:] = last.reshape(self.swap).swapaxes(1, 2).ravel()
        return rows

    def bytes(self, file: GGUFFile, *, mapped: bool) -> NDArray[np.uint8]:
        """The rows in the file's order, uint8 [rows, bytes a row], expert after expert.

        A view if ``mapped``, but for a part of every expert.
        """
        tensor = self.tensor
        if len(tensor.shape) == 1 or mapped:
            data = file.view(tensor) if mapped else file.read(tensor)
            rows = data.reshape(*(tensor.shape[:-1] or tensor.shape), -1)
            return rows[..., self.start : self.stop, :].reshape(-1, rows.shape[-1])
        whole = self.count == tensor.shape[-2]
        read = [file.read(tensor, span) for span in ([slice(None)] if whole else self.spans())]
        return (read[0] if len(read) == 1 else np.concatenate(read)).reshape(-1, tensor.row_bytes)
