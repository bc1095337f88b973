"""Every kernel, in the variants that differ in source: compiled, and run on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlxfuse.bench.cases import sample
from mlxfuse.formats import BY_NAME
from mlxfuse.kernels import causal_conv, delta_step, route, route_sigmoid, ssm_step
from mlxfuse.kernels.activations import Int8Activations
from mlxfuse.kernels.kv import dequantize_kv, quantize_kv
from mlxfuse.kernels.kv.compressed_sdpa import compressed_sdpa
from mlxfuse.kernels.kv.scheme import KVScheme, KVSide, pack
from mlxfuse.kernels.kv.sdpa_call import Scores
from mlxfuse.kernels.matmul import dequantize, int8_matmul, quantized_matmul
from mlxfuse.kernels.matmul.product import Experts
from mlxfuse.kernels.matmul.tile_program import ACTIVATIONS, GATED
from mlxfuse.kernels.norm import gated_norm, norm_rope, quantize_int8, rms_norm
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.kernels.runtime.self_test import calls
from mlxfuse.kernels.runtime.source import header
from mlxfuse.kernels.weight import AffineSegment, AnySegment, Part, QuantizedWeight
from tests import msl

from . import flat

# But for those that are stored as others are.
FORMATS = tuple(f.name for f in BY_NAME.values() if f.kernel and not f.traits.stored)
MLX = {f"affine{bits}": (bits, 64, "affine") for bits in (2, 3, 4, 5, 6, 8)}
MLX |= {"mlx mxfp4": (4, 32, "mxfp4"), "mlx mxfp8": (8, 32, "mxfp8"), "mlx nvfp4": (4, 16, "nvfp4")}
NAMES = (*FORMATS, *MLX)
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
ROWS, COLUMNS = 24, 512


@dataclass(frozen=True)
class Variant:
    """A kernel and the arguments that make the variant; ``str`` names it."""

    name: str
    kernel: _kernel.Kernel[Any]
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return self.name

    @property
    def launch(self) -> _kernel.Launch:
        return self.kernel.launch(*self.arguments)

    @property
    def reference(self) -> list[mx.array]:
        return self.kernel.reference(*self.arguments)

    @property
    def nbytes(self) -> int:
        """Bytes of inputs and outputs of a single dispatch."""
        launch = self.launch
        sizes = zip(launch.shapes, launch.dtypes, strict=True)
        outputs = sum(int(np.prod(shape)) * dtype.size for shape, dtype in sizes)
        return outputs + sum(a.nbytes for a in launch.arrays)


def call_of(launch: _kernel.Launch) -> dict[str, Any]:
    """How ``mx.fast.metal_kernel``'s result is called, but for the inputs."""
    return {
        "grid": launch.grid,
        "threadgroup": launch.threadgroup,
        "template": list(launch.template),
        "output_shapes": list(launch.shapes),
        "output_dtypes": list(launch.dtypes),
    }


def kernel_of(launch: _kernel.Launch, factory: Any = msl.metal_kernel) -> Any:
    """The Metal kernel of a launch, by ``mx.fast.metal_kernel`` or a stand-in."""
    return factory(
        name=f"mlxfuse_{launch.program.op}",
        input_names=list(launch.program.inputs),
        output_names=list(launch.program.outputs),
        source=launch.program.body,
        header=header(launch.program.parts),
    )


def capture(launch: _kernel.Launch) -> msl.Capture:
    """What MLX would hand to Metal."""
    return msl.capture(kernel_of(launch), launch.arrays, **call_of(launch))


def segment(name: str, rows: int, columns: int, experts: int | None = None) -> AnySegment:
    """Any bits as codes; float16 scales are below 1/8, so that no result overflows."""
    if name in MLX:
        return _of_mlx(*MLX[name], rows, columns)
    found = sample(BY_NAME[name], rows, columns)
    if experts is None:
        return found
    shape = experts, rows // experts, -1
    return replace(found, arrays={n: a.reshape(shape) for n, a in found.arrays.items()})


