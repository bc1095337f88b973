"""What Metal's library functions give, against numpy: on the bench, and on a Mac on Metal."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests import msl

pytestmark = pytest.mark.usefixtures("kernels")
emulated_only = pytest.mark.skipif(mx.metal.is_available(), reason="tests the emulation itself")

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
INTEGERS = (mx.int32, mx.uint32, mx.int16, mx.uint16)
LANE = np.arange(32)


def run(source, inputs, shape, dtype, threads, threadgroup=None, **options):
    """The output ``o`` of ``shape`` and ``dtype``, as a numpy array (bfloat16 as float32)."""
    at_creation = {k: options.pop(k) for k in ("header", "atomic_outputs") if k in options}
    kernel = mx.fast.metal_kernel(
        name="conformance",
        input_names=list(inputs),
        output_names=["o"],
        source=source,
        **at_creation,
    )
    (o,) = kernel(
        inputs=[mx.array(a) if isinstance(a, np.ndarray) else a for a in inputs.values()],
        grid=(threads, 1, 1),
        threadgroup=(threadgroup or min(threads, 256), 1, 1),
        output_shapes=[shape],
        output_dtypes=[dtype],
        **options,
    )
    return np.array(o.astype(mx.float32) if dtype == mx.bfloat16 else o)


def evaluate(expressions, inputs, dtype, threads, prologue="", **options):
    """``[threads, len(expressions)]``: each expression in each thread, as ``dtype``."""
    n = len(expressions)
    stores = "\n".join(
        f"o[i * {n} + {j}] = static_cast<O>({e});" for j, e in enumerate(expressions)
    )
    source = f"""
      const uint i = thread_position_in_grid.x;
      const uint lane = thread_index_in_simdgroup;
      {prologue}
      {stores}
    """
    template = [("O", dtype), *options.pop("template", [])]
    return run(source, inputs, (threads, n), dtype, threads, template=template, **options)


# ---- SIMD-group and quad-group functions --------------------------------------------------------


def whole(reduce):
    return lambda v: reduce(v, axis=1, keepdims=True)


def quad(reduce):
    return lambda v: np.repeat(reduce(v.reshape(-1, 8, 4), axis=2), 4, axis=1)


def lanes(index):
    return lambda v: v[:, index]


def powers(v):
    """1 but for every eighth lane, so that products stay small."""
    return np.where(LANE % 8 == 3, v, 1)


# Values are small integers, so that sums are exact in every type and any order.
POWERS = "(lane % 8 == 3 ? v : T(1))"
SIMD = {
    "simd_sum(v)": whole(np.sum),
    "simd_max(v)": whole(np.max),
    "simd_min(v)": whole(np.min),
    f"simd_product({POWERS})": lambda v: powers(v).prod(1, keepdims=True),
    "simd_prefix_inclusive_sum(v)": lambda v: v.cumsum(1),
    "simd_prefix_exclusive_sum(v)": lambda v: v.cumsum(1) - v,
    f"simd_prefix_inclusive_product({POWERS})": lambda v: powers(v).cumprod(1),
    f"simd_prefix_exclusive_product({POWERS})": lambda v: powers(v).cumprod(1) // powers(v),
    "simd_broadcast(v, ushort(7))": lanes([7]),
    "simd_broadcast_first(v)": lanes([0]),
    "simd_shuffle(v, ushort((lane * 5 + 3) % 32))": lanes((LANE * 5 + 3) % 32),
    "simd_shuffle_xor(v, ushort(11))": lanes(LANE ^ 11),
    "simd_shuffle_rotate_up(v, ushort(3))": lanes((LANE - 3) % 32),
    "simd_shuffle_rotate_down(v, ushort(3))": lanes((LANE + 3) % 32),
    # Lanes that receive nothing keep their value.
    "simd_shuffle_up(v, ushort(2))": lanes(np.where(LANE >= 2, LANE - 2, LANE)),
    "simd_shuffle_down(v, ushort(2))": lanes(np.where(LANE < 30, LANE + 2, LANE)),
    "simd_shuffle_and_fill_up(v, T(9), ushort(2))": lambda v: np.where(
        LANE >= 2, np.roll(v, 2, 1), 9
    ),
    "simd_shuffle_and_fill_down(v, T(9), ushort(2))": lambda v: np.where(
        LANE < 30, np.roll(v, -2, 1), 9
    ),
    "quad_sum(v)": quad(np.sum),
    "quad_max(v)": quad(np.max),
    "quad_min(v)": quad(np.min),
    "quad_broadcast(v, ushort(2))": lanes(LANE // 4 * 4 + 2),
    "quad_shuffle(v, ushort((lane + 1) % 4))": lanes(LANE // 4 * 4 + (LANE + 1) % 4),
    "quad_shuffle_xor(v, ushort(2))": lanes(LANE ^ 2),
    "simd_is_first() ? T(1) : T(0)": lambda v: LANE == 0,
    "simd_any(v == T(5)) ? T(1) : T(0)": whole(lambda v, **k: (v == 5).any(**k)),
    "simd_all(v < T(5)) ? T(1) : T(0)": whole(lambda v, **k: (v < 5).all(**k)),
}
SIMD_OF_INTEGERS = {
    "simd_and(v)": whole(np.bitwise_and.reduce),
    "simd_or(v)": whole(np.bitwise_or.reduce),
    "simd_xor(v)": whole(np.bitwise_xor.reduce),
}


def simd_values(dtype):
    low = 0 if dtype in (mx.uint32, mx.uint16) else -3
    values = np.random.default_rng(0).integers(low, 5, (2, 32))
    values[:, 3::8] = abs(values[:, 3::8]) % 3 + 1
    values[1, 17] = 5  # in the second SIMD-group alone
    return values


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_simd_functions(dtype):
    functions = SIMD | (SIMD_OF_INTEGERS if dtype in INTEGERS else {})
    values = simd_values(dtype)
    x = mx.array(values.reshape(-1)).astype(dtype)
    got = evaluate(functions, {"x": x}, dtype, 64, "const T v = x[i];", template=[("T", dtype)])
    for got_one, (expression, function) in zip(got.T, functions.items(), strict=True):
        expected = np.broadcast_to(function(values), values.shape)
        np.testing.assert_array_equal(got_one.reshape(2, 32), expected, err_msg=expression)


def test_ballot():
    values = simd_values(mx.int32)
    bits = "const ulong m = static_cast<ulong>(simd_ballot(x[i] > 0));"
    got = evaluate(["m"], {"x": values.astype(np.int32).reshape(-1)}, mx.uint32, 64, bits)
    expected = ((values > 0) << LANE).sum(1)
    np.testing.assert_array_equal(got.reshape(2, 32), np.repeat(expected[:, None], 32, 1))


def test_vectors_are_shuffled_whole():
    x = np.arange(256, dtype=np.float32)
    prologue = "const float4 v = simd_shuffle_xor(float4(x[4 * i], x[4 * i + 1], 2, 3), ushort(5));"
    got = evaluate(["v.x + v.y + v.z + v.w"], {"x": x}, mx.float32, 64, prologue)
    sums = (x[::4] + x[1::4] + 5).reshape(2, 32)
    np.testing.assert_array_equal(got.reshape(2, 32), sums[:, LANE ^ 5])


def test_a_partial_simdgroup_has_its_own_lanes_only():
    x = np.arange(1, 49, dtype=np.float32)
    got = evaluate(["simd_sum(x[i])", "simd_max(-x[i])"], {"x": x}, mx.float32, 48)
    np.testing.assert_array_equal(got[:32], [[x[:32].sum(), -1]] * 32)
    np.testing.assert_array_equal(got[32:], [[x[32:].sum(), -33]] * 16)


@emulated_only
@pytest.mark.parametrize(
    "call",
    [
        "simd_sum(long(i))",
        "simd_sum(i > 0)",
        "simd_shuffle(ulong(i), ushort(0))",
        "quad_sum(ulong(i))",
    ],
)
def test_simd_functions_that_metal_lacks(call):
    # MLX's preamble adds 64-bit shuffles of its own; these are Metal's.
    with pytest.raises(msl.MslCompileError, match="SIMD-group functions take no bool"):
        evaluate([f"metal::{call}"], {}, mx.uint32, 32)


# ---- simdgroup_matrix ---------------------------------------------------------------------------

MATRICES = """
  simdgroup_matrix<T, 8, 8> a, b, c;
  threadgroup T t[64];
  for (uint k = thread_index_in_simdgroup; k < 64; k += 32) t[k] = x[k];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_load(a, t, 8);
  simdgroup_load(b, y, 12, ulong2(2, 1));
  simdgroup_load(c, y, 12, ulong2(0, 0), true);
  simdgroup_matrix<float, 8, 8> d = make_filled_simdgroup_matrix<float, 8, 8>(2.0f);
  simdgroup_multiply_accumulate(d, a, b, d);
  simdgroup_store(d, o, 8);
  simdgroup_multiply(d, a, c);
  simdgroup_store(d, o + 64, 8, ulong2(0, 0), true);
  const auto e = b.thread_elements();
  o[128 + thread_index_in_simdgroup * 2] = float(e[0]);
  o[129 + thread_index_in_simdgroup * 2] = float(e[1]);
