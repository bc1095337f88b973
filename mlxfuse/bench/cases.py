"""A table of calls, every kernel and every format among them: for self-tests and for timing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..formats import BY_NAME, Format
from ..gguf.relayout import allocate, relayout
from ..kernels.causal_conv import causal_conv
from ..kernels.kv.compressed_sdpa import compressed_sdpa
from ..kernels.kv.dequantize_kv import dequantize_kv
from ..kernels.kv.quantize_kv import quantize_kv
from ..kernels.kv.scheme import KVScheme, KVSide
from ..kernels.kv.sdpa_call import Scores
from ..kernels.matmul.dequantize import dequantize
from ..kernels.matmul.int8_matmul import int8_matmul, unsupported
from ..kernels.matmul.product import MAX_ROWS_PER_EXPERT, Experts
from ..kernels.matmul.quantized_matmul import quantized_matmul
from ..kernels.norm.norm_rope import RopeOptions, norm_rope
from ..kernels.norm.quantize_int8 import quantize_int8
from ..kernels.norm.rms_norm import rms_norm
from ..kernels.route import route
from ..kernels.weight import QuantizedWeight, Segment

Calls = Sequence[Callable[[], object]]
_KV = ((8, 8), (8, 4), (4, 4))  # bits of keys and of values


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one size.

    name     the format and the size.
    against  MLX's own operations that are beside it, and the format of their weights.
    ours     calls of the public function, with the same sizes on different arrays.
    mlx      calls of MLX's operations, likewise.
    """

    name: str
    against: str
    ours: Calls
    mlx: Calls


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the table is made for.

    matrices  rows and columns of weights.
    experts   their number, how many are chosen, rows and columns of each.
    heads     of queries, of keys, and their elements.
    tokens    in a key-value cache.
    rows      of activations.
    cold      bytes of arrays that are read before one is read again.
    """

    matrices: tuple[tuple[int, int], ...] = ((4096, 4096), (14336, 4096))
    experts: tuple[int, int, int, int] = (64, 8, 768, 2048)
    heads: tuple[int, int, int] = (32, 8, 128)
    tokens: tuple[int, ...] = (4096, 32768)
    rows: tuple[int, ...] = (1, 4, 512)
    cold: int = 256 << 20  # more than any cache of a Mac's chip holds

    def copies(self, nbytes: int) -> int:
        """Arrays of so many bytes that are more than ``cold``."""
        return max(1, min(64, math.ceil(self.cold / nbytes)))


SMALL = Sizes(((16, 512),), (4, 2, 16, 512), (4, 2, 64), (64,), (1, 4), 0)
"""For self-tests."""


def cases(sizes: Sizes, formats: Sequence[Format] | None = None) -> Iterator[Case]:
    """The whole table, kernel by kernel.

    Args:
        formats: of weights; all that have a kernel if not given.
    """
    for format in BY_NAME.values() if formats is None else formats:
        if format.kernel:
            yield from _products(format, sizes)
            yield from _chosen_experts(format, sizes)
    yield from _activations(sizes)
    yield from _router(sizes)
    yield from _recurrent(sizes)
    yield from _attention(sizes)


def _normal(*shape: int) -> mx.array:
    return mx.random.normal(shape, mx.float16, key=mx.random.key(math.prod(shape)))


def sample(format: Format, rows: int = 16, columns: int = 0) -> Segment:
    """Random rows, the same ones each time; two blocks of columns, at least 512, if not given.

    Scales are small, so that a float16 holds what is multiplied by them.
    """
    columns = columns or 2 * max(256, format.block_size)
    random = np.random.default_rng(0)
    data = random.integers(0, 256, (rows, format.row_bytes(columns)), np.uint8)
    blocks = data.reshape(-1, format.type_size)
    for at in format.float16:
        blocks[:, at + 1] = blocks[:, at + 1] & 0x8F | 0x10  # 2^-11 to 2^-8, of either sign
    for at in format.exponents:
        blocks[:, at] = blocks[:, at] % 28 + 100
    for at in format.small:
        blocks[:, at] = blocks[:, at] & 0x8F | 0x10
    streams = allocate(format, len(data), columns)
    relayout(data, format, streams)
    return Segment(format, columns, {name: mx.array(a) for name, a in streams.items()})


def _copies(segment: Segment, sizes: Sizes) -> list[Segment]:
    copies = [
        {n: mx.array(a) for n, a in segment.arrays.items()}
        for _ in range(sizes.copies(segment.nbytes))
    ]
    mx.eval(copies)
    return [replace(segment, arrays=arrays) for arrays in copies]


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"


def nearest_bits(bits_per_weight: float) -> int:
    """Of MLX's affine weights in groups of 64, which take half a bit more for each weight."""
    return min((2, 3, 4, 5, 6, 8), key=lambda bits: abs(bits + 0.5 - bits_per_weight))


