"""Decoding of streams in plain MLX operations: what the traits of ``metal/formats.h`` mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ... import codebooks
from ..weight import FACTORS, AffineSegment, AnySegment

Scales = tuple[mx.array, mx.array | None]


def decode(segment: AnySegment) -> mx.array:
    """The weights in float32, ``[..., rows, columns]``, bit for bit as gguf-py gives them."""
    if isinstance(segment, AffineSegment):
        scales, biases = segment.arrays["scales"], segment.arrays.get("supers")
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(
            segment.arrays["codes"],
            scales,
            biases,
            group_size=segment.group_size,
            bits=segment.bits,
            mode=segment.mode,
        ).astype(mx.float32)
    lead = segment.arrays["codes"].shape[:-1]
    if 0 in lead:
        return mx.zeros((*lead, segment.columns))  # below, sizes are inferred
    name = segment.trait
    arrays = {s: a.flatten(0, -2) for s, a in segment.arrays.items()}
    codes = _CODES[name](arrays)
    scale, bias = _scales(name, arrays)
    # [rows, groups of one scale, weights of a group]
    weights = scale[..., None] * codes.reshape(*scale.shape, segment.columns // scale.shape[1])
    if bias is not None:
        weights = weights + bias[..., None]
    weights = weights.reshape(*lead, segment.columns)
    return weights * segment.arrays[FACTORS] if FACTORS in segment.arrays else weights


def _unpack(words: mx.array, bits: int, place: Callable[[int, int], tuple[int, int]]) -> mx.array:
    """The ``bits`` of every weight from a plane of ``bits`` words for 32 weights.

    Returns uint32 ``[rows, groups, 2, 4, 4]``: weight ``16 h + 4 j + b`` at ``[..., h, j, b]``,
    from byte ``b`` of the word and from the bit on that ``place(h, j)`` says.
    """
    groups = words.reshape(words.shape[0], words.shape[1] // bits, bits)
    quads = []
    for h in (0, 1):
        for j in range(4):
            word, at = place(h, j)
            shifts = mx.array([at, at + 8, at + 16, at + 24], mx.uint32)
            quads.append((groups[..., word, None] >> shifts) & ((1 << bits) - 1))
    return mx.stack(quads, axis=-2).reshape(*groups.shape[:2], 2, 4, 4)


def _nibbles(a: dict[str, mx.array]) -> mx.array:
    return _unpack(a["codes"], 4, lambda h, j: (j, 4 * h))


def _pairs(words: mx.array) -> mx.array:
    return _unpack(words, 2, lambda h, j: (j % 2, 4 * h + 2 * (j // 2)))


def _bits(a: dict[str, mx.array]) -> mx.array:
    return _unpack(a["high"], 1, lambda h, j: (0, 4 * h + j))


def _rotated_bits(a: dict[str, mx.array]) -> mx.array:
    return _unpack(a["high"], 1, lambda h, j: (0, 4 * (j % 2) + 2 * h + j // 2))


def _fives(a: dict[str, mx.array]) -> mx.array:
    return _nibbles(a) | _rotated_bits(a) << 4


def _table(values: NDArray[np.int8]) -> Callable[[dict[str, mx.array]], mx.array]:
    def codes(a: dict[str, mx.array]) -> mx.array:
        return mx.array(values.astype(np.float32))[_nibbles(a)]

    return codes


def _minus(
    codes: Callable[[dict[str, mx.array]], mx.array], offset: int
) -> Callable[[dict[str, mx.array]], mx.array]:
    def centred(a: dict[str, mx.array]) -> mx.array:
        return codes(a).astype(mx.float32) - offset

    return centred


def _fields(words: mx.array, bits: int, count: int) -> mx.array:
    """``count`` neighbouring fields of ``bits`` bits of every word, lowest first, in float32 or as
    indices: ``[rows, words * count]``."""
    shifts = mx.arange(count, dtype=mx.uint32) * bits
    fields = words.astype(mx.uint32)[..., None] >> shifts & ((1 << bits) - 1)
    return fields.reshape(words.shape[0], -1)


def _even_signs(words: mx.array) -> mx.array:
    """32 signs, 1 or -1, from four times 7 bits of every word; each eighth makes them even."""
    bits = _fields(words, 1, 28).reshape(words.shape[0], -1, 7)
    eighth = bits.sum(axis=-1, keepdims=True) & 1
    return _signs(mx.concatenate([bits, eighth], axis=-1))


def _signs(bits: mx.array) -> mx.array:
    return 1 - 2 * bits.astype(mx.float32).reshape(bits.shape[0], -1)


def _plane_signs(a: dict[str, mx.array]) -> mx.array:
    return _signs(_rotated_bits({"high": a["signs"]}))


def _entries(name: str, index: mx.array) -> mx.array:
    """The values of a codebook's entries, float32 ``[rows, values]``."""
    values = mx.array(codebooks.grid(name).astype(np.float32))
    return values[index].reshape(index.shape[0], -1)


