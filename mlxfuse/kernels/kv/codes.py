"""Attention over keys and values that others have quantised, in the forms of oneDNN's graph API.

There, x = (code - zero point) * scale, with codes signed or unsigned, and scales and zero points
for the tensor, or along any axes. Here all of it becomes packed rows, exactly, or is refused::

    packed = pack_codes(KVCodes(k_codes, k_scales), KVCodes(v_codes, v_scales, bits=4))
    output = packed.attend(queries, scale=head_size**-0.5)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from .compressed_sdpa import compressed_sdpa
from .scheme import KVScheme, KVSide, code_words, value_words
from .sdpa_call import Scores


@dataclass(frozen=True, slots=True)
class KVCodes:
    """Quantised keys or values.

    codes        int8 or uint8 ``[B, Hkv, S, dim]``, one code in each element.
    scales       floating point, of four axes, each as long as that of the codes or 1; the last
                 may also have an entry for each group of elements. A scale for each element
                 must be the same for all tokens (per channel).
    zero_points  integers of the shape of ``scales``, in the range of the codes; None for 0.
    bits         4 or 8.
    """

    codes: mx.array
    scales: mx.array
    zero_points: mx.array | None = None
    bits: int = 8

    def __post_init__(self) -> None:
        codes, scales = self.codes, self.scales
        if codes.ndim != 4 or codes.dtype not in (mx.int8, mx.uint8):
            raise ValueError(
                f"codes: expected int8 or uint8 [B, Hkv, S, dim], found {codes.dtype} {codes.shape}"
            )
        pairs = zip(scales.shape[:3], codes.shape[:3], strict=False)
        if scales.ndim != 4 or any(n not in (1, m) for n, m in pairs):
            raise ValueError(f"scales {scales.shape} do not broadcast to codes {codes.shape}")
        if self.dim % scales.shape[3]:
            raise ValueError(f"{scales.shape[3]} scales for heads of {self.dim}")
        if self.channels and scales.shape[2] != 1:
            raise ValueError(
                "a scale for each element of each token is not supported; the nearest valid group "
                "is 32 elements"
            )
        points = self.zero_points
        if points is None:
            return
        if points.shape != scales.shape:
            raise ValueError(
                f"zero points {points.shape} of other shape than scales {scales.shape}"
            )
        if self.channels and self.bits == 8:
            raise ValueError(
                "zero points of channels are not supported for 8-bit codes; the nearest valid "
                "form has none, or one for each group"
            )

    @property
    def dim(self) -> int:
        return self.codes.shape[3]

    @property
    def channels(self) -> bool:
        """Whether each element has a scale of its own."""
        return self.scales.shape[3] == self.dim

    @property
    def offset(self) -> int:
        """What makes the codes unsigned."""
        return 1 << (self.bits - 1) if self.codes.dtype == mx.int8 else 0


@dataclass(frozen=True, slots=True)
class PackedCodes:
    """Keys and values as packed rows, made once by `pack_codes` and attended to many times.

    scheme           what a row is.
    rows             uint32 ``[B, Hkv, S or up to 3 more, row_words]``.
    length           S.
    k_scale, v_scale floating point ``[1 or B, 1 or Hkv, 1, dim]``: scales of channels, or None.
    """

    scheme: KVScheme
    rows: mx.array
    length: int
    k_scale: mx.array | None = None
    v_scale: mx.array | None = None

    def attend(
        self, q: mx.array, *, left_padding: mx.array | None = None, **options: Any
    ) -> mx.array:
        """`compressed_sdpa` over all of the keys and values.

        Scales of channels multiply the queries, or the result, in float32.

        Args:
            q: ``[B, Hq, L, dim]``; Hq a multiple of Hkv.
            left_padding: as for `compressed_sdpa`.
            options: the fields of `Scores`: ``scale``, ``mask``, ``causal``, ``window``,
                ``softcap``, ``sinks``.

        Returns:
            ``[B, Hq, L, v.dim]`` in ``q.dtype``.

        Raises:
            ValueError: arguments whose shapes or types do not fit together.
        """
        query = q
        if self.k_scale is not None:
            query = q.astype(mx.float32) * _for_queries(self.k_scale, q)
        (out,) = compressed_sdpa(
            *(query, self.scheme, self.rows, self.length),
            scores=Scores(**options),
            left_padding=left_padding,
        )
        if self.v_scale is not None:
            out = out.astype(mx.float32) * _for_queries(self.v_scale, q)
        return out.astype(q.dtype)


def pack_codes(k: KVCodes | mx.array, v: KVCodes | mx.array) -> PackedCodes:
    """Keys and values as the attention kernel reads them; no code, scale or zero point is rounded.

    Args:
        k: codes, or plain keys ``[B, Hkv, S, dim]``. Any S: rows are padded to a multiple of 4.
        v: likewise, independently of k.

    Raises:
        ValueError: codes have no exact form here; the nearest that has is named.
    """
    scheme, rows, k_scale, v_scale = _packed(k, v)
    length = rows.shape[2]
    if short := -length % 4:
        rows = mx.pad(rows, [(0, 0), (0, 0), (0, short), (0, 0)])
    return PackedCodes(scheme, rows, length, k_scale, v_scale)


def _for_queries(scale: mx.array, q: mx.array) -> mx.array:
    """Scales ``[B or 1, Hkv or 1, 1, dim]`` for each head of queries."""
    scale = scale.astype(mx.float32)
    return scale if scale.shape[1] == 1 else mx.repeat(scale, q.shape[1] // scale.shape[1], axis=1)


def _packed(
    k: KVCodes | mx.array, v: KVCodes | mx.array
) -> tuple[KVScheme, mx.array, mx.array | None, mx.array | None]:
    """Scheme, rows, and the scales of the channels of K and V."""
    types = {x.scales.dtype if isinstance(x, KVCodes) else x.dtype for x in (k, v)}
    dtype = types.pop() if len(types) == 1 else mx.float32
    (k_side, k_words, k_scales, k_channels), (v_side, v_words, v_scales, v_channels) = (
        _side(x, dtype) for x in (k, v)
    )
    rows = mx.concatenate([k_words, v_words, *k_scales, *v_scales], axis=-1)
    return KVScheme(k_side, v_side, dtype), rows, k_channels, v_channels


def _side(
    x: KVCodes | mx.array, dtype: mx.Dtype
) -> tuple[KVSide, mx.array, list[mx.array], mx.array | None]:
    """The side, its words, the words of its scales, and the scales of its channels."""
    if isinstance(x, mx.array):
        return KVSide(x.shape[-1], 16), value_words(x.astype(dtype)), [], None
    channels = x.scales if x.channels else None
    if channels is not None:
        if x.zero_points is not None:  # of 4 bits: the differences are codes of 8
            codes = x.codes.astype(mx.int8) - x.zero_points.astype(mx.int8)
            x = replace(x, codes=codes, bits=8, zero_points=None)
        x = replace(x, scales=mx.ones((1, 1, 1, 1), dtype))
    lead = x.codes.shape[:3]
    groups = x.scales.shape[3]
    kind = "symmetric" if x.zero_points is None and x.offset else "zero_point"
    side = KVSide(x.dim, x.bits, x.dim // groups, kind)
    numbers = [x.scales.astype(dtype)]
    if kind == "zero_point":
        points = mx.zeros_like(x.scales) if x.zero_points is None else x.zero_points
        numbers.append((points.astype(mx.int32) + x.offset).astype(dtype))
    shape = (*lead, groups)
    stacked = mx.stack([mx.broadcast_to(n, shape) for n in numbers], axis=-1)
    codes = (x.codes.astype(mx.int32) + x.offset).astype(mx.uint32)
    return side, code_words(side, codes), [value_words(stacked.reshape(*lead, -1))], channels
