"""What the calls of kernels that take one token into a state have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx

from .runtime.kernel import normal
from .weight import FLOATS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")
Arrays = Mapping[str, mx.array]


def check_shapes(arrays: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Nothing where each array has its shape.

    Raises:
        ValueError: one has another.
    """
    for name, array in arrays.items():
        if array.shape != shapes[name]:
            raise ValueError(f"{name}: expected {shapes[name]}, found {array.shape}")


def refuse_types(arrays: Arrays, parameters: Collection[str]) -> str | None:
    """Why a kernel does not take arrays of such types; None if it does.

    Args:
        arrays: the first says the type of the others; ``state`` is float32.
        parameters: names of arrays that may be float32 as well.
    """
    first, x = next(iter(arrays.items()))
    for name, array in arrays.items():
        wanted = mx.float32 if name == "state" else x.dtype
        wide = name in parameters and array.dtype == mx.float32
        if array.dtype not in FLOATS or (array.dtype != wanted and not wide):
            return f"{name} is {array.dtype}, where {first} is {x.dtype}"
    return "there are no sequences" if x.size == 0 else None


@lru_cache(maxsize=128)
def constants(numbers: tuple[float, ...], sizes: tuple[int, ...]) -> tuple[mx.array, mx.array]:
    """float32 and uint32 arrays, made once."""
    arrays = mx.array(numbers, mx.float32), mx.array(sizes, mx.uint32)
    mx.eval(arrays)
    return arrays


def small(call: C, arrays: Arrays) -> tuple[C]:
    """Two random sequences at most, of heads of the same sizes, in the place of a call's arrays."""
    x = next(iter(arrays.values()))
    draw, single = normal(x.dtype), normal(mx.float32)
    batch = min(x.shape[0], 2)
    found: dict[str, Any] = {}
    for name, array in arrays.items():
        shape = array.shape if array.ndim == 1 else (batch, *array.shape[1:])
        found[name] = (single if array.dtype == mx.float32 else draw)(*shape)
    return (replace(call, **found),)
