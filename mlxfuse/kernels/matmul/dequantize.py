"""Rows of a quantised matrix as ordinary numbers: ``metal/dequantize.metal``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from ... import codebooks
from ..runtime.kernel import Kernel, Launch, Program
from ..weight import FACTORS, FLOATS, STREAMS, AnySegment
from . import small
from .decode import decode

_THREADS = 128


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


@dataclass(frozen=True, slots=True)
class Bound:
    """How a kernel's body speaks of a segment.

    inputs      names of its arrays there.
    trait       the trait that decodes it.
    expression  gathers the arrays; ``{grid}`` stands for where its codebook is.
    factors     the name of the input that has a factor for each row, if there is one.
    grid        the name of the input that is its codebook, if it has one, and its words.
    """

    inputs: tuple[str, ...]
    trait: str
    expression: str
    factors: str = ""
    grid: str = ""
    words: int = 0

    def at(self, grid: str) -> str:
        """The expression with the codebook at ``grid``."""
        return self.expression.replace("{grid}", grid)

    def stage(self, to: str, threads: int) -> str:
        """The statement with which all threads copy the codebook to threadgroup memory."""
        me = "thread_index_in_threadgroup"
        return f"stage({self.grid}, {to}, {self.words}, {me}, {threads});"


def bind(segment: AnySegment, suffix: str = "") -> tuple[Bound, dict[str, mx.array]]:
    """What the body of a kernel needs to read a segment, and the arrays by name."""
    held = [s for s in STREAMS if s in segment.arrays]
    arrays = {f"{s}{suffix}": segment.arrays[s] for s in held}
    names = [f"{s}{suffix}" if s in held else f"codes{suffix}" for s in STREAMS]
    grid, words, factors = "", 0, ""
    if FACTORS in segment.arrays:
        factors = f"{FACTORS}{suffix}"
        arrays[factors] = segment.arrays[FACTORS]
    if segment.grid:
        grid = f"grid_{segment.grid}"
        arrays[grid] = codebook(segment.grid)
        words = arrays[grid].size
    gathered = f"streams({', '.join(names)}, {'{grid}' if grid else names[0]})"
    return Bound(tuple(arrays), segment.trait, gathered, factors, grid, words), arrays


@cache
def codebook(name: str) -> mx.array:
    """The words of `mlxfuse.codebooks.staged`."""
    array = mx.array(codebooks.staged(name))
    mx.eval(array)
    return array


@cache
def _program(bound: Bound, gathered: bool) -> Program:
    row = "uint(rows[to])" if gathered else "to"
    lines = [
        "const uint me = thread_index_in_threadgroup;",
        f"threadgroup vec<T, 4> room[{4 * _THREADS}];",
    ]
    if bound.grid:
        lines += [f"threadgroup uint grid[{bound.words}];", bound.stage("grid", _THREADS)]
    lines += [
        f"const uint from = threadgroup_position_in_grid.x * {_steps(bound) * _THREADS} + me;",
        "const uint units = uint(size[1]), total = uint(size[2]);",
        f"for (uint n = 0; n < {_steps(bound)}; n++) {{",
        f"const uint at = from + n * {_THREADS}, held = min(at, total - 1), to = held / units;",
        f"dequantize_unit<{bound.trait}, {str(bool(bound.factors)).lower()}, T>("
        f"{bound.at('grid')}, {bound.factors or bound.inputs[0]}, out, "
        f"min({row}, uint(size[0] - 1)), units, held % units, at, total, room + me / 32 * 128, "
        "me % 32);",
        "}",
    ]
    return Program(
        op="dequantize",
        inputs=(*bound.inputs, *(["rows"] if gathered else []), "size"),
        outputs=("out",),
        body="\n".join(lines) + "\n",
        parts=(section(bound.trait), "dequantize.metal"),
    )


def _steps(bound: Bound) -> int:
    """Units of a thread: several where a codebook is copied first."""
    return 8 if bound.grid else 1


def _launch(segment: AnySegment, rows: mx.array | None, dtype: mx.Dtype) -> Launch:
    bound, arrays = bind(segment)
    units = segment.columns // segment.unit
    # Rows of all experts lie one after the other.
    lead = segment.arrays["codes"].shape[:-1] if rows is None else rows.shape
    total = math.prod(lead) * units
    chosen = () if rows is None else (rows.reshape(-1),)
    each = _steps(bound) * _THREADS
    return Launch(
        program=_program(bound, rows is not None),
        arrays=(
            *arrays.values(),
            *chosen,
            mx.array([segment.rows * (segment.experts or 1), units, total], mx.uint32),
        ),
        grid=(-(-total // each) * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
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
