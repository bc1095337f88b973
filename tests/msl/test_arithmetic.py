"""Rounding of half and bfloat, vectors and integer functions, against numpy, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests import msl
from tests.msl.test_conformance import emulated_only, evaluate, run

pytestmark = pytest.mark.usefixtures("kernels")


def to_bfloat(x):
    """float32 to the nearest bfloat16, ties to even, as float32."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), np.float32(np.nan), rounded.view(np.float32))


def to_half(x):
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float32).astype(np.float16).astype(np.float32)


ROUND = {mx.float16: to_half, mx.bfloat16: to_bfloat}
NARROW = list(ROUND)


def every_value(dtype):
    """All 65,536 values of a 16-bit type, as float32."""
    bits = np.arange(65536, dtype=np.uint16)
    if dtype == mx.float16:
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def is_normal(x, dtype):
    """Zero, or not so small that hardware may flush it."""
    return ~(abs(x) < (2.0**-14 if dtype == mx.float16 else 2.0**-126)) | (x == 0)


def same(got, expected):
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_value_converts_to_float(dtype):
    x = every_value(dtype)
    x = x[is_normal(x, dtype)]
    got = evaluate(["float(x[i])"], {"x": mx.array(x).astype(dtype)}, mx.float32, x.size)[:, 0]
    np.testing.assert_array_equal(np.isnan(got), np.isnan(x))
    same(got[~np.isnan(x)], x[~np.isnan(x)])


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_float_rounds_to_nearest_even(dtype):
    """At every value, halfway between every two neighbours, and one float32 step either side."""
    x = np.unique(every_value(dtype))
    x = x[np.isfinite(x) & is_normal(x, dtype)]
    halfway = ((x[:-1].astype(np.float64) + x[1:]) / 2).astype(np.float32)
    up, down = (np.nextafter(halfway, np.float32(s * np.inf)) for s in (1, -1))
    x = np.concatenate([x, halfway, up, down, np.float32([65519, 65520, 1e6, -1e6, np.inf])])
    x = x[is_normal(x, dtype)]
    got = evaluate(["float(T(x[i]))"], {"x": x}, mx.float32, x.size, template=[("T", dtype)])
    same(got[:, 0], ROUND[dtype](x))


OPERATIONS = {
    "a + b": np.add,
    "a - b": np.subtract,
    "a * b": np.multiply,
    "a / b": np.divide,
}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_operation_rounds(dtype):
    """Each operation rounds once, and the product before the sum: no wider intermediate."""
    rng = np.random.default_rng(3)
    a, b, c = (ROUND[dtype](v) for v in rng.standard_normal((3, 65536)).astype(np.float32))
    to = ROUND[dtype]
    expected = [to(f(a, b)) for f in OPERATIONS.values()]
    expected += [to(to(a * b) + c), to(to(to(a + b) * c) - a)]
    inputs = {k: mx.array(v).astype(dtype) for k, v in (("x", a), ("y", b), ("z", c))}
    got = evaluate(
        [*OPERATIONS, "a * b + c", "(a + b) * c - a"],
        inputs,
        dtype,
        a.size,
        "const T a = x[i], b = y[i], c = z[i];",
        template=[("T", dtype)],
    ).astype(np.float32)
    for got_one, expected_one in zip(got.T, expected, strict=True):
        np.testing.assert_array_equal(got_one, expected_one)
    assert (to(a * b + c) != expected[4]).mean() > 0.1  # one rounding fewer would be seen


def test_float_products_are_not_fused():
    rng = np.random.default_rng(4)
    a, b, c = rng.standard_normal((3, 65536)).astype(np.float32)
    exact = (a.astype(np.float64) * b + c).astype(np.float32)
    # The sum of float64 rounds twice; that differs from fma in about one of 2^29 cases.
    got = evaluate(
        ["fma(x[i], y[i], z[i])", "x[i] * y[i]"], {"x": a, "y": b, "z": c}, mx.float32, a.size
    )
    np.testing.assert_array_equal(got[:, 0], exact)
    np.testing.assert_array_equal(got[:, 1], a * b)
    assert (a * b + c != exact).mean() > 0.1


@emulated_only
def test_small_numbers_are_kept_or_flushed():
    x = np.float32([1e-38, 3e-39, 1.2e-38])
    for flush, expected in ((False, x * np.float32(0.5)), (True, np.zeros(3, np.float32))):
        with msl.using(flush_denormals=flush):
            got = evaluate(["x[i] * 0.5f"], {"x": x}, mx.float32, 3)
        np.testing.assert_array_equal(got[:, 0], expected)


# ---- vectors ------------------------------------------------------------------------------------


