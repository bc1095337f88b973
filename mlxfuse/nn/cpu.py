"""What MLX's CPU back-end needs, for weights of a GGUF file; a Mac does without.

Matrices are multiplied by the fastest BLAS at hand. ``Linear``, ``Embedding`` and ``SwitchLinear``
hold dense floats; those that are ``Streamed`` hold none: they dequantise the file's rows at every
call, for models whose dense form does not fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import switch_layers
from numpy.typing import NDArray

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


def evaluated(y: mx.array) -> mx.array:
    """``y`` with its value, where it can have one: what it was made of is no longer needed.

    Else the rows that are dequantised for one token live, of all layers, until the token is there.
    """
    if backend().values:  # else dispatches are counted, of a graph
        with suppress(ValueError):  # inside mx.compile or mx.vmap
            mx.eval(y)
    return y


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
        parts = []
        for i in range(0, n, step):
            chunk = mx.array(self._rows(i, min(i + step, n))).astype(x.dtype)
            parts.append(evaluated(matmul(x, chunk)))
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


def grouped(
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
        evaluated(matmul(flat[mx.array(of_x[own])], matrix(int(expert))))
        for expert, own in zip(experts, np.split(order, starts[1:]), strict=True)
    ]
    return mx.concatenate(parts)[mx.array(np.argsort(order))].reshape(*ids.shape, 1, rows)


def values_of(ids: mx.array) -> NDArray[np.integer] | None:
    """The ids, or None where nothing has a value yet: inside `mx.compile` or an export."""
    try:
        return np.asarray(ids)
    except ValueError:
        return None


def biased(layer: nn.Module, y: mx.array, ids: mx.array) -> mx.array:
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
        ids = values_of(indices) if mx.default_device() == mx.cpu else None
        if ids is None:
            y: mx.array = super().__call__(x, indices, sorted_indices)
            return y
        return biased(self, grouped(x, ids, self.weight.__getitem__, self.output_dims), indices)


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

        return biased(self, grouped(x, np.asarray(indices), matrix, n), indices)