@dataclass(frozen=True, slots=True)
class _Affine:
    """MLX's affine weights that take about as many bits as a format's, to be timed beside it."""

    bits: int

    @classmethod
    def like(cls, format: Format) -> _Affine:
        return cls(nearest_bits(format.bits_per_weight))

    @property
    def name(self) -> str:
        return f"affine{self.bits}g64"

    @property
    def how(self) -> dict[str, Any]:
        """The arguments of MLX's operations."""
        return {"group_size": 64, "bits": self.bits}


def _products(format: Format, sizes: Sizes) -> Iterator[Case]:
    """Dense weights, in floats and in integers, and whole matrices decoded."""
    affine = _Affine.like(format)
    how = affine.how
    for n, k in sizes.matrices:
        segments = _copies(sample(format, n, k), sizes)
        theirs_of = [mx.quantize(_normal(n, k), **how) for _ in segments]
        name = f"{format.name} {n}x{k}"
        yield Case(
            name,
            f"dequantize {affine.name}",
            [partial(dequantize, s, None, mx.float16) for s in segments],
            [partial(mx.dequantize, *a, **how) for a in theirs_of],
        )
        weights = [QuantizedWeight.whole(s) for s in segments]
        for rows in sizes.rows:
            x = _normal(rows, k)
            theirs = [partial(mx.quantized_matmul, x, *a, **how) for a in theirs_of]
            against = f"quantized_matmul {affine.name}"
            at = f"{name}, {_plural(rows, 'row')}"
            if rows <= 32:  # above, MLX multiplies
                yield Case(at, against, [partial(quantized_matmul, x, w) for w in weights], theirs)
            if unsupported(weights[0]) is None:
                codes = quantize_int8(x)
                mine = [partial(int8_matmul, codes, w) for w in weights]
                yield Case(f"{at} of int8", against, mine, theirs)


def _chosen_experts(format: Format, sizes: Sizes) -> Iterator[Case]:
    """Chosen experts: of one token, summed, and of so many tokens that each has a tile of them."""
    affine = _Affine.like(format)
    number, chosen, n, k = sizes.experts
    flat = sample(format, number * n, k)
    arrays = {name: a.reshape(number, n, -1) for name, a in flat.arrays.items()}
    weight = QuantizedWeight.whole(replace(flat, arrays=arrays))
    given = mx.quantize(_normal(number, n, k), **affine.how)
    token, prompt = _normal(chosen, k), max(sizes.rows[-1], MAX_ROWS_PER_EXPERT * number + 1)
    groups = [mx.arange(i, i + chosen) for i in range(0, number - chosen + 1, chosen)]
    tokens, scores = _normal(prompt, k), mx.softmax(_normal(chosen))
    ids = mx.arange(prompt) * number // prompt
    name = f"{format.name} {chosen} of {number} experts {n}x{k}"
    gather: Any = partial(mx.gather_qmm, **affine.how)

    def summed(ids: mx.array) -> mx.array:
        y = gather(token[:, None], *given, rhs_indices=ids)[:, 0]
        total: mx.array = (y * scores[:, None]).sum(0, keepdims=True)
        return total

    ours, against = partial(quantized_matmul, weight=weight), f"gather_qmm {affine.name}"
    yield Case(
        name,
        against,
        [partial(ours, token[:1], experts=Experts(ids)) for ids in groups],
        [partial(gather, token[:1], *given, rhs_indices=ids) for ids in groups],
    )
    yield Case(
        f"{name}, summed",
        f"{against}, multiply, sum",
        [partial(ours, token, experts=Experts(ids, scores)) for ids in groups],
        [partial(summed, ids) for ids in groups],
    )
    yield Case(
        f"{format.name} {number} experts {n}x{k}, {_plural(prompt, 'row')}",
        against,
        [partial(ours, tokens, experts=Experts(ids, sorted=True))],
        [partial(gather, tokens[:, None], *given, rhs_indices=ids, sorted_indices=True)],
    )


