"""A table of calls, every kernel and every format among them: for self-tests and for timing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..formats import BY_NAME, Format
from ..gguf.relayout import allocate, relayout
from ..kernels.matmul.dequantize import dequantize
from ..kernels.matmul.int8_matmul import int8_matmul, unsupported
from ..kernels.matmul.product import MAX_ROWS_PER_EXPERT, Call, Experts
from ..kernels.matmul.quantized_matmul import KERNEL, quantized_matmul
from ..kernels.matmul.shapes import tensors
from ..kernels.norm.quantize_int8 import quantize_int8
from ..kernels.weight import QuantizedWeight, Segment
from . import layer_cases
from .case import SMALL, Case, Sizes, normal, plural

__all__ = ["SMALL", "Case", "Sizes", "cases", "nearest_bits", "sample"]

_PROMPT = 64  # rows of x


def cases(sizes: Sizes, formats: Sequence[Format] | None = None) -> Iterator[Case]:
    """The whole table, kernel by kernel.

    Args:
        formats: of weights; all that have a kernel if not given.
    """
    for format in BY_NAME.values() if formats is None else formats:
        if format.kernel:
            yield from _products(format, sizes)
            yield from _chosen_experts(format, sizes)
    yield from layer_cases.activations(sizes)
    yield from layer_cases.router(sizes)
    yield from layer_cases.recurrent(sizes)
    yield from layer_cases.delta_net(sizes)
    yield from layer_cases.mamba(sizes)
    yield from layer_cases.attention(sizes)


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
        theirs_of = [mx.quantize(normal(n, k), **how) for _ in segments]
        name = f"{format.name} {n}x{k}"
        yield Case(
            name,
            f"dequantize {affine.name}",
            [partial(dequantize, s, None, mx.float16) for s in segments],
            [partial(mx.dequantize, *a, **how) for a in theirs_of],
        )
        weights = [QuantizedWeight.whole(s) for s in segments]
        for rows in sizes.rows:
            x = normal(rows, k)
            theirs = [partial(mx.quantized_matmul, x, *a, **how) for a in theirs_of]
            against = f"quantized_matmul {affine.name}"
            at = f"{name}, {plural(rows, 'row')}"
            if rows <= 32:  # above, MLX multiplies
                yield Case(at, against, [partial(quantized_matmul, x, w) for w in weights], theirs)
            if unsupported(weights[0]) is None:
                codes = quantize_int8(x)
                mine = [partial(int8_matmul, codes, w) for w in weights]
                yield Case(f"{at} of int8", against, mine, theirs)
        if tensors():  # which nothing runs before `mlxfuse tune` has chosen them
            x = normal(_PROMPT, k)
            calls = [Call(x, weight, variant="tensor") for weight in weights]
            yield Case(
                f"{name}, {_PROMPT} rows by tensor operations",
                f"quantized_matmul {affine.name}",
                [partial(KERNEL, call) for call in calls],
                [partial(mx.quantized_matmul, x, *a, **how) for a in theirs_of],
            )


def _chosen_experts(format: Format, sizes: Sizes) -> Iterator[Case]:
    """Chosen experts: of one token, summed, and of so many tokens that each has a tile of them."""
    affine = _Affine.like(format)
    number, chosen, n, k = sizes.experts
    flat = sample(format, number * n, k)
    arrays = {name: a.reshape(number, n, -1) for name, a in flat.arrays.items()}
    weight = QuantizedWeight.whole(replace(flat, arrays=arrays))
    given = mx.quantize(normal(number, n, k), **affine.how)
    token, prompt = normal(chosen, k), max(sizes.rows[-1], MAX_ROWS_PER_EXPERT * number + 1)
    groups = [mx.arange(i, i + chosen) for i in range(0, number - chosen + 1, chosen)]
    tokens, scores = normal(prompt, k), mx.softmax(normal(chosen))
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
        f"{format.name} {number} experts {n}x{k}, {plural(prompt, 'row')}",
        against,
        [partial(ours, tokens, experts=Experts(ids, sorted=True))],
        [partial(gather, tokens[:, None], *given, rhs_indices=ids, sorted_indices=True)],
    )