def _of_mlx(bits: int, group: int, mode: str, rows: int, columns: int) -> AffineSegment:
    w = mx.random.normal((rows, columns), mx.float16, key=mx.random.key(bits))
    arrays = mx.quantize(w, group, bits, mode=mode)
    names = ("codes", "scales", "supers")[: len(arrays)]
    return AffineSegment(bits, group, mode, columns, dict(zip(names, arrays, strict=True)))


def _matmul(
    name: str, parts: list[tuple[str, int]], rows: int, dtype: mx.Dtype, **more: Any
) -> Variant:
    made = {f: segment(f, sum(n for g, n in parts if g == f), COLUMNS) for f, _ in parts}
    at = dict.fromkeys(made, 0)
    weight = []
    for fmt, n in parts:
        weight.append(Part(made[fmt], at[fmt], n))
        at[fmt] += n
    return _product(name, QuantizedWeight(tuple(weight)), rows, dtype, **more)


def _product(
    name: str, weight: QuantizedWeight, rows: int, dtype: mx.Dtype, **more: Any
) -> Variant:
    rng = np.random.default_rng(rows)
    x = mx.array(rng.normal(0, 0.01, (rows, weight.columns)), mx.float32).astype(dtype)
    call = flat.call_of(x, weight, **more)
    call.check()
    return Variant(f"quantized_matmul {name}", quantized_matmul.KERNEL, (call,))


