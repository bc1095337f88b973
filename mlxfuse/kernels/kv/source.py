"""What the kernels for compressed keys and values have in common: Metal types and constants."""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx

from .scheme import KVScheme, KVSide

THREADGROUP = (32, 4, 1)
"""Where a SIMD-group has one token: four of them."""

NAMES = {mx.float16: "half", mx.bfloat16: "bfloat16_t", mx.float32: "float"}


def sections(scheme: KVScheme) -> tuple[str, ...]:
    """The parts of ``kv_rows.h`` that decode a scheme's rows, and plain ones."""
    coded = [side for side in (scheme.k, scheme.v) if side.quantized]
    names = ["floats" if scheme.dtype == mx.float32 else "halves"]
    codes = {f"codes{side.bits}" if side.bits in (4, 8) else "codes" for side in coded}
    names += sorted(codes | {side.kind for side in coded})
    return tuple(f"kv_rows.h:{name}" for name in (*names, "hadamard"))


def refuse_dims(scheme: KVScheme) -> str | None:
    """What every kernel says to heads that do not fit a SIMD-group."""
    dims = (scheme.k.dim, scheme.v.dim)
    if min(dims) < 32 or max(dims) > 512:
        return f"heads have 32 to 512 elements, not {dims[0]} and {dims[1]}"
    return None


def sides(scheme: KVScheme) -> tuple[str, str]:
    """The types of ``kv_rows.h`` that decode K and V of a packed row."""
    k, v, k_scales, v_scales = scheme.offsets
    return (
        _side(scheme.k, scheme.dtype, k, k_scales, scheme.row_words),
        _side(scheme.v, scheme.dtype, v, v_scales, scheme.row_words),
    )


def plain_sides(scheme: KVScheme) -> tuple[str, str]:
    """The types that decode plain keys and plain values, each from their first word on."""
    k, v = (_side(KVSide(s.dim, 16), scheme.dtype, 0, 0, s.dim) for s in (scheme.k, scheme.v))
    return k, v


def _side(side: KVSide, dtype: mx.Dtype, first: int, scales: int, words: int) -> str:
    numbers = f"Numbers<{NAMES[dtype]}>"
    align = math.gcd(first, words, 4)
    if not side.quantized:
        return f"Side<{numbers}, void, {numbers}, {first}, 0, 0, {align}>"
    codes = f"Codes<{side.bits}>"
    kinds = {"affine": "Affine", "zero_point": "ZeroPoint"}
    kind = kinds.get(side.kind, f"Symmetric<{1 << (side.bits - 1)}>")
    return f"Side<{codes}, {kind}, {numbers}, {first}, {scales}, {side.group}, {align}>"


@lru_cache(maxsize=1024)
def constants(values: tuple[int, ...] | tuple[float, ...], dtype: mx.Dtype = mx.int32) -> mx.array:
    """Numbers that do not grow, as an array that is made once."""
    array = mx.array(values, dtype)
    mx.eval(array)
    return array
