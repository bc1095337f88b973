"""Linears that are computed together, or with what follows them, over the arrays they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from ..kernels import Prepared, wanted
from ..kernels.quantized_matmul import MAX_BATCH, prepare, quantized_matmul
from ..kernels.weight import AffineSegment, Part, QuantizedWeight
from .linear import GATED, PLAIN, Linear, matmul
from .quantized import QuantizedLinear

# Layers that do nothing but multiply and add their bias: no LoRA, no subclass.
LINEARS = (QuantizedLinear, nn.QuantizedLinear, Linear, nn.Linear)
_ARRAYS = ("weight", "scales", "biases", "bias")


# Expert ids from which mlx-lm sorts them, so that rows of one expert are neighbours.
MAX_IDS = 64


class Projection:
    """Linears ``names`` of ``parent``, which all have the same input.

    The linears stay where they are and keep their arrays; here are other views of them. Methods
    give None where the linears have to be called one by one instead.

    formats  the type or format of each linear.
    """

    def __init__(self, parent: nn.Module, names: Sequence[str], formats: Sequence[str]) -> None:
        self.formats = tuple(formats)
        self._held: list[tuple[Callable[[str], object], str, object]] = []
        for name in names:
            linear = parent[name]
            self._held.append((parent.get, name, linear))
            if isinstance(linear, QuantizedLinear):
                self._held.append((vars(linear).get, "weight", linear.weight))
            self._held += [(linear.get, a, linear[a]) for a in _ARRAYS if a in linear]

    def holds(self) -> bool:
        """Whether the linears still have the arrays that they had.

        They do not after an update, nor inside a gradient with respect to them.
        """
        for get, name, value in self._held:  # noqa: SIM110 (a generator takes three times as long)
            if get(name) is not value:
                return False
        return True

    def split(self, x: mx.array, mode: str) -> Sequence[mx.array] | None:
        """The result of each linear, x ``[..., K]`` -> ``[..., N]``.

        Args:
            mode: `mlxfuse.kernels.ready`, here and below.
        """
        raise NotImplementedError

    def activated(self, x: mx.array, activation: str, mode: str) -> mx.array | None:
        """``act(gate) * up`` of two, or ``act`` of one; see `quantized_matmul` for the names."""
        raise NotImplementedError

    def added(self, x: mx.array, residual: mx.array, mode: str) -> mx.array | None:
        """The result of one linear, plus ``residual``."""
        raise NotImplementedError


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
        self._stock = stock
        # MLX's result has the wider type of activations and scales.
        self._dtypes = {
            s.arrays["scales"].dtype
            for s in weight.segments
            if stock and isinstance(s, AffineSegment) and s.mode == "affine"
        }

        self._prepared: dict[tuple[object, ...], Prepared] = {}

    def _run(
        self,
        x: mx.array,
        mode: str,
        residual: mx.array | None = None,
        activation: str | None = None,
        experts: mx.array | None = None,
        *,
        split: bool = False,
    ) -> Sequence[mx.array] | None:
        """`quantized_matmul`; None if MLX's own linears are to be called instead."""
        reason = None
        given: dict[str, Any] = {
            "residual": residual,
            "activation": activation,
            "experts": experts,
            "split": split,
        }
        if mode:
            free = [a for a in (x, residual, experts) if a is not None]
            key = (mode, activation, split, *[(a.shape, a.dtype) for a in free])
            prepared = self._prepared.get(key)
            if prepared is None and not self._large(x, experts):
                if self._refusal(x, residual) is None:
                    prepared = prepare(x, self.weight, bias=self.bias, **given)
                if prepared is not None:
                    self._prepared[key] = prepared
            if prepared is not None:
                found = prepared(*free)
                if found is not None:
                    return found
                reason = "it failed its self-test"
        if self._stock:
            reason = reason or self._refusal(x, residual)
            if self._large(x, experts) or not wanted("quantized_matmul", reason):
                return None
        return quantized_matmul(x, self.weight, bias=self.bias, **given)

    def _large(self, x: mx.array, experts: mx.array | None) -> bool:
        """Whether MLX's own linears have so many rows to multiply that they are left to it."""
        if experts is not None:
            return experts.size >= MAX_IDS
        return self._stock and x.size > MAX_BATCH * x.shape[-1]

    def _refusal(self, x: mx.array, residual: mx.array | None) -> str | None:
        """Why the result would have another type than that of MLX's operations, or None."""
        if x.dtype != mx.float32 and any(x.dtype != d for d in self._dtypes):
            return f"activations are {x.dtype} and scales are not"
        if residual is not None and residual.dtype != x.dtype:
            return f"activations are {x.dtype} and what is added is {residual.dtype}"
        return None

    def split(self, x: mx.array, mode: str) -> Sequence[mx.array] | None:
        return self._run(x, mode, split=True)

    def activated(self, x: mx.array, activation: str, mode: str) -> mx.array | None:
        found = self._run(x, mode, activation=activation)
        return None if found is None else found[0]

    def gathered(
        self, x: mx.array, experts: mx.array, activation: str, mode: str
    ) -> mx.array | None:
        """`activated` for some experts of each row: [..., K] and [..., k] -> [..., k, N]."""
        found = self._run(x, mode, None, activation, experts)
        return None if found is None else found[0]

    def added(self, x: mx.array, residual: mx.array, mode: str) -> mx.array | None:
        if not self._stock and residual.dtype != x.dtype:
            return None
        found = self._run(x, mode, residual)
        return None if found is None else found[0]


