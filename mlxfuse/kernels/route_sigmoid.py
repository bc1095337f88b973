"""The experts that a router chooses by sigmoids with a bias: ``metal/route.metal``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache

import mlx.core as mx

from .route import MAX_CHOSEN, MAX_EXPERTS
from .runtime.kernel import Kernel, Launch, Program, normal
from .weight import FLOATS

MAX_GROUPS = 32
"""Most groups of experts: a SIMD-group has a lane for each."""


@dataclass(frozen=True, slots=True)
class SigmoidOptions:
    """How experts are chosen, and what becomes of their weights.

    count     the experts of a row.
    groups    of neighbouring experts, of the same size.
    kept      groups that are chosen from: those with the largest sums of their best two.
    whole     weights are not divided by their sum.
    eps       is added to that sum.
    scale     multiplies the weights.
    """

    count: int
    groups: int = 1
    kept: int = 1
    whole: bool = False
    eps: float = 0.0
    scale: float = 1.0


def route_sigmoid(
    logits: mx.array, bias: mx.array, how: SigmoidOptions
) -> tuple[mx.array, mx.array]:
    """The experts with the largest ``sigmoid(logit) + bias``, and their weights.

    As in MLX-LM's ``group_expert_select``: experts of groups that are not kept count as zeros, so
    that they go before one whose value is negative. Of equal values the lower number goes first.
    All is float32.

    Args:
        logits: ``[..., experts]``, float16, bfloat16 or float32.
        bias: ``[experts]``, any of these types; the weights do without it.

    Returns:
        uint32 and float32 ``[..., count]``.

    Raises:
        ValueError: there are not so many experts, biases or groups.
    """
    experts = logits.shape[-1] if logits.ndim else 0
    if not 1 <= how.count <= experts or bias.shape != (experts,):
        raise ValueError(
            f"logits and bias: expected at least {how.count} experts and as many biases, "
            f"found {logits.shape} and {bias.shape}"
        )
    if not 1 <= how.kept <= how.groups or experts % how.groups:
        raise ValueError(f"{how.kept} of {how.groups} groups of {experts} experts")
    ids, scores = KERNEL(logits, bias, how)
    return ids, scores


def _refuse(logits: mx.array, bias: mx.array, how: SigmoidOptions) -> str | None:
    if logits.dtype not in FLOATS or bias.dtype not in FLOATS:
        return f"logits are {logits.dtype} and biases {bias.dtype}"
    if logits.size == 0:
        return "there are no rows"
    experts = logits.shape[-1]
    if experts > MAX_EXPERTS or how.count > MAX_CHOSEN or how.groups > MAX_GROUPS:
        return f"more than {MAX_EXPERTS} experts, {MAX_CHOSEN} of a token or {MAX_GROUPS} groups"
    if how.groups > 1 and experts // how.groups < 2:
        return "groups of one expert"
    return None


def _launch(logits: mx.array, bias: mx.array, how: SigmoidOptions) -> Launch:
    experts = logits.shape[-1]
    pieces = next(n for n in (1, 2, 4, 8, 16, 32) if 32 * n >= experts)
    shape = (*logits.shape[:-1], how.count)
    return Launch(
        program=_program(pieces, how.kept < how.groups, how.whole),
        arrays=(logits, bias, *_constants(experts, how)),
        grid=(32, logits.size // experts, 1),
        threadgroup=(32, 1, 1),
        template=(("T", mx.float32), ("L", logits.dtype), ("B", bias.dtype)),
        shapes=(shape, shape),
        dtypes=(mx.uint32, mx.float32),
    )


@lru_cache(maxsize=64)
def _constants(experts: int, how: SigmoidOptions) -> tuple[mx.array, mx.array]:
    numbers = mx.array([how.scale, how.eps], mx.float32)
    size = mx.array([experts, how.count, how.groups, how.kept], mx.uint32)
    mx.eval(numbers, size)
    return numbers, size


@cache
def _program(pieces: int, grouped: bool, whole: bool) -> Program:
    flags = f"{pieces}, {str(grouped).lower()}, {str(whole).lower()}"
    at = "thread_position_in_grid.y, thread_index_in_simdgroup"
    return Program(
        op="route",
        inputs=("logits", "bias", "numbers", "size"),
        outputs=("ids", "scores"),
        body=f"route_sigmoid<{flags}, T>(logits, bias, numbers, size, {at}, ids, scores);\n",
        parts=("route.metal:sigmoid",),
    )


def _reference(logits: mx.array, bias: mx.array, how: SigmoidOptions) -> list[mx.array]:
    weights = mx.sigmoid(logits.astype(mx.float32))
    values = weights + bias.astype(mx.float32)
    if how.kept < how.groups:
        parts = mx.unflatten(values, -1, (how.groups, -1))
        best = mx.topk(parts, 2, axis=-1).sum(-1)
        dropped = mx.argsort(best, axis=-1)[..., : how.groups - how.kept, None]
        values = mx.put_along_axis(parts, dropped, mx.array(0.0), axis=-2).flatten(-2)
    ids = mx.argsort(-values, axis=-1)[..., : how.count].astype(mx.uint32)
    chosen = mx.take_along_axis(weights, ids, axis=-1)
    if not how.whole:
        chosen = chosen / (chosen.sum(-1, keepdims=True) + how.eps)
    return [ids, chosen * how.scale]


def _small(
    logits: mx.array, bias: mx.array, how: SigmoidOptions
) -> tuple[mx.array, mx.array, SigmoidOptions]:
    """A few random rows of as many experts."""
    experts = logits.shape[-1]
    rows = min(logits.size // experts, 8)
    draws = normal(logits.dtype)(rows, experts), normal(bias.dtype)(experts)
    return *draws, replace(how)


KERNEL = Kernel("route", _launch, _refuse, _reference, _small)
