"""Each kernel variant runs once on a small case against its reference, before it is used.

`calls` finds out which variants a model uses, by building its graph without running it; `check`
runs those that have not passed on this machine yet. Never inside a trace: values are compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ... import env
from ...files import write_text
from ..activations import Int8Activations
from ..kv.small import SMALL_KV
from ..matmul.dequantize import KERNEL as DEQUANTIZE
from ..matmul.int8_matmul import KERNEL as INT8_MATMUL
from ..matmul.product import MAX_BATCH, MAX_VECTOR_ROWS, Call
from ..matmul.quantized_matmul import KERNEL as QUANTIZED_MATMUL
from ..norm.norm_rope import KERNEL as NORM_ROPE
from ..norm.norm_rope import _Call as RopeCall
from ..norm.quantize_int8 import KERNEL as QUANTIZE_INT8
from ..norm.rms_norm import KERNEL as RMS_NORM
from ..norm.rms_norm import _Call as NormCall
from ..weight import Part, QuantizedWeight, Segment
from . import kernel as _kernel
from .kernel import Kernel, Launch, Program, Recorded
from .source import header

# Rows of x of which a model's calls use every variant: one by one up to a whole batch, and so
# many that the weight is dequantised.
LENGTHS = (*range(1, MAX_BATCH + 1), MAX_VECTOR_ROWS + 1)


# Rows of a weight in a small case: more than a threadgroup works on, and no multiple of that.
_ROWS = 11
_SEED = 20

# Largest error, of the largest value: sums in another order, then one rounding to the type.
_BOUNDS: dict[object, float] = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
# What one int8 code that is rounded the other way is of the largest, and of a sum of 32; and what
# Metal's fast sine, which mx.fast.rope takes, may be off.
_CODE, _SUM, _SINE = 1e-2, 2e-3, 1e-3
# Packed words in which a code may be rounded the other way: a reciprocal may be off by a bit.
_WORDS = 0.02


def calls(run: Callable[[], object]) -> list[Recorded]:
    """The kernel calls of ``run``, which must not look at a value; none of them is launched."""
    found: list[Recorded] = []
    with _kernel.recording(found):
        run()
    return found


def check(recorded: Iterable[Recorded], *, emulated: bool = False) -> dict[Program, str]:
    """Run every variant of ``recorded`` that has no result yet; disable those that are wrong.

    Results are kept in the user's cache by device, operating system, MLX version, source text
    and types. A wrong variant warns once, and its calls run as reference from then on.

    Returns:
        The programs among them that are disabled now, with the reason.
    """
    path = env.cache_dir() / "self-tests.json"
    known = _read(path)
    before = dict(known)
    disabled = {}
    seen = set()
    for kernel, arguments in recorded:
        launch = kernel.launch(*arguments)
        variant = tuple(
            (one.program, one.template, tuple(a.size < 8 for a in one.arrays))
            for one in launch.chain()
        )
        if variant in seen:
            continue
        seen.add(variant)
        key = _key(launch)
        if key not in known:
            small = _SMALL[kernel.name](*arguments)
            known[key] = compare(kernel, small, emulated=emulated)
        if reason := known[key]:
            if launch.program not in _kernel.disabled:
                warnings.warn(
                    f"mlxfuse: {kernel.name} failed its self-test and will not be used: {reason}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            _kernel.disabled[launch.program] = disabled[launch.program] = reason
    if known != before:
        _write(path, known)
    return disabled


def _key(launch: Launch) -> str:
    """What the result depends on: the machine, MLX, and what MLX compiles."""
    info = mx.device_info() if mx.metal.is_available() else {}
    text = repr(
        (
            info.get("device_name"),
            info.get("architecture"),
            platform.platform(),
            version("mlx"),
            *(
                (
                    header(one.program.parts),
                    one.program,
                    one.template,
                    tuple((a.dtype, a.ndim, a.size < 8) for a in one.arrays),
                )
                for one in launch.chain()
            ),
        )
    )
    return hashlib.sha256(text.encode()).hexdigest()


def compare(kernel: Kernel[Any], arguments: tuple[Any, ...], *, emulated: bool) -> str:
    """Empty where the outputs agree, else how they differ."""
    launch = kernel.launch(*arguments)
    try:
        got = _kernel.run(launch, emulated=emulated)
        mx.eval(got)
    except RuntimeError as error:  # Metal's compiler speaks through it
        return str(error).strip().splitlines()[0] or "it does not run"
    want = kernel.reference(*arguments)
    # All outputs follow from values rounded to the type the program is made for.
    bound = _BOUNDS[dict(launch.template)["T"]]
    if mx.int8 in launch.dtypes:
        bound = max(bound, _SUM)
    if kernel.name == NORM_ROPE.name:
        bound = max(bound, _SINE)
    for a, b in zip(got, want, strict=True):
        if a.dtype == mx.uint32:
            differ = float(mx.mean(a != b))
            if differ > _WORDS:
                return f"{differ:.1%} of the packed words differ"
            continue
        x, y = (np.array(v.astype(mx.float32)) for v in (a, b))
        worst = float(np.abs(x - y.reshape(x.shape)).max())
        largest = float(np.abs(y).max())
        allowed = _CODE if a.dtype == mx.int8 else bound
        if not worst <= allowed * largest:  # a NaN is no agreement
            return f"largest error {worst:.3g}, largest value {largest:.3g}, in {a.dtype}"
    return ""


def _small_rows(
    segment: Segment, rows: mx.array | None, dtype: mx.Dtype
) -> tuple[Segment, mx.array | None, mx.Dtype]:
    """The first rows of the very weight, all or some of them."""
    taken = segment.take(slice(0, _ROWS))
    if rows is not None:
        # MLX binds fewer than 8 elements in another address space.
        rows = mx.arange(min(rows.size, 8), dtype=rows.dtype) % taken.rows
    return taken, rows, dtype


def _small_matmul(call: Call[Any]) -> tuple[Call[Any]]:
    """The first rows of each part, random activations; the same parts, formats and epilogue."""
    rows: dict[int, list[slice]] = {}
    for part in call.weight.parts:
        taken = slice(part.first, part.first + min(part.rows, _ROWS))
        rows.setdefault(id(part.segment), []).append(taken)
    segments = {
        id(s): replace(
            s,
            arrays={
                n: mx.concatenate([a[..., r, :] for r in rows[id(s)]], axis=-2)
                for n, a in s.arrays.items()
            },
        )
        for s in call.weight.segments
    }
    parts, at = [], dict.fromkeys(segments, 0)
    for part in call.weight.parts:
        count = min(part.rows, _ROWS)
        parts.append(Part(segments[id(part.segment)], at[id(part.segment)], count))
        at[id(part.segment)] += count
    weight = QuantizedWeight(tuple(parts))
    normal = _normal(call.x.dtype)
    x = normal(call.x.size // weight.columns, weight.columns)
    small = replace(call, x=x.reshape(call.x.shape), weight=weight)
    if isinstance(call.x, Int8Activations):
        codes, scales, sums = QUANTIZE_INT8.reference(x)
        small = replace(small, x=Int8Activations(codes, scales, sums, x.dtype))
    if call.experts is not None:
        ids = mx.arange(call.experts.size, dtype=call.experts.dtype).reshape(call.experts.shape)
        small = replace(small, experts=ids * (weight.experts or 1) // ids.size)
    if call.bias is not None:
        shape = (*call.bias.shape[:-1], weight.rows)
        small = replace(small, bias=normal(*shape).astype(call.bias.dtype))
    if call.scores is not None:
        small = replace(small, scores=normal(*call.scores.shape).astype(call.scores.dtype))
    if call.residual is not None:
        small = replace(small, residual=normal(call.rows, small.widths[0]))
    return (small,)


def _normal(dtype: mx.Dtype) -> Callable[..., mx.array]:
    """Random values of given shapes, one array after the other."""
    random = np.random.default_rng(_SEED)

    def draw(*shape: int) -> mx.array:
        return mx.array(random.standard_normal(shape, np.float32)).astype(dtype)

    return draw


def _small_norm(call: NormCall) -> tuple[NormCall]:
    """A few random rows of the same length."""
    normal = _normal(call.x.dtype)
    shape = min(call.x.size // call.columns, 8), call.columns
    small = replace(call, x=normal(*shape))
    if call.residual is not None:
        small = replace(small, residual=normal(*shape))
    if call.weight is not None:
        small = replace(small, weight=normal(call.columns))
    return (small,)


def _small_quantize(x: mx.array) -> tuple[mx.array]:
    return (_normal(x.dtype)(min(x.size // x.shape[-1], 8), x.shape[-1]),)


def _small_rope(call: RopeCall) -> tuple[RopeCall]:
    """A few random positions of the same heads."""
    normal = _normal(call.q.dtype)
    lead = tuple(min(n, 8) for n in call.q.shape[:2])
    offset = mx.arange(lead[0], dtype=call.offset.dtype)
    small = replace(
        call,
        q=normal(*lead, call.q.shape[-1]),
        k=None if call.k is None else normal(*lead, call.k.shape[-1]),
        offset=offset if call.offset.ndim else offset[0],
    )
    names = [n for n in ("q_weight", "k_weight") if getattr(call, n) is not None]
    weights: Any = {name: normal(call.columns) for name in names}
    return (replace(small, **weights),)


_SMALL: dict[str, Callable[..., tuple[Any, ...]]] = {
    DEQUANTIZE.name: _small_rows,
    INT8_MATMUL.name: _small_matmul,
    NORM_ROPE.name: _small_rope,
    QUANTIZE_INT8.name: _small_quantize,
    QUANTIZED_MATMUL.name: _small_matmul,
    RMS_NORM.name: _small_norm,
    **SMALL_KV,
}


def _read(path: Path) -> dict[str, str]:
    """Results so far; a file that is not ours to believe is as none."""
    try:
        if path.stat().st_uid != os.getuid():
            return {}
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, str)}


def _write(path: Path, results: dict[str, str]) -> None:
    """Replace the file in one step; a cache that cannot be written is no error."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(path, json.dumps(results))
    except OSError as error:
        warnings.warn(f"mlxfuse: self-test results cannot be kept: {error}", stacklevel=2)
