"""RMSNorm of groups of values behind their gate: ``metal/gated_norm.metal``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache

import mlx.core as mx

from ..runtime.kernel import Kernel, Launch, Program, normal
from ..weight import FLOATS, refuse_other_types
from .rms_norm import MAX_COLUMNS, launch_size


def gated_norm(
    x: mx.array, gate: mx.array, weight: mx.array, eps: float, *, groups: int = 1
) -> mx.array:
    """``h / sqrt(mean(h^2) + eps) * weight`` with ``h = x * silu(gate)``, as Mamba-2's mixers have.

    h is computed in float32 and rounded to its type T; MLX-LM rounds the SiLU too. Mean and root
    are float32; the normalised value and its product are each rounded to T, as by
    `mx.fast.rms_norm`. Arguments of different types promote, and run without the kernel.

    Args:
        x: ``[..., K]``, float16, bfloat16 or float32.
        gate: of the shape of x.
        weight: ``[K]``.
        eps: added to the mean of the squares.
        groups: runs of ``K / groups`` values, of which each has a mean of its own.

    Returns:
        ``[..., K]``.

    Raises:
        ValueError: arguments that do not fit together.
    """
    call = _Call(x, gate, weight, eps, groups)
    call.check()
    (y,) = KERNEL(call)
    return y


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one `gated_norm`."""

    x: mx.array
    gate: mx.array
    weight: mx.array
    eps: float
    groups: int

    @property
    def columns(self) -> int:
        """Of a group."""
        return self.x.shape[-1] // self.groups

    def check(self) -> None:
        x, groups = self.x, self.groups
        if x.ndim < 1 or groups < 1 or x.shape[-1] == 0 or x.shape[-1] % groups:
            raise ValueError(f"x: expected [..., K] with {groups} equal groups, found {x.shape}")
        if self.gate.shape != x.shape:
            raise ValueError(f"gate: expected {x.shape}, found {self.gate.shape}")
        if self.weight.shape != x.shape[-1:]:
            raise ValueError(f"weight: expected {x.shape[-1:]}, found {self.weight.shape}")


def _refuse(call: _Call) -> str | None:
    x = call.x
    if x.dtype not in FLOATS:
        return f"x is float16, bfloat16 or float32, not {x.dtype}"
    if x.size == 0:
        return "x has no rows"
    if call.columns > MAX_COLUMNS:
        return f"groups of more than {MAX_COLUMNS} values"
    return refuse_other_types(x, {"gate": call.gate, "weight": call.weight})


def _launch(call: _Call) -> Launch:
    pieces, threads = launch_size(call.columns)
    return Launch(
        program=_program(pieces, call.columns % 4 == 0),
        arrays=(call.x, call.gate, call.weight, *_constants(call.columns, call.groups, call.eps)),
        grid=(call.x.size // call.columns * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        template=(("T", call.x.dtype),),
        shapes=(call.x.shape,),
        dtypes=(call.x.dtype,),
    )


@lru_cache(maxsize=64)
def _constants(columns: int, groups: int, eps: float) -> tuple[mx.array, mx.array]:
    arrays = mx.array([columns, groups], mx.int32), mx.array([eps], mx.float32)
    mx.eval(arrays)
    return arrays


@cache
def _program(pieces: int, whole: bool) -> Program:
    return Program(
        op="gated_norm",
        inputs=("x", "gate", "weight", "sizes", "numbers"),
        outputs=("y",),
        body=(
            "threadgroup float partial[8];\n"
            f"gated_norm<T, {pieces}, {str(whole).lower()}>(\n"
            "    x, gate, weight, sizes, numbers, threadgroup_position_in_grid.x,\n"
            "    simdgroups_per_threadgroup, simdgroup_index_in_threadgroup,\n"
            "    thread_index_in_simdgroup, partial, y);\n"
        ),
        parts=("rms_norm.metal:store", "rms_norm.metal:weighted", "gated_norm.metal"),
    )


def _reference(call: _Call) -> list[mx.array]:
    dtype = mx.result_type(call.x, call.gate, call.weight)
    gate = call.gate.astype(mx.float32)
    h = (call.x.astype(mx.float32) * (gate * mx.sigmoid(gate))).astype(dtype)
    parts = mx.unflatten(h, -1, (call.groups, call.columns))
    y = mx.fast.rms_norm(parts, None, call.eps)
    return [y.flatten(-2) * call.weight.astype(dtype)]


def _small(call: _Call) -> tuple[_Call]:
    """A few random rows of the same length."""
    draw, width = normal(call.x.dtype), call.x.shape[-1]
    shape = min(call.x.size // width, 8), width
    return (replace(call, x=draw(*shape), gate=draw(*shape), weight=draw(width)),)


KERNEL = Kernel("gated_norm", _launch, _refuse, _reference, _small)
