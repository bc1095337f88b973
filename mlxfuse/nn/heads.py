"""A matrix for each head, which mlx-lm's latent attention (MLA) multiplies by."""

from __future__ import annotations

import mlx.core as mx

from ..kernels import unavailable
from ..kernels.matmul.dequantize import dequantize
from ..kernels.matmul.product import Experts
from ..kernels.matmul.quantized_matmul import quantized_matmul
from ..kernels.weight import QuantizedWeight
from .quantized import _Holder


class QuantizedMultiLinear(_Holder):
    """In the place of mlx-lm's ``MultiLinear``; the matrices stay at their file's bytes.

    A decoded token multiplies each head's row by its matrix where it lies. A prompt multiplies
    by matrices that are dequantised for the call, as it does so with many rows, and in half of the
    products by the matrices as they are, whose rows are then what is added up.

    Args:
        weight: ``[heads, N, K]`` of one part.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__(weight)
        (part,) = weight.parts
        self._segment = part.segment

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        """x ``[B, heads or 1, L, K]`` -> ``[B, heads, L, N]``.

        Args:
            transpose: False multiplies by the matrices as they are: x ``[..., N]`` -> ``[..., K]``.
        """
        heads = self.weight.experts
        assert heads is not None
        rows = transpose and x.shape[1:3] == (heads, 1)
        if rows and unavailable() is None and not self.training:
            indices = mx.broadcast_to(mx.arange(heads), x.shape[:2])
            (y,) = quantized_matmul(x, self.weight, experts=Experts(indices))
            return y[..., None, :]
        whole = dequantize(self._segment, dtype=x.dtype)
        return x @ (whole.swapaxes(-1, -2) if transpose else whole)
