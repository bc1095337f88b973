"""Of the table of calls what is not a product: norms, routers, recurrences and caches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..kernels.causal_conv import causal_conv
from ..kernels.delta_step import delta_step
from ..kernels.kv.compressed_sdpa import compressed_sdpa
from ..kernels.kv.dequantize_kv import dequantize_kv
from ..kernels.kv.quantize_kv import quantize_kv
from ..kernels.kv.scheme import KVScheme, KVSide
from ..kernels.kv.sdpa_call import Scores
from ..kernels.norm.gated_norm import gated_norm
from ..kernels.norm.norm_rope import RopeOptions, norm_rope
from ..kernels.norm.quantize_int8 import quantize_int8
from ..kernels.norm.rms_norm import rms_norm
from ..kernels.route import route
from ..kernels.route_sigmoid import SigmoidOptions, route_sigmoid
from ..kernels.ssm_step import ssm_step
from .case import Case, Sizes, normal, plural

_KV = ((8, 8), (8, 4), (4, 4))  # bits of keys and of values


def activations(sizes: Sizes) -> Iterator[Case]:
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
        x, residual = normal(2, rows, columns)
        size = f"{plural(rows, 'row')} of {columns}"
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
        q, k = normal(1, rows, heads * dim), normal(1, rows, kv_heads * dim)
        rope = partial(
            norm_rope, q, k, 7,
            RopeOptions(
                heads=heads, kv_heads=kv_heads, dims=dim,
                q_weight=head_weight, k_weight=head_weight, base=1e4,
            ),
        )  # fmt: skip
        yield Case(
            f"{heads}+{kv_heads} heads of {dim}, {plural(rows, 'token')}",
            "rms_norm, rope of q and of k",
            [rope] * repeat,
            [partial(turned, q, k)] * repeat,
        )


def router(sizes: Sizes) -> Iterator[Case]:
    """The choice of experts from a router's logits, and the gate of a shared one."""
    number, chosen, _, _ = sizes.experts

    def theirs(logits: mx.array, gate: mx.array) -> list[mx.array]:
        weights = mx.softmax(logits, axis=-1, precise=True)
        ids = mx.argpartition(weights, kth=-chosen, axis=-1)[..., -chosen:]
        scores = mx.take_along_axis(weights, ids, axis=-1)
        return [ids, scores / scores.sum(axis=-1, keepdims=True), mx.sigmoid(gate)]

    for rows in sizes.rows:
        given = normal(rows, number), normal(rows, 1)
        repeat = 16
        yield Case(
            f"router of {number}, {plural(rows, 'row')}",
            "softmax, argpartition, take_along_axis, sum, divide, sigmoid",
            [partial(route, given[0], chosen, whole=False, gate=given[1])] * repeat,
            [partial(theirs, *given)] * repeat,
        )
        how = SigmoidOptions(chosen, 2, 1, eps=1e-20, scale=2.5)
        bias = mx.linspace(-1, 1, number)
        yield Case(
            f"router of {number} by sigmoids, {plural(rows, 'row')}",
            "the same with an operation at a time",
            [partial(route_sigmoid, given[0], bias, how)] * repeat,
            [partial(by_sigmoids, given[0], bias, how)] * repeat,
        )


def by_sigmoids(logits: mx.array, bias: mx.array, how: SigmoidOptions) -> list[mx.array]:
    """`route_sigmoid` by MLX's operations, without groups."""
    weights = mx.sigmoid(logits.astype(mx.float32))
    ids = mx.argpartition(-(weights + bias), kth=how.count - 1, axis=-1)[..., : how.count]
    scores = mx.take_along_axis(weights, ids, axis=-1)
    return [ids, scores / (scores.sum(-1, keepdims=True) + how.eps) * how.scale]


def recurrent(sizes: Sizes) -> Iterator[Case]:
    """What layers with a state do besides products: a convolution of each channel."""
    channels = sizes.matrices[0][0] * 2
    weight = normal(channels, 4, 1)

    def theirs(x: mx.array, state: mx.array) -> list[mx.array]:
        padded = mx.concatenate([state, x], axis=1)
        y = nn.silu(mx.conv1d(padded, weight, groups=channels))
        return [y, mx.contiguous(padded[:, -3:])]

    for rows in sizes.rows:
        given = normal(1, rows, channels), normal(1, 3, channels)
        repeat = 16
        yield Case(
            f"convolution of {channels} channels, {plural(rows, 'token')}",
            "concatenate, conv1d, silu, contiguous",
            [partial(causal_conv, *given, weight)] * repeat,
            [partial(theirs, *given)] * repeat,
        )