class _Joined(Projection):
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

    def split(self, x: mx.array, mode: str) -> Sequence[mx.array]:
        return list(mx.split(self._multiply(x), self._ends, axis=-1))

    def activated(self, x: mx.array, activation: str, mode: str) -> mx.array:
        if not self._ends:
            return PLAIN[activation](self._multiply(x))
        return GATED[activation](*self.split(x, mode))

    def added(self, x: mx.array, residual: mx.array, mode: str) -> mx.array:
        return residual + self._multiply(x)


class _Dense(Projection):
    """A dense linear without a bias: its product and the sum are one operation of MLX's."""

    def __init__(self, parent: nn.Module, name: str, linear: nn.Linear) -> None:
        super().__init__(parent, [name], [_name(linear.weight.dtype)])
        self._linear = linear

    def split(self, x: mx.array, mode: str) -> Sequence[mx.array]:
        return (self._linear(x),)

    def activated(self, x: mx.array, activation: str, mode: str) -> mx.array:
        return PLAIN[activation](self._linear(x))

    def added(self, x: mx.array, residual: mx.array, mode: str) -> mx.array:
        if isinstance(self._linear, Linear) and mx.default_device() == mx.cpu:
            return residual + self._linear(x)  # by the faster BLAS
        return mx.addmm(residual, x, self._linear.weight.T)


def single(parent: nn.Module, name: str) -> Projection | str:
    """One linear, for its epilogue; nothing is copied. Or why not."""
    linear = parent[name]
    if type(linear) is QuantizedLinear:
        return KernelProjection(parent, [name], linear.weight, linear.get("bias"), stock=False)
    if type(linear) is nn.QuantizedLinear:
        segment = _segment(linear, linear)
        if isinstance(segment, str):
            return segment
        weight = QuantizedWeight.whole(segment)
        return KernelProjection(parent, [name], weight, linear.get("bias"), stock=True)
    if type(linear) in (Linear, nn.Linear) and "bias" not in linear:
        return _Dense(parent, name, linear)
    return f"{name} is {describe(linear)}, which cannot add it"


def cut(parent: nn.Module, name: str, rows: Sequence[int]) -> Projection | str:
    """One linear as several of so many ``rows``; nothing is copied. Or why not."""
    linear = parent[name]
    if type(linear) not in LINEARS:
        return f"its linear is {describe(linear)}"
    whole = linear.weight.rows if isinstance(linear, QuantizedLinear) else linear.weight.shape[0]
    if sum(rows) != whole:
        return "its matrix has other rows than its parts"
    if isinstance(linear, QuantizedLinear):
        parts = _cut_parts(linear.weight.parts, rows)
        if parts is None:
            return "its matrix has other rows than its parts"
        return KernelProjection(
            parent, [name], QuantizedWeight(parts), linear.get("bias"), stock=False
        )
    if isinstance(linear, nn.QuantizedLinear):
        segment = _segment(linear, linear)
        if not isinstance(segment, str):
            starts = [0, *accumulate(rows)]
            split = tuple(Part(segment, a, n) for a, n in zip(starts, rows, strict=False))
            return KernelProjection(
                parent, [name], QuantizedWeight(split), linear.get("bias"), stock=True
            )
    formats = [format_of(linear)] * len(rows)
    return _Joined(parent, [name], formats, rows, _multiplication(linear, linear))


