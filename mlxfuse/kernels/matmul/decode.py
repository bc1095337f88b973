"""Decoding of streams in plain MLX operations: what the traits of ``metal/formats.h`` mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from ..weight import AffineSegment, AnySegment

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

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
    name = segment.format.name
    arrays = {s: a.flatten(0, -2) for s, a in segment.arrays.items()}
    codes = _CODES[name](arrays)
    scale, bias = _scales(name, arrays)
    # [rows, groups of one scale, weights of a group]
    weights = scale[..., None] * codes.reshape(*scale.shape, segment.columns // scale.shape[1])
    if bias is not None:
        weights = weights + bias[..., None]
    return weights.reshape(*lead, segment.columns)


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


def _table(values: tuple[int, ...]) -> Callable[[dict[str, mx.array]], mx.array]:
    def codes(a: dict[str, mx.array]) -> mx.array:
        return mx.array(values, mx.float32)[_nibbles(a)]

    return codes


def _minus(
    codes: Callable[[dict[str, mx.array]], mx.array], offset: int
) -> Callable[[dict[str, mx.array]], mx.array]:
    def centred(a: dict[str, mx.array]) -> mx.array:
        return codes(a).astype(mx.float32) - offset

    return centred


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
    "IQ4_NL": _table(IQ4_VALUES),
    "IQ4_XS": _table(IQ4_VALUES),
    "MXFP4": _table(E2M1_VALUES),
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


_TIMES: dict[str, Callable[[dict[str, mx.array]], mx.array]] = {
    "Q3_K": _q3_k_times,
    "Q6_K": lambda a: a["scales"].view(mx.int8).astype(mx.float32),
}


def _scales(name: str, a: dict[str, mx.array]) -> Scales:
    """The scale of every group of weights, and the bias where there is one."""
    if name in _TIMES:
        return mx.repeat(_supers(a), 16, axis=1) * _TIMES[name](a), None
    return _SCALES[name](a)


def _supers(a: dict[str, mx.array]) -> mx.array:
    return a["supers"].astype(mx.float32)


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
    name, arrays = segment.format.name, dict(segment.arrays)
    codes = _CODES[name](arrays).astype(mx.float32).reshape(segment.rows, segment.columns)
    if name in _TIMES:
        return Integers(codes, _TIMES[name](arrays), mx.repeat(_supers(arrays), 8, axis=1), None)
    return Integers(codes, None, *_SCALES[name](arrays))
