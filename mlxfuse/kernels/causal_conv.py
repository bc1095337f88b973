"""A convolution of each channel along its tokens, with its state: ``metal/causal_conv.metal``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache

import mlx.core as mx
import mlx.nn as nn

from .runtime.kernel import Kernel, Launch, Program, normal
from .weight import FLOATS, refuse_other_types

MAX_TAPS = 8
"""Longest filter: each thread holds one."""


def causal_conv(
    x: mx.array,
    state: mx.array,
    weight: mx.array,
    bias: mx.array | None = None,
    *,
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """``silu(convolution + bias)`` of each channel, and the state for the tokens that follow.

    The filter of a channel ends at its own token: ``sum(weight[k] * v[t + k])``, where v are the
    rows of the state and then those of x. The kernel computes in float32 and rounds once, to the
    type of x; MLX rounds the convolution too.

    Args:
        x: ``[B, L, C]``, float16, bfloat16 or float32.
        state: ``[B, K - 1, C]``, the last inputs before x.
        weight: ``[C, K]``, or ``[C, K, 1]`` as `mlx.nn.Conv1d` has it.
        bias: ``[C]``.
        mask: bool ``[B, L]``; tokens where it is False count as zeros.
        lengths: integers ``[B]``, the tokens of each sequence after which its state is taken,
            from 0 to L; all tokens if not given.

    Returns:
        ``[B, L, C]``, and the state ``[B, K - 1, C]``.

    Raises:
        ValueError: arguments that do not fit together.
    """
    call = _Call(x, state, weight, bias, mask, lengths)
    call.check()
    y, after = KERNEL(call)
    return y, after


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one `causal_conv`."""

    x: mx.array
    state: mx.array
    weight: mx.array
    bias: mx.array | None
    mask: mx.array | None
    lengths: mx.array | None

    @property
    def taps(self) -> int:
        return self.weight.shape[1]

    @property
    def given(self) -> dict[str, mx.array]:
        """The arrays of a call, by the names of the kernel's inputs."""
        found = {
            **{"x": self.x, "state": self.state, "weight": self.weight},
            **{"bias": self.bias, "mask": self.mask, "lengths": self.lengths},
        }
        return {name: array for name, array in found.items() if array is not None}

    def check(self) -> None:
        if self.x.ndim != 3 or self.weight.ndim not in (2, 3) or self.weight.shape[1] < 2:
            raise ValueError(
                "x and weight: expected [B, L, C] and [C, K] with K > 1, found "
                f"{self.x.shape} and {self.weight.shape}"
            )
        batch, length, channels = self.x.shape
        shapes = {
            "state": (batch, self.taps - 1, channels),
            "weight": (channels, self.taps, 1)[: self.weight.ndim],
            "bias": (channels,),
            "mask": (batch, length),
            "lengths": (batch,),
        }
        for name, shape in shapes.items():
            found = self.given.get(name)
            if found is not None and found.shape != shape:
                raise ValueError(f"{name}: expected {shape}, found {found.shape}")


def _refuse(call: _Call) -> str | None:
    x = call.x
    if x.dtype not in FLOATS:
        return f"x is float16, bfloat16 or float32, not {x.dtype}"
    if x.size == 0:
        return "x has no tokens"
    if call.taps > MAX_TAPS:
        return f"filters of more than {MAX_TAPS} values"
    others = {name: a for name, a in call.given.items() if name not in ("x", "mask", "lengths")}
    return refuse_other_types(x, others)


def _launch(call: _Call) -> Launch:
    batch, length, channels = call.x.shape
    return Launch(
        program=_program(call.taps, tuple(call.given)),
        arrays=(*call.given.values(), _size(channels, length)),
        grid=(channels, max(length, call.taps - 1), batch),
        threadgroup=(min(channels, 256), 1, 1),
        template=(("T", call.x.dtype),),
        shapes=(call.x.shape, call.state.shape),
        dtypes=(call.x.dtype, call.x.dtype),
    )


@lru_cache(maxsize=64)
def _size(channels: int, length: int) -> mx.array:
    array = mx.array([channels, length], mx.uint32)
    mx.eval(array)
    return array


@cache
def _program(taps: int, inputs: tuple[str, ...]) -> Program:
    optional = ("bias", "mask", "lengths")
    flags = ", ".join(str(name in inputs).lower() for name in optional)
    # What is not given is not read; the state stands for it.
    given = ", ".join(name if name in inputs else "state" for name in optional)
    return Program(
        op="causal_conv",
        inputs=(*inputs, "size"),
        outputs=("y", "next"),
        body=(
            f"causal_conv<{taps}, {flags}, T>(\n"
            f"    x, state, weight, {given}, size, thread_position_in_grid, y, next);\n"
        ),
        parts=("causal_conv.metal",),
    )


def _reference(call: _Call) -> list[mx.array]:
    """As MLX-LM's models compute it."""
    x, kept, length = call.x, call.taps - 1, call.x.shape[1]
    if call.mask is not None:
        x = mx.where(call.mask[..., None], x, mx.zeros((), x.dtype))
    rows = mx.concatenate([call.state, x], axis=1)
    if call.lengths is None:
        after = mx.contiguous(rows[:, length:])
    else:
        ends = mx.clip(call.lengths, 0, length)
        positions = (ends[:, None] + mx.arange(kept))[..., None]
        after = mx.take_along_axis(rows, positions, axis=1)
    weight = call.weight if call.weight.ndim == 3 else call.weight[..., None]
    y = mx.conv1d(rows, weight, groups=x.shape[-1])
    return [nn.silu(y if call.bias is None else y + call.bias), after]


def _small(call: _Call) -> tuple[_Call]:
    """Two short random sequences, or as many tokens if there are fewer."""
    batch, length, channels = call.x.shape
    batch, length, draw = min(batch, 2), min(length, 8), normal(call.x.dtype)
    small = replace(
        call, x=draw(batch, length, channels), state=draw(batch, call.taps - 1, channels)
    )
    small = replace(small, weight=draw(*call.weight.shape))
    if call.bias is not None:
        small = replace(small, bias=draw(channels))
    if call.mask is not None:
        small = replace(small, mask=draw(batch, length) > 0)
    if call.lengths is not None:
        small = replace(small, lengths=mx.arange(batch) + length // 2)
    return (small,)


KERNEL = Kernel("causal_conv", _launch, _refuse, _reference, _small)
