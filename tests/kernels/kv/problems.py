"""Compressed keys and values for tests, and attention over them in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import mlx.core as mx
import numpy as np

from mlxfuse.kernels.kv.scheme import KVScheme, KVSide, pack
from mlxfuse.kernels.kv.sdpa_call import Scores

from ..weights import to_float64

THRESHOLD = {mx.float16: 1.466e-3, mx.bfloat16: 2.0**-7, mx.float32: 1e-5}
"""Of an element, times the sum of |p v|; oneDNN's."""


def normal(rng: np.random.Generator, dtype: mx.Dtype, *shape: int) -> mx.array:
    return mx.array(rng.standard_normal(shape, np.float32)).astype(dtype)


def hadamard(n: int) -> np.ndarray:
    """The orthonormal matrix, by its recursion."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)


def rotate(x: np.ndarray, block: int) -> np.ndarray:
    return (x.reshape(*x.shape[:-1], -1, block) @ hadamard(block)).reshape(x.shape)


def _numbers(words: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """Words as float64."""
    if dtype == mx.bfloat16:
        return (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    kind = np.float16 if dtype == mx.float16 else np.float32
    return words.view(kind).astype(np.float64)


def _side(side: KVSide, words: np.ndarray, scales: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    if side.bits == 16:
        return _numbers(words, dtype)
    codes = words.view(np.uint8)
    if side.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1)
    codes = codes.reshape(*words.shape[:-1], side.groups, side.group).astype(np.float64)
    numbers = _numbers(scales, dtype)
    if side.kind == "symmetric":
        values = numbers[..., : side.groups, None] * (codes - 2 ** (side.bits - 1))
    else:
        scale, second = numbers[..., 0::2, None], numbers[..., 1::2, None]
        values = scale * codes + second if side.kind == "affine" else scale * (codes - second)
    return values.reshape(*words.shape[:-1], side.dim)


def decode(scheme: KVScheme, rows: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values in float64, not rotated, by the documented layout."""
    size = scheme.dtype.size
    found, at, words = {}, 0, np.ascontiguousarray(np.array(rows))
    parts = [(n, s.dim * (s.bits if s.bits < 16 else 8 * size) // 32)
             for n, s in (("k", scheme.k), ("v", scheme.v))]  # fmt: skip
    for name, side in (("k scales", scheme.k), ("v scales", scheme.v)):
        numbers = side.groups * (1 if side.kind == "symmetric" else 2)
        parts.append((name, -(-numbers * size // 4)))
    for name, count in parts:
        found[name] = np.ascontiguousarray(words[..., at : at + count])
        at += count
    assert at == words.shape[-1] == scheme.row_words
    k = _side(scheme.k, found["k"], found["k scales"], scheme.dtype)
    v = _side(scheme.v, found["v"], found["v scales"], scheme.dtype)
    return rotate(k, scheme.k_block), rotate(v, scheme.v_block)


def with_scores(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Scores` among the options as one."""
    names = [f.name for f in fields(Scores) if f.name in options]
    rest = {name: value for name, value in options.items() if name not in names}
    return {"scores": Scores(**{name: options[name] for name in names}), **rest}


@dataclass
class Problem:
    """A call of `compressed_sdpa`: its positional arguments, and the others by name; the fields
    of `Scores` are among them.
    """

    q: mx.array
    scheme: KVScheme
    rows: mx.array | None
    length: Any
    tail: mx.array | None = None
    tail_length: Any = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.q, self.scheme, self.rows, self.length, self.tail, self.tail_length

    @property
    def given(self) -> dict[str, Any]:
        """The others as `compressed_sdpa` takes them."""
        return with_scores(self.options)

    def keys(self, b: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a sequence, ``[Hkv, keys, dim]``."""

        def used(rows: tuple[np.ndarray, np.ndarray], length: Any) -> tuple[np.ndarray, ...]:
            n = int(np.broadcast_to(np.array(length), (self.q.shape[0],))[b])
            return tuple(x[b, :, :n] for x in rows)

        def plain(rows: mx.array) -> tuple[np.ndarray, np.ndarray]:
            return tuple(np.split(to_float64(rows), [self.scheme.k.dim], axis=-1))

        options, parts = self.options, []
        if options.get("sink") is not None:
            parts.append(used(plain(options["sink"]), options["sink_length"]))
        if self.rows is not None:
            parts.append(used(decode(self.scheme, self.rows), self.length))
        if self.tail is not None:
            parts.append(used(plain(self.tail), self.tail_length))
        if options.get("fresh") is not None:
            parts.append(used(tuple(map(to_float64, options["fresh"])), self.q.shape[2]))
        k, v = zip(*parts, strict=True)
        return np.concatenate(k, axis=1), np.concatenate(v, axis=1)


def oracle(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The attention, and the error an element may have, in float64: ``[B, Hq, L, v_dim]`` each.

    The error is `THRESHOLD` times the sum of |p v|. Rotated values are summed before they are
    turned back, so float32 also rounds what the other elements of the block add and take away.
    Half a step of float16's least numbers is what rounding to them takes.
    """
    given = problem.options
    q = to_float64(problem.q)
    batch, heads, queries, _ = q.shape
    out, bound = [], []
    for b in range(batch):
        k, v = problem.keys(b)
        k, v = (np.repeat(x, heads // x.shape[0], axis=0) for x in (k, v))
        s = given["scale"] * q[b] @ k.swapaxes(-1, -2)
        if given.get("softcap"):
            s = given["softcap"] * np.tanh(s / given["softcap"])
        key = np.arange(k.shape[1])
        own = (k.shape[1] - queries + np.arange(queries))[:, None]
        seen = np.ones(s.shape, bool)
        if given.get("causal", True):
            seen &= key <= own
        if given.get("window"):
            seen &= key > own - given["window"]
        if given.get("left_padding") is not None:
            seen &= key >= int(given["left_padding"][b])
        if given.get("mask") is not None:
            mask = given["mask"]
            mask = np.array(mask) if mask.dtype == mx.bool_ else to_float64(mask)
            mask = np.broadcast_to(mask, (batch, heads, queries, mask.shape[-1]))[b]
            if mask.dtype == bool:
                seen &= mask[..., : k.shape[1]]
            else:
                s = s + mask[..., : k.shape[1]]
        s = np.where(seen, s, -np.inf)
        logits = np.full((heads, 1, 1), -np.inf)
        if given.get("sinks") is not None:
            logits = to_float64(given["sinks"]).reshape(-1, 1, 1)
        most = np.maximum(s.max(-1, keepdims=True), logits)
        most = np.where(most == -np.inf, 0, most)
        p = np.exp(s - most)
        total = p.sum(-1, keepdims=True) + np.exp(logits - most)
        p /= np.where(total == 0, 1, total)
        out.append(p @ v)
        block = problem.scheme.v_block
        others = (p @ np.abs(rotate(v, block))).reshape(*p.shape[:-1], -1, block)
        others = np.repeat(others.sum(-1) / np.sqrt(block), block, axis=-1)
        size = p @ np.abs(v)
        subnormal = (problem.q.dtype == mx.float16) * (size > 0) * 2.0**-25
        rotated = (block > 1) * 2.0**-22 * others
        bound.append(THRESHOLD[problem.q.dtype] * size + rotated + subnormal)
    return np.array(out), np.array(bound)


def packed(scheme: KVScheme, rng: np.random.Generator, *shape: int) -> mx.array:
    """Rows of random keys and values; shape ``(B, Hkv, capacity)``."""
    k, v = (normal(rng, scheme.dtype, *shape, side.dim) for side in (scheme.k, scheme.v))
    return pack(scheme, k, v)