def refusal(linears: Sequence[nn.Module]) -> str | None:
    """Why the linears cannot be joined, or None."""
    if any(type(x) not in LINEARS for x in linears) or len({_family(x) for x in linears}) > 1:
        return "its linears are " + " and ".join(sorted({describe(x) for x in linears}))
    if len({_columns(x) for x in linears}) > 1:
        return "its linears have different inputs"
    if _family(linears[0]) is nn.Linear and len({x.weight.dtype for x in linears}) > 1:
        return "its linears have different types"
    if _family(linears[0]) is nn.QuantizedLinear:
        without = [s for s in (_segment(x, x) for x in linears) if isinstance(s, str)]
        if without and len({_stock_kind(x) for x in linears}) > 1:
            return without[0]
        if (
            len(
                {x.bias.dtype for x in linears if "bias" in x}
                | {x.scales.dtype for x in linears if x.mode == "affine"}
            )
            > 1
        ):
            return "its linears have different types"
    return None


def join_experts(parent: nn.Module, names: Sequence[str]) -> KernelProjection | str:
    """The experts of MLX-LM's switch linears together; nothing is copied. Or why not."""
    linears = [parent[name] for name in names]
    kinds = {type(x).__name__ for x in linears}
    if any(type(x) is not QuantizedSwitchLinear for x in linears):
        return "its experts are " + " and ".join(sorted(kinds))
    if any("bias" in x for x in linears):
        return "its experts have biases"
    if len({x.input_dims for x in linears}) > 1 or len({x.scales.dtype for x in linears}) > 1:
        return "its experts have different inputs or types"
    segments = [_segment(x, x) for x in linears]
    for segment in segments:
        if isinstance(segment, str):
            return segment
    parts = tuple(Part(s, 0, s.rows) for s in segments if not isinstance(s, str))
    if len({part.rows for part in parts}) > 1:
        return "gate and up have different rows"
    return KernelProjection(parent, names, QuantizedWeight(parts), None, stock=True)


def copies(linears: Sequence[nn.Module]) -> bool:
    """Whether `join` puts their rows in new arrays."""
    if isinstance(linears[0], nn.QuantizedLinear):
        return any(isinstance(_segment(x, x), str) for x in linears)
    return isinstance(linears[0], nn.Linear)


def join(parent: nn.Module, names: Sequence[str]) -> Projection:
    """The linears together; they must have no `refusal`.

    Where there is no kernel, the rows are put one after the other in new arrays, of which the
    linears' arrays become views: nothing is held twice.
    """
    linears = [parent[name] for name in names]
    rows = [_rows(x) for x in linears]
    bias = _join_biases(linears, rows)
    if isinstance(linears[0], QuantizedLinear):
        return KernelProjection(parent, names, _whole(linears), bias, stock=False)
    if not copies(linears):
        segments = [s for s in (_segment(x, x) for x in linears) if not isinstance(s, str)]
        parts = tuple(Part(s, 0, s.rows) for s in segments)
        return KernelProjection(parent, names, QuantizedWeight(parts), bias, stock=True)
    arrays = _join_arrays(linears)
    held = dict(arrays) if bias is None else {**arrays, "bias": bias}
    formats = [format_of(x) for x in linears]
    return _Joined(parent, names, formats, rows, _multiplication(linears[0], held))


def describe(linear: nn.Module) -> str:
    """What a linear is, for a reason."""
    if type(linear) not in LINEARS:
        return type(linear).__name__
    return "dense" if isinstance(linear, nn.Linear) else "quantised"


def _family(linear: nn.Module) -> type[nn.Module]:
    return nn.Linear if isinstance(linear, nn.Linear) else type(linear)


def _rows(linear: nn.Module) -> int:
    if isinstance(linear, QuantizedLinear):
        return linear.weight.rows
    return int(linear.weight.shape[0])


