"""New keys and values as packed rows: ``metal/quantize_kv.metal``."""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from ..runtime.kernel import Kernel, Launch, Program
from . import small
from .scheme import FLOATS, KVScheme, KVSide, pack
from .source import NAMES, refuse_dims

_THREADGROUP_BYTES = 16384


def quantize_kv(k: mx.array, v: mx.array, scheme: KVScheme) -> mx.array:
    """Rotate and quantise keys and values into the packed rows of a scheme, in one dispatch.

    Each group is quantised by itself, in float32, so a token's row does not depend on what else
    is in the call. Of a group's values x, n = 2^bits - 1 and m = 2^(bits - 1) - 1:

    * ``affine``: scale (max x - min x) / n and bias min x, both rounded to the scheme's type;
      codes round((x - bias) / scale), halves to even, limited to 0 to n;
    * ``symmetric``: scale max|x| / m, rounded; codes m + 1 + round(x / scale), limited to 1 to n.

    The codes are those of the rounded scales. A side of 16 bits is only rotated and rounded.

    Args:
        k: ``[B, Hkv, L, k_dim]``, float16, bfloat16 or float32.
        v: ``[B, Hkv, L, v_dim]``, of the type of ``k``.

    Returns:
        uint32 ``[B, Hkv, L, scheme.row_words]``.

    Raises:
        ValueError: shapes or types that do not fit, or codes with zero points, which only come
            from `pack_codes`.
    """
    if k.ndim != 4 or k.shape[-1] != scheme.k.dim or v.shape != (*k.shape[:-1], scheme.v.dim):
        raise ValueError(
            f"expected keys [B, Hkv, L, {scheme.k.dim}] and values [B, Hkv, L, {scheme.v.dim}], "
            f"found {k.shape} and {v.shape}"
        )
    if k.dtype not in FLOATS or v.dtype != k.dtype:
        raise ValueError(f"expected floating point of one type, found {k.dtype} and {v.dtype}")
    if any(side.quantized and side.kind == "zero_point" for side in (scheme.k, scheme.v)):
        raise ValueError("nothing is quantised with zero points: use affine or symmetric codes")
    (rows,) = KERNEL(k, v, scheme)
    return rows


def _side(side: KVSide, block: int, dtype: mx.Dtype) -> str:
    shape = f"{NAMES[dtype]}, {side.dim}, {block}"
    if not side.quantized:
        return f"Values<{shape}>"
    symmetric = str(side.kind == "symmetric").lower()
    return f"Quantized<{shape}, {side.bits}, {side.group}, {symmetric}>"


def _tokens(scheme: KVScheme) -> int:
    """Of a threadgroup: of eight, rows end with a piece of 32 bytes."""
    fit = _THREADGROUP_BYTES // scheme.row_bytes
    return next(n for n in (8, 4, 2, 1) if n <= max(fit, 1))


@cache
def _program(scheme: KVScheme) -> Program:
    k, v, k_scales, v_scales = scheme.offsets
    words, tokens = scheme.row_words, _tokens(scheme)
    sides = (
        ("k", scheme.k.dim, _side(scheme.k, scheme.k_block, scheme.dtype), k, k_scales),
        ("v", scheme.v.dim, _side(scheme.v, scheme.v_block, scheme.dtype), v, v_scales),
    )
    calls = "".join(
        f"{of}::write({name} + ulong(token) * {dim}, row + {codes}, row + {scales}, lane);\n"
        for name, dim, of, codes, scales in sides
    )
    return Program(
        op="quantize_kv",
        inputs=("k", "v"),
        outputs=("rows",),
        body=(
            "const uint lane = thread_index_in_simdgroup;\n"
            "const uint token = thread_position_in_grid.y;\n"
            f"threadgroup uint4 scratch[{-(-tokens * words // 4)}];\n"
            "threadgroup uint* to = (threadgroup uint*)scratch;\n"
            f"threadgroup uint* row = to + token % {tokens} * {words};\n{calls}"
            f"store_rows<{words}, {tokens}>(to, rows, token / {tokens} * {tokens}, "
            "threads_per_grid.y, thread_index_in_threadgroup);\n"
        ),
        parts=("kv_rows.h:hadamard", "quantize_kv.metal"),
    )


def _launch(k: mx.array, v: mx.array, scheme: KVScheme) -> Launch:
    return Launch(
        program=_program(scheme),
        arrays=(k, v),
        grid=(32, k.size // scheme.k.dim, 1),
        threadgroup=(32, _tokens(scheme), 1),
        template=(("T", k.dtype),),
        shapes=((*k.shape[:-1], scheme.row_words),),
        dtypes=(mx.uint32,),
    )


def _refuse(k: mx.array, v: mx.array, scheme: KVScheme) -> str | None:
    return refuse_dims(scheme) or ("there are no tokens" if k.size == 0 else None)


def _reference(k: mx.array, v: mx.array, scheme: KVScheme) -> list[mx.array]:
    return [pack(scheme, k, v)]


KERNEL = Kernel("quantize_kv", _launch, _refuse, _reference, small.quantize)
