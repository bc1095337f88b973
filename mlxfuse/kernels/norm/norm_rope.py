"""Rotary embedding of q and k together, behind their norms: ``metal/norm_rope.metal``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from ..runtime.backend import backend
from ..runtime.kernel import Kernel, Launch, Prepared, Program, normal
from ..weight import FLOATS

HEADS_EACH = 4
"""Heads of one position that a SIMD-group turns by the same angles. Not measured on a Mac."""

MAX_COLUMNS = 512
"""Longest head the kernel keeps in the registers of a SIMD-group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeOptions:
    """What the heads of q and k are normed and turned by.

    heads, kv_heads     heads of q and of k.
    dims                rotated components, the first ones of each head; even.
    q_weight, k_weight  of the norms, ``[D]``, both or neither; of another type they promote, as in
                        MLX, and the call runs without the kernel.
    eps                 of the norms.
    norm_offset         added to their weights: 1 for gemma's.
    base, freqs         one of them; freqs is float32 ``[dims / 2]``, in positions per radian.
    scale               of positions; 1 / factor for linear scaling.
    mscale              multiplies the rotated components, rounded to the type of q: the magnitude
                        of YaRN and longrope.
    traditional         pairs are (2 i, 2 i + 1), not (i, i + dims / 2).
    """

    heads: int
    kv_heads: int
    dims: int
    q_weight: mx.array | None = None
    k_weight: mx.array | None = None
    eps: float = 1e-6
    norm_offset: float = 0.0
    base: float | None = None
    freqs: mx.array | None = None
    scale: float = 1.0
    mscale: float = 1.0
    traditional: bool = False

    @property
    def weights(self) -> tuple[mx.array, ...]:
        """Those of the norms that there are."""
        return tuple(w for w in (self.q_weight, self.k_weight) if w is not None)

    def check(self, columns: int, has_keys: bool) -> None:
        """ValueError: they do not fit together, or not heads of so many components."""
        if not 0 < self.dims <= columns or self.dims % 2:
            raise ValueError(f"dims: expected an even number up to {columns}, found {self.dims}")
        if (self.base is None) == (self.freqs is None):
            raise ValueError("expected either base or freqs")
        if self.freqs is not None and self.freqs.shape != (self.dims // 2,):
            raise ValueError(f"freqs: expected ({self.dims // 2},), found {self.freqs.shape}")
        if (self.k_weight is None) != (self.q_weight is None or not has_keys):
            raise ValueError("expected both q_weight and k_weight, or neither")
        for name, weight in (("q_weight", self.q_weight), ("k_weight", self.k_weight)):
            if weight is not None and weight.shape != (columns,):
                raise ValueError(f"{name}: expected ({columns},), found {weight.shape}")


def norm_rope(
    q: mx.array, k: mx.array | None, offset: int | mx.array, options: RopeOptions
) -> tuple[mx.array, ...]:
    """`mx.fast.rope` of every head of q and k, after `mx.fast.rms_norm` of each where given.

    Pair i of the rotated components at position p turns by ``scale * p / freqs[i]`` radians,
    where ``freqs[i]`` is ``base ** (2 i / dims)`` if a base is given instead. Angles are float32.
    The results of the norm, of the product with ``mscale`` and of the rotation are each rounded
    to the type of q and k.

    Args:
        q: ``[B, L, heads * D]``, float16, bfloat16 or float32.
        k: ``[B, L, kv_heads * D]`` of the type of q; None with 0 ``kv_heads`` and no weight.
        offset: position of the first of the L: an int, or an integer array of no axes or ``[B]``.

    Returns:
        ``[B, heads, L, D]`` and, if there is a k, ``[B, kv_heads, L, D]``, contiguous.

    Raises:
        ValueError: arguments that do not fit together.
    """
    if isinstance(offset, int):
        offset = mx.array(offset, mx.int32)
    call = _Call(q, k, offset, options)
    call.check()
    return tuple(KERNEL(call))


def prepare(
    q: mx.array, k: mx.array | None, offset: mx.array, options: RopeOptions
) -> Prepared | None:
    """`norm_rope` of such arguments as one launch, to be called with q, k if there is one, and the
    offset as int32 ``[1]`` or ``[B]``; None where there is no kernel for it.
    """
    call = _Call(q, k, offset, options)
    call.check()
    if _refuse(call) is not None:
        return None
    launch = _launch(call)
    backend().expect(KERNEL, (call,), launch)
    free = ("q", "offset") if k is None else ("q", "k", "offset")
    return Prepared(launch, free, launch.shapes)


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one `norm_rope`."""

    q: mx.array
    k: mx.array | None
    offset: mx.array
    options: RopeOptions

    @property
    def columns(self) -> int:
        return self.q.shape[-1] // self.options.heads

    def check(self) -> None:
        q, k, heads, kv_heads = self.q, self.k, self.options.heads, self.options.kv_heads
        if q.ndim != 3 or heads < 1 or q.shape[-1] % heads or q.shape[-1] == 0:
            raise ValueError(f"q: expected [B, L, {heads} * D], found {q.shape}")
        columns = self.columns
        found = (*q.shape[:2], 0) if k is None else k.shape
        expected = (*q.shape[:2], kv_heads * columns)
        if found != expected:
            raise ValueError(f"k: expected {expected}, found {found}")
        self.options.check(columns, k is not None)
        if self.offset.shape not in ((), q.shape[:1]):
            raise ValueError(f"offset: expected one or {q.shape[:1]}, found {self.offset.shape}")


def _refuse(call: _Call) -> str | None:
    q = call.q
    if q.dtype not in FLOATS:
        return f"q is float16, bfloat16 or float32, not {q.dtype}"
    for other in (call.k, *call.options.weights):
        if other is not None and other.dtype != q.dtype:
            return f"q is {q.dtype}, k or a weight {other.dtype}"
    if q.size == 0 or (call.k is not None and call.k.size == 0):
        return "q or k has no rows"
    # MLX binds arrays of fewer than 8 values in another address space.
    if not 8 <= call.columns <= MAX_COLUMNS:
        return f"heads of fewer than 8 or more than {MAX_COLUMNS} values"
    return None


def _launch(call: _Call) -> Launch:
    q, k, how, columns = call.q, call.k, call.options, call.columns
    batch, length, _ = q.shape
    keys = () if k is None else (k,)
    freqs = how.freqs
    if freqs is None:
        assert how.base is not None
        freqs = _freqs(how.base, how.dims)
    size, numbers = _numbers(
        (how.heads, how.kv_heads, columns, how.dims // 2, length, call.offset.ndim),
        (how.scale, how.mscale, how.eps, how.norm_offset),
        q.dtype,
    )
    pairs = -(-how.dims // 64)
    rest = -(-(columns - how.dims) // 32)
    return Launch(
        program=_program(pairs, rest, how.traditional, bool(how.weights), k is not None),
        arrays=(
            *(q, *keys, *how.weights, freqs.astype(mx.float32)),
            *(call.offset.astype(mx.int32).reshape(-1), size, numbers),
        ),
        grid=(32 * -(-(how.heads + how.kv_heads) // HEADS_EACH), batch * length, 1),
        threadgroup=(64, 1, 1),
        template=(("T", q.dtype),),
        shapes=tuple((batch, n, length, columns) for n in (how.heads, how.kv_heads) if n),
        dtypes=(q.dtype,) * (1 + len(keys)),
    )


@lru_cache(maxsize=1024)
def _numbers(
    size: tuple[int, ...], numbers: tuple[float, ...], dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    scale, mscale, *norm = numbers
    rounded = mx.array(mscale, dtype).astype(mx.float32).item()
    arrays = mx.array(size, mx.int32), mx.array([scale, rounded, *norm], mx.float32)
    mx.eval(arrays)
    return arrays


@lru_cache(maxsize=64)
def _freqs(base: float, dims: int) -> mx.array:
    freqs = mx.array((base ** (np.arange(0, dims, 2) / dims)).astype(np.float32))
    mx.eval(freqs)
    return freqs


@cache
def _program(pairs: int, rest: int, traditional: bool, normed: bool, keys: bool) -> Program:
    norm = "Norm<T>" if normed else "NoNorm"
    names = ("q", "k") if keys else ("q",)
    q, k = names[0], names[-1]  # q in k's place is not read: k has no heads
    weights = (f"{q}_weight", f"{k}_weight") if normed else ()
    return Program(
        op="norm_rope",
        inputs=(*names, *dict.fromkeys(weights), "freqs", "offset", "size", "numbers"),
        outputs=tuple(f"{name}_out" for name in names),
        body=(
            f"const {norm} norm = {{{', '.join(weights)}}};\n"
            f"norm_rope<{norm}, {pairs}, {rest}, {str(traditional).lower()}>("
            f"{q}, {k}, norm, freqs, offset, size, numbers, thread_position_in_grid.xy, "
            f"thread_index_in_simdgroup, {q}_out, {k}_out);\n"
        ),
        parts=(f"norm_rope.metal:{norm.partition('<')[0]}",),
    )


def _reference(call: _Call) -> list[mx.array]:
    found, how = [], call.options
    for x, heads, weight in (
        (call.q, how.heads, how.q_weight),
        (call.k, how.kv_heads, how.k_weight),
    ):
        if x is None:
            continue
        x = x.reshape(*x.shape[:2], heads, -1)
        if weight is not None:
            weight = how.norm_offset + weight if how.norm_offset else weight
            x = mx.fast.rms_norm(x, weight, how.eps)
        x = x.transpose(0, 2, 1, 3)
        if how.mscale != 1.0:
            x = x.at[..., : how.dims].multiply(how.mscale)
        x = mx.fast.rope(
            x,
            how.dims,
            traditional=how.traditional,
            base=how.base,
            scale=how.scale,
            offset=call.offset,
            freqs=how.freqs,
        )
        found.append(x)
    return found


def _small(call: _Call) -> tuple[_Call]:
    """A few random positions of the same heads."""
    draw = normal(call.q.dtype)
    lead = tuple(min(n, 8) for n in call.q.shape[:2])
    offset = mx.arange(lead[0], dtype=call.offset.dtype)
    names = [n for n in ("q_weight", "k_weight") if getattr(call.options, n) is not None]
    weights: Any = {name: draw(call.columns) for name in names}
    q, k = draw(*lead, call.q.shape[-1]), call.k
    small = _Call(
        q,
        None if k is None else draw(*lead, k.shape[-1]),
        offset if call.offset.ndim else offset[0],
        replace(call.options, **weights),
    )
    return (small,)


KERNEL = Kernel("norm_rope", _launch, _refuse, _reference, _small)