def _bytes(words: mx.array) -> mx.array:
    return words.view(mx.uint8).astype(mx.uint32)


def _iq2_xxs(a: dict[str, mx.array]) -> mx.array:
    return _entries("IQ2_XXS", _bytes(a["codes"][:, 0::2])) * _even_signs(a["codes"][:, 1::2])


def _iq2_xs(a: dict[str, mx.array]) -> mx.array:
    both = a["codes"].view(mx.uint16)
    bits = _fields(both >> 9, 1, 7).reshape(both.shape[0], -1, 7)
    eighth = bits.sum(axis=-1, keepdims=True) & 1
    return _entries("IQ2_XS", both & 511) * _signs(mx.concatenate([bits, eighth], axis=-1))


def _iq2_s(a: dict[str, mx.array]) -> mx.array:
    high = _fields(a["high"], 2, 16)
    return _entries("IQ2_S", _bytes(a["codes"]) | high << 8) * _plane_signs(a)


def _iq3_xxs(a: dict[str, mx.array]) -> mx.array:
    return _entries("IQ3_XXS", _bytes(a["codes"])) * _even_signs(a["signs"])


def _iq3_s(a: dict[str, mx.array]) -> mx.array:
    high = _fields(a["high"], 1, 32)
    return _entries("IQ3_S", _bytes(a["codes"]) | high << 8) * _plane_signs(a)


def _iq1(index: mx.array, minus: mx.array) -> mx.array:
    """8 times the grid's values, plus or minus 1: of ``minus`` a bit for every 8 weights."""
    values = 8 * _entries("IQ1_S", index).reshape(*index.shape, 8)
    return values + (1 - 2 * minus.astype(mx.float32))[..., None]


def _iq1_s(a: dict[str, mx.array]) -> mx.array:
    high = a["high"].view(mx.uint16)
    minus = mx.repeat(high >> 15, 4, axis=1)
    return _iq1(_bytes(a["codes"]) | _fields(high & 0xFFF, 3, 4) << 8, minus)


def _iq1_m(a: dict[str, mx.array]) -> mx.array:
    four = _fields(a["high"], 4, 8)
    return _iq1(_bytes(a["codes"]) | (four & 7) << 8, four >> 3)


def _one_bit(a: dict[str, mx.array]) -> mx.array:
    return 1 - _signs(_rotated_bits({"high": a["codes"]}))


_CODES: dict[str, Callable[[dict[str, mx.array]], mx.array]] = {
    "Q4_0": _minus(_nibbles, 8),
    "Q4_1": _minus(_nibbles, 0),
    "Q5_0": _minus(_fives, 16),
    "Q5_1": _minus(_fives, 0),
    "Q8_0": lambda a: a["codes"].view(mx.int8).astype(mx.float32),
    "Q2_K": lambda a: _pairs(a["codes"]).astype(mx.float32),
    "Q3_K": _minus(lambda a: _pairs(a["codes"]) | _bits(a) << 2, 4),
    "Q4_K": _minus(_nibbles, 0),
    "Q5_K": _minus(lambda a: _nibbles(a) | _bits(a) << 4, 0),
    "Q6_K": _minus(lambda a: _nibbles(a) | _pairs(a["high"]) << 4, 32),
    "IQ4_NL": _table(codebooks.IQ4),
    "IQ4_XS": _table(codebooks.IQ4),
    "MXFP4": _table(codebooks.E2M1X2),
    "NVFP4": _table(codebooks.E2M1X2),
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "TQ2_0": _minus(lambda a: _pairs(a["codes"]), 1),
    "Q2_0": _minus(lambda a: _pairs(a["codes"]), 1),
    "Q1_0": _minus(_one_bit, 1),
    "F32": lambda a: a["codes"].view(mx.float32),
    "F16": lambda a: a["codes"].view(mx.float16).astype(mx.float32),
    "BF16": lambda a: a["codes"].view(mx.bfloat16).astype(mx.float32),
}