def int8(rows: int, columns: int, dtype: mx.Dtype) -> Int8Activations:
    """Any codes and scales, with the sums that belong to them."""
    rng = np.random.default_rng([rows, columns])
    codes = rng.integers(-127, 128, (rows, columns // 32, 32))
    scales = rng.uniform(0, 1e-3, codes.shape[:2]).astype(np.float32)
    sums = scales * codes.sum(-1).astype(np.float32)
    whole = mx.array(codes.reshape(rows, columns), mx.int8)
    return Int8Activations(whole, mx.array(scales), mx.array(sums), dtype)


def _int8_variants() -> Iterator[Variant]:
    """Formats with and without biases, halves and unsigned bytes; each way to cut a product."""
    for parts, rows, more in (
        ([("Q4_0", ROWS)], 1, {}),
        ([("Q6_K", ROWS)], 3, {"split": True}),
        ([("affine8", ROWS)], 40, {}),
        ([("Q4_K", ROWS), ("Q6_K", ROWS)], 40, {"activation": "swiglu"}),
        ([("Q5_0", 16), ("affine4", 8), ("affine8", 8)], 8, {"split": True}),
    ):
        product = _matmul("", parts, rows, mx.float16, **more)
        call = replace(product.arguments[0], x=int8(rows, COLUMNS, mx.float16))
        formats = ", ".join(f for f, _ in parts)
        yield Variant(f"int8_matmul {formats} M = {rows}", int8_matmul.KERNEL, (call,))


def product(name: str, rows: int, columns: int, dtype: mx.Dtype, many: int = 1) -> Variant:
    """One row of x, or ``many``, times a weight of one format, of any size."""
    weight = QuantizedWeight.whole(segment(name, rows, columns))
    return _product(f"{name} {rows} x {columns}", weight, many, dtype)


def variants() -> Iterator[Variant]:
    """All formats; each type of x, each epilogue and each kind of weight on some."""
    half = mx.float16
    some = mx.array([5, 0, 23], mx.uint32)
    for name in NAMES:
        for dtype in DTYPES if name == "Q4_0" else DTYPES[:1]:
            kind = f"{name} {str(dtype).removeprefix('mlx.core.')}"
            part = segment(name, ROWS, COLUMNS)
            if name not in MLX:
                yield Variant(f"dequantize rows {kind}", dequantize.KERNEL, (part, some, dtype))
            for rows in (1, 3):
                yield _matmul(f"{kind} M = {rows}", [(name, ROWS)], rows, dtype)
    yield Variant("dequantize", dequantize.KERNEL, (segment("Q4_0", ROWS, COLUMNS), None, half))
    rng = np.random.default_rng(0)
    same, mixed = [("Q4_K", ROWS), ("Q4_K", ROWS)], [("Q4_K", ROWS), ("Q8_0", ROWS)]
    qkv = [("Q5_0", 16), ("Q5_0", 8), ("Q8_0", 8)]
    for activation in ACTIVATIONS:
        parts = same if activation in GATED else same[:1]
        yield _matmul(f"{activation} M = 1", parts, 1, half, activation=activation)
    bias = mx.array(rng.standard_normal(32), mx.float32).astype(half)
    for rows in (1, 8, 40):
        kind = f"M = {rows}"
        yield _matmul(f"swiglu of both {kind}", mixed, rows, half, activation="swiglu")
        yield _matmul(f"split {kind}", qkv, rows, half, split=True)
        yield _matmul(f"joined, bias {kind}", qkv, rows, half, bias=bias)
        added = mx.array(rng.standard_normal((rows, ROWS)), mx.float32).astype(half)
        yield _matmul(f"residual {kind}", same[:1], rows, half, residual=added)
    yield _matmul("bfloat16 M = 40", same[:1], 40, mx.bfloat16)
    ids = mx.array([[3, 1]], mx.uint32)
    halves = [segment(name, 4 * ROWS, COLUMNS, experts=4) for name in ("MXFP4", "Q4_0")]
    both = QuantizedWeight(tuple(Part(s, 0, ROWS) for s in halves))
    yield _product("experts", both, 1, half, experts=ids)
    yield _product("experts, swiglu", both, 1, half, experts=ids, activation="swiglu")
    many = mx.array([0] * 19 + [3] * 2, mx.uint32)
    yield _product("experts in tiles", both, 21, half, experts=many, activation="swiglu_clipped")
    down = _product("experts summed", both.split()[0], 2, half, experts=ids[0])
    (call,) = down.arguments
    summed = Experts(ids, mx.full((1, 2), 0.5, half))
    yield replace(down, arguments=(replace(call, x=call.x[None], experts=summed),))
    yield from _int8_variants()
    yield from compressed()
    yield from norms()


def norm(
    rows: int,
    columns: int,
    dtype: mx.Dtype,
    *,
    added: bool = True,
    weighted: bool = True,
    post: bool | float = False,
    **more: Any,
) -> Variant:
    """`rms_norm` of random rows, with residual and weight by default, for all its outputs."""
    shapes = (rows, columns), (rows, columns), (columns,), (columns,)
    x, residual, weight, after = _normal(dtype, *shapes)
    options = {"offset": 0.0, "outputs": rms_norm.OUTPUTS, **more}
    others = (after, weight) if options.get("others") else ()
    factor = mx.array([0.5], dtype) if others else None
    beside = (rms_norm.Post(weight, 1e-4), residual) if others else None
    given = residual if added else None, options["offset"], options["outputs"]
    before = rms_norm.Post(after, 1e-3, 1.0, factor) if post is True else post or None
    call = rms_norm._Call(x, weight if weighted else None, 1e-5, *given, before, others, beside)
    call.check(call.outputs)
    outputs = ("h",) * added + call.outputs + ("others",) * bool(others)
    of = {True: "post ", False: ""}.get(post, "multiplied ")
    kind = f"{of}{rows} x {columns} {', '.join(outputs)}"
    kind += " no weight" * (not weighted)
    return Variant(f"rms_norm {kind} {_short(dtype)}", rms_norm.KERNEL, (call,))


def rope(
    columns: int,
    dims: int,
    dtype: mx.Dtype,
    *,
    length: int = 3,
    normed: bool = True,
    values: bool = False,
    **more: Any,
) -> Variant:
    """`norm_rope` of 6 heads of q and 2 of k."""
    of_q, of_k = (6, 2) if more.get("wide") else (1, 1)
    shapes = *((1, length, n * columns) for n in (6, 2)), (of_q * columns,), (of_k * columns,)
    q, k, *weights = _normal(dtype, *shapes)
    offset = more.pop("offset", mx.array(7))
    if normed:
        more |= zip(("q_weight", "k_weight"), weights, strict=True)
    how = norm_rope.RopeOptions(heads=6, kv_heads=2, dims=dims, **{"base": 1e4, **more})
    call = norm_rope._Call(q, k, offset, how, k if values else None)
    call.check()
    kind = f"{columns} of which {dims}{' traditional' if how.traditional else ''}"
    kind += " wide" if how.wide else " no weight" if how.q_scale else ""
    name = f"norm_rope {kind}{'' if normed else ' without norm'} {_short(dtype)}"
    return Variant(name, norm_rope.KERNEL, (call,))


def quantize(rows: int, columns: int, dtype: mx.Dtype) -> Variant:
    """`quantize_int8` of random rows."""
    (x,) = _normal(dtype, (rows, columns))
    return Variant(f"quantize_int8 {rows} x {columns} {_short(dtype)}", quantize_int8.KERNEL, (x,))


def norms() -> Iterator[Variant]:
    """Each type, each option, rows in one and in several pieces."""
    half, bfloat, single = DTYPES
    yield norm(2, 576, half, offset=1.0)
    yield norm(2, 2880, bfloat)
    yield norm(2, 16384, single, added=False, weighted=False)
    yield norm(2, 31, bfloat, outputs=("y",))
    yield norm(2, 576, half, post=True)
    yield norm(2, 2880, bfloat, post=True, weighted=False, outputs=())
    yield norm(2, 576, half, post=True, outputs=("y",), others=True)
    yield norm(2, 576, half, post=0.22)
    yield norm(2, 2880, bfloat, post=0.22, weighted=False, outputs=())
    yield norm(2, 576, half, added=False, outputs=("y",))
    yield norm(2, 576, half, added=False, outputs=("int8",))
    yield quantize(4, 512, half)
    yield quantize(4, 512, bfloat)
    yield rope(128, 128, half)
    yield rope(256, 64, bfloat, normed=False, traditional=True)
    yield rope(80, 20, single, values=True)
    yield rope(128, 128, bfloat, wide=True)
    yield rope(128, 128, half, normed=False, q_scale=3.87)
    logits, gate = _normal(half, (2, 128), (2, 1))
    yield Variant("route 128", route.KERNEL, (logits, 8, False, gate))
    (logits,) = _normal(single, (2, 300))
    how = route_sigmoid.SigmoidOptions(5, 6, 2, scale=2.5)
    yield Variant("route 300 by sigmoids", route_sigmoid.KERNEL, (logits, logits[0], how))
    yield Variant("route 300 whole", route.KERNEL, (logits, 5, True, None))
    x, state, weight = _normal(half, (2, 3, 40), (2, 3, 40), (40, 4))
    lengths = mx.array([3, 1])
    call = causal_conv._Call(x, state, weight, weight[:, 0], x[..., 0] > 0, lengths)
    yield Variant("causal_conv of 4", causal_conv.KERNEL, (call,))
    x, state, weight = _normal(bfloat, (1, 1, 40), (1, 2, 40), (40, 3))
    call = causal_conv._Call(x, state, weight, None, None, None)
    yield Variant("causal_conv of 3", causal_conv.KERNEL, (call,))
    for size, tiled in ((128, False), (20, True)):
        shapes = (1, 1, 8 * size), (1, 1, 4 * size), (1, 1, 4), (1, 1, 4), (size,)
        qkv, z, a, b, weight = _normal(half, *shapes)
        a_log, dt_bias, state = _normal(single, (4,), (4,), (1, 4, size, size))
        step = delta_step._Call(qkv, z, a, b, a_log, dt_bias, weight, state, 1e-6, tiled)
        yield Variant(f"delta_step {size}", delta_step.KERNEL, (step,))
    for size, limits in ((128, (0.001, 100.0)), (20, (0.0, float("inf")))):
        xbc, dt = _normal(half, (1, 1, 8 * size), (1, 1, 4))
        a_log, dt_bias, skip, state = _normal(single, (4,), (4,), (4,), (1, 4, size, size))
        update = ssm_step._Call(xbc, dt, a_log, dt_bias, skip, state, limits)
        yield Variant(f"ssm_step {size}", ssm_step.KERNEL, (update,))
    for columns, dtype in ((2048, half), (186, bfloat)):
        x, gate, weight = _normal(dtype, (2, columns), (2, columns), (columns,))
        norm_call = gated_norm._Call(x, gate, weight, 1e-5, 2)
        yield Variant(f"gated_norm {columns}", gated_norm.KERNEL, (norm_call,))


def _normal(dtype: mx.Dtype, *shapes: tuple[int, ...]) -> list[mx.array]:
    rng = np.random.default_rng(1)
    return [mx.array(rng.standard_normal(s), mx.float32).astype(dtype) for s in shapes]


def _short(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def compressed() -> Iterator[Variant]:
    """Each width of codes and kind, rotated or not; each source of tokens and kind of mask."""
    affine, symmetric = KVSide(128, 8, 64, "affine", True), KVSide(80, 4, 0, "symmetric", True)
    usual = KVScheme(affine, KVSide(128, 4, 64, "affine", True), mx.float16)
    odd = KVScheme(symmetric, KVSide(112, 16), mx.bfloat16)
    wide = KVScheme(KVSide(512, 16), KVSide(256, 8, 128), mx.float32)
    rng = np.random.default_rng(0)

    def normal(dtype: mx.Dtype, *shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape, np.float32)).astype(dtype)

    for scheme in (usual, odd):
        kind = str(scheme.dtype).removeprefix("mlx.core.")
        k, v = (normal(scheme.dtype, 1, 2, 6, s.dim) for s in (scheme.k, scheme.v))
        yield Variant(f"quantize_kv {kind}", quantize_kv.KERNEL, (k, v, scheme))
        rows = pack(scheme, k, v)
        given = (rows, scheme, scheme.dtype)
        yield Variant(f"dequantize_kv {kind}", dequantize_kv.KERNEL, given)
    for scheme, heads, queries, sources, mask in (
        (usual, 8, 1, ("rows", "tail", "sink", "fresh"), None),
        (odd, 7, 5, ("rows", "tail"), mx.bool_),
        (wide, 4, 1, ("rows", "fresh"), mx.float32),
    ):
        dk, dv, dtype = scheme.k.dim, scheme.v.dim, scheme.dtype
        k, v = normal(dtype, 1, 2, 40, dk), normal(dtype, 1, 2, 40, dv)
        rows = pack(scheme, k, v)
        plain = mx.concatenate([k, v], axis=-1)
        options: dict[str, Any] = {
            "rows": rows if "rows" in sources else None,
            "length": 37,
            "tail": plain[:, :, :16] if "tail" in sources else None,
            "tail_length": 11,
            "scores": Scores(
                dk**-0.5,
                None if mask is None else mx.ones((queries, 80), mask),
                sinks=normal(mx.float32, 2 * heads) if "sink" in sources else None,
            ),
            "sink": plain[:, :, 20:24] if "sink" in sources else None,
            "sink_length": 3,
        }
        if "fresh" in sources:
            options["fresh"] = k[:, :, 30 : 30 + queries], v[:, :, 30 : 30 + queries]
        q = normal(dtype, 1, 2 * heads, queries, dk)
        ((kernel, arguments),) = calls(
            lambda q=q, scheme=scheme, options=options: compressed_sdpa(q, scheme, **options)
        )
        name = f"compressed_sdpa {dk} {dv} {heads} x {queries} {' '.join(sources)}"
        yield Variant(name, kernel, arguments)
