"""MLX's own kernels, read from the installed wheel, give what MLX's CPU gives, with no report.

They are what the bench is measured against: code that is known to compile and run on every Mac,
with shared memory, barriers, SIMD-group functions and matrices, that it must not find fault with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re

import mlx.core as mx
import numpy as np
import pytest

from tests import msl
from tests.msl import mlx_kernels
from tests.msl.mlx_kernels import Affine

# Largest difference over largest reference value.
TOLERANCE = {mx.float32: 3e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}
GROUP = 64


def problem(rows, k, n, dtype, bits):
    """x ``[rows, k]``, a quantised weight ``[n, k]``, and MLX's product of both in float32."""
    rng = np.random.default_rng(0)
    x = mx.array(rng.standard_normal((rows, k)).astype(np.float32)).astype(dtype)
    weight = mx.array(rng.standard_normal((n, k)).astype(np.float32)).astype(dtype)
    codes, scales, biases = mx.quantize(weight, group_size=GROUP, bits=bits)
    expected = mx.quantized_matmul(
        *(x.astype(mx.float32), codes, scales.astype(mx.float32), biases.astype(mx.float32)),
        group_size=GROUP,
        bits=bits,
    )
    return x, Affine(codes, scales, biases, GROUP, bits), np.array(expected)


def run(case, build):
    """The result as float32; the fast build's is the same in each order of threads."""
    orders = msl.ORDERS if build == "fast" else msl.ORDERS[:1]
    first, *others = (case.run(build, msl.Schedule(order=order))[0] for order in orders)
    for other in others:
        np.testing.assert_array_equal(other, first)
    y = mx.array(first)
    return np.array((y.view(mx.bfloat16) if case.x.dtype == mx.bfloat16 else y).astype(mx.float32))


def error(got, expected):
    return abs(got - expected).max() / abs(expected).max()


@pytest.mark.parametrize("build", msl.BUILDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_affine_qmv_fast(dtype, bits, build):
    x, weight, expected = problem(2, 1024, 64, dtype, bits)
    y = run(mlx_kernels.qmv_fast(x, weight), build)
    assert error(y, expected) < TOLERANCE[dtype]
    assert error(y, np.roll(expected, 1, axis=1)) > 0.1  # the measure can fail


@pytest.mark.parametrize("build", msl.BUILDS)
@pytest.mark.parametrize("rows", [32, 37])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_affine_qmm_t(dtype, rows, build):
    x, weight, expected = problem(rows, 256, 64, dtype, bits=4)
    y = run(mlx_kernels.qmm_t(x, weight), build)
    assert error(y, expected) < TOLERANCE[dtype]
    assert error(y, np.roll(expected, 1, axis=1)) > 0.1


@pytest.mark.parametrize("kernel", [mlx_kernels.qmv_fast, mlx_kernels.qmm_t])
@pytest.mark.parametrize("version", msl.LANGUAGES)
def test_the_lint_finds_no_fault(kernel, version):
    x, weight, _ = problem(1, 1024, 64, mx.bfloat16, bits=4)
    case = kernel(x, weight)
    assert msl.check(case.source, case.name, version) == ()


def test_a_fault_in_the_kernel_is_found():
    x, weight, _ = problem(1, 1024, 64, mx.float32, bits=4)
    case = mlx_kernels.qmv_fast(x, weight)
    longer = tuple((name, size + 512 * (name == "in_vec_size")) for name, size in case.sizes)
    with pytest.raises(msl.MslRunError, match="of buffer '") as e:
        dataclasses.replace(case, sizes=longer).run("checked")
    assert e.value.kind == "out-of-bounds"


def test_the_preamble_is_mlx_own():
    text = msl.preamble()
    if mx.__version__ == "0.32.4":  # equal to the string in that version's macOS library
        digest = hashlib.sha256(text.encode()).hexdigest()
        assert digest == "ec70ca7b8330eaf43786cdbeba2b816440611341c2ea48cfdef55ae8e4d358b1"
    headers = re.findall(r'^#line 1 "mlx/backend/metal/kernels/(\w+\.h)"$', text, re.M)
    assert headers == ["bf16.h", "bf16_math.h", "complex.h", "defines.h", "logging.h", "utils.h"]
    assert "#pragma once" not in text
    assert '#include "' not in text
    assert "#include <metal_stdlib>" in text
    assert "using namespace metal;" in text