def _columns(linear: nn.Module) -> int:
    if isinstance(linear, QuantizedLinear):
        return linear.weight.columns
    bits = 32 if isinstance(linear, nn.Linear) else linear.bits
    return int(linear.weight.shape[-1]) * 32 // bits


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def format_of(linear: nn.Module) -> str:
    """The format or type of a linear's weight, as reports name it."""
    if isinstance(linear, QuantizedLinear):
        return " and ".join(part.segment.name for part in linear.weight.parts)
    if isinstance(linear, nn.QuantizedLinear):
        affine = linear.mode == "affine"
        return f"affine{linear.bits}g{linear.group_size}" if affine else str(linear.mode)
    return _name(linear.weight.dtype)


def _stock_kind(linear: nn.Module) -> tuple[object, ...]:
    return linear.bits, linear.group_size, linear.mode, linear.scales.dtype


def _segment(linear: nn.Module, arrays: Any) -> AffineSegment | str:
    """The rows in ``arrays``, quantised like those of ``linear``; or why there is no kernel."""
    held = {"codes": arrays["weight"], "scales": arrays["scales"]}
    if linear.mode == "affine":
        held["supers"] = arrays["biases"]
    try:
        return AffineSegment(linear.bits, linear.group_size, linear.mode, _columns(linear), held)
    except ValueError as error:
        return str(error)


def _join_arrays(linears: Sequence[nn.Module]) -> dict[str, mx.array]:
    """Their arrays but for the bias, joined along the rows; they become views of the result."""
    names = [n for n in _ARRAYS[:3] if n in linears[0]]
    arrays = {n: mx.concatenate([x[n] for x in linears]) for n in names}
    mx.eval(arrays)
    for name, array in arrays.items():
        _hand_back(linears, name, array, [_rows(x) for x in linears])
    return arrays


def _hand_back(
    linears: Iterable[nn.Module], name: str, array: mx.array, rows: Sequence[int]
) -> None:
    at = 0
    for linear, count in zip(linears, rows, strict=True):
        if name in linear:
            linear[name] = array[at : at + count]
            mx.eval(linear[name])
        at += count


def _join_biases(linears: Sequence[nn.Module], rows: Sequence[int]) -> mx.array | None:
    """The biases one after the other, zeros where there is none; None if no linear has one."""
    dtypes = [x.bias.dtype for x in linears if "bias" in x]
    if not dtypes:
        return None
    bias = mx.concatenate(
        [
            x.bias if "bias" in x else mx.zeros(n, dtypes[0])
            for x, n in zip(linears, rows, strict=True)
        ]
    )
    mx.eval(bias)
    _hand_back(linears, "bias", bias, rows)
    return bias


def _multiplication(linear: nn.Module, arrays: Any) -> Callable[[mx.array], mx.array]:
    """What ``linear`` does, with other arrays."""
    weight, bias = arrays["weight"], arrays.get("bias")
    if isinstance(linear, nn.QuantizedLinear):
        scales, biases = arrays["scales"], arrays.get("biases")
        how = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}

        def quantized(x: mx.array) -> mx.array:
            y = mx.quantized_matmul(x, weight, scales=scales, biases=biases, transpose=True, **how)
            return y if bias is None else y + bias

        return quantized

    def dense(x: mx.array) -> mx.array:
        if bias is not None and type(linear) is nn.Linear:
            return mx.addmm(bias, x, weight.T)
        y = matmul(x, weight) if isinstance(linear, Linear) else x @ weight.T
        return y if bias is None else y + bias

    return dense


def _whole(linears: Sequence[nn.Module]) -> QuantizedWeight:
    """The weight of all; where they are the views of one whole weight, it is that weight.

    Its formats' rows are together then, which the gated activations need.
    """
    whole: QuantizedWeight = linears[0].place.whole
    at, together = 0, True
    for linear in linears:
        together &= linear.place.whole is whole and linear.place.first == at
        at += len(linear.weight.parts)
    if together and at == len(whole.parts):
        return whole
    return QuantizedWeight(tuple(p for linear in linears for p in linear.weight.parts))


def _cut_parts(given: Sequence[Part], rows: Sequence[int]) -> tuple[Part, ...] | None:
    """Parts of so many rows; None if their ends are inside a format's."""
    parts, left = [], list(given)
    for count in rows:
        if not left or left[0].rows < count:
            return None
        part = left.pop(0)
        parts.append(Part(part.segment, part.first, count))
        if part.rows > count:
            left.insert(0, Part(part.segment, part.first + count, part.rows - count))
    return None if left else tuple(parts)
