"""Rounding to MLX's float types from float64, and RMSNorm with it: oracles of the norm kernels."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from tests.conftest import METAL

# Significant bits, exponent of the smallest denormal, largest value.
_TYPES = {
    mx.float16: (11, -24, 65504.0),
    mx.bfloat16: (8, -133, float(2**8 - 1) * 2.0**120),
    mx.float32: (24, -149, float(2**24 - 1) * 2.0**104),
}
NORMAL = 2.0**-126
Array = np.ndarray


def quantum(a: Array, dtype: mx.Dtype) -> Array:
    """Distance of neighbouring values of the type around ``a``."""
    bits, least, _ = _TYPES[dtype]
    with np.errstate(invalid="ignore"):
        return np.exp2(np.maximum(np.frexp(a)[1] - bits, least).astype(np.float64))


def nearest(a: Array, dtype: mx.Dtype) -> Array:
    """float64 values rounded once to the type, to even; still float64."""
    step = quantum(a, dtype)
    with np.errstate(invalid="ignore"):
        rounded = np.where(np.isfinite(a), np.rint(a / step) * step, a)
    return np.where(np.abs(rounded) > _TYPES[dtype][2], np.copysign(np.inf, rounded), rounded)


def ulps(got: Array, want: Array, dtype: mx.Dtype) -> Array:
    """Distance in units of the last place; the same infinity or two NaNs are 0 apart."""
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    # Apple's GPUs flush denormals of float32.
    same |= METAL & (got == 0) & (np.abs(want) < NORMAL)
    with np.errstate(invalid="ignore"):
        return np.where(same, 0.0, np.abs(got - want) / quantum(want, dtype))


def normalised(
    h: Array,
    weight: Array | None,
    eps: float,
    dtype: mx.Dtype,
    *,
    offset: float = 0.0,
    cast: str = "llama",
) -> Array:
    """RMSNorm of the rows of h in float64, rounded to the type where `rms_norm` says."""
    total = (h * h).sum(-1, keepdims=True)
    total = np.where(total > _TYPES[mx.float32][2], np.inf, total)  # as a float32 sum
    with np.errstate(invalid="ignore"):
        x = h / np.sqrt(total / h.shape[-1] + np.float64(np.float32(eps)))
        if weight is None:
            return nearest(x, dtype)
        if cast == "gemma":
            return nearest(x * nearest(offset + weight, mx.float32), dtype)
        return nearest(nearest(x, dtype) * nearest(offset + weight, dtype), dtype)
