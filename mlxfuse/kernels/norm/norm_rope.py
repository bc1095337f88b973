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

_GROUPS = 8
"""SIMD-groups that share the heads of one position, where a norm acts on all of them together."""

MAX_COLUMNS = 512
"""Longest head the kernel keeps in the registers of a SIMD-group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeOptions:
    """What the heads of q and k are normed and turned by.

    heads, kv_heads     heads of q and of k.
    dims                rotated components, the first ones of each head; even.
    q_weight, k_weight  of the norms, ``[D]``, both or neither; of another type they promote, as in
                        MLX, and the call runs without the kernel.
    wide                a norm acts on all heads of q together, another on those of k; their weights
                        are ``[heads * D]`` and ``[kv_heads * D]``.
    q_scale             the norms have no weights, and q is multiplied by this number behind its
                        own, rounded to the type of q.
    eps                 of the norms.
    norm_offset         added to their weights: 1 for gemma's.
    base, freqs         one of them; freqs is float32 ``[dims / 2]``, in positions per radian.
    scale               of positions; 1 / factor for linear scaling. 0 turns nothing.
    mscale              multiplies the rotated components, rounded to the type of q: the magnitude
                        of YaRN and longrope.
    traditional         pairs are (2 i, 2 i + 1), not (i, i + dims / 2).
    """

    heads: int
    kv_heads: int
    dims: int
    q_weight: mx.array | None = None
    k_weight: mx.array | None = None
    wide: bool = False
    q_scale: float | None = None
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
        if self.q_scale is not None and self.q_weight is not None:
            raise ValueError("expected either weights or q_scale")
        of_q, of_k = (self.heads, self.kv_heads) if self.wide else (1, 1)
        for name, weight, count in (
            ("q_weight", self.q_weight, of_q * columns),
            ("k_weight", self.k_weight, of_k * columns),
        ):
            if weight is not None and weight.shape != (count,):
                raise ValueError(f"{name}: expected ({count},), found {weight.shape}")


def norm_rope(
    q: mx.array,
    k: mx.array | None,
    offset: int | mx.array,
    options: RopeOptions,
    v: mx.array | None = None,
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
        v: of the shape and type of k, which there is, or k itself. Its heads are normed without a
            weight by the same ``eps``, and not turned.

    Returns:
        ``[B, heads, L, D]`` and, if there are a k and a v, ``[B, kv_heads, L, D]``, contiguous.

    Raises:
        ValueError: arguments that do not fit together.
    """
    if isinstance(offset, int):
        offset = mx.array(offset, mx.int32)
    call = _Call(q, k, offset, options, v)
    call.check()
    return tuple(KERNEL(call))


