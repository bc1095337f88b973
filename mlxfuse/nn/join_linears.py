"""How linears become a `Projection`; where they do not, `NotFusible` says why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import switch_layers
from mlx_lm.tuner.lora import LoRALinear

from ..errors import NotFusible
from ..kernels.weight import AffineSegment, Part, QuantizedWeight, type_name
from .adapted import AdaptedProjection, base, bases
from .cpu import Linear, matmul
from .experts import QuantizedSwitchLinear
from .projection import (
    ARRAYS,
    DenseProjection,
    JoinedProjection,
    KernelProjection,
    Projection,
)
from .quantized import QuantizedLinear
from .summed import Summed, SummedProjection

# Layers that do nothing but multiply and add their bias: no subclass. They may have an
# adapter. Of those that mlx-lm has sharded, a rank has some rows, or some columns whose results
# are added up.
_STOCK = (nn.QuantizedLinear, nn.QuantizedAllToShardedLinear)
_DENSE = (Linear, nn.Linear, nn.AllToShardedLinear)
LINEARS = (QuantizedLinear, *_STOCK, *_DENSE)
_SUMMED = (nn.QuantizedShardedToAllLinear, nn.ShardedToAllLinear)


def single(parent: nn.Module, name: str) -> Projection:
    """One linear, for its epilogue; nothing is copied.

    Raises:
        NotFusible: it is a linear that cannot add anything.
    """
    linear = parent[name]
    if type(linear) is Summed:
        return SummedProjection(parent, name, single(linear, "inner"), linear.inner)
    if type(linear) is LoRALinear:
        return AdaptedProjection(parent, [name], single(bases(parent, [name]), name))
    if type(linear) in _SUMMED:
        arrays = {n: linear[n] for n in ARRAYS[:3] if n in linear}
        multiply = _multiplication(linear, arrays)
        inner: Projection = JoinedProjection(
            parent, [name], [format_of(linear)], [_rows(linear)], multiply
        )
        if "scales" in linear and _has_kernel(linear):
            weight = QuantizedWeight.whole(_segment(linear))
            inner = KernelProjection(parent, [name], weight, None, stock=True)
        return SummedProjection(parent, name, inner, multiply, linear.get("bias"))
    if type(linear) is QuantizedLinear:
        return KernelProjection(parent, [name], linear.weight, linear.get("bias"), stock=False)
    if type(linear) is nn.QuantizedLinear:
        weight = QuantizedWeight.whole(_segment(linear))
        return KernelProjection(parent, [name], weight, linear.get("bias"), stock=True)
    if type(linear) in (Linear, nn.Linear) and "bias" not in linear:
        return DenseProjection(parent, name, linear)
    biased = " with a bias" if "bias" in linear else ""
    raise NotFusible(f"{name} is {describe(linear)}{biased}, which cannot add it")


def one_expert(parent: nn.Module, name: str) -> KernelProjection:
    """One linear as the only one of its experts, whose results are added up by their scores;
    nothing is copied.

    Raises:
        NotFusible: there is no kernel for it.
    """
    linear = parent[name]
    stock = type(linear) is nn.QuantizedLinear
    if not stock and type(linear) is not QuantizedLinear:
        raise NotFusible(f"{name} is {describe(linear)}")
    part, *others = [_part(linear)] if stock else linear.weight.parts
    if others:
        raise NotFusible(f"{name} has rows of several formats")
    arrays = {n: a[None] for n, a in part.segment.arrays.items()}
    weight = QuantizedWeight((replace(part, segment=replace(part.segment, arrays=arrays)),))
    bias = linear.get("bias")
    bias = None if bias is None else bias[None]
    mx.eval(arrays, bias)
    return KernelProjection(parent, [name], weight, bias, stock=stock)


def cut(parent: nn.Module, name: str, rows: Sequence[int]) -> Projection:
    """One linear as several of so many ``rows``; nothing is copied.

    Raises:
        NotFusible: it cannot be told apart so.
    """
    linear = parent[name]
    if type(linear) is LoRALinear:
        inner = cut(bases(parent, [name]), name, rows)
        return AdaptedProjection(parent, [name], inner, rows)
    if type(linear) not in LINEARS:
        raise NotFusible(f"its linear is {describe(linear)}")
    whole = linear.weight.rows if isinstance(linear, QuantizedLinear) else linear.weight.shape[0]
    if sum(rows) != whole:
        raise NotFusible("its matrix has other rows than its parts")
    stock = not isinstance(linear, QuantizedLinear)
    if not stock or (isinstance(linear, _STOCK) and _has_kernel(linear)):
        held = [_part(linear)] if stock else linear.weight.parts
        weight = QuantizedWeight(_cut_parts(held, rows))
        return KernelProjection(parent, [name], weight, linear.get("bias"), stock=stock)
    formats = [format_of(linear)] * len(rows)
    return JoinedProjection(parent, [name], formats, rows, _multiplication(linear, linear))


def check_joinable(linears: Sequence[nn.Module]) -> None:
    """Raise unless `join` can join the linears.

    Raises:
        NotFusible: it cannot.
    """
    linears = [base(x) for x in linears]
    if any(type(x) not in LINEARS for x in linears) or len({_family(x) for x in linears}) > 1:
        kinds = sorted({describe(x) for x in linears})
        raise NotFusible("its linears are " + " and ".join(kinds))
    if len({_columns(x) for x in linears}) > 1:
        raise NotFusible("its linears have different inputs")
    if _family(linears[0]) is nn.Linear and len({x.weight.dtype for x in linears}) > 1:
        raise NotFusible("its linears have different types")
    if not isinstance(linears[0], _STOCK):
        return
    if len({_stock_kind(x) for x in linears}) > 1:
        for linear in linears:
            _segment(linear)
    types = {x.bias.dtype for x in linears if "bias" in x}
    if len(types | {x.scales.dtype for x in linears if x.mode == "affine"}) > 1:
        raise NotFusible("its linears have different types")


def embedding_rows(embedding: nn.QuantizedEmbedding) -> KernelProjection:
    """The weight of MLX's quantised embedding; nothing is copied.

    Raises:
        NotFusible: there is no kernel for it.
    """
    weight = QuantizedWeight.whole(_segment(embedding))
    return KernelProjection(embedding, (), weight, None, stock=True)


def check_experts(linears: Sequence[nn.Module]) -> None:
    """Raise unless `join_experts` can join the switch linears.

    Raises:
        NotFusible: it cannot.
    """
    kinds = {type(x) for x in linears}
    if len(kinds) > 1 or not kinds <= {switch_layers.QuantizedSwitchLinear, QuantizedSwitchLinear}:
        raise NotFusible("its experts are " + " and ".join(sorted(kind.__name__ for kind in kinds)))
    if kinds == {QuantizedSwitchLinear}:
        if len({(x.weight.rows, x.weight.columns, x.weight.experts) for x in linears}) > 1:
            raise NotFusible("gate and up have different shapes")
        return
    if any(x.bits is None or x.group_size is None for x in linears):
        raise NotFusible("its experts do not tell their bits and group size")
    if len({_columns(x) for x in linears}) > 1 or len({x.scales.dtype for x in linears}) > 1:
        raise NotFusible("its experts have different inputs or types")
    if len({x.bias.dtype for x in linears if "bias" in x}) > 1:
        raise NotFusible("its experts have biases of different types")
    if len({_segment(x).rows for x in linears}) > 1:
        raise NotFusible("gate and up have different rows")


def join_experts(parent: nn.Module, names: Sequence[str]) -> KernelProjection:
    """The experts of switch linears together; see `check_experts`.

    Nothing is copied but biases, of which the linears' become views.
    """
    linears = [parent[name] for name in names]
    stock = not isinstance(linears[0], QuantizedSwitchLinear)
    weight = QuantizedWeight(tuple(map(_part, linears))) if stock else _whole(linears)
    bias = _join_biases(linears, [part.rows for part in weight.parts])
    return KernelProjection(parent, names, weight, bias, stock=stock)


def copies(linears: Sequence[nn.Module]) -> bool:
    """Whether `join` puts their rows in new arrays."""
    linears = [base(x) for x in linears]
    if isinstance(linears[0], _STOCK):
        return not all(map(_has_kernel, linears))
    return isinstance(linears[0], _DENSE)


def join(parent: nn.Module, names: Sequence[str]) -> Projection:
    """The linears together; see `check_joinable`.

    Where there is no kernel, the rows are put one after the other in new arrays, of which the
    linears' arrays become views: nothing is held twice.
    """
    if any(type(parent[name]) is LoRALinear for name in names):
        return AdaptedProjection(parent, names, join(bases(parent, names), names))
    linears = [parent[name] for name in names]
    rows = [_rows(x) for x in linears]
    bias = _join_biases(linears, rows)
    if isinstance(linears[0], QuantizedLinear):
        return KernelProjection(parent, names, _whole(linears), bias, stock=False)
    if not copies(linears):
        weight = QuantizedWeight(tuple(map(_part, linears)))
        return KernelProjection(parent, names, weight, bias, stock=True)
    arrays = _join_arrays(linears)
    held = dict(arrays) if bias is None else {**arrays, "bias": bias}
    formats = [format_of(x) for x in linears]
    return JoinedProjection(parent, names, formats, rows, _multiplication(linears[0], held))


def describe(linear: nn.Module) -> str:
    """What a linear is, for a reason."""
    linear = base(linear)
    if type(linear) not in LINEARS:
        return type(linear).__name__
    return "dense" if isinstance(linear, _DENSE) else "quantised"


def _family(linear: nn.Module) -> type[nn.Module]:
    return nn.Linear if isinstance(linear, _DENSE) else type(linear)


def _rows(linear: nn.Module) -> int:
    if isinstance(linear, QuantizedLinear):
        return linear.weight.rows
    return int(linear.weight.shape[0])


def _columns(linear: nn.Module) -> int:
    if isinstance(linear, QuantizedLinear):
        return linear.weight.columns
    bits = 32 if isinstance(linear, _DENSE) else linear.bits
    return int(linear.weight.shape[-1]) * 32 // bits


def format_of(linear: nn.Module) -> str:
    """The format or type of a linear's weight, as reports name it."""
    linear = base(linear)
    if isinstance(linear, QuantizedLinear | QuantizedSwitchLinear):
        return " and ".join(part.segment.name for part in linear.weight.parts)
    if "scales" in linear:
        affine = linear.mode == "affine"
        return f"affine{linear.bits}g{linear.group_size}" if affine else str(linear.mode)
    return type_name(linear.weight.dtype)


