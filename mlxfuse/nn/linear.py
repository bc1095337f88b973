"""Linear and embedding layers for weights that came from a GGUF file, on MLX's CPU back-end.

``Linear`` and ``Embedding`` hold a dense float matrix. ``StreamedLinear`` and
``StreamedEmbedding`` hold none: they dequantise the file's rows at every call, for
models whose dense form does not fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.activations import swiglu

from .. import blas

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


# The gated activations of `mlxfuse.kernels.quantized_matmul`, with MLX-LM's own operations.
GATED: dict[str, Callable[[mx.array, mx.array], mx.array]] = {
    "swiglu": swiglu,
    "geglu_tanh": lambda gate, up: nn.gelu_approx(gate) * up,
}


def join_biases(linears: Sequence[nn.Module], rows: Sequence[int]) -> mx.array | None:
    """The biases one after the other, zeros where there is none; None if no linear has one."""
    given = [linear.get("bias") for linear in linears]
    dtypes = [bias.dtype for bias in given if bias is not None]
    if not dtypes:
        return None
    return mx.concatenate(
        [
            mx.zeros(n, dtypes[0]) if bias is None else bias
            for bias, n in zip(given, rows, strict=True)
        ]
    )


class FusedLinear(Linear):
    """Several dense linears of the same input as one matrix ``[N, K]``; results are views.

    Args:
        rows: rows of each of them.
    """

    def __init__(self, weight: mx.array, bias: mx.array | None, rows: Sequence[int]) -> None:
        super().__init__(weight, bias)
        self._ends = tuple(accumulate(rows))

    @classmethod
    def join(cls, linears: Sequence[nn.Linear]) -> FusedLinear:
        """The rows of ``linears`` one after the other; each of them becomes a view of the result.

        So nothing is held twice, and the linears can take their places again.
        """
        rows = [linear.weight.shape[0] for linear in linears]
        weight = mx.concatenate([linear.weight for linear in linears])
        bias = join_biases(linears, rows)
        made = cls(weight, bias, rows)
        mx.eval(made.parameters())
        made.hand_back(linears)
        return made

    @classmethod
    def cut(cls, linear: nn.Linear, rows: Sequence[int]) -> FusedLinear | None:
        """One linear as several of so many ``rows``."""
        fits = sum(rows) == linear.weight.shape[0]
        return cls(linear.weight, linear.get("bias"), rows) if fits else None

    def hand_back(self, linears: Sequence[nn.Linear]) -> None:
        """Let each of the linears be a view of its rows."""
        start = 0
        for linear in linears:
            end = start + linear.weight.shape[0]
            for name in ("weight", "bias"):
                if name in linear:
                    linear[name] = self[name][start:end]
                    mx.eval(linear[name])
            start = end

    @property
    def formats(self) -> tuple[str, ...]:
        """The type of each of them."""
        return (str(self.weight.dtype).removeprefix("mlx.core."),) * len(self._ends)

    def split(self, x: mx.array) -> tuple[mx.array, ...]:
        """The result of each linear."""
        return tuple(mx.split(self(x), self._ends[:-1], axis=-1))

    def gated(self, x: mx.array, activation: str) -> mx.array:
        """``act(gate) * up`` of two linears, gate and up."""
        return GATED[activation](*self.split(x))


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


class StreamedEmbedding(nn.Module):
    """An embedding whose rows are dequantised from the file's bytes when they are looked up."""

    def __init__(self, rows: Rows, shape: tuple[int, int], dtype: mx.Dtype) -> None:
        super().__init__()
        self._head = StreamedLinear(rows, shape)
        self._rows = rows
        self._shape = shape
        self._dtype = dtype

    def _extra_repr(self) -> str:
        return f"{self._shape[0]}, {self._shape[1]}, streamed"

    def __call__(self, ids: mx.array) -> mx.array:
        if not ids.size:
            return mx.zeros((*ids.shape, self._shape[1]), self._dtype)
        wanted, place = np.unique(np.asarray(ids), return_inverse=True)
        table = np.concatenate([self._rows(int(i), int(i) + 1) for i in wanted])
        return mx.array(table).astype(self._dtype)[mx.array(place).reshape(ids.shape)]

    def as_linear(self, x: mx.array) -> mx.array:
        return self._head(x)
