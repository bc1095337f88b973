"""Linear and embedding layers for weights that came from a GGUF file, on MLX's CPU back-end.

``Linear`` and ``Embedding`` hold a dense float matrix. ``StreamedLinear`` and
``StreamedEmbedding`` hold none: they dequantise the file's rows at every call, for
models whose dense form does not fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.activations import swiglu, swiglu_oai

from .. import blas
from ..kernels import backend
from ..kernels.weight import type_name
from .adapters import lora_linear

# Float rows [start, stop) of a matrix, as float32 [stop - start, columns].
Rows = Callable[[int, int], np.ndarray]

# Scratch for rows dequantised per call: large enough for BLAS, small beside any model.
_CHUNK_BYTES = 32 << 20


@mx.custom_function
def _numpy_matmul(x: mx.array, weight: mx.array) -> mx.array:
    # np.asarray shares MLX's memory; both arrays are evaluated by it.
    a = np.asarray(x)
    y = a.reshape(-1, a.shape[-1]) @ np.asarray(weight).T
    return mx.array(y.reshape(*a.shape[:-1], -1))


@_numpy_matmul.vjp
def _numpy_matmul_vjp(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    x, weight = primals
    flat = cotangent.reshape(-1, cotangent.shape[-1])
    return cotangent @ weight, flat.T @ x.reshape(-1, x.shape[-1])


def matmul(x: mx.array, weight: mx.array) -> mx.array:
    """``x @ weight.T`` by the fastest BLAS at hand.

    Args:
        x: [..., K].
        weight: [N, K], the same dtype for the fast path (float32, on the CPU).

    Returns:
        [..., N] in the dtype MLX's own matmul would give.
    """
    fast = (
        x.dtype == mx.float32
        and weight.dtype == mx.float32
        and x.size > 0
        and mx.default_device() == mx.cpu
        and blas.numpy_is_faster()
        and backend().values
    )
    if fast:
        try:
            return cast(mx.array, _numpy_matmul(x, weight))
        except ValueError:
            # Inside mx.compile, mx.vmap or an export nothing has a value yet; a wrong
            # shape lands here too and gets MLX's own message below.
            pass
    return x @ weight.T


class Linear(nn.Linear):
    """``nn.Linear`` that multiplies with :func:`matmul`; same parameters and meaning."""

    def __init__(self, weight: mx.array, bias: mx.array | None = None) -> None:
        nn.Module.__init__(self)
        self.weight = weight
        if bias is not None:
            self.bias = bias

    def __call__(self, x: mx.array) -> mx.array:
        y = matmul(x, self.weight)
        return y + self.bias if "bias" in self else y


# The activations of `mlxfuse.kernels.matmul.quantized_matmul`, with MLX-LM's own operations.
GATED: dict[str, Callable[[mx.array, mx.array], mx.array]] = {
    "swiglu": swiglu,
    "geglu": lambda gate, up: nn.gelu(gate) * up,
    "geglu_tanh": lambda gate, up: nn.gelu_approx(gate) * up,
    "swiglu_clipped": swiglu_oai,
}
PLAIN: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "gelu_tanh": nn.gelu_approx,
    "relu2": nn.relu2,
}


class Embedding(nn.Embedding):
    """``nn.Embedding`` whose ``as_linear`` (a tied head) multiplies with :func:`matmul`."""

    def __init__(self, weight: mx.array) -> None:
        nn.Module.__init__(self)
        self.weight = weight

    def as_linear(self, x: mx.array) -> mx.array:
        return matmul(x, self.weight)


class StreamedLinear(nn.Module):
    """A linear layer whose weight stays in the file's bytes and is dequantised per call.

    Args:
        rows: float32 rows of the weight, by range.
        shape: [N, K] of the weight.
        bias: [N], optional.
    """

    def __init__(self, rows: Rows, shape: tuple[int, int], bias: mx.array | None = None) -> None:
        super().__init__()
        self._rows = rows
        self._shape = shape
        if bias is not None:
            self.bias = bias

    def _extra_repr(self) -> str:
        return f"input_dims={self._shape[1]}, output_dims={self._shape[0]}, streamed"

    def __call__(self, x: mx.array) -> mx.array:
        n, k = self._shape
        step = max(1, _CHUNK_BYTES // (4 * k))
        parts = [
            matmul(x, mx.array(self._rows(i, min(i + step, n))).astype(x.dtype))
            for i in range(0, n, step)
        ]
        y = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
        return y + self.bias if "bias" in self else y

    def to_lora(self, **options: Any) -> Any:
        """The layer with a low-rank adapter, for mlx-lm's ``linear_to_lora_layers``."""
        return lora_linear(self, self._shape, **options)


class StreamedEmbedding(nn.Module):
    """An embedding whose rows are dequantised from the file's bytes when they are looked up."""

    def __init__(self, rows: Rows, shape: tuple[int, int], dtype: mx.Dtype) -> None:
        super().__init__()
        self._head = StreamedLinear(rows, shape)
        self._rows = rows
        self._shape = shape
        self._dtype = type_name(dtype)  # an mx.Dtype cannot be copied or pickled

    def _extra_repr(self) -> str:
        return f"{self._shape[0]}, {self._shape[1]}, streamed"

    def __call__(self, ids: mx.array) -> mx.array:
        if not ids.size:
            return mx.zeros((*ids.shape, self._shape[1]), getattr(mx, self._dtype))
        wanted, place = np.unique(np.asarray(ids), return_inverse=True)
        table = np.concatenate([self._rows(int(i), int(i) + 1) for i in wanted])
        return mx.array(table).astype(getattr(mx, self._dtype))[mx.array(place).reshape(ids.shape)]

    def as_linear(self, x: mx.array) -> mx.array:
        return self._head(x)