def prepare(
    q: mx.array,
    k: mx.array | None,
    offset: mx.array,
    options: RopeOptions,
    v: mx.array | None = None,
) -> Prepared | None:
    """`norm_rope` of such arguments as one launch, to be called with q, k and v if there are any,
    and the offset as int32 ``[1]`` or ``[B]``; None where there is no kernel for it.
    """
    call = _Call(q, k, offset, options, v)
    call.check()
    if _refuse(call) is not None:
        return None
    launch = _launch(call)
    backend().expect(KERNEL, (call,), launch)
    given = {"q": q, "k": k, "v": v}
    free = (*(name for name, array in given.items() if array is not None), "offset")
    return Prepared(launch, free, launch.shapes)


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one `norm_rope`."""

    q: mx.array
    k: mx.array | None
    offset: mx.array
    options: RopeOptions
    v: mx.array | None = None

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
        if self.v is not None and (k is None or self.v.shape != k.shape):
            raise ValueError(f"v: expected {found}, found {self.v.shape}")
        self.options.check(columns, k is not None)
        if self.offset.shape not in ((), q.shape[:1]):
            raise ValueError(f"offset: expected one or {q.shape[:1]}, found {self.offset.shape}")


def _refuse(call: _Call) -> str | None:
    q = call.q
    if q.dtype not in FLOATS:
        return f"q is float16, bfloat16 or float32, not {q.dtype}"
    for other in (call.k, call.v, *call.options.weights):
        if other is not None and other.dtype != q.dtype:
            return f"q is {q.dtype}, k, v or a weight {other.dtype}"
    if q.size == 0 or (call.k is not None and call.k.size == 0):
        return "q or k has no rows"
    # MLX binds arrays of fewer than 8 values in another address space.
    if not 8 <= call.columns <= MAX_COLUMNS:
        return f"heads of fewer than 8 or more than {MAX_COLUMNS} values"
    return None


def _launch(call: _Call) -> Launch:
    q, k, how, columns = call.q, call.k, call.options, call.columns
    batch, length, _ = q.shape
    others = tuple(array for array in (k, call.v) if array is not None)
    freqs = how.freqs
    if freqs is None:
        assert how.base is not None
        freqs = _freqs(how.base, how.dims)
    wide = how.wide and bool(how.weights)
    total = how.heads + how.kv_heads
    each = -(-total // _GROUPS) if wide else HEADS_EACH
    groups = -(-total // each)
    values = 0 if call.v is None else -(-how.kv_heads // each)
    size, numbers = _numbers(
        (how.heads, how.kv_heads, columns, how.dims // 2, length, call.offset.ndim, each),
        (how.scale, how.mscale, how.eps, how.norm_offset, how.q_scale or 1.0),
        q.dtype,
    )
    pairs = -(-how.dims // 64)
    rest = -(-(columns - how.dims) // 32)
    plain = "NoNorm" if how.q_scale is None else "PlainNorm"
    norm = ("WideNorm" if wide else "Norm") if how.weights else plain
    return Launch(
        program=_program(pairs, rest, how.traditional, norm, "qkv"[: 1 + len(others)]),
        arrays=(
            *(q, *others, *how.weights, freqs.astype(mx.float32)),
            *(call.offset.astype(mx.int32).reshape(-1), size, numbers),
        ),
        grid=(32 * (groups + values), batch * length, 1),
        threadgroup=(32 * groups if wide else 64, 1, 1),
        template=(("T", q.dtype),),
        shapes=tuple(
            (batch, n, length, columns) for n in (how.heads, *[how.kv_heads] * len(others))
        ),
        dtypes=(q.dtype,) * (1 + len(others)),
    )


@lru_cache(maxsize=1024)
def _numbers(
    size: tuple[int, ...], numbers: tuple[float, ...], dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    scale, mscale, eps, offset, q_scale = numbers
    rounded = mx.array([mscale, q_scale], dtype).astype(mx.float32)
    others = mx.array([scale, eps, offset], mx.float32)
    numbered = mx.concatenate([others[:1], rounded[:1], others[1:], rounded[1:]])
    arrays = mx.array(size, mx.int32), numbered
    mx.eval(arrays)
    return arrays


@lru_cache(maxsize=64)
def _freqs(base: float, dims: int) -> mx.array:
    freqs = mx.array((base ** (np.arange(0, dims, 2) / dims)).astype(np.float32))
    mx.eval(freqs)
    return freqs


@cache
def _program(pairs: int, rest: int, traditional: bool, norm: str, names: str) -> Program:
    """Args:
    names: ``q``, ``qk`` or ``qkv``: of which there are heads.
    """
    q, k = names[0], names[:2][-1]  # q in k's place is not read: k has no heads
    weights = (f"{q}_weight", f"{k}_weight") if norm in ("Norm", "WideNorm") else ()
    kind = f"{norm}<T>" if weights else norm
    lines = [f"const {kind} norm = {{{', '.join(weights)}}};"]
    if norm == "WideNorm":
        lines = [
            f"threadgroup float partial[{2 * _GROUPS}];",
            f"const {kind} norm = wide_norm({q}, {k}, {', '.join(weights)}, size, numbers, "
            "thread_position_in_grid.y, thread_index_in_simdgroup, "
            "simdgroup_index_in_threadgroup, simdgroups_per_threadgroup, partial);",
        ]
    sections = [norm]
    if "v" in names:
        sections += ["values"]
        lines += [
            "const uint before = uint(size[0] + size[1] + size[6] - 1) / uint(size[6]);",
            "if (thread_position_in_grid.x / 32 >= before) {",
            f"norm_values<{2 * pairs + rest}>(v, size, numbers, before, "
            "thread_position_in_grid.xy, thread_index_in_simdgroup, v_out);",
            "return;",
            "}",
        ]
    lines += [
        f"norm_rope<{kind}, {pairs}, {rest}, {str(traditional).lower()}>("
        f"{q}, {k}, norm, freqs, offset, size, numbers, thread_position_in_grid.xy, "
        f"thread_index_in_simdgroup, {q}_out, {k}_out);"
    ]
    return Program(
        op="norm_rope",
        inputs=(*names, *dict.fromkeys(weights), "freqs", "offset", "size", "numbers"),
        outputs=tuple(f"{name}_out" for name in names),
        body="\n".join(lines) + "\n",
        parts=tuple(f"norm_rope.metal:{name}" for name in sections),
    )


def _reference(call: _Call) -> list[mx.array]:
    found, how = [], call.options
    for x, heads, weight, factor in (
        (call.q, how.heads, how.q_weight, how.q_scale),
        (call.k, how.kv_heads, how.k_weight, None),
    ):
        if x is None:
            continue
        if weight is not None:
            weight = how.norm_offset + weight if how.norm_offset else weight
        if how.wide and weight is not None:
            x = mx.fast.rms_norm(x, weight, how.eps)
        x = x.reshape(*x.shape[:2], heads, -1)
        if how.q_scale is not None or (weight is not None and not how.wide):
            x = mx.fast.rms_norm(x, weight, how.eps)
        x = x if factor is None else x * factor
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
    if call.v is not None:
        v = call.v.reshape(*call.v.shape[:2], how.kv_heads, -1)
        found.append(mx.fast.rms_norm(v, None, how.eps).transpose(0, 2, 1, 3))
    return found


def _small(call: _Call) -> tuple[_Call]:
    """A few random positions of the same heads."""
    draw = normal(call.q.dtype)
    lead = tuple(min(n, 8) for n in call.q.shape[:2])
    offset = mx.arange(lead[0], dtype=call.offset.dtype)
    given = {name: getattr(call.options, name) for name in ("q_weight", "k_weight")}
    weights: Any = {name: draw(*w.shape) for name, w in given.items() if w is not None}
    q, k = draw(*lead, call.q.shape[-1]), call.k
    small = _Call(
        q,
        None if k is None else draw(*lead, k.shape[-1]),
        offset if call.offset.ndim else offset[0],
        replace(call.options, **weights),
        None if k is None or call.v is None else draw(*lead, k.shape[-1]),
    )
    return (small,)


KERNEL = Kernel("norm_rope", _launch, _refuse, _reference, _small)