def _activations(sizes: Sizes) -> Iterator[Case]:
    """Norms and what goes with them."""
    heads, kv_heads, dim = sizes.heads
    columns = sizes.matrices[0][1]
    weight, head_weight = mx.ones(columns, mx.float16), mx.ones(dim, mx.float16)

    def added(x: mx.array, residual: mx.array) -> mx.array:
        return mx.fast.rms_norm(x + residual, weight, 1e-5)

    def multiplied(x: mx.array, residual: mx.array) -> mx.array:
        return added(x * 0.22, residual)

    def coded(x: mx.array, residual: mx.array) -> object:
        return mx.quantize(added(x, residual), group_size=32, bits=8)

    def turned(*given: mx.array) -> list[mx.array]:
        shaped = (x.reshape(*x.shape[:2], -1, dim) for x in given)
        normed = (mx.fast.rms_norm(x, head_weight, 1e-6).swapaxes(1, 2) for x in shaped)
        options: Any = {"traditional": False, "base": 1e4, "scale": 1.0, "offset": 7}
        return [mx.fast.rope(x, dim, **options) for x in normed]

    for rows in sizes.rows:
        x, residual = _normal(2, rows, columns)
        size = f"{_plural(rows, 'row')} of {columns}"
        norm = partial(rms_norm, x, weight, 1e-5, residual=residual)
        repeat = 16
        yield Case(
            f"{size}, residual",
            "add, rms_norm",
            [norm] * repeat,
            [partial(added, x, residual)] * repeat,
        )
        yield Case(
            f"{size} by a number, residual",
            "multiply, add, rms_norm",
            [partial(norm, post=0.22)] * repeat,
            [partial(multiplied, x, residual)] * repeat,
        )
        yield Case(
            f"{size}, residual, to int8",
            "add, rms_norm, quantize affine8g32",
            [partial(norm, outputs=("int8",))] * repeat,
            [partial(coded, x, residual)] * repeat,
        )
        yield Case(
            size,
            "quantize affine8g32",
            [partial(quantize_int8, x)] * repeat,
            [partial(mx.quantize, x, group_size=32, bits=8)] * repeat,
        )
        q, k = _normal(1, rows, heads * dim), _normal(1, rows, kv_heads * dim)
        rope = partial(
            norm_rope, q, k, 7,
            RopeOptions(
                heads=heads, kv_heads=kv_heads, dims=dim,
                q_weight=head_weight, k_weight=head_weight, base=1e4,
            ),
        )  # fmt: skip
        yield Case(
            f"{heads}+{kv_heads} heads of {dim}, {_plural(rows, 'token')}",
            "rms_norm, rope of q and of k",
            [rope] * repeat,
            [partial(turned, q, k)] * repeat,
        )


