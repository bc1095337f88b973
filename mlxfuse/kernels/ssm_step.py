"""One token of Mamba-2's recurrence: ``metal/ssm_step.metal``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import mlx.core as mx

from .one_token import check_shapes, constants, refuse_types, small
from .runtime.kernel import Kernel, Launch, Program

MAX_STATE = 256
"""Longest row of a state, of which a lane holds 8 values."""


def ssm_step(
    xbc: mx.array,
    dt: mx.array,
    parameters: tuple[mx.array, mx.array, mx.array],
    state: mx.array,
    limits: tuple[float, float],
) -> tuple[mx.array, mx.array]:
    """One token of a selective state space whose heads have one decay each (Mamba-2).

    The state S of a head and what is read of it are ``S' = exp(-exp(A_log) t) S + t x B^T`` and
    ``S' C + D x``, with ``t = clip(softplus(dt + dt_bias), *limits)``. All of it is float32, the
    result rounded once to the type of xbc; MLX-LM's classes round D to it too.

    Args:
        xbc: ``[B, 1, heads Dh + 2 groups Ds]``, float16, bfloat16 or float32: x of each head, then
            B and then C of each group; head h reads those of ``h // (heads // groups)``.
        dt: ``[B, 1, heads]`` of the type of xbc.
        parameters: A_log, dt_bias and D, ``[heads]``.
        state: float32 ``[B, heads, Dh, Ds]``.
        limits: of the step t.

    Returns:
        ``[B, 1, heads Dh]`` and the new state.

    Raises:
        ValueError: arguments that do not fit together.
    """
    call = _Call(xbc, dt, *parameters, state, limits)
    call.check()
    y, after = KERNEL(call)
    return y, after


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one `ssm_step`."""

    xbc: mx.array
    dt: mx.array
    a_log: mx.array
    dt_bias: mx.array
    skip: mx.array
    state: mx.array
    limits: tuple[float, float]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Heads, groups, and the sizes of a row of the state and of a head."""
        _, heads, size, columns = self.state.shape
        return heads, (self.xbc.shape[-1] - heads * size) // (2 * columns), columns, size

    @property
    def arrays(self) -> dict[str, mx.array]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "limits"}

    def check(self) -> None:
        if self.xbc.ndim != 3 or self.xbc.shape[1] != 1 or self.state.ndim != 4:
            raise ValueError(
                "xbc and state: expected [B, 1, N] and [B, heads, Dh, Ds], found "
                f"{self.xbc.shape} and {self.state.shape}"
            )
        batch, (heads, groups, columns, size) = self.xbc.shape[0], self.sizes
        if groups < 1 or heads % groups:
            raise ValueError(
                f"xbc: expected x of {heads} heads of {size} and B and C of some groups of "
                f"{columns}, found {self.xbc.shape[-1]} columns"
            )
        shapes = {
            "xbc": (batch, 1, heads * size + 2 * groups * columns),
            "dt": (batch, 1, heads),
            **dict.fromkeys(("a_log", "dt_bias", "skip"), (heads,)),
            "state": (batch, heads, size, columns),
        }
        check_shapes(self.arrays, shapes)


def _refuse(call: _Call) -> str | None:
    if reason := refuse_types(call.arrays, ("a_log", "dt_bias", "skip")):
        return reason
    if call.state.shape[-1] > MAX_STATE:
        return f"states with rows of more than {MAX_STATE}"
    return None


def _launch(call: _Call) -> Launch:
    heads, _, columns, size = call.sizes
    groups = min(8, -(-size // 4))
    batch = call.xbc.shape[0]
    whole = columns % 32 == 0 and heads * size % 4 == 0
    types = {"T": call.xbc, "L": call.a_log, "D": call.dt_bias, "K": call.skip}
    return Launch(
        program=_program(-(-columns // 32), whole),
        arrays=(*call.arrays.values(), *constants(call.limits, call.sizes)),
        grid=(32 * groups, heads, batch),
        threadgroup=(32 * groups, 1, 1),
        template=tuple((name, array.dtype) for name, array in types.items()),
        shapes=((batch, 1, heads * size), call.state.shape),
        dtypes=(call.xbc.dtype, mx.float32),
    )


@cache
def _program(pieces: int, whole: bool) -> Program:
    inputs = tuple(f.name for f in fields(_Call) if f.name != "limits")
    return Program(
        op="ssm_step",
        inputs=(*inputs, "numbers", "sizes"),
        outputs=("y", "next"),
        body=(
            f"ssm_step<{pieces}, {str(whole).lower()}, T>(\n"
            f"    {', '.join(inputs)}, numbers, sizes,\n"
            "    threadgroup_position_in_grid.y, threadgroup_position_in_grid.z,\n"
            "    simdgroup_index_in_threadgroup, simdgroups_per_threadgroup,\n"
            "    thread_index_in_simdgroup, y, next);\n"
        ),
        parts=("delta_step.metal", "ssm_step.metal"),
    )


def _reference(call: _Call) -> list[mx.array]:
    heads, groups, columns, size = call.sizes
    batch = call.xbc.shape[0]

    def wide(array: mx.array, *shape: int) -> mx.array:
        return array.reshape(*shape).astype(mx.float32)

    inner, shared = heads * size, groups * columns
    x, b, c = mx.split(call.xbc, [inner, inner + shared], axis=-1)
    x = wide(x, batch, heads, size)
    b, c = (mx.repeat(wide(v, batch, groups, 1, columns), heads // groups, 1) for v in (b, c))
    step = mx.logaddexp(wide(call.dt, batch, heads) + wide(call.dt_bias, heads), mx.array(0.0))
    step = mx.clip(step, *call.limits)
    decay = mx.exp(-mx.exp(wide(call.a_log, heads)) * step)
    state = call.state * decay[..., None, None] + (x * step[..., None])[..., None] * b
    y = (state * c).sum(-1) + x * wide(call.skip, heads, 1)
    return [y.reshape(batch, 1, inner).astype(call.xbc.dtype), state]


def _small(call: _Call) -> tuple[_Call]:
    return small(call, call.arrays)


KERNEL = Kernel("ssm_step", _launch, _refuse, _reference, _small)
