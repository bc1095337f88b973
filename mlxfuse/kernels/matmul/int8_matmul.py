"""Products of int8 activations and quantised weights, in integers: ``metal/int8_matmul.metal``.

Source of the formula: ggml's products of Q8_1 with its other formats (``vecdotq.cuh``).
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from ..activations import GROUP, Int8Activations
from ..norm import quantize_int8
from ..runtime.kernel import Kernel, Launch
from ..weight import FACTORS, AnySegment, QuantizedWeight
from . import small
from .decode import integers
from .product import (
    MAX_BATCHED_ROWS,
    NO_EPILOGUE,
    Call,
    Epilogue,
    Experts,
    batches,
    finish,
    launch,
    refuse,
    simd_groups,
)
from .tile_program import Tile

_CHUNK = 1 << 24
"""Sums of groups that the reference holds at once."""


def int8_matmul(
    x: Int8Activations,
    weight: QuantizedWeight,
    epilogue: Epilogue = NO_EPILOGUE,
    experts: Experts | None = None,
    *,
    split: bool = False,
) -> tuple[mx.array, ...]:
    """``activation(x @ weight.T + bias) + residual`` for int8 activations.

    With a group of 32 weights as ``scale * codes + bias``, a product is the sum over groups of
    ``scale * x_scale * isum + bias * x_sum``. ``isum``, of the products of codes, is an exact
    integer; where 16 weights have a scale of their own, an integer times the group's, it holds
    these integers too. Unsigned 8-bit codes count less 128, with ``bias + 128 * scale``. Groups
    are added in float32: up to `MAX_BATCHED_ROWS` rows of x in one order, so that a result's bits
    depend neither on the other rows nor on the other parts; above, in the order of the groups.
    The epilogue is computed in float32 from the unrounded sums; the result is rounded once.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]`` or ``[experts, N, K]``, of formats that `unsupported` has nothing
            against.
        epilogue, experts, split: as for `quantized_matmul`; experts without scores.

    Returns:
        ``[..., N]`` in ``x.dtype``, alone in a tuple; with ``split`` one for each part; with
        ``experts`` of shape ``[*ids.shape, N]``.

    Raises:
        ValueError: arguments whose shapes do not fit together, or a format without integers.
    """
    if reason := unsupported(weight):
        raise ValueError(reason)
    call = Call(x, weight, epilogue, experts, split)
    call.check()
    return tuple(y.reshape(*call.lead, y.shape[-1]) for y in KERNEL(call))


def unsupported(weight: QuantizedWeight) -> str | None:
    """None where `int8_matmul` takes the weight, else why not."""
    for segment in weight.segments:
        if not segment.integers:
            return f"int8 activations: {segment.name} is no scale times small integers"
    return None


def _tile(call: Call[Int8Activations]) -> Tile:
    segments = call.weight.segments
    sums = "x_sums" if any(s.biased for s in segments) else "x_scales"
    x = f"int8_rows(x, x_scales, {sums})"
    own = ("int8_matmul.metal:Affine8",) * any(s.trait.startswith("Affine<8") for s in segments)
    op, shared = "int8_matmul", "quantized_matmul.metal"
    if call.experts is None and call.rows > MAX_BATCHED_ROWS:
        sections = (*own, shared, f"{op}.metal:tiles")
        rows, scratch = 32 if call.gated else 64, "threadgroup Int8Tile scratch;"
        return Tile(op, sections, "int8_tile", "", x, rows, 32, 128, scratch)
    lanes = f"{shared}:{'floor' if call.floor else 'lanes'}"
    sections = (*own, lanes, f"{op}.metal:{call.part('batch')}", f"{shared}:batch_tile")
    many, groups = batches(call.rows), simd_groups(call.weight)
    function = "batch_tile"
    if call.experts is not None:
        sections = (*sections, f"{shared}:experts", f"{op}.metal:gathered")
        many, function = 1, "gathered_tile"
    return Tile(
        op, sections, function, f", 2, {groups}, {many}", x, 2 * groups, many, 32 * groups, ""
    )


def _launch(call: Call[Int8Activations]) -> Launch:
    x = call.x
    arrays = {"x": x.codes, "x_scales": x.scales}
    if any(s.biased for s in call.weight.segments):
        arrays["x_sums"] = x.sums
    return launch(call, _tile(call), arrays)


def _reference(call: Call[Int8Activations]) -> list[mx.array]:
    return finish(call, [_part(call, p.segment, p.first, p.rows) for p in call.weight.parts])


def _part(call: Call[Int8Activations], segment: AnySegment, first: int, rows: int) -> mx.array:
    """float32 ``[rows of the outputs, rows]``."""
    given = call.x.codes, call.x.scales, call.x.sums
    x = [a.reshape(-1, a.shape[-1]) for a in given]
    some = slice(first, first + rows)
    if call.experts is None:
        return _product(x, segment.take(some))
    ids = call.experts.ids.reshape(-1)
    if not ids.size:
        return mx.zeros((0, rows))
    outputs = ids.size // len(x[0])  # of a row of x
    each = [[a[i // outputs, None] for a in x] for i in range(ids.size)]
    products = [_product(row, segment.take((i, some))) for row, i in zip(each, ids, strict=True)]
    return mx.concatenate(products)


def _product(given: list[mx.array], segment: AnySegment) -> mx.array:
    """float32 ``[rows of x, rows of the segment]`` of x's codes, scales and sums."""
    w = integers(segment)
    halves = 1 if w.times is None else 2
    groups = segment.columns // GROUP
    codes = w.codes.reshape(segment.rows, groups * halves, -1).transpose(1, 2, 0)
    scales, sums = (a.T[..., None] for a in given[1:])
    x = given[0].reshape(-1, groups * halves, GROUP // halves).swapaxes(0, 1)
    step = max(_CHUNK // (groups * segment.rows), 1)
    outputs = [mx.zeros((0, segment.rows))]
    for at in range(0, len(x[0]), step):
        some = slice(at, at + step)
        # Codes have 8 bits at most and sums less than 24: float32 and even TF32 are exact.
        isum = x[:, some].astype(mx.float32) @ codes
        if w.times is not None:
            isum = isum * w.times.T[:, None]
            isum = isum[0::2] + isum[1::2]
        terms = w.scales.T[:, None] * scales[:, some] * isum
        if w.biases is not None:
            terms = terms + w.biases.T[:, None] * sums[:, some]
        outputs.append(terms.sum(axis=0))
    y = mx.concatenate(outputs)
    return y * segment.arrays[FACTORS].T if FACTORS in segment.arrays else y


def _small(call: Call[Int8Activations]) -> tuple[Call[Int8Activations]]:
    (floats,) = small.product(call)
    codes, scales, sums = quantize_int8.reference(floats.x)
    return (replace(floats, x=Int8Activations(codes, scales, sums, call.x.dtype)),)


KERNEL = Kernel("int8_matmul", _launch, refuse, _reference, _small)
