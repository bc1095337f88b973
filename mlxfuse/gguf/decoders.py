"""The block formats: one decoder a type, from bytes to integer codes and float32 scales.

Sources: the layouts in ``ggml/src/ggml-common.h``, and the order of operations in
``ggml/src/ggml-quants.c``, which is kept so that results equal llama.cpp's bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mlxfuse import codebooks

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


class Decoded(NamedTuple):
    """``n`` blocks taken apart: weight = code * scale + offset, in float32, in that order.

    codes    ``(n, block_size)``, int8 or uint8; the values themselves for unquantised types.
    scales   float32 ``(n, groups)``, each for ``block_size / groups`` weights in a row, or None.
    offsets  float32 like ``scales``, or None.
    """

    codes: NDArray[Any]
    scales: Floats | None = None
    offsets: Floats | None = None


# --- what decoders are made of ---


# Short lanes are moved as one item each, which numpy copies several times faster than their bytes.
_WIDE = {4: "u4", 8: "u8", 16: "c16"}


def _unpack(packed: Bytes, bits: int, lane: int) -> Bytes:
    """Codes of ``bits`` bits from ``(n, bytes)``, as uint8 ``(n, codes)``.

    Bytes come in lanes of ``lane``; a lane's lowest bits are its first ``lane`` codes, the next
    bits the following ones, and so on.
    """
    n = len(packed)
    wide = _WIDE.get(lane, "u1")
    lanes = packed.view(wide).copy().view(np.uint8).reshape(n, -1, lane)
    codes = np.empty((n, lanes.shape[1], 8 // bits, lane), np.uint8)
    for i in range(8 // bits):
        codes.view(wide)[:, :, i] = (lanes >> np.uint8(i * bits)).view(wide)
    codes &= np.uint8((1 << bits) - 1)
    return codes.reshape(n, -1)


def _gather(table: NDArray[Any], index: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """``table[index]`` as ``(n, -1)`` of ``dtype``, which splits the table's wide entries."""
    # No index is out of range; "wrap" only spares the check and its copy.
    entries: NDArray[Any] = np.take(table, index, mode="wrap")
    return entries.view(dtype).reshape(len(index), -1)


def _bits(packed: Bytes) -> Bytes:
    """The bits of ``(n, bytes)``, lowest first, as uint8 ``(n, 8 * bytes)`` of 0 and 1."""
    return _gather(codebooks.BITS, packed, np.uint8)