def _stock_kind(linear: nn.Module) -> tuple[object, ...]:
    return linear.bits, linear.group_size, linear.mode, linear.scales.dtype


def _segment(linear: nn.Module) -> AffineSegment:
    """The rows of one of MLX's quantised layers, for our kernels.

    Raises:
        NotFusible: there is no kernel for them.
    """
    if "global_scale" in linear:
        raise NotFusible("its experts have a scale each beside those of their groups")
    held = {"codes": linear["weight"], "scales": linear["scales"]}
    if linear.mode == "affine":
        held["supers"] = linear["biases"]
    try:
        return AffineSegment(linear.bits, linear.group_size, linear.mode, _columns(linear), held)
    except ValueError as error:
        raise NotFusible(str(error)) from error


def _part(linear: nn.Module) -> Part:
    segment = _segment(linear)
    return Part(segment, 0, segment.rows)


def _has_kernel(linear: nn.Module) -> bool:
    try:
        _segment(linear)
    except NotFusible:
        return False
    return True


def _join_arrays(linears: Sequence[nn.Module]) -> dict[str, mx.array]:
    """Their arrays but for the bias, joined along the rows; they become views of the result."""
    names = [n for n in ARRAYS[:3] if n in linears[0]]
    arrays = {n: mx.concatenate([x[n] for x in linears]) for n in names}
    mx.eval(arrays)
    for name, array in arrays.items():
        _hand_back(linears, name, array, [_rows(x) for x in linears], axis=0)
    return arrays


