"""Compressed keys and values: how a token's K and V of one head lie in one packed row.

A row of 32-bit words holds, each part padded to whole words::

    codes of K | codes of V | scales of K | scales of V

so that new tokens are one array and one write. Codes are in MLX's order, the first in the lowest
bits. Each group of codes has a scale, followed by its bias or zero point where it has one. A side
of 16 bits is not quantised: its "codes" are the values themselves, in the scheme's type, and it
has no scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx

FLOATS = (mx.float16, mx.bfloat16, mx.float32)
BITS = (2, 3, 4, 5, 6, 8, 16)
KINDS = ("affine", "symmetric", "zero_point")
GROUPS = (32, 64, 128)

V_BLOCK = 64
"""Largest block that values are rotated in; keys are rotated in the largest that fits."""


@dataclass(frozen=True, slots=True)
class KVSide:
    """K or V of one head.

    dim     elements; a multiple of 8.
    bits    4 or 8: codes; 16: plain values of the scheme's type. Arrays of MLX's own, which are
            no packed rows, may also have codes of 2, 3, 5 or 6 bits.
    group   consecutive elements that share a scale: 32, 64 or 128 that divides ``dim``, or
            ``dim`` itself. 0 stands for ``dim``; of no meaning with 16 bits.
    kind    what a code c stands for, with unsigned c and the group's scale s:
            ``affine`` s c + bias, ``symmetric`` s (c - 2^(bits - 1)), ``zero_point`` s (c - z).
    rotate  the elements are multiplied by an orthonormal Hadamard matrix, block by block, before
            they are quantised; see `KVScheme`.
    """

    dim: int
    bits: int = 8
    group: int = 64
    kind: str = "affine"
    rotate: bool = False

    def __post_init__(self) -> None:
        if self.dim <= 0 or self.dim % 8:
            raise ValueError(f"a head of a multiple of 8 elements is expected, found {self.dim}")
        if self.bits not in BITS:
            raise ValueError(f"bits of keys and values: expected {BITS}, found {self.bits}")
        if self.kind not in KINDS:
            raise ValueError(f"kind of codes: expected {KINDS}, found {self.kind!r}")
        if self.group == 0 or not self.quantized:
            object.__setattr__(self, "group", self.dim)
        valid = [g for g in (*GROUPS, self.dim) if self.dim % g == 0]
        if self.group not in valid:
            nearest = min(valid, key=lambda g: abs(g - self.group))
            raise ValueError(
                f"a group of {self.group} does not divide a head of {self.dim} elements; the "
                f"nearest valid group is {nearest}"
            )

    @property
    def quantized(self) -> bool:
        return self.bits < 16

    @property
    def groups(self) -> int:
        return self.dim // self.group if self.quantized else 0

    @property
    def numbers(self) -> int:
        """Numbers beside the codes: one or two for each group."""
        return self.groups * (1 if self.kind == "symmetric" else 2)

    def code_words(self, dtype: mx.Dtype) -> int:
        """Words of the codes, or of the values where they are plain."""
        return self.dim * (self.bits if self.quantized else 8 * dtype.size) // 32

    def scale_words(self, dtype: mx.Dtype) -> int:
        return -(-self.numbers * dtype.size // 4)


@dataclass(frozen=True, slots=True)
class KVScheme:
    """The layout of a row: K, V and the type of their scales and plain values.

    Keys are rotated in blocks of the largest power of two that divides their dimension, values
    in blocks of at most `V_BLOCK`. A Hadamard matrix is its own inverse, so queries are rotated
    like keys and the sum of values like a value.
    """

    k: KVSide
    v: KVSide
    dtype: mx.Dtype

    def __post_init__(self) -> None:
        if self.dtype not in FLOATS:
            raise ValueError(
                f"scales are float16, bfloat16 or float32, not {self.dtype}: cast the keys and "
                "values"
            )

    @property
    def k_block(self) -> int:
        """Elements that a key is rotated in; 1 where it is not."""
        return self.k.dim & -self.k.dim if self.k.rotate else 1

    @property
    def v_block(self) -> int:
        return min(V_BLOCK, self.v.dim & -self.v.dim) if self.v.rotate else 1

    def check_packed(self) -> None:
        """Raises:
        ValueError: packed rows have no such codes.
        """
        for side in (self.k, self.v):
            _check_packed(side)

    @property
    def offsets(self) -> tuple[int, int, int, int]:
        """First word of K's codes, V's codes, K's scales and V's scales.

        Raises:
            ValueError: packed rows have no such codes.
        """
        self.check_packed()
        v = self.k.code_words(self.dtype)
        k_scales = v + self.v.code_words(self.dtype)
        return 0, v, k_scales, k_scales + self.k.scale_words(self.dtype)

    @property
    def row_words(self) -> int:
        """32-bit words that a token takes in each head: the cache's size."""
        return self.offsets[3] + self.v.scale_words(self.dtype)

    @property
    def row_bytes(self) -> int:
        return 4 * self.row_words


