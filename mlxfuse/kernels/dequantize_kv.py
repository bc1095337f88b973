"""Keys and values out of packed rows: ``metal/dequantize_kv.metal``."""

from __future__ import annotations

import mlx.core as mx

from .kv_scheme import KVScheme, unpack


def dequantize_kv(
    rows: mx.array, scheme: KVScheme, dtype: mx.Dtype | None = None
) -> tuple[mx.array, mx.array]:
    """The keys and values of packed rows, un-rotated, in one dispatch.

    Args:
        rows: uint32 ``[B, Hkv, L, scheme.row_words]``.
        dtype: float16, bfloat16 or float32; None for the scheme's type. All is computed in
            float32 and rounded once.

    Returns:
        ``[B, Hkv, L, k_dim]`` and ``[B, Hkv, L, v_dim]``.

    Raises:
        ValueError: rows of another type or width.
    """
    if rows.ndim != 4 or rows.dtype != mx.uint32 or rows.shape[-1] != scheme.row_words:
        raise ValueError(
            f"rows: expected uint32 [B, Hkv, L, {scheme.row_words}], found {rows.dtype} "
            f"{rows.shape}"
        )
    k, v = unpack(scheme, rows)
    dtype = scheme.dtype if dtype is None else dtype
    return k.astype(dtype), v.astype(dtype)