def _router(sizes: Sizes) -> Iterator[Case]:
    """The choice of experts from a router's logits, and the gate of a shared one."""
    number, chosen, _, _ = sizes.experts

    def theirs(logits: mx.array, gate: mx.array) -> list[mx.array]:
        weights = mx.softmax(logits, axis=-1, precise=True)
        ids = mx.argpartition(weights, kth=-chosen, axis=-1)[..., -chosen:]
        scores = mx.take_along_axis(weights, ids, axis=-1)
        return [ids, scores / scores.sum(axis=-1, keepdims=True), mx.sigmoid(gate)]

    for rows in sizes.rows:
        given = _normal(rows, number), _normal(rows, 1)
        repeat = 16
        yield Case(
            f"router of {number}, {_plural(rows, 'row')}",
            "softmax, argpartition, take_along_axis, sum, divide, sigmoid",
            [partial(route, given[0], chosen, whole=False, gate=given[1])] * repeat,
            [partial(theirs, *given)] * repeat,
        )


def _recurrent(sizes: Sizes) -> Iterator[Case]:
    """What layers with a state do besides products: a convolution of each channel."""
    channels = sizes.matrices[0][0] * 2
    weight = _normal(channels, 4, 1)

    def theirs(x: mx.array, state: mx.array) -> list[mx.array]:
        padded = mx.concatenate([state, x], axis=1)
        y = nn.silu(mx.conv1d(padded, weight, groups=channels))
        return [y, mx.contiguous(padded[:, -3:])]

    for rows in sizes.rows:
        given = _normal(1, rows, channels), _normal(1, 3, channels)
        repeat = 16
        yield Case(
            f"convolution of {channels} channels, {_plural(rows, 'token')}",
            "concatenate, conv1d, silu, contiguous",
            [partial(causal_conv, *given, weight)] * repeat,
            [partial(theirs, *given)] * repeat,
        )


def _attention(sizes: Sizes) -> Iterator[Case]:
    """A compressed cache beside a float16 one, and its way in and out beside MLX's codes."""
    heads, kv_heads, dim = sizes.heads
    q, scale = _normal(1, heads, 1, dim), dim**-0.5
    for tokens in sizes.tokens:
        for k_bits, v_bits in _KV:
            k_side, v_side = (KVSide(dim, b, 64, rotate=True) for b in (k_bits, v_bits))
            scheme = KVScheme(k_side, v_side, mx.float16)
            k, v = _normal(2, 1, kv_heads, tokens, dim)
            copies = range(sizes.copies(kv_heads * tokens * scheme.row_bytes))
            plain = [(mx.array(k), mx.array(v)) for _ in copies]
            packed = [quantize_kv(*pair, scheme) for pair in plain]
            how: Any = [{"group_size": 64, "bits": bits} for bits in (k_bits, v_bits)]

            def codes(pair: Any, how: Any = how) -> list[Any]:
                return [mx.quantize(x, **h) for x, h in zip(pair, how, strict=True)]

            def values(pair: Any, how: Any = how) -> list[mx.array]:
                return [mx.dequantize(*x, **h) for x, h in zip(pair, how, strict=True)]

            ours = partial(compressed_sdpa, scores=Scores(scale))
            sdpa = mx.fast.scaled_dot_product_attention
            name = f"k{k_bits}v{v_bits} {_plural(tokens, 'token')}, {heads}:{kv_heads} x {dim}"
            yield Case(
                name,
                "scaled_dot_product_attention float16",
                [partial(ours, q, scheme, rows, tokens) for rows in packed],
                [partial(sdpa, q, *pair, scale=scale) for pair in plain],
            )
            against = f"affine{k_bits}g64 of k, affine{v_bits}g64 of v"
            yield Case(
                name,
                f"quantize {against}",
                [partial(quantize_kv, *pair, scheme) for pair in plain],
                [partial(codes, pair) for pair in plain],
            )
            yield Case(
                name,
                f"dequantize {against}",
                [partial(dequantize_kv, r, scheme) for r in packed],
                [partial(values, codes(pair)) for pair in plain],
            )
