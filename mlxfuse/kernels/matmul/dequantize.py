"""Rows of a quantised matrix as ordinary numbers: ``metal/dequantize.metal``."""

from __future__ import annotations

import math
from functools import cache

import mlx.core as mx

from ..runtime.kernel import Kernel, Launch, Program
from ..weight import FLOATS, STREAMS, AnySegment
from . import small
from .decode import decode


def dequantize(
    segment: AnySegment, rows: mx.array | None = None, dtype: mx.Dtype = mx.float32
) -> mx.array:
    """Decode a matrix, or the rows of it that are asked for.

    Args:
        segment: ``[N, K]`` weights of one format; without ``rows`` also ``[experts, N, K]``.
        rows: integer array of any shape, each in ``[0, N)``; None for all rows in order.
        dtype: float16, bfloat16 or float32. Every weight is computed in float32 exactly as
            ggml defines it (one rounding where the format has a bias, none elsewhere) and
            then rounded once to ``dtype``.

    Returns:
        Of the segment's shape, or ``[*rows.shape, K]``.

    Raises:
        ValueError: ``rows`` of a segment with experts.
    """
    if rows is not None and segment.experts is not None:
        raise ValueError(
            f"rows of a matrix: expected a segment [N, K], found one of {segment.experts} experts; "
            "take() an expert first"
        )
    (out,) = KERNEL(segment, rows, dtype)
    return out


def section(trait: str) -> str:
    """The part of the Metal sources that holds a trait."""
    return f"formats.h:{trait.partition('<')[0]}"


def bindings(segment: AnySegment, suffix: str = "") -> tuple[tuple[str, ...], str]:
    """Input names of a segment's streams, and the Metal expression that gathers them."""
    held = [s for s in STREAMS if s in segment.arrays]
    names = [f"{s}{suffix}" if s in held else f"codes{suffix}" for s in STREAMS]
    return tuple(f"{s}{suffix}" for s in held), f"streams({', '.join(names)})"


@cache
def _program(trait: str, held: tuple[str, ...], expression: str, gathered: bool) -> Program:
    row = "uint(rows[to])" if gathered else "to"
    return Program(
        op="dequantize",
        inputs=(*held, *(["rows"] if gathered else []), "size"),
        outputs=("out",),
        body=(
            "const uint i = thread_position_in_grid.x;\n"
            "const uint to = thread_position_in_grid.y;\n"
            f"dequantize_unit<{trait}, T>({expression}, out, min({row}, uint(size[0] - 1)), "
            "uint(size[1]), i, to);\n"
        ),
        parts=(section(trait), "dequantize.metal"),
    )


def _launch(segment: AnySegment, rows: mx.array | None, dtype: mx.Dtype) -> Launch:
    held, expression = bindings(segment)
    units = segment.columns // segment.unit
    # Rows of all experts lie one after the other.
    lead = segment.arrays["codes"].shape[:-1] if rows is None else rows.shape
    chosen = () if rows is None else (rows.reshape(-1),)
    return Launch(
        program=_program(segment.trait, held, expression, rows is not None),
        arrays=(
            *(segment.arrays[s] for s in held),
            *chosen,
            mx.array([segment.rows * (segment.experts or 1), units], mx.int32),
        ),
        grid=(units, math.prod(lead), 1),
        threadgroup=(min(units, 128), 1, 1),
        template=(("T", dtype),),
        shapes=((*lead, segment.columns),),
        dtypes=(dtype,),
    )


def _refuse(segment: AnySegment, rows: mx.array | None, dtype: mx.Dtype) -> str | None:
    if dtype not in FLOATS:
        return f"results are float16, bfloat16 or float32, not {dtype}"
    if rows is not None and rows.size == 0:
        return "there are no rows"
    return None


def _reference(segment: AnySegment, rows: mx.array | None, dtype: mx.Dtype) -> list[mx.array]:
    if rows is not None:
        taken = segment.take(rows.reshape(-1))
        return [decode(taken).reshape(*rows.shape, segment.columns).astype(dtype)]
    return [decode(segment).astype(dtype)]


KERNEL = Kernel("dequantize", _launch, _refuse, _reference, small.rows)
