"""Linears that are computed together, or with what follows them, over the arrays they hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn

from ..kernels import Backend, Prepared
from ..kernels.activations import Int8Activations
from ..kernels.matmul.int8_matmul import int8_matmul, unsupported
from ..kernels.matmul.product import MAX_BATCHED_ROWS, Epilogue, Experts
from ..kernels.matmul.quantized_matmul import prepare, quantized_matmul
from ..kernels.matmul.shapes import MAX_BATCH
from ..kernels.norm.quantize_int8 import quantize_int8
from ..kernels.weight import AffineSegment, QuantizedWeight, type_name
from .activations import GATED, PLAIN
from .cpu import Linear
from .experts import QuantizedSwitchLinear
from .quantized import QuantizedLinear
from .snapshot import Snapshot

ARRAYS = ("weight", "scales", "biases", "bias")


# Expert ids from which mlx-lm sorts them, so that rows of one expert are neighbours.
MAX_IDS = 64


class Projection(ABC):
    """Linears ``names`` of ``parent``, which all have the same input; of none, the parent itself.

    The linears stay where they are and keep their arrays; here are other views of them. Methods
    give None where the linears have to be called one by one instead.

    formats  the type or format of each linear.
    holds    whether the linears still have the arrays that they had; see `Snapshot`.
    """

    def __init__(self, parent: nn.Module, names: Sequence[str], formats: Sequence[str]) -> None:
        self.formats = tuple(formats)
        held: list[tuple[Callable[[str], object], str]] = []
        for linear in [parent[name] for name in names] or [parent]:
            if isinstance(linear, (QuantizedLinear, QuantizedSwitchLinear)):
                held.append((vars(linear).get, "weight"))
            held += [(linear.get, a) for a in ARRAYS if a in linear]
        held += [(parent.get, name) for name in names]
        self.snapshot = Snapshot(held)
        self.holds = self.snapshot.holds

    @abstractmethod
    def split(self, x: mx.array, on: Backend) -> Sequence[mx.array] | None:
        """The result of each linear, x ``[..., K]`` -> ``[..., N]``.

        Args:
            on: what runs kernels, here and below.
        """

    @abstractmethod
    def activated(self, x: mx.array, activation: str, on: Backend) -> mx.array | None:
        """``act(gate) * up`` of two, or ``act`` of one; see `quantized_matmul` for the names."""

    @abstractmethod
    def added(self, x: mx.array, residual: mx.array, on: Backend) -> mx.array | None:
        """The result of one linear, plus ``residual``."""


class KernelProjection(Projection):
    """Weights with a kernel.

    Args:
        stock: the linears are MLX's, which has a multiplication for them that is used where the
            kernel cannot run and above `MAX_BATCH` rows.
    """

    def __init__(
        self,
        parent: nn.Module,
        names: Sequence[str],
        weight: QuantizedWeight,
        bias: mx.array | None,
        *,
        stock: bool,
    ) -> None:
        super().__init__(parent, names, [part.segment.name for part in weight.parts])
        self.weight = weight
        self.bias = bias
        self._plain = Epilogue(bias)
        self._stock = stock
        # MLX's result has the widest type of activations, scales and biases.
        self._dtypes = {
            s.arrays["scales"].dtype
            for s in weight.segments
            if stock and isinstance(s, AffineSegment) and s.mode == "affine"
        } | {b.dtype for b in (bias,) if stock and b is not None}
        self._prepared: dict[tuple[object, ...], Prepared] = {}

    def _run(
        self,
        x: mx.array,
        on: Backend,
        epilogue: Epilogue,
        experts: Experts | None = None,
        *,
        split: bool = False,
    ) -> Sequence[mx.array] | None:
        """`quantized_matmul`; None if MLX's own linears are to be called instead."""
        reason = None
        ids = None if experts is None else experts.ids
        # Not for prompts, which have lengths of every kind.
        if on.prepares and x.size <= MAX_BATCHED_ROWS * x.shape[-1]:
            scores = None if experts is None else experts.scores
            free = [a for a in (x, epilogue.residual, ids, scores) if a is not None]
            how = epilogue.activation, epilogue.times, split
            key = (*how, *[(a.shape, a.dtype) for a in free])
            prepared = self._prepared.get(key)
            if prepared is None and not self.large(x, ids):
                if self._refusal(x, epilogue.residual) is None:
                    prepared = prepare(x, self.weight, epilogue, experts, split=split)
                if prepared is not None:
                    self._prepared[key] = prepared
            if prepared is not None:
                found = prepared(*free, on=on)
                if found is not None:
                    return found
                reason = "it failed its self-test"
        if self._stock:
            reason = reason or self._refusal(x, epilogue.residual)
            if self.large(x, ids) or not on.takes("quantized_matmul", reason):
                return None
        return quantized_matmul(x, self.weight, epilogue, experts, split=split)

    def large(self, x: mx.array, experts: mx.array | None) -> bool:
        """Whether MLX's own linears have so many rows to multiply that they are left to it."""
        if experts is not None:
            return experts.size >= MAX_IDS
        return self._stock and x.size > MAX_BATCH * x.shape[-1]

    def _refusal(self, x: mx.array, residual: mx.array | None) -> str | None:
        """Why the result would have another type than that of MLX's operations, or None."""
        if x.dtype != mx.float32 and any(x.dtype != d for d in self._dtypes):
            return f"activations are {x.dtype} and scales or biases are not"
        if residual is not None and residual.dtype != x.dtype:
            return f"activations are {x.dtype} and what is added is {residual.dtype}"
        return None

    def split(self, x: mx.array, on: Backend) -> Sequence[mx.array] | None:
        return self._run(x, on, self._plain, split=True)

    def activated(self, x: mx.array, activation: str, on: Backend) -> mx.array | None:
        found = self._run(x, on, Epilogue(self.bias, None, activation))
        return None if found is None else found[0]

    def multiplied(
        self, x: mx.array, activation: str, factor: mx.array, on: Backend
    ) -> mx.array | None:
        """`activated`, times ``factor``, which is of the result's shape."""
        if factor.dtype != x.dtype:
            return None
        found = self._run(x, on, Epilogue(self.bias, factor, activation, times=True))
        return None if found is None else found[0]

    def gathered(
        self,
        x: mx.array,
        experts: Experts,
        on: Backend,
        *,
        activation: str | None = None,
        residual: mx.array | None = None,
    ) -> mx.array | None:
        """`activated` for some experts of each row: [..., K] and [..., k] -> [..., k, N].

        With scores [..., k] their weighted sums: [..., k, K] -> [..., N].

        Args:
            experts: many have to be sorted.
            residual: is added to the weighted sums.
        """
        # The file's own experts know how to multiply without kernels.
        unsorted = self.large(x, experts.ids) and not experts.sorted
        if not self._stock and (unsorted or not self.takes_many(on)):
            return None
        found = self._run(x, on, Epilogue(self.bias, residual, activation), experts)
        return None if found is None else found[0]

    def takes_many(self, on: Backend) -> bool:
        """Whether `gathered` takes many ids, if they are sorted."""
        return not self._stock and on.reason is None

    def integers(
        self,
        x: mx.array | Int8Activations,
        residual: mx.array | None = None,
        activation: str | None = None,
        experts: mx.array | None = None,
        *,
        split: bool = False,
    ) -> tuple[mx.array, ...]:
        """The product with int8 activations, to which floats are rounded first."""
        codes = x if isinstance(x, Int8Activations) else quantize_int8(x)
        end = Epilogue(self.bias, residual, activation)
        of = None if experts is None else Experts(experts)
        return int8_matmul(codes, self.weight, end, of, split=split)

    def added(self, x: mx.array, residual: mx.array, on: Backend) -> mx.array | None:
        if not self._stock and residual.dtype != x.dtype:
            return None
        found = self._run(x, on, Epilogue(self.bias, residual))
        return None if found is None else found[0]


