"""Linear and embedding layers whose weights stay at their file's bytes: `QuantizedWeight`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..kernels.matmul.dequantize import dequantize
from ..kernels.matmul.product import Epilogue
from ..kernels.matmul.quantized_matmul import quantized_matmul
from ..kernels.weight import QuantizedWeight, type_name
from .adapters import lora_linear


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer's rows lie: they are parts ``first`` and following of ``whole``."""

    whole: QuantizedWeight
    first: int = 0


class _Holder(nn.Module):
    """Holds the streams of a weight.

    They are in the module's tree, where MLX-LM adds up what a model takes, but they are not
    parameters: `set_dtype` would convert the scales, and no optimiser can change them. In
    training mode layers multiply by MLX's own operations, which have gradients.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.weight = weight
        self._streams = [dict(segment.arrays) for segment in weight.segments]
        self.eval()

    def _extra_repr(self) -> str:
        formats = dict.fromkeys(segment.name for segment in self.weight.segments)
        return f"{self.weight.columns} -> {self.weight.rows}, {' and '.join(formats)}"


class QuantizedLinear(_Holder):
    """``x @ weight.T + bias``, for float16, bfloat16 and float32 activations.

    Args:
        weight: ``[N, K]``; its parts are N rows in all, one after the other.
        bias: ``[N]``.
        place: the weight that these rows are a view of, by default ``weight``.
    """

    def __init__(
        self, weight: QuantizedWeight, bias: mx.array | None = None, place: Place | None = None
    ) -> None:
        super().__init__(weight)
        self.place = place or Place(weight)
        if bias is not None:
            self.bias = bias

    def __call__(self, x: mx.array) -> mx.array:
        """x ``[..., K]`` -> ``[..., N]``."""
        end = Epilogue(self.get("bias"))
        (y,) = quantized_matmul(x, self.weight, end, differentiable=self.training)
        return y

    def to_lora(self, **options: Any) -> Any:
        """The layer with a low-rank adapter, for mlx-lm's ``linear_to_lora_layers``."""
        return lora_linear(self, (self.weight.rows, self.weight.columns), **options)


class QuantizedEmbedding(_Holder):
    """Rows are decoded when they are looked up; ``as_linear`` multiplies by the same bytes.

    Args:
        weight: ``[vocabulary, K]``, of one part.
        dtype: of the rows that a look-up gives.
    """

    def __init__(self, weight: QuantizedWeight, dtype: mx.Dtype) -> None:
        super().__init__(weight)
        self._dtype = type_name(dtype)  # an mx.Dtype cannot be copied or pickled

    def __call__(self, ids: mx.array) -> mx.array:
        """ids, integers of any shape -> ``[*ids.shape, K]``."""
        (segment,) = self.weight.segments
        return dequantize(segment, ids, getattr(mx, self._dtype))

    def as_linear(self, x: mx.array) -> mx.array:
        """x ``[..., K]`` -> ``[..., vocabulary]``: a tied output head."""
        (y,) = quantized_matmul(x, self.weight, differentiable=self.training)
        return y