def _hand_back(
    linears: Iterable[nn.Module], name: str, array: mx.array, rows: Sequence[int], axis: int
) -> None:
    own = mx.split(array, list(accumulate(rows))[:-1], axis=axis)
    for linear, view in zip(linears, own, strict=True):
        if name in linear:
            linear[name] = view
            mx.eval(view)


def _join_biases(linears: Sequence[nn.Module], rows: Sequence[int]) -> mx.array | None:
    """The biases one after the other, zeros where there is none; None if no linear has one."""
    held = [x.bias for x in linears if "bias" in x]
    if not held:
        return None
    lead, dtype = held[0].shape[:-1], held[0].dtype  # lead: of experts
    bias = mx.concatenate(
        [
            x.bias if "bias" in x else mx.zeros((*lead, n), dtype)
            for x, n in zip(linears, rows, strict=True)
        ],
        axis=-1,
    )
    mx.eval(bias)
    _hand_back(linears, "bias", bias, rows, axis=-1)
    return bias


def _multiplication(linear: nn.Module, arrays: Any) -> Callable[[mx.array], mx.array]:
    """What ``linear`` does, with other arrays."""
    weight, bias = arrays["weight"], arrays.get("bias")
    if "scales" in arrays:
        scales, biases = arrays["scales"], arrays.get("biases")
        how = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}

        def quantized(x: mx.array) -> mx.array:
            y = mx.quantized_matmul(x, weight, scales=scales, biases=biases, transpose=True, **how)
            return y if bias is None else y + bias

        return quantized

    def dense(x: mx.array) -> mx.array:
        if bias is not None and type(linear) in (nn.Linear, nn.AllToShardedLinear):
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


def _cut_parts(given: Sequence[Part], rows: Sequence[int]) -> tuple[Part, ...]:
    """Parts of so many rows.

    Raises:
        NotFusible: their ends are inside a format's.
    """
    parts, left = [], list(given)
    for count in rows:
        if not left or left[0].rows < count:
            raise NotFusible("its matrix has other rows than its parts")
        part = left.pop(0)
        parts.append(Part(part.segment, part.first, count))
        if part.rows > count:
            left.insert(0, Part(part.segment, part.first + count, part.rows - count))
    return tuple(parts)