def no_integers(reader: Projection | None) -> str | None:
    """Why a reader does not take int8 activations, or None."""
    if not isinstance(reader, KernelProjection):
        return "what reads it has no kernel or is not fused"
    return unsupported(reader.weight)


class JoinedProjection(Projection):
    """One multiplication of MLX's for all, by their rows one after the other."""

    def __init__(
        self,
        parent: nn.Module,
        names: Sequence[str],
        formats: Sequence[str],
        rows: Sequence[int],
        multiply: Callable[[mx.array], mx.array],
    ) -> None:
        super().__init__(parent, names, formats)
        self._ends = tuple(accumulate(rows))[:-1]
        self._multiply = multiply

    def split(self, x: mx.array, on: Backend) -> Sequence[mx.array]:
        return list(mx.split(self._multiply(x), self._ends, axis=-1))

    def activated(self, x: mx.array, activation: str, on: Backend) -> mx.array:
        if not self._ends:
            return PLAIN[activation](self._multiply(x))
        return GATED[activation](*self.split(x, on))

    def added(self, x: mx.array, residual: mx.array, on: Backend) -> mx.array:
        return residual + self._multiply(x)


class DenseProjection(Projection):
    """A dense linear without a bias: its product and the sum are one operation of MLX's."""

    def __init__(self, parent: nn.Module, name: str, linear: nn.Linear) -> None:
        super().__init__(parent, [name], [type_name(linear.weight.dtype)])
        self._linear = linear

    def split(self, x: mx.array, on: Backend) -> Sequence[mx.array]:
        return (self._linear(x),)

    def activated(self, x: mx.array, activation: str, on: Backend) -> mx.array:
        return PLAIN[activation](self._linear(x))

    def added(self, x: mx.array, residual: mx.array, on: Backend) -> mx.array:
        if isinstance(self._linear, Linear) and mx.default_device() == mx.cpu:
            return residual + self._linear(x)  # by the faster BLAS
        return mx.addmm(residual, x, self._linear.weight.T)
