"""Activations as int8 codes: what the norm and quantise kernels write and the integer matmul reads.

Source of the format: ggml's Q8_1, with scales and sums in float32 and in arrays of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

GROUP = 32
"""Consecutive activations of one scale."""


@dataclass(frozen=True, slots=True)
class Int8Activations:
    """Rows of activations; ``codes * scales`` stands for the values.

    codes   int8 ``[..., K]``, from -127 to 127: ``round(x / scale)``, halves away from zero.
    scales  float32 ``[..., K / 32]``: ``max|x| / 127`` of each group, 0 for a group of zeros.
    sums    float32 ``[..., K / 32]``: the scale times the sum of the group's codes.
    dtype   of the values that were quantised, and of what a matmul returns.
    """

    codes: mx.array
    scales: mx.array
    sums: mx.array
    dtype: mx.Dtype

    def __post_init__(self) -> None:
        shape = self.codes.shape
        groups = (*shape[:-1], shape[-1] // GROUP) if shape and shape[-1] % GROUP == 0 else None
        for name, array, dtype, expected in (
            ("codes", self.codes, mx.int8, shape),
            ("scales", self.scales, mx.float32, groups),
            ("sums", self.sums, mx.float32, groups),
        ):
            if array.dtype != dtype or array.shape != expected:
                raise ValueError(
                    f"{name} of int8 activations: expected {dtype} of shape {expected}, "
                    f"found {array.dtype} of shape {array.shape}"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def size(self) -> int:
        return self.codes.size
