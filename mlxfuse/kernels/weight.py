"""A weight whose rows stay at their file's own bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from ..formats import Format

STREAMS = ("codes", "high", "scales", "supers")

_DTYPES: dict[str, mx.Dtype] = {
    "uint8": mx.uint8,
    "uint32": mx.uint32,
    "float16": mx.float16,
}


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of one format: the streams of `mlxfuse.formats` as MLX arrays.

    format   a format with streams.
    columns  weights of a row, K.
    arrays   stream name -> array ``[rows, n]``, or ``[experts, rows, n]``.
    """

    format: Format
    columns: int
    arrays: Mapping[str, mx.array] = field(compare=False)

    def __post_init__(self) -> None:
        fmt = self.format
        if not fmt.streams or self.columns % fmt.block_size:
            raise ValueError(f"no streams of {fmt.name} with {self.columns} columns")
        blocks = self.columns // fmt.block_size
        lead = self.arrays["codes"].shape[:-1]
        for stream in fmt.streams:
            dtype = _DTYPES[stream.dtype]
            shape = (*lead, blocks * stream.nbytes // dtype.size)
            array = self.arrays[stream.name]
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"stream {stream.name} of {fmt.name}: expected {dtype} of shape {shape}, "
                    f"found {array.dtype} of shape {array.shape}"
                )

    @property
    def rows(self) -> int:
        return self.arrays["codes"].shape[-2]

    @property
    def experts(self) -> int | None:
        codes = self.arrays["codes"]
        return codes.shape[0] if codes.ndim == 3 else None

    @property
    def nbytes(self) -> int:
        return sum(self.arrays[s.name].nbytes for s in self.format.streams)
