"""Matrices of experts, of which every row of activations uses its own.

Each class takes the place of mlx-lm's ``SwitchLinear`` in a ``SwitchGLU``: it is called with
``x`` ``[..., 1, K]``, a row for each expert id or one for every ``k`` of them, and with ids
``[..., k]``, which are in ascending order if ``sorted_indices``; it gives ``[..., k, 1, N]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import switch_layers
from numpy.typing import NDArray

from ..kernels import unavailable
from ..kernels.matmul.dequantize import dequantize
from ..kernels.matmul.quantized_matmul import quantized_matmul
from ..kernels.weight import QuantizedWeight
from .adapters import lora_switch_linear
from .linear import Rows, matmul
from .quantized import Place, _Holder


def _grouped(
    x: mx.array, ids: NDArray[np.integer], matrix: Callable[[int], mx.array], rows: int
) -> mx.array:
    """Ask for each chosen expert's matrix ``[N, K]`` once, and multiply all of its rows by it.

    Args:
        rows: N.
    """
    if not ids.size:
        return mx.zeros((*ids.shape, 1, rows), x.dtype)
    chosen, flat = ids.reshape(-1), x.reshape(-1, x.shape[-1])
    of_x = np.arange(chosen.size) // (chosen.size // flat.shape[0])
    order = np.argsort(chosen, kind="stable")
    experts, starts = np.unique(chosen[order], return_index=True)
    parts = [
        matmul(flat[mx.array(of_x[own])], matrix(int(expert)))
        for expert, own in zip(experts, np.split(order, starts[1:]), strict=True)
    ]
    return mx.concatenate(parts)[mx.array(np.argsort(order))].reshape(*ids.shape, 1, rows)


def _values(ids: mx.array) -> NDArray[np.integer] | None:
    """The ids, or None where nothing has a value yet: inside `mx.compile` or an export."""
    try:
        return np.asarray(ids)
    except ValueError:
        return None


def _biased(layer: nn.Module, y: mx.array, ids: mx.array) -> mx.array:
    return y + mx.expand_dims(layer.bias[ids], -2) if "bias" in layer else y


class SwitchLinear(switch_layers.SwitchLinear):
    """mlx-lm's, with dense matrices; on the CPU each chosen one is read once.

    Args:
        weight: ``[experts, N, K]``.
        bias: ``[experts, N]``.
    """

    def __init__(self, weight: mx.array, bias: mx.array | None = None) -> None:
        nn.Module.__init__(self)
        self.weight = weight
        if bias is not None:
            self.bias = bias

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        ids = _values(indices) if mx.default_device() == mx.cpu else None
        if ids is None:
            y: mx.array = super().__call__(x, indices, sorted_indices)
            return y
        return _biased(self, _grouped(x, ids, self.weight.__getitem__, self.output_dims), indices)


class StreamedSwitchLinear(nn.Module):
    """The chosen matrices are dequantised from the file's bytes at every call.

    Args:
        rows: float32 rows by range, expert after expert.
        shape: [experts, N].
        bias: ``[experts, N]``.
    """

    def __init__(self, rows: Rows, shape: tuple[int, ...], bias: mx.array | None = None) -> None:
        super().__init__()
        self._rows = rows
        self._shape = shape
        if bias is not None:
            self.bias = bias

    def _extra_repr(self) -> str:
        return f"experts={self._shape[0]}, output_dims={self._shape[1]}, streamed"

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        n = self._shape[1]

        def matrix(expert: int) -> mx.array:
            return mx.array(self._rows(expert * n, (expert + 1) * n)).astype(x.dtype)

        return _biased(self, _grouped(x, np.asarray(indices), matrix, n), indices)


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
        ids = _values(indices) if unavailable() is not None else None
        if ids is not None:
            y = _grouped(x.astype(mx.float32), ids, self._matrix, self.weight.rows).astype(x.dtype)
            return _biased(self, y, indices)
        (y,) = quantized_matmul(
            x,
            self.weight,
            bias=self.get("bias"),
            experts=indices,
            sorted_experts=sorted_indices,
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
