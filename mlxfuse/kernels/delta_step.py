"""One token of a gated delta net: ``metal/delta_step.metal``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import mlx.core as mx

from .one_token import check_shapes, constants, refuse_types, small
from .runtime.kernel import Kernel, Launch, Program

MAX_KEY_SIZE, MAX_SIZE = 256, 1024
"""Largest heads of keys, of which a lane holds 8 values, and of values."""

EPS = 1e-6
"""What MLX-LM adds to the squares of q and of k."""


def delta_step(
    qkv: mx.array,
    gates: tuple[mx.array, mx.array, mx.array],
    parameters: tuple[mx.array, mx.array, mx.array],
    state: mx.array,
    *,
    eps: float,
    tiled: bool = False,
) -> tuple[mx.array, mx.array]:
    """One token of the gated delta rule, from the convolution to the norm of each head.

    q and k are divided by their length, q by the root of its size too. The state S of a head and
    what is read of it are ``S' = g S + beta (v - g S k) k^T`` and ``S' q``, with
    ``g = exp(-exp(A_log) softplus(a + dt_bias))`` and ``beta = sigmoid(b)``; the result is
    ``rms_norm(S' q) * weight * silu(z)``. All of it is float32, rounded once to the type of qkv:
    MLX-LM's own code rounds q, k, beta, what is read and its norm as well.

    Args:
        qkv: ``[B, 1, 2 key_heads Dk + heads Dv]``, float16, bfloat16 or float32: q, k and v, heads
            side by side; value head h reads key head ``h // (heads // key_heads)``.
        gates: z ``[B, 1, heads Dv]``, a and b ``[B, 1, heads]``, of the type of qkv.
        parameters: A_log and dt_bias ``[heads]``, and the norm's weight ``[Dv]``.
        state: float32 ``[B, heads, Dv, Dk]``.
        eps: of the norm.
        tiled: in z and the result, head ``r key_heads + k`` is head ``k (heads // key_heads) + r``.

    Returns:
        ``[B, 1, heads Dv]`` and the new state.

    Raises:
        ValueError: arguments that do not fit together.
    """
    call = _Call(qkv, *gates, *parameters, state, eps, tiled)
    call.check()
    y, after = KERNEL(call)
    return y, after


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one `delta_step`."""

    qkv: mx.array
    z: mx.array
    a: mx.array
    b: mx.array
    a_log: mx.array
    dt_bias: mx.array
    weight: mx.array
    state: mx.array
    eps: float
    tiled: bool

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Heads of keys and of values, and the size of each."""
        _, heads, size, key_size = self.state.shape
        return (self.qkv.shape[-1] - heads * size) // (2 * key_size), heads, key_size, size

    @property
    def arrays(self) -> dict[str, mx.array]:
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, mx.array)}

    def check(self) -> None:
        if self.qkv.ndim != 3 or self.qkv.shape[1] != 1 or self.state.ndim != 4:
            raise ValueError(
                "qkv and state: expected [B, 1, N] and [B, heads, Dv, Dk], found "
                f"{self.qkv.shape} and {self.state.shape}"
            )
        batch, (key_heads, heads, key_size, size) = self.qkv.shape[0], self.sizes
        if key_heads < 1 or heads % key_heads:
            raise ValueError(
                f"qkv: expected q and k of some heads of {key_size} and v of {heads} of {size}, "
                f"found {self.qkv.shape[-1]} columns"
            )
        shapes = {
            "qkv": (batch, 1, 2 * key_heads * key_size + heads * size),
            "z": (batch, 1, heads * size),
            **dict.fromkeys(("a", "b"), (batch, 1, heads)),
            **dict.fromkeys(("a_log", "dt_bias"), (heads,)),
            "weight": (size,),
            "state": (batch, heads, size, key_size),
        }
        check_shapes(self.arrays, shapes)


def _refuse(call: _Call) -> str | None:
    if reason := refuse_types(call.arrays, ("a_log", "dt_bias")):
        return reason
    _, _, key_size, size = call.sizes
    if key_size > MAX_KEY_SIZE or size > MAX_SIZE:
        return f"heads of more than {MAX_KEY_SIZE} of keys or {MAX_SIZE} of values"
    return None


def _launch(call: _Call) -> Launch:
    _, heads, key_size, size = call.sizes
    groups = min(8, -(-size // 4))
    batch = call.qkv.shape[0]
    types = {"T": call.qkv, "L": call.a_log, "D": call.dt_bias}
    return Launch(
        program=_program(-(-key_size // 32), key_size % 32 == 0, size, call.tiled),
        arrays=(*call.arrays.values(), *constants((EPS, call.eps), call.sizes)),
        grid=(32 * groups, heads, batch),
        threadgroup=(32 * groups, 1, 1),
        template=tuple((name, array.dtype) for name, array in types.items()),
        shapes=((batch, 1, heads * size), call.state.shape),
        dtypes=(call.qkv.dtype, mx.float32),
    )


@cache
def _program(pieces: int, whole: bool, size: int, tiled: bool) -> Program:
    inputs = tuple(f.name for f in fields(_Call) if f.name not in ("eps", "tiled"))
    flags = ", ".join(str(flag).lower() for flag in (whole, tiled))
    return Program(
        op="delta_step",
        inputs=(*inputs, "numbers", "sizes"),
        outputs=("y", "next"),
        body=(
            f"threadgroup float read[{size}];\n"
            f"delta_step<{pieces}, {flags}, T>(\n"
            f"    {', '.join(inputs)}, numbers, sizes,\n"
            "    threadgroup_position_in_grid.y, threadgroup_position_in_grid.z,\n"
            "    simdgroup_index_in_threadgroup, simdgroups_per_threadgroup,\n"
            "    thread_index_in_simdgroup, read, y, next);\n"
        ),
        parts=("delta_step.metal",),
    )


def _reference(call: _Call) -> list[mx.array]:
    key_heads, heads, key_size, size = call.sizes
    batch, keys, each = call.qkv.shape[0], key_heads * key_size, heads // key_heads

    def wide(array: mx.array) -> mx.array:
        return array.reshape(batch, -1).astype(mx.float32)

    q, k, v = mx.split(wide(call.qkv), [keys, 2 * keys], axis=-1)
    q, k = (mx.repeat(x.reshape(batch, key_heads, 1, key_size), each, axis=1) for x in (q, k))
    q, k = (x * mx.rsqrt(x.square().sum(-1, keepdims=True) + EPS) for x in (q, k))
    step = mx.logaddexp(wide(call.a) + call.dt_bias.astype(mx.float32), mx.array(0.0))
    decay = mx.exp(-mx.exp(call.a_log.astype(mx.float32)) * step)
    state = call.state * decay[..., None, None]
    delta = v.reshape(batch, heads, size) - (state * k).sum(-1)
    delta = delta * mx.sigmoid(wide(call.b))[..., None]
    state = state + k * delta[..., None]
    read = (state * q).sum(-1) * key_size**-0.5
    y = read * mx.rsqrt(read.square().mean(-1, keepdims=True) + call.eps)
    y = y * call.weight.astype(mx.float32)
    if call.tiled:
        y = y.reshape(batch, key_heads, each, size).swapaxes(1, 2)
    z = wide(call.z)
    y = y.reshape(z.shape) * z * mx.sigmoid(z)
    return [y.reshape(call.z.shape).astype(call.qkv.dtype), state]


def _small(call: _Call) -> tuple[_Call]:
    return small(call, call.arrays)


KERNEL = Kernel("delta_step", _launch, _refuse, _reference, _small)