def delta_net(sizes: Sizes) -> Iterator[Case]:
    """A token of a gated delta net, beside MLX's norms of q, k and the result and its state."""
    heads, key_heads, dim = sizes.heads
    keys = key_heads * dim
    qkv, z, gate = normal(1, 1, 2 * keys + heads * dim), normal(1, 1, heads * dim), mx.ones(heads)
    state = mx.ones((1, heads, dim, dim))
    weight, opening = mx.ones(dim, mx.float16), gate.astype(mx.float16)[None, None]

    def theirs() -> list[mx.array]:
        q, k, v = mx.split(qkv.reshape(2 * key_heads + heads, dim), [key_heads, 2 * key_heads])
        q, k = (mx.repeat(mx.fast.rms_norm(x, None, 1e-6), heads // key_heads, 0) for x in (q, k))
        decayed = state * mx.exp(-gate)[:, None, None]
        delta = (v - (decayed * k[:, None]).sum(-1)) * gate[:, None]
        after = decayed + delta[..., None] * k[:, None]
        y = mx.fast.rms_norm((after * q[:, None]).sum(-1).astype(mx.float16), weight, 1e-6)
        return [y.reshape(z.shape) * nn.silu(z), after]

    ours = partial(delta_step, qkv, (z, opening, opening), (gate, gate, weight), state, eps=1e-6)
    yield Case(
        f"delta rule, {heads}:{key_heads} x {dim}, 1 token",
        "the same with a product, a sum or a norm at a time",
        [ours] * 16,
        [theirs] * 16,
    )


def mamba(sizes: Sizes) -> Iterator[Case]:
    """A token of a Mamba-2 mixer, beside MLX's products and sums; and the norm behind its gate."""
    heads, groups, dim = sizes.heads
    inner, shared = heads * dim, groups * dim
    xbc, step, gate = normal(1, 1, inner + 2 * shared), normal(1, 1, heads), normal(1, 1, inner)
    numbers, state = mx.ones(heads), mx.ones((1, heads, dim, dim))
    weight = mx.ones(inner, mx.float16)

    def theirs() -> list[mx.array]:
        x, b, c = mx.split(xbc.reshape(-1, dim), [heads, heads + groups])
        b, c = (mx.repeat(v, heads // groups, 0)[:, None] for v in (b, c))
        time = mx.logaddexp(step[0, 0] + numbers, mx.array(0.0))[:, None, None]
        after = state * mx.exp(-numbers[:, None, None] * time) + x[..., None] * time * b
        y = (after * c).sum(-1).astype(mx.float16) + x
        return [y.reshape(1, 1, inner), after]

    def normed() -> mx.array:
        parts = (gate * nn.silu(gate)).reshape(groups, -1)
        return weight * mx.fast.rms_norm(parts, None, 1e-5).reshape(gate.shape)

    yield Case(
        f"state space, {heads}:{groups} x {dim}, 1 token",
        "the same with a product or a sum at a time",
        [partial(ssm_step, xbc, step, (numbers,) * 3, state, (0.0, 100.0))] * 16,
        [theirs] * 16,
    )
    yield Case(
        f"{groups} groups of {inner} behind a gate",
        "silu, multiply, rms_norm, multiply",
        [partial(gated_norm, gate, gate, weight, 1e-5, groups=groups)] * 16,
        [normed] * 16,
    )


def attention(sizes: Sizes) -> Iterator[Case]:
    """A compressed cache beside a float16 one, and its way in and out beside MLX's codes."""
    heads, kv_heads, dim = sizes.heads
    q, scale = normal(1, heads, 1, dim), dim**-0.5
    for tokens in sizes.tokens:
        for k_bits, v_bits in _KV:
            k_side, v_side = (KVSide(dim, b, 64, rotate=True) for b in (k_bits, v_bits))
            scheme = KVScheme(k_side, v_side, mx.float16)
            k, v = normal(2, 1, kv_heads, tokens, dim)
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
            name = f"k{k_bits}v{v_bits} {plural(tokens, 'token')}, {heads}:{kv_heads} x {dim}"
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