"""


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_simdgroup_matrix(dtype):
    rng = np.random.default_rng(1)
    x, y = rng.integers(-4, 5, (8, 8)), rng.integers(-4, 5, (12, 12))
    inputs = {"x": mx.array(x.astype(np.float32)), "y": mx.array(y.astype(np.float32))}
    inputs = {k: v.astype(dtype) for k, v in inputs.items()}
    got = run(MATRICES, inputs, (192,), mx.float32, 32, template=[("T", dtype)])
    b, c = y[1:9, 2:10], y[:8, :8].T
    np.testing.assert_array_equal(got[:64].reshape(8, 8), x @ b + 2)
    np.testing.assert_array_equal(got[64:128].reshape(8, 8), (x @ c).T)
    # Which lane holds what: the layout that MLX's kernels (steel/gemm/mma.h) count on.
    quad = LANE // 4
    row, column = (quad & 4) + LANE // 2 % 4, (quad & 2) * 2 + LANE % 2 * 2
    held = np.stack([b[row, column], b[row, column + 1]], -1)
    np.testing.assert_array_equal(got[128:].reshape(32, 2), held)


# ---- atomics ------------------------------------------------------------------------------------

# Of 512 threads with value x[i], on o[j] that starts at 6.
ATOMICS = {
    "atomic_fetch_add_explicit": lambda v: 6 + v.sum(),
    "atomic_fetch_sub_explicit": lambda v: 6 - v.sum(),
    "atomic_fetch_max_explicit": lambda v: max(6, v.max()),
    "atomic_fetch_min_explicit": lambda v: min(6, v.min()),
    "atomic_fetch_and_explicit": lambda v: np.bitwise_and.reduce(v) & 6,
    "atomic_fetch_or_explicit": lambda v: np.bitwise_or.reduce(v) | 6,
    "atomic_fetch_xor_explicit": lambda v: np.bitwise_xor.reduce(v) ^ 6,
}


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint32, mx.float32], ids=str)
def test_device_atomics(dtype):
    functions = dict(list(ATOMICS.items())[:2]) if dtype == mx.float32 else ATOMICS
    v = np.random.default_rng(2).integers(0 if dtype == mx.uint32 else -900, 900, 512)
    if dtype == mx.uint32:
        functions = {k: f for k, f in functions.items() if "sub" not in k}
    source = "const T v = x[thread_position_in_grid.x];\n" + "\n".join(
        f"{name}(&o[{j}], v, memory_order_relaxed);" for j, name in enumerate(functions)
    )
    got = run(
        source,
        {"x": mx.array(v).astype(dtype)},
        (len(functions),),
        dtype,
        512,
        64,
        template=[("T", dtype)],
        atomic_outputs=True,
        init_value=6,
    )
    for got_one, (name, function) in zip(got, functions.items(), strict=True):
        assert got_one == function(v), name


def test_compare_exchange_and_threadgroup_atomics():
    source = """
      threadgroup atomic_uint count;
      threadgroup uint last;
      const uint t = thread_position_in_threadgroup.x;
      if (t == 0) atomic_store_explicit(&count, 10u, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      atomic_fetch_add_explicit(&count, t, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (t == 0) last = atomic_exchange_explicit(&count, 0u, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      // The sum of squares by compare-exchange.
      uint seen = atomic_load_explicit(&o[0], memory_order_relaxed);
      while (!atomic_compare_exchange_weak_explicit(
          &o[0], &seen, seen + t * t, memory_order_relaxed, memory_order_relaxed)) {}
      if (t == 0) atomic_store_explicit(&o[1 + threadgroup_position_in_grid.x], last,
                                        memory_order_relaxed);
    """
    got = run(source, {}, (3,), mx.uint32, 128, 64, atomic_outputs=True, init_value=0)
    numbers = np.arange(64)
    assert got.tolist() == [2 * (numbers**2).sum(), 10 + numbers.sum(), 10 + numbers.sum()]


@emulated_only
@pytest.mark.parametrize(
    "call",
    [
        "threadgroup atomic_float a; atomic_fetch_add_explicit(&a, 1.0f, memory_order_relaxed);",
        "atomic_fetch_max_explicit((device atomic_float*)o, 1.0f, memory_order_relaxed);",
    ],
)
def test_atomics_that_metal_lacks(call):
    with pytest.raises(msl.MslCompileError, match="no such atomic"):
        run(call, {}, (1,), mx.float32, 1)
