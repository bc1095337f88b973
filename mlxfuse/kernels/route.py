"""The experts that a router chooses, and their weights: ``metal/route.metal``."""

from __future__ import annotations

from functools import cache, lru_cache

import mlx.core as mx

from .runtime.kernel import Kernel, Launch, Program, normal
from .weight import FLOATS

MAX_EXPERTS = 1024
MAX_CHOSEN = 32
"""Most experts, and most that are chosen of them: a SIMD-group holds a row in its registers."""


def route(logits: mx.array, count: int, *, whole: bool) -> tuple[mx.array, mx.array]:
    """The ``count`` experts with the largest logits and their weights, the largest first.

    Of equal logits the expert with the lower number goes first. Weights are a softmax in float32,
    rounded once to the type of the logits. MLX-LM rounds the softmax and the division by the sum
    of what was chosen, and names the experts in any order.

    Args:
        logits: ``[..., experts]``, float16, bfloat16 or float32.
        count: from 1 to ``experts``.
        whole: the softmax is over all experts, so that the weights add up to less than 1; else
            over those that are chosen, which is what dividing by their sum gives.

    Returns:
        uint32 ``[..., count]``, and weights of the same shape.

    Raises:
        ValueError: there are not so many experts.
    """
    _check(logits, count)
    ids, scores = KERNEL(logits, count, whole)
    return ids, scores


def _check(logits: mx.array, count: int) -> None:
    if logits.ndim < 1 or not 1 <= count <= logits.shape[-1]:
        raise ValueError(f"logits: expected at least {count} experts, found {logits.shape}")


def _refuse(logits: mx.array, count: int, whole: bool) -> str | None:
    if logits.dtype not in FLOATS:
        return f"logits are float16, bfloat16 or float32, not {logits.dtype}"
    if logits.size == 0:
        return "there are no rows"
    if logits.shape[-1] > MAX_EXPERTS or count > MAX_CHOSEN:
        return f"more than {MAX_EXPERTS} experts, or {MAX_CHOSEN} of them for a token"
    return None


def _launch(logits: mx.array, count: int, whole: bool) -> Launch:
    experts = logits.shape[-1]
    pieces = next(n for n in (1, 2, 4, 8, 16, 32) if 32 * n >= experts)
    shape = (*logits.shape[:-1], count)
    return Launch(
        program=_program(pieces, whole),
        arrays=(logits, _size(experts, count)),
        grid=(32, logits.size // experts, 1),
        threadgroup=(32, 1, 1),
        template=(("T", logits.dtype),),
        shapes=(shape, shape),
        dtypes=(mx.uint32, logits.dtype),
    )


@lru_cache(maxsize=64)
def _size(experts: int, count: int) -> mx.array:
    array = mx.array([experts, count], mx.uint32)
    mx.eval(array)
    return array


@cache
def _program(pieces: int, whole: bool) -> Program:
    return Program(
        op="route",
        inputs=("logits", "size"),
        outputs=("ids", "scores"),
        body=(
            f"route<{pieces}, {str(whole).lower()}, T>(logits, size, thread_position_in_grid.y, "
            "thread_index_in_simdgroup, ids, scores);\n"
        ),
        parts=("route.metal",),
    )


def _reference(logits: mx.array, count: int, whole: bool) -> list[mx.array]:
    ids = mx.argsort(-logits.astype(mx.float32), axis=-1)[..., :count].astype(mx.uint32)
    if whole:
        weights = mx.softmax(logits.astype(mx.float32), axis=-1)
        return [ids, mx.take_along_axis(weights, ids, axis=-1).astype(logits.dtype)]
    chosen = mx.take_along_axis(logits, ids, axis=-1).astype(mx.float32)
    return [ids, mx.softmax(chosen, axis=-1).astype(logits.dtype)]


def _small(logits: mx.array, count: int, whole: bool) -> tuple[mx.array, int, bool]:
    """A few random rows of as many experts."""
    experts = logits.shape[-1]
    return normal(logits.dtype)(min(logits.size // experts, 8), experts), count, whole


KERNEL = Kernel("route", _launch, _refuse, _reference, _small)