def test_vectors():
    rng = np.random.default_rng(5)
    x = rng.integers(-50, 50, (64, 4)).astype(np.float32)
    prologue = """
      const float4 v = *(const device float4*)(x + 4 * i);
      const float3 w = float3(v.yz, 7);
      float4 s = v.wzyx; s.xz = float2(1, 2); s[1] = 5;
      const int4 n = int4(v);
      const uchar4 u = uchar4(abs(n));
    """
    a, b, c, d = x.T
    ones = np.ones(64)
    expected = {
        "dot(v, s)": a * 1 + b * 5 + c * 2 + d * a,
        "length_squared(w)": b * b + c * c + 49,
        "float4(1, v.xy, 2).y + float4(v.zw, w.yz).w": a + 7,
        "max(v, 3.0f * float4(w, 1)).x": np.maximum(a, 3 * b),
        "min(v, float4(w.zyx, 0)).y": np.minimum(b, c),
        "clamp(v, -2.0f, float4(w.z).x).z": np.clip(c, -2, 7),
        "select(v, -v, v < 0.0f).w": abs(d),
        "any(v < -45.0f) ? 1 : 0": (x < -45).any(1),
        "all(v < 45.0f) ? 1 : 0": (x < 45).all(1),
        "(v * 2.0f - w.xxxx).w": 2 * d - b,
        "float4(u).x + float(u.y)": abs(a) + abs(b),
        "(n << 1 | int4(1)).y": b * 2 + 1,
        "n.z / 3 + n.w % 7": np.trunc(c / 3) + np.fmod(d, 7),
        "as_type<float4>(as_type<uint4>(v) ^ 0x80000000u).x": -a,
        "vec<float, 2>(v.x, v.y).y + vec<T, 4>(T(1)).w": b + 1,
        "half4(v).z": c,
        "sizeof(float3) * 100 + sizeof(packed_float3)": 1612 * ones,
        "sizeof(half3) * 100 + sizeof(packed_half4)": 808 * ones,
        "alignof(packed_uchar4) * 100 + alignof(uchar4)": 104 * ones,
    }
    got = evaluate(
        expected, {"x": x.reshape(-1)}, mx.float32, 64, prologue, template=[("T", mx.float16)]
    )
    for got_one, (expression, values) in zip(got.T, expected.items(), strict=True):
        np.testing.assert_array_equal(got_one, values, err_msg=expression)


def test_packed_vectors_load_at_their_own_alignment(kernels):
    x = np.arange(40, dtype=np.uint8)
    source = """
      const device packed_uchar4* p = (const device packed_uchar4*)(x + 1);
      o[thread_position_in_grid.x] = uint(p[thread_position_in_grid.x].w);
    """
    if kernels == "checked" and msl.compiler().major >= 20:
        # The one false report known: see runtime/check.c.
        with pytest.raises(msl.MslRunError, match="misaligned read of 4 bytes"):
            run(source, {"x": x}, (9,), mx.uint32, 9)
    else:
        np.testing.assert_array_equal(run(source, {"x": x}, (9,), mx.uint32, 9), x[4:40:4])


# ---- integer and float functions ----------------------------------------------------------------


def test_integer_functions():
    rng = np.random.default_rng(6)
    a = np.append(rng.integers(0, 2**32, 63, dtype=np.uint32), np.uint32(0))
    b = rng.integers(0, 2**32, 64, dtype=np.uint32)
    n = [int(v) for v in a]
    wide = a.astype(np.uint64)
    expected = {
        "popcount(a)": [v.bit_count() for v in n],
        "clz(a)": [32 - v.bit_length() for v in n],
        "ctz(a)": [(v & -v).bit_length() - 1 if v else 32 for v in n],
        "clz(ushort(a))": [16 - (v & 0xFFFF).bit_length() for v in n],
        "rotate(a, 7u)": (wide << 7 | wide >> 25) & 0xFFFFFFFF,
        "mulhi(a, b)": wide * b >> 32,
        "extract_bits(a, 5, 9)": a >> 5 & 511,
        "insert_bits(a, b, 4, 8)": a & ~np.uint32(0xFF0) | (b & 255) << 4,
        "absdiff(a, b)": np.where(a > b, a - b, b - a),
        "addsat(a, b)": np.minimum(wide + b, 0xFFFFFFFF),
        "subsat(a, b)": np.where(a > b, a - b, 0),
        "uint(addsat(int(a), int(b)))": np.clip(
            a.view(np.int32).astype(np.int64) + b.view(np.int32), -(2**31), 2**31 - 1
        )
        & 0xFFFFFFFF,
        "uint(extract_bits(int(a), 3, 6))": ((a << 23).view(np.int32) >> 26).view(np.uint32),
        "max3(a, b, 5u)": np.maximum(np.maximum(a, b), 5),
    }
    prologue = "const uint a = x[i], b = y[i];"
    got = evaluate(expected, {"x": a, "y": b}, mx.uint32, 64, prologue)
    for got_one, (expression, values) in zip(got.T, expected.items(), strict=True):
        np.testing.assert_array_equal(got_one, np.asarray(values), err_msg=expression)


# Largest error in units of the last place (MSL specification 7.4, and what the spec leaves open 0).
FLOAT_FUNCTIONS = {
    "exp": (np.exp, 4),
    "exp2": (np.exp2, 4),
    "log": (lambda v: np.log(abs(v)), 4),
    "sqrt": (lambda v: np.sqrt(abs(v)), 0.5),
    "rsqrt": (lambda v: 1 / np.sqrt(abs(v)), 2),
    "tanh": (np.tanh, 5),
    "sin": (np.sin, 4),
    "cos": (np.cos, 4),
    "rint": (np.rint, 0),
    "round": (lambda v: np.copysign(np.floor(abs(v) + 0.5), v), 0),
    "floor": (np.floor, 0),
    "ceil": (np.ceil, 0),
    "trunc": (np.trunc, 0),
}


def test_float_functions():
    x = np.random.default_rng(7).uniform(-20, 20, 4096).astype(np.float32)
    x[:3] = [0.5, 1.5, -2.5]  # ties
    positive = {"log", "sqrt", "rsqrt"}
    calls = [f"precise::{f}({'abs(x[i])' if f in positive else 'x[i]'})" for f in FLOAT_FUNCTIONS]
    got = evaluate(calls, {"x": x}, mx.float32, x.size)
    for got_one, (name, (function, ulp)) in zip(got.T, FLOAT_FUNCTIONS.items(), strict=True):
        exact = function(x.astype(np.float64))
        step = np.spacing(abs(exact).astype(np.float32)).astype(np.float64)
        assert (abs(got_one - exact) <= ulp * step).all(), name
