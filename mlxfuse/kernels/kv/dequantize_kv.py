"""Keys and values out of packed rows: ``metal/dequantize_kv.metal``."""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from ..runtime.kernel import Kernel, Launch, Program
from . import small
from .scheme import FLOATS, KVScheme, unpack
from .source import THREADGROUP, refuse_dims, sections, sides


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
        ValueError: rows of another type or width, or another ``dtype``.
    """
    if rows.ndim != 4 or rows.dtype != mx.uint32 or rows.shape[-1] != scheme.row_words:
        raise ValueError(
            f"rows: expected uint32 [B, Hkv, L, {scheme.row_words}], found {rows.dtype} "
            f"{rows.shape}"
        )
    dtype = scheme.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise ValueError(f"dtype: expected float16, bfloat16 or float32, found {dtype}")
    k, v = KERNEL(rows, scheme, dtype)
    return k, v


@cache
def _program(scheme: KVScheme) -> Program:
    k, v = sides(scheme)
    return Program(
        op="dequantize_kv",
        inputs=("rows",),
        outputs=("k", "v"),
        body=(
            "const uint lane = thread_index_in_simdgroup;\n"
            "const uint token = thread_position_in_grid.y;\n"
            f"const device uint* row = rows + ulong(token) * {scheme.row_words};\n"
            f"dequantize_side<{k}, {scheme.k.dim}, {scheme.k_block}>("
            f"row, k + ulong(token) * {scheme.k.dim}, lane);\n"
            f"dequantize_side<{v}, {scheme.v.dim}, {scheme.v_block}>("
            f"row, v + ulong(token) * {scheme.v.dim}, lane);\n"
        ),
        parts=(*sections(scheme), "kv_rows.h:units", "dequantize_kv.metal"),
    )


def _launch(rows: mx.array, scheme: KVScheme, dtype: mx.Dtype) -> Launch:
    return Launch(
        program=_program(scheme),
        arrays=(rows,),
        grid=(32, rows.size // scheme.row_words, 1),
        threadgroup=THREADGROUP,
        template=(("T", dtype),),
        shapes=((*rows.shape[:-1], scheme.k.dim), (*rows.shape[:-1], scheme.v.dim)),
        dtypes=(dtype, dtype),
    )


def _refuse(rows: mx.array, scheme: KVScheme, dtype: mx.Dtype) -> str | None:
    return refuse_dims(scheme) or ("there are no tokens" if rows.size == 0 else None)


def _reference(rows: mx.array, scheme: KVScheme, dtype: mx.Dtype) -> list[mx.array]:
    return [x.astype(dtype) for x in unpack(scheme, rows)]


KERNEL = Kernel("dequantize_kv", _launch, _refuse, _reference, small.dequantize)
