"""New keys and values as packed rows: ``metal/quantize_kv.metal``."""

from __future__ import annotations

import mlx.core as mx

from .kv_scheme import KVScheme, pack


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
        ValueError: shapes that do not fit, or codes with zero points, which only come from
            `pack_codes`.
    """
    if k.ndim != 4 or k.shape[-1] != scheme.k.dim or v.shape != (*k.shape[:-1], scheme.v.dim):
        raise ValueError(
            f"expected keys [B, Hkv, L, {scheme.k.dim}] and values [B, Hkv, L, {scheme.v.dim}], "
            f"found {k.shape} and {v.shape}"
        )
    if "zero_point" in (scheme.k.kind, scheme.v.kind):
        raise ValueError("nothing is quantised with zero points: use affine or symmetric codes")
    return pack(scheme, k, v)
