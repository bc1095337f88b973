"""Activations as int8 codes, where no norm precedes: ``metal/quantize_int8.metal``."""

from __future__ import annotations

import mlx.core as mx

from ..activations import GROUP, Int8Activations
from ..runtime.kernel import Kernel, Launch, Program, normal
from ..weight import FLOATS

SMALLEST = 2.0**-126
"""Smallest normal float32; GPUs flush what is smaller to 0."""


def quantize_int8(x: mx.array) -> Int8Activations:
    """Round groups of 32 values to int8, as ggml's Q8_1.

    Args:
        x: ``[..., K]``, float16, bfloat16 or float32; K a multiple of 32.

    Returns:
        See `Int8Activations`; what is rounded to a code is the float32 quotient. A group whose
        scale would be below 2^-126 counts as zeros. A group with an infinity or a NaN has that as
        its scale, codes of 0 and a sum of NaN, so that whatever is made of it is a NaN.

    Raises:
        ValueError: K is no multiple of 32, or x is no float.
    """
    if x.ndim < 1 or x.shape[-1] % GROUP or x.dtype not in FLOATS:
        raise ValueError(
            f"x: expected floats [..., K] with K a multiple of {GROUP}, "
            f"found {x.dtype} of shape {x.shape}"
        )
    codes, scales, sums = KERNEL(x)
    return Int8Activations(codes, scales, sums, x.dtype)


def output_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Shapes of codes, scales and sums."""
    groups = (*shape[:-1], shape[-1] // GROUP)
    return shape, groups, groups


OUTPUTS = ("codes", "scales", "sums")
DTYPES = (mx.int8, mx.float32, mx.float32)

_PROGRAM = Program(
    op="quantize_int8",
    inputs=("x",),
    outputs=OUTPUTS,
    body=(
        "const ulong at = 4 * ulong(thread_position_in_grid.x);\n"
        "const vec<T, 4> v = *(const device vec<T, 4>*)(x + at);\n"
        "quantize_quad<T>(v, at, true, codes, scales, sums);\n"
    ),
    parts=("quantize_int8.metal:codes",),
)


def _launch(x: mx.array) -> Launch:
    quads = x.size // 4
    return Launch(
        program=_PROGRAM,
        arrays=(x,),
        grid=(quads, 1, 1),
        threadgroup=(min(quads, 256), 1, 1),
        template=(("T", x.dtype),),
        shapes=output_shapes(x.shape),
        dtypes=DTYPES,
    )


def _refuse(x: mx.array) -> str | None:
    return "x has no values" if x.size == 0 else None


def reference(x: mx.array) -> list[mx.array]:
    """Codes, scales and sums, by MLX's own operations."""
    groups = x.astype(mx.float32).reshape(*output_shapes(x.shape)[1], GROUP)
    largest = mx.abs(groups).max(-1)
    scales = largest / 127
    scales = mx.where(scales < SMALLEST, 0.0, scales)
    usable = (scales > 0) & (largest < mx.inf)
    ratio = mx.where(usable[..., None], groups / scales[..., None], 0.0)
    whole = mx.floor(mx.abs(ratio))
    codes = mx.sign(ratio) * (whole + (mx.abs(ratio) - whole >= 0.5))
    return [codes.reshape(x.shape).astype(mx.int8), scales, scales * codes.sum(-1)]


def _small(x: mx.array) -> tuple[mx.array]:
    """A few random rows of the same length."""
    return (normal(x.dtype)(min(x.size // x.shape[-1], 8), x.shape[-1]),)


KERNEL = Kernel("quantize_int8", _launch, _refuse, reference, _small)
