"""Matrices of experts, of which every row of activations uses its own.

Each class takes the place of mlx-lm's ``SwitchLinear`` in a ``SwitchGLU``: it is called with
``x`` ``[..., 1, K]``, a row for each expert id or one for every ``k`` of them, and with ids
``[..., k]``, which are in ascending order if ``sorted_indices``; it gives ``[..., k, 1, N]``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..kernels import unavailable
from ..kernels.matmul.dequantize import dequantize
from ..kernels.matmul.product import Epilogue, Experts
from ..kernels.matmul.quantized_matmul import quantized_matmul
from ..kernels.weight import QuantizedWeight
from .adapters import lora_switch_linear
from .cpu import biased, grouped, values_of
from .quantized import Place, _Holder


class QuantizedSwitchLinear(_Holder):
    """The matrices stay at their file's bytes, of which only the chosen experts' are read.

    In training mode they are dequantised: kernels have no gradient.

    Args:
        weight: ``[experts, N, K]`` of one part, which may be some rows of each expert.
        bias: ``[experts, N]``.
        place: the weight that the part is one of, by default ``weight``. That of a gate and an
            up projection gives both, or ``act(gate) * up``, in one dispatch.
    """

    def __init__(
        self, weight: QuantizedWeight, bias: mx.array | None = None, place: Place | None = None
    ) -> None:
        super().__init__(weight)
        (part,) = weight.parts
        self._part = part
        # Of a segment that another layer shares, what is counted is this layer's.
        own = slice(part.first, part.first + part.rows)
        self._streams = [{n: a[:, own] for n, a in part.segment.arrays.items()}]
        self.place = place or Place(weight)
        if bias is not None:
            self.bias = bias

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        ids = values_of(indices) if unavailable() is not None else None
        if ids is not None:
            y = grouped(x.astype(mx.float32), ids, self._matrix, self.weight.rows).astype(x.dtype)
            return biased(self, y, indices)
        (y,) = quantized_matmul(
            x,
            self.weight,
            Epilogue(self.get("bias")),
            Experts(indices, sorted=sorted_indices),
            differentiable=self.training,
        )
        return y[..., None, :]

    def to_lora(self, **options: Any) -> Any:
        """The layer with low-rank adapters, for mlx-lm's ``linear_to_lora_layers``."""
        experts = next(iter(self._streams[0].values())).shape[0]
        shape = (experts, self.weight.rows, self.weight.columns)
        return lora_switch_linear(self, shape, **options)

    def _matrix(self, expert: int) -> mx.array:
        """One expert's, float32 [N, K]."""
        (streams,) = self._streams
        arrays = {name: array[expert] for name, array in streams.items()}
        return dequantize(replace(self._part.segment, arrays=arrays))
