"""Stand-in for the kernels of attention over compressed keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import mlx.core as mx


def hadamard_block(size: int, most: int) -> int:
    return min(size & -size, most)


@dataclass(frozen=True)
class KVScheme:
    k_bits: int
    v_bits: int
    k_dim: int
    v_dim: int
    k_group: int
    v_group: int
    rotate: bool = True

    @property
    def words(self) -> int:
        return _words(self.k_dim, self.k_bits, self.k_group) + _words(
            self.v_dim, self.v_bits, self.v_group
        )


def _words(dim: int, bits: int, group: int) -> int:
    return dim * bits // 32 + (0 if bits == 16 else dim // group)


def _rotate(x: mx.array, block: int) -> mx.array:
    shape = x.shape
    x = x.astype(mx.float32).reshape(*shape[:-1], -1, block)
    return mx.hadamard_transform(x, 1 / sqrt(block)).reshape(shape)


def _pack(x: mx.array, bits: int, group: int) -> list[mx.array]:
    shape = x.shape[:-1]
    if bits == 16:
        return [x.astype(mx.float16).view(mx.uint32)]
    x = x.astype(mx.float32).reshape(*shape, -1, group)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    top = 2**bits - 1
    scale = ((high - low) / top).astype(mx.float16)
    low = low.astype(mx.float16)
    wide = scale.astype(mx.float32)
    inverse = mx.where(wide > 0, 1 / mx.where(wide > 0, wide, 1), 0)
    codes = mx.clip(mx.round((x - low.astype(mx.float32)) * inverse), 0, top).astype(mx.uint32)
    per = 32 // bits
    codes = codes.reshape(*shape, -1, per) << (bits * mx.arange(per, dtype=mx.uint32))
    both = mx.concatenate([scale, low], -1).view(mx.uint32)
    return [codes.sum(-1).astype(mx.uint32), both.reshape(*shape, -1)]


def _unpack(rows: mx.array, dim: int, bits: int, group: int) -> mx.array:
    shape = rows.shape[:-1]
    if bits == 16:
        return rows.view(mx.float16).astype(mx.float32)
    per = 32 // bits
    words = dim // per
    codes = rows[..., :words, None] >> (bits * mx.arange(per, dtype=mx.uint32))
    codes = (codes & (2**bits - 1)).reshape(*shape, -1, group).astype(mx.float32)
    both = rows[..., words:].view(mx.float16).reshape(*shape, -1, 2).astype(mx.float32)
    return (codes * both[..., :1] + both[..., 1:]).reshape(*shape, dim)


def pack(kv: mx.array, scheme: KVScheme) -> mx.array:
    k, v = kv[..., : scheme.k_dim], kv[..., scheme.k_dim :]
    if scheme.rotate:
        k = _rotate(k, hadamard_block(scheme.k_dim, 1 << 30)) if scheme.k_bits < 16 else k
        v = _rotate(v, hadamard_block(scheme.v_dim, 64)) if scheme.v_bits < 16 else v
    parts = _pack(k, scheme.k_bits, scheme.k_group) + _pack(v, scheme.v_bits, scheme.v_group)
    return mx.concatenate(parts, -1)


def unpack(rows: mx.array, scheme: KVScheme, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    words = _words(scheme.k_dim, scheme.k_bits, scheme.k_group)
    k = _unpack(rows[..., :words], scheme.k_dim, scheme.k_bits, scheme.k_group)
    v = _unpack(rows[..., words:], scheme.v_dim, scheme.v_bits, scheme.v_group)
    if scheme.rotate:
        k = _rotate(k, hadamard_block(scheme.k_dim, 1 << 30)) if scheme.k_bits < 16 else k
        v = _rotate(v, hadamard_block(scheme.v_dim, 64)) if scheme.v_bits < 16 else v
    return k.astype(dtype), v.astype(dtype)