def _single(a: dict[str, mx.array]) -> Scales:
    return a["scales"].astype(mx.float32), None


def _with_bias(a: dict[str, mx.array]) -> Scales:
    both = a["scales"].astype(mx.float32)
    return both[:, 0::2], both[:, 1::2]


def _q2_k(a: dict[str, mx.array]) -> Scales:
    packed = a["scales"].view(mx.uint8)
    d = a["supers"].astype(mx.float32)
    scale = mx.repeat(d[:, 0::2], 16, axis=1) * (packed & 15)
    return scale, -(mx.repeat(d[:, 1::2], 16, axis=1) * (packed >> 4))


def _q3_k_times(a: dict[str, mx.array]) -> mx.array:
    packed = a["scales"].view(mx.uint8)
    packed = packed.reshape(packed.shape[0], packed.shape[1] // 12, 12)
    low, high = packed[..., :8], packed[..., 8:]
    four = mx.concatenate([low & 15, low >> 4], axis=-1)
    two = mx.concatenate([(high >> s) & 3 for s in (0, 2, 4, 6)], axis=-1)
    return ((four | two << 4).astype(mx.float32) - 32).reshape(packed.shape[0], -1)


def _odd(fields: mx.array) -> mx.array:
    return 2 * fields.astype(mx.float32) + 1


def _iq1_m_words(a: dict[str, mx.array]) -> mx.array:
    return a["scales"].view(mx.uint16)


def _iq1_m_supers(a: dict[str, mx.array]) -> mx.array:
    """The float16 in the top four bits of four words, lowest first."""
    words = _iq1_m_words(a)
    nibbles = (words >> 12).reshape(words.shape[0], -1, 4) << mx.array([0, 4, 8, 12], mx.uint16)
    return nibbles.sum(axis=-1).astype(mx.uint16).view(mx.float16).astype(mx.float32) / 8


_TIMES: dict[str, Callable[[dict[str, mx.array]], mx.array]] = {
    "Q3_K": _q3_k_times,
    "Q6_K": lambda a: a["scales"].view(mx.int8).astype(mx.float32),
    "IQ2_XS": lambda a: _odd(_fields(a["scales"], 4, 8)),
    "IQ2_S": lambda a: _odd(_fields(a["scales"], 4, 8)),
    "IQ1_M": lambda a: _odd(_fields(_iq1_m_words(a), 3, 4)),
}


def _scales(name: str, a: dict[str, mx.array]) -> Scales:
    """The scale of every group of weights, and the bias where there is one."""
    if name in _TIMES:
        return mx.repeat(_blocks(name, a), 16, axis=1) * _TIMES[name](a), None
    return _SCALES[name](a)


def _blocks(name: str, a: dict[str, mx.array]) -> mx.array:
    """The float32 scale of each block, which `_TIMES` multiplies for every 16 weights."""
    if name == "IQ1_M":
        return _iq1_m_supers(a)
    return _supers(a) / (8 if name in ("IQ2_XS", "IQ2_S") else 1)


def _supers(a: dict[str, mx.array]) -> mx.array:
    return a["supers"].astype(mx.float32)


def _scaled(
    factor: float, odd: Callable[[dict[str, mx.array]], mx.array]
) -> Callable[[dict[str, mx.array]], Scales]:
    """Scales of 32 weights: the block's times an odd number that is 2 times a field plus 1."""

    def scales(a: dict[str, mx.array]) -> Scales:
        return mx.repeat(factor * _supers(a), 8, axis=1) * _odd(odd(a)), None

    return scales


def _e4m3_half(a: dict[str, mx.array]) -> Scales:
    values = mx.array(codebooks.UE4M3_HALF)
    return values[_bytes(a["scales"])], None


def _six_bits(a: dict[str, mx.array]) -> Scales:
    blocks = a["scales"].reshape(a["scales"].shape[0], -1, 4)
    d = blocks[..., :1].view(mx.float16).astype(mx.float32)
    packed = blocks[..., 1:].view(mx.uint8)
    x, y, z = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scale = mx.concatenate([x & 63, (z & 15) | (x >> 2) & 48], axis=-1)
    minimum = mx.concatenate([y & 63, (z >> 4) | (y >> 2) & 48], axis=-1)
    rows = blocks.shape[0]
    return (
        (d[..., :1] * scale).reshape(rows, -1),
        (-(d[..., 1:] * minimum)).reshape(rows, -1),
    )


def _iq4_xs(a: dict[str, mx.array]) -> Scales:
    blocks = a["scales"].reshape(a["scales"].shape[0], -1, 2)
    d = blocks[..., :1].view(mx.float16)[..., :1].astype(mx.float32)
    g = mx.arange(8, dtype=mx.uint32)
    six = (blocks[..., 1:] >> (4 * g)) & 15 | (blocks[..., :1] >> (16 + 2 * g) & 3) << 4
    return (d * (six.astype(mx.float32) - 32)).reshape(blocks.shape[0], -1), None


def _mxfp4(a: dict[str, mx.array]) -> Scales:
    # 2^(e - 128), the scale that goes with twice the value; subnormal for e < 2.
    e = a["scales"].astype(mx.uint32)
    bits = mx.where(e < 2, mx.array(0x00200000, mx.uint32) << e, (e - 1) << 23)
    return bits.view(mx.float32), None


_SCALES: dict[str, Callable[[dict[str, mx.array]], Scales]] = {
    "Q4_0": _single,
    "Q4_1": _with_bias,
    "Q5_0": _single,
    "Q5_1": _with_bias,
    "Q8_0": _single,
    "Q2_K": _q2_k,
    "Q4_K": _six_bits,
    "Q5_K": _six_bits,
    "IQ4_NL": _single,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "NVFP4": _e4m3_half,
    "IQ2_XXS": _scaled(0.125, lambda a: a["codes"][:, 1::2] >> 28),
    "IQ3_XXS": _scaled(0.25, lambda a: a["signs"] >> 28),
    "IQ3_S": _scaled(1.0, lambda a: _fields(a["scales"], 4, 8)),
    "IQ1_S": _scaled(0.125, lambda a: a["high"].view(mx.uint16) >> 12 & 7),
    "TQ2_0": _single,
    "Q2_0": _single,
    "Q1_0": _single,
    **dict.fromkeys(("F32", "F16", "BF16"), lambda a: (mx.ones((a["codes"].shape[0], 1)), None)),
}


class Integers(NamedTuple):
    """Rows of weights as ``scales * times * codes + biases``, all in float32.

    codes   ``[rows, K]``, integers from -128 to 127.
    times   integers ``[rows, K / 16]``, or None for 1.
    scales  ``[rows, K / 32]``.
    biases  ``[rows, K / 32]``, or None for 0.
    """

    codes: mx.array
    times: mx.array | None
    scales: mx.array
    biases: mx.array | None


def integers(segment: AnySegment) -> Integers:
    """What the integer products of ``metal/int8_matmul.metal`` take as weights."""
    if isinstance(segment, AffineSegment):
        scales, biases = (segment.arrays[n].astype(mx.float32) for n in ("scales", "supers"))
        offset = 128 if segment.bits == 8 else 0
        ones, group = mx.ones_like(scales), segment.group_size
        codes = mx.dequantize(
            segment.arrays["codes"], ones, -offset * ones, group_size=group, bits=segment.bits
        )
        scales, biases = (mx.repeat(a, group // 32, -1) for a in (scales, biases + offset * scales))
        return Integers(codes, None, scales, biases)
    name, arrays = segment.trait, dict(segment.arrays)
    codes = _CODES[name](arrays).astype(mx.float32).reshape(segment.rows, segment.columns)
    if name in _TIMES:
        supers = mx.repeat(_blocks(name, arrays), 8, axis=1)
        return Integers(codes, _TIMES[name](arrays), supers, None)
    single, bias = _SCALES[name](arrays)
    return Integers(codes, None, _of_groups(single, segment.columns), bias)


def _of_groups(scales: mx.array, columns: int) -> mx.array:
    """One for each 32 weights, of those that belong to more."""
    return mx.repeat(scales, columns // 32 // scales.shape[1], axis=1)
