"""The experts that a router chooses, and their weights: ``metal/route.metal``."""

from __future__ import annotations

from functools import cache, lru_cache

import mlx.core as mx

from .runtime.kernel import Kernel, Launch, Program, normal
from .weight import FLOATS

MAX_EXPERTS = 1024
MAX_CHOSEN = 32
"""Most experts, and most that are chosen of them: a SIMD-group holds a row in its registers."""


def route(
    logits: mx.array,
    count: int,
    *,
    whole: bool,
    gate: mx.array | None = None,
    factors: mx.array | None = None,
) -> tuple[mx.array, ...]:
    """The ``count`` experts with the largest logits and their weights, the largest first.

    Of equal logits the expert with the lower number goes first. Weights are a softmax in float32,
    rounded once to the type of the logits. MLX-LM rounds the softmax and the division by the sum
    of what was chosen, and names the experts in any order.

    Args:
        logits: ``[..., experts]``, float16, bfloat16 or float32.
        count: from 1 to ``experts``.
        whole: the softmax is over all experts, so that the weights add up to less than 1; else
            over those that are chosen, which is what dividing by their sum gives.
        gate: ``[..., 1]``, the logit of an expert that every row gets besides.
        factors: ``[experts]`` of the type of the logits, multiply the weights before they are
            rounded.

    Returns:
        uint32 ``[..., count]``, and weights of the same shape; with ``gate`` also its sigmoid, in
        float32 and rounded once to its type.

    Raises:
        ValueError: there are not so many experts, or not so many gates as rows.
    """
    if logits.ndim < 1 or not 1 <= count <= logits.shape[-1]:
        raise ValueError(f"logits: expected at least {count} experts, found {logits.shape}")
    if gate is not None and gate.shape != (*logits.shape[:-1], 1):
        raise ValueError(f"gate: expected {(*logits.shape[:-1], 1)}, found {gate.shape}")
    if factors is not None and factors.shape != logits.shape[-1:]:
        raise ValueError(f"factors: expected {logits.shape[-1:]}, found {factors.shape}")
    return tuple(KERNEL(logits, count, whole, gate, factors))


def _refuse(
    logits: mx.array,
    count: int,
    whole: bool,
    gate: mx.array | None,
    factors: mx.array | None = None,
) -> str | None:
    if logits.dtype not in FLOATS:
        return f"logits are float16, bfloat16 or float32, not {logits.dtype}"
    if logits.size == 0:
        return "there are no rows"
    if gate is not None and gate.dtype != logits.dtype:
        return f"logits are {logits.dtype}, that of the shared expert {gate.dtype}"
    if factors is not None and factors.dtype != logits.dtype:
        return f"logits are {logits.dtype}, the factors of experts {factors.dtype}"
    if logits.shape[-1] > MAX_EXPERTS or count > MAX_CHOSEN:
        return f"more than {MAX_EXPERTS} experts, or {MAX_CHOSEN} of them for a token"
    return None


def _launch(
    logits: mx.array,
    count: int,
    whole: bool,
    gate: mx.array | None,
    factors: mx.array | None = None,
) -> Launch:
    gates = () if gate is None else (gate,)
    more = () if factors is None else (factors,)
    experts = logits.shape[-1]
    pieces = next(n for n in (1, 2, 4, 8, 16, 32) if 32 * n >= experts)
    shape = (*logits.shape[:-1], count)
    return Launch(
        program=_program(pieces, whole, gate is not None, factors is not None),
        arrays=(logits, *gates, *more, _size(experts, count)),
        grid=(32, logits.size // experts, 1),
        threadgroup=(32, 1, 1),
        template=(("T", logits.dtype),),
        shapes=(shape, shape, *(g.shape for g in gates)),
        dtypes=(mx.uint32, logits.dtype, *(g.dtype for g in gates)),
    )


@lru_cache(maxsize=64)
def _size(experts: int, count: int) -> mx.array:
    array = mx.array([experts, count], mx.uint32)
    mx.eval(array)
    return array


@cache
def _program(pieces: int, whole: bool, gated: bool, multiplied: bool) -> Program:
    at = "thread_position_in_grid.y, thread_index_in_simdgroup"
    flags = f"{str(whole).lower()}, {str(multiplied).lower()}"
    factors = "factors" if multiplied else "logits"
    body = f"route<{pieces}, {flags}, T>(logits, {factors}, size, {at}, ids, scores);\n"
    if gated:
        body += f"gate_row<T>(gate, {at}, shared);\n"
    return Program(
        op="route",
        inputs=("logits", *["gate"] * gated, *["factors"] * multiplied, "size"),
        outputs=("ids", "scores", *["shared"] * gated),
        body=body,
        parts=("route.metal:softmax", *["route.metal:gate"] * gated),
    )


def _reference(
    logits: mx.array,
    count: int,
    whole: bool,
    gate: mx.array | None,
    factors: mx.array | None = None,
) -> list[mx.array]:
    ids = mx.argsort(-logits.astype(mx.float32), axis=-1)[..., :count].astype(mx.uint32)
    if whole:
        every = mx.softmax(logits.astype(mx.float32), axis=-1)
        weights = mx.take_along_axis(every, ids, axis=-1)
    else:
        chosen = mx.take_along_axis(logits, ids, axis=-1).astype(mx.float32)
        weights = mx.softmax(chosen, axis=-1)
    if factors is not None:
        weights = weights * factors[ids].astype(mx.float32)
    found = [ids, weights.astype(logits.dtype)]
    if gate is not None:
        found.append(mx.sigmoid(gate.astype(mx.float32)).astype(gate.dtype))
    return found


def _small(
    logits: mx.array,
    count: int,
    whole: bool,
    gate: mx.array | None,
    factors: mx.array | None = None,
) -> tuple[mx.array, int, bool, mx.array | None, mx.array | None]:
    """A few random rows of as many experts."""
    draw, experts = normal(logits.dtype), logits.shape[-1]
    rows = min(logits.size // experts, 8)
    gates = None if gate is None else draw(rows, 1)
    return draw(rows, experts), count, whole, gates, None if factors is None else draw(experts)


KERNEL = Kernel("route", _launch, _refuse, _reference, _small)