def _check_packed(side: KVSide) -> None:
    if side.bits not in (4, 8, 16):
        raise ValueError(f"packed rows have codes of 4 or 8 bits, not of {side.bits}")


def rotated(x: mx.array, block: int) -> mx.array:
    """``x`` times the orthonormal Hadamard matrix in blocks of the last axis, in float32."""
    x = x.astype(mx.float32)
    if block == 1:
        return x
    blocks = x.reshape(*x.shape[:-1], -1, block)
    return mx.hadamard_transform(blocks, block**-0.5).reshape(x.shape)


def _quantized(side: KVSide, x: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Codes ``[..., dim]`` and scales ``[..., numbers]`` of float32 values."""
    groups = x.reshape(*x.shape[:-1], side.groups, side.group)
    most = (1 << side.bits) - 1
    if side.kind == "symmetric":
        half = 1 << (side.bits - 1)
        scale = (mx.abs(groups).max(-1, keepdims=True) * (1 / (half - 1))).astype(dtype)
        numbers = scale
        first, low, high = mx.array(0.0), 1 - half, half - 1
    else:
        least = groups.min(-1, keepdims=True)
        scale = ((groups.max(-1, keepdims=True) - least) * (1 / most)).astype(dtype)
        bias = least.astype(dtype)
        numbers = mx.concatenate([scale, bias], axis=-1)
        first, low, high, half = bias.astype(mx.float32), 0, most, 0
    step = scale.astype(mx.float32)
    inverse = mx.where(step > 1e-30, 1 / step, 0)
    codes = mx.clip(mx.round((groups - first) * inverse), low, high) + half
    return codes.astype(mx.uint32).reshape(x.shape), numbers.reshape(*x.shape[:-1], -1)


def code_words(side: KVSide, codes: mx.array) -> mx.array:
    """Unsigned codes ``[..., dim]`` as words."""
    _check_packed(side)
    per = 32 // side.bits
    places = mx.arange(per, dtype=mx.uint32) * side.bits
    words = codes.astype(mx.uint32).reshape(*codes.shape[:-1], -1, per) << places
    return words.sum(-1)


def value_words(values: mx.array) -> mx.array:
    """Numbers ``[..., n]`` as words, padded with zeros."""
    per = 4 // values.dtype.size
    if short := -values.shape[-1] % per:
        values = mx.concatenate([values, mx.zeros_like(values[..., :short])], axis=-1)
    return values.view(mx.uint32)


def pack(scheme: KVScheme, k: mx.array, v: mx.array) -> mx.array:
    """Rows ``[..., row_words]`` of keys and values ``[..., dim]``: see `quantize_kv`."""
    codes, scales = [], []
    for side, x, block in ((scheme.k, k, scheme.k_block), (scheme.v, v, scheme.v_block)):
        x = rotated(x, block)
        if side.quantized:
            found, numbers = _quantized(side, x, scheme.dtype)
            codes.append(code_words(side, found))
            scales.append(value_words(numbers))
        else:
            codes.append(value_words(x.astype(scheme.dtype)))
    return mx.concatenate([*codes, *scales], axis=-1)


def _values(side: KVSide, words: mx.array, scales: mx.array, dtype: mx.Dtype) -> mx.array:
    """float32 values of a side's words."""
    if not side.quantized:
        return words.view(dtype).astype(mx.float32)
    numbers = scales.view(dtype)[..., : side.numbers].astype(mx.float32)
    if side.kind == "symmetric":
        scale, bias = numbers, numbers * -float(1 << (side.bits - 1))
    else:
        scale, bias = numbers[..., ::2], numbers[..., 1::2]
        bias = bias if side.kind == "affine" else -scale * bias
    codes = words.view(mx.uint8)
    if side.bits == 4:
        codes = mx.stack([codes & 15, codes >> 4], axis=-1)
    codes = codes.reshape(*words.shape[:-1], side.groups, side.group).astype(mx.float32)
    return (codes * scale[..., None] + bias[..., None]).reshape(*words.shape[:-1], side.dim)


def decoded(scheme: KVScheme, rows: mx.array) -> tuple[mx.array, mx.array]:
    """Keys and values as they were quantised, float32 ``[..., dim]``: rotated, if they are."""
    kc, vc, ks, vs = (rows[..., a:b] for a, b in pairwise((*scheme.offsets, scheme.row_words)))
    return _values(scheme.k, kc, ks, scheme.dtype), _values(scheme.v, vc, vs, scheme.dtype)


def unpack(scheme: KVScheme, rows: mx.array) -> tuple[mx.array, mx.array]:
    """Keys and values, float32 ``[..., dim]``, as they were before they were rotated."""
    k, v = decoded(scheme, rows)
    return rotated(k, scheme.k_block), rotated(v, scheme.v_block)