def _float16(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte ``at`` of each block, as float32 ``(n, 1)``."""
    return blocks[:, at : at + 2].view("<f2").astype(np.float32)


def _words(packed: Bytes, dtype: str) -> NDArray[Any]:
    return np.ascontiguousarray(packed).view(dtype)


def _fields(words: NDArray[Any], shifts: tuple[int, ...], mask: int) -> NDArray[Any]:
    """Bit fields of each word of ``(n, words)``: ``(n, words * len(shifts))``."""
    fields: NDArray[Any] = words[..., None] >> np.array(shifts, words.dtype)
    fields &= words.dtype.type(mask)
    return fields.reshape(len(words), -1)


# --- unquantised ---


def _values(dtype: str) -> Callable[[Bytes], Decoded]:
    return lambda blocks: Decoded(blocks.view(dtype))


@cache
def _float16_table() -> Floats:
    with np.errstate(all="ignore"):
        return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def _f16(blocks: Bytes) -> Decoded:
    # A gather of 65,536 values is 2.5 times faster than numpy's conversion.
    return Decoded(_gather(_float16_table(), blocks.view("<u2"), np.float32))


def _bf16(blocks: Bytes) -> Decoded:
    bits = blocks.view("<u2").astype(np.uint32)
    bits <<= np.uint32(16)
    return Decoded(bits.view(np.float32))


# --- 32 weights and a scale ---


def _q4_0(blocks: Bytes) -> Decoded:
    codes = _unpack(blocks[:, 2:], 4, 16).view(np.int8)
    codes -= np.int8(8)
    return Decoded(codes, _float16(blocks, 0))


def _q4_1(blocks: Bytes) -> Decoded:
    return Decoded(_unpack(blocks[:, 4:], 4, 16), _float16(blocks, 0), _float16(blocks, 2))


def _five_bits(low: Bytes, high: Bytes) -> Bytes:
    codes = _bits(high)
    codes <<= np.uint8(4)
    codes |= _unpack(low, 4, 16)
    return codes


def _q5_0(blocks: Bytes) -> Decoded:
    codes = _five_bits(blocks[:, 6:], blocks[:, 2:6]).view(np.int8)
    codes -= np.int8(16)
    return Decoded(codes, _float16(blocks, 0))


def _q5_1(blocks: Bytes) -> Decoded:
    codes = _five_bits(blocks[:, 8:], blocks[:, 4:8])
    return Decoded(codes, _float16(blocks, 0), _float16(blocks, 2))


def _q8_0(blocks: Bytes) -> Decoded:
    return Decoded(blocks[:, 2:].view(np.int8), _float16(blocks, 0))


def _q1_0(blocks: Bytes) -> Decoded:
    codes = _bits(blocks[:, 2:]).view(np.int8)
    codes += codes
    codes -= np.int8(1)
    return Decoded(codes, _float16(blocks, 0))


def _q2_0(blocks: Bytes) -> Decoded:
    codes = _unpack(blocks[:, 2:], 2, 1).view(np.int8)
    codes -= np.int8(1)
    return Decoded(codes, _float16(blocks, 0))


def _iq4_nl(blocks: Bytes) -> Decoded:
    codes = _gather(codebooks.IQ4, _unpack(blocks[:, 2:], 4, 16), np.int8)
    return Decoded(codes, _float16(blocks, 0))


def _mxfp4(blocks: Bytes) -> Decoded:
    codes = _gather(codebooks.E2M1X2, _unpack(blocks[:, 1:], 4, 16), np.int8)
    return Decoded(codes, codebooks.E8M0_HALF[blocks[:, :1]])


def _nvfp4(blocks: Bytes) -> Decoded:
    codes = _gather(codebooks.E2M1X2, _unpack(blocks[:, 4:], 4, 8), np.int8)
    return Decoded(codes, codebooks.UE4M3_HALF[blocks[:, :4]])


# --- K-quants: 256 weights, scales of scales ---


def _q2_k(blocks: Bytes) -> Decoded:
    scales = _float16(blocks, 80) * (blocks[:, :16] & np.uint8(15))
    offsets = -_float16(blocks, 82) * (blocks[:, :16] >> np.uint8(4))
    return Decoded(_unpack(blocks[:, 16:80], 2, 32), scales, offsets)


def _q3_k(blocks: Bytes) -> Decoded:
    codes = _unpack(blocks[:, :32], 1, 32)
    codes <<= np.uint8(2)
    codes |= _unpack(blocks[:, 32:96], 2, 32)
    codes = codes.view(np.int8)
    codes -= np.int8(4)
    scales = _unpack(blocks[:, 104:108], 2, 4) << np.uint8(4) | _unpack(blocks[:, 96:104], 4, 8)
    return Decoded(codes, _float16(blocks, 108) * (scales.view(np.int8) - np.int8(32)))


def _six_bit_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scales and offsets of Q4_K and Q5_K from d, dmin and twelve bytes of 6-bit pairs."""
    # Four 6-bit scales, four minima, then four bytes of low nibbles of the other four of each,
    # whose top bits are the top bits of the first eight bytes. Four bytes at a time:
    low, middle, high = np.ascontiguousarray(blocks[:, 4:16]).view(np.uint32).T
    six, four, top = np.uint32(0x3F3F3F3F), np.uint32(0x0F0F0F0F), np.uint32(0x30303030)
    scales = np.stack([low & six, high & four | low >> 2 & top], axis=1).view(np.uint8)
    minima = np.stack([middle & six, high >> 4 & four | middle >> 2 & top], axis=1).view(np.uint8)
    return _float16(blocks, 0) * scales, -_float16(blocks, 2) * minima


def _q4_k(blocks: Bytes) -> Decoded:
    return Decoded(_unpack(blocks[:, 16:], 4, 32), *_six_bit_scales(blocks))


def _q5_k(blocks: Bytes) -> Decoded:
    codes = _unpack(blocks[:, 16:48], 1, 32)
    codes <<= np.uint8(4)
    codes |= _unpack(blocks[:, 48:], 4, 32)
    return Decoded(codes, *_six_bit_scales(blocks))


def _q6_k(blocks: Bytes) -> Decoded:
    codes = _unpack(blocks[:, 128:192], 2, 32)
    codes <<= np.uint8(4)
    codes |= _unpack(blocks[:, :128], 4, 64)
    codes = codes.view(np.int8)
    codes -= np.int8(32)
    return Decoded(codes, _float16(blocks, 208) * blocks[:, 192:208].view(np.int8))


def _q8_k(blocks: Bytes) -> Decoded:
    scales = np.ascontiguousarray(blocks[:, :4]).view("<f4")
    return Decoded(blocks[:, 4:260].view(np.int8), scales)


def _iq4_xs(blocks: Bytes) -> Decoded:
    codes = _gather(codebooks.IQ4, _unpack(blocks[:, 8:], 4, 16), np.int8)
    scales = _unpack(blocks[:, 2:4], 2, 1) << np.uint8(4) | _unpack(blocks[:, 4:8], 4, 1)
    return Decoded(codes, _float16(blocks, 0) * (scales.view(np.int8) - np.int8(32)))


# --- ternary ---


def _tq1_0(blocks: Bytes) -> Decoded:
    # A byte holds a base-3 fraction: times 3**k (mod 256), its top trit is byte * 3 >> 8.
    n = len(blocks)
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
    parts = [
        (blocks[:, None, a:b] * powers[:trits]).reshape(n, -1)
        for a, b, trits in ((0, 32, 5), (32, 48, 5), (48, 52, 4))
    ]
    digits = np.concatenate(parts, axis=1)
    codes = (digits > 85).view(np.int8) + (digits > 170).view(np.int8)
    codes -= np.int8(1)
    return Decoded(codes, _float16(blocks, 52))


def _tq2_0(blocks: Bytes) -> Decoded:
    codes = _unpack(blocks[:, :64], 2, 32).view(np.int8)
    codes -= np.int8(1)
    return Decoded(codes, _float16(blocks, 64))


# --- IQ: codebook entries of four or eight weights, with signs ---


def _signed(
    name: str, index: NDArray[Any], signs: NDArray[Any], sign_table: NDArray[np.uint64]
) -> NDArray[np.int8]:
    codes = _gather(codebooks.packed_grid(name), index, np.int8)
    codes *= _gather(sign_table, signs, np.int8)
    return codes


def _half_steps(d: Floats, scales: NDArray[Any], unit: float) -> Floats:
    return d * (np.float32(0.5) + scales.astype(np.float32)) * np.float32(unit)


_SEVEN_BITS = (0, 7, 14, 21)


def _iq2_xxs(blocks: Bytes) -> Decoded:
    pairs = _words(blocks[:, 2:], "<u4").reshape(-1, 8, 2)
    index = np.ascontiguousarray(pairs[..., 0]).view(np.uint8)
    tail = pairs[..., 1]
    codes = _signed("IQ2_XXS", index, _fields(tail, _SEVEN_BITS, 127), codebooks.EVEN_SIGNS)
    return Decoded(codes, _half_steps(_float16(blocks, 0), tail >> np.uint32(28), 0.25))


def _iq2_xs(blocks: Bytes) -> Decoded:
    words = _words(blocks[:, 2:66], "<u2")
    index, signs = words & np.uint16(511), words >> np.uint16(9)
    codes = _signed("IQ2_XS", index, signs, codebooks.EVEN_SIGNS)
    return Decoded(codes, _half_steps(_float16(blocks, 0), _unpack(blocks[:, 66:], 4, 1), 0.25))


def _iq2_s(blocks: Bytes) -> Decoded:
    index = _unpack(blocks[:, 66:74], 2, 1).astype(np.uint16) << np.uint16(8) | blocks[:, 2:34]
    codes = _signed("IQ2_S", index, blocks[:, 34:66], codebooks.SIGNS)
    return Decoded(codes, _half_steps(_float16(blocks, 0), _unpack(blocks[:, 74:], 4, 1), 0.25))


def _iq3_xxs(blocks: Bytes) -> Decoded:
    tail = _words(blocks[:, 66:], "<u4")
    signs = _fields(tail, _SEVEN_BITS, 127)
    codes = _signed("IQ3_XXS", blocks[:, 2:66], signs, codebooks.EVEN_SIGNS)
    return Decoded(codes, _half_steps(_float16(blocks, 0), tail >> np.uint32(28), 0.5))


def _iq3_s(blocks: Bytes) -> Decoded:
    index = _bits(blocks[:, 66:74]).astype(np.uint16) << np.uint16(8) | blocks[:, 2:66]
    codes = _signed("IQ3_S", index, blocks[:, 74:106], codebooks.SIGNS)
    scales = _unpack(blocks[:, 106:], 4, 1)
    return Decoded(codes, _float16(blocks, 0) * (scales + scales + np.uint8(1)))


def _iq1(index: NDArray[Any], minus: NDArray[Any], scales: Floats) -> Decoded:
    """Weight = scale * (grid +- 1/8); codes hold 8 times the bracket, scales an eighth."""
    codes = _gather(codebooks.packed_grid("IQ1_S"), index, np.int8)
    groups = codes.reshape(*minus.shape, -1)
    groups += np.where(minus, np.int8(-1), np.int8(1))[..., None]
    return Decoded(codes, scales * np.float32(0.125))


def _iq1_s(blocks: Bytes) -> Decoded:
    high = _words(blocks[:, 34:], "<u2")
    index = _fields(high, (0, 3, 6, 9), 7) << np.uint16(8) | blocks[:, 2:34]
    scales = _float16(blocks, 0) * (2 * _fields(high, (12,), 7) + 1)
    return _iq1(index, high & np.uint16(0x8000) != 0, scales)


def _iq1_m(blocks: Bytes) -> Decoded:
    high = _unpack(blocks[:, 32:48], 4, 1)
    index = (high & np.uint8(7)).astype(np.uint16) << np.uint16(8) | blocks[:, :32]
    words = _words(blocks[:, 48:], "<u2")
    # The float16 scale lies in the top four bits of the four words, lowest first.
    nibbles = words >> np.uint16(12) << np.array([0, 4, 8, 12], np.uint16)
    d = np.bitwise_or.reduce(nibbles, axis=1, keepdims=True).view(np.float16).astype(np.float32)
    scales = d * (2 * _fields(words, (0, 3, 6, 9), 7) + 1)
    return _iq1(index, high & np.uint8(8) != 0, scales)


DECODERS: dict[str, Callable[[Bytes], Decoded]] = {
    "F32": _values("<f4"),
    "F64": _values("<f8"),
    "F16": _f16,
    "BF16": _bf16,
    "I8": _values("<i1"),
    "I16": _values("<i2"),
    "I32": _values("<i4"),
    "I64": _values("<i8"),
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "IQ4_NL": _iq4_nl,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "Q8_K": _q8_k,
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
}
