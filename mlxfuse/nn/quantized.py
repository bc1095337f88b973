"""Linear and embedding layers whose weights stay at their file's bytes: `QuantizedWeight`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..kernels.dequantize import dequantize
from ..kernels.quantized_matmul import quantized_matmul
from ..kernels.weight import Part, QuantizedWeight
from .linear import join_biases


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

    def __call__(
        self, x: mx.array, *, residual: mx.array | None = None, activation: str | None = None
    ) -> mx.array:
        """x ``[..., K]`` -> ``[..., N]``; see `quantized_matmul` for the epilogues."""
        (y,) = quantized_matmul(
            x,
            self.weight,
            bias=self.get("bias"),
            residual=residual,
            activation=activation,
            differentiable=self.training,
        )
        return y


class FusedQuantizedLinear(QuantizedLinear):
    """Several linears of the same input in one dispatch; no weight is copied."""

    @classmethod
    def join(cls, linears: Sequence[QuantizedLinear]) -> FusedQuantizedLinear:
        """The rows of ``linears`` one after the other.

        Where they are the views of one whole weight, it is that weight: its formats' rows are
        together. Missing biases are zeros.
        """
        whole = linears[0].place.whole
        at, together = 0, True
        for linear in linears:
            together &= linear.place.whole is whole and linear.place.first == at
            at += len(linear.weight.parts)
        if not together or at != len(whole.parts):
            whole = QuantizedWeight(tuple(p for linear in linears for p in linear.weight.parts))
        return cls(whole, join_biases(linears, [linear.weight.rows for linear in linears]))

    @classmethod
    def cut(cls, linear: QuantizedLinear, rows: Sequence[int]) -> FusedQuantizedLinear | None:
        """One linear as several of so many ``rows``; None if their ends are inside a format's."""
        parts, left = [], list(linear.weight.parts)
        for count in rows:
            if not left or left[0].rows < count:
                return None
            part = left.pop(0)
            parts.append(Part(part.segment, part.first, count))
            if part.rows > count:
                left.insert(0, Part(part.segment, part.first + count, part.rows - count))
        return None if left else cls(QuantizedWeight(tuple(parts)), linear.get("bias"))

    @property
    def formats(self) -> tuple[str, ...]:
        """The format of each part."""
        return tuple(part.segment.name for part in self.weight.parts)

    def split(self, x: mx.array) -> tuple[mx.array, ...]:
        """One contiguous result for each part, all by one dispatch."""
        return quantized_matmul(
            x, self.weight, bias=self.get("bias"), split=True, differentiable=self.training
        )

    def gated(self, x: mx.array, activation: str) -> mx.array:
        """``act(gate) * up``, in the same dispatch."""
        return self(x, activation=activation)


class QuantizedEmbedding(_Holder):
    """Rows are decoded when they are looked up; ``as_linear`` multiplies by the same bytes.

    Args:
        weight: ``[vocabulary, K]``, of one part.
        dtype: of the rows that a look-up gives.
    """

    def __init__(self, weight: QuantizedWeight, dtype: mx.Dtype) -> None:
        super().__init__(weight)
        self._dtype = dtype

    def __call__(self, ids: mx.array) -> mx.array:
        """ids, integers of any shape -> ``[*ids.shape, K]``."""
        (segment,) = self.weight.segments
        return dequantize(segment, ids, self._dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """x ``[..., K]`` -> ``[..., vocabulary]``: a tied output head."""
        (y,) = quantized_matmul(x, self.weight, differentiable=self.training)
        return y
