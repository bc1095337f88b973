"""MLX's own kernels, read from the installed wheel, give what MLX's CPU gives, with no report.

They are what the bench is measured against: code that is known to compile and run on every Mac,
with shared memory, barriers, SIMD-group functions and matrices, that it must not find fault with.
"""

from __future__ import annotations

import functools
import hashlib
import re

import mlx.core as mx
import numpy as np
import pytest

from tests import msl

KERNELS = "mlx/backend/metal/kernels/"
INCLUDE = re.compile(r'#include "(.*)"')
# Largest difference over largest reference value.
TOLERANCE = {mx.float32: 3e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}
METAL_TYPE = {mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t"}
GROUP = 64


def included(path, seen):
    """A header of MLX with the headers it includes in their place, each once."""
    if path in seen:
        return ""
    seen.add(path)
    lines = []
    for line in (msl.mlx_include() / path).read_text(encoding="utf-8").splitlines():
        found = INCLUDE.match(line)
        lines.append(included(found[1], seen) if found else line)
    return "\n".join(line for line in lines if "#pragma once" not in line)


@functools.cache
def quantized_headers():
    seen = set()
    names = ("quantized_utils.h", "steel/gemm/gemm.h", "quantized.h")
    return "\n".join(included(KERNELS + name, seen) for name in names)


def instantiated(name, dtype, arguments):
    """The headers and an instantiation of one kernel, as MLX writes it."""
    kernel = f"{name}<{METAL_TYPE[dtype]}, {arguments}>"
    return (
        f"{quantized_headers()}\n"
        f"using T = {METAL_TYPE[dtype]};\n"  # the entry point repeats the types of the parameters
        f'template [[host_name("{name}")]] [[kernel]] decltype({kernel}) {kernel};\n'
    )


def quantized_problem(rows, k, n, dtype, bits, seed=0):
    """x ``[rows, k]``, a quantised weight ``[n, k]``, and their product in float32."""
    rng = np.random.default_rng(seed)
    x = mx.array(rng.standard_normal((rows, k)).astype(np.float32)).astype(dtype)
    weight = mx.array(rng.standard_normal((n, k)).astype(np.float32)).astype(dtype)
    w, scales, biases = mx.quantize(weight, group_size=GROUP, bits=bits)
    upcast = [a.astype(mx.float32) for a in (scales, biases)]
    expected = mx.quantized_matmul(
        x.astype(mx.float32), w, *upcast, group_size=GROUP, bits=bits, transpose=True
    )
    return x, (w, scales, biases), np.array(expected)


def launch(library, weight, x, n, sizes, grid, threadgroup, dtype):
    """Run ``library`` with no batch dimension; y ``[rows, n]`` as float32."""
    y = np.empty((x.shape[0], n), msl.to_numpy(x).dtype)
    # The shapes and strides of batch dimensions, of which there are none.
    none = {
        b: np.zeros(1, np.int32 if b.endswith(("ndims", "shape")) else np.int64)
        for b in library.translation.buffers
        if b.endswith(("_ndims", "_shape", "_strides"))
    }
    given = dict(zip(("w", "scales", "biases"), map(msl.to_numpy, weight), strict=True))
    given |= {"x": msl.to_numpy(x), "y": y} | none
    given |= {name: np.array([value], np.int32) for name, value in sizes.items()}
    buffers = [
        msl.Buffer(name, given[name], "out" if name == "y" else "in")
        for name in library.translation.buffers
    ]
    results = []
    for order in msl.ORDERS if library.build == "fast" else ("ascending",):
        msl.launch(library, buffers, grid, threadgroup, msl.Schedule(order=order))
        results.append(y.tobytes())
    assert len(set(results)) == 1
    bits = mx.array(y)
    return np.array((bits.view(dtype) if dtype == mx.bfloat16 else bits).astype(mx.float32))


def error(got, expected):
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("build", msl.BUILDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_affine_qmv_fast(dtype, bits, build):
    rows, k, n = 2, 1024, 64
    x, weight, expected = quantized_problem(rows, k, n, dtype, bits)
    source = instantiated("affine_qmv_fast", dtype, f"{GROUP}, {bits}, false")
    library = msl.compile_kernel(source, "affine_qmv_fast", build)
    sizes = {"in_vec_size": k, "out_vec_size": n}
    # Threadgroups of 2 SIMD-groups, 4 outputs each.
    y = launch(library, weight, x, n, sizes, (rows * 32, n // 8 * 2, 1), (32, 2, 1), dtype)
    assert error(y, expected) < TOLERANCE[dtype]
    shifted = np.roll(expected, 1, axis=1)
    assert error(y, shifted) > 0.1  # the measure can fail


@pytest.mark.parametrize("build", msl.BUILDS)
@pytest.mark.parametrize("rows", [32, 37])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_affine_qmm_t(dtype, rows, build):
    k, n, bits = 256, 64, 4
    x, weight, expected = quantized_problem(rows, k, n, dtype, bits)
    source = instantiated("affine_qmm_t", dtype, f"{GROUP}, {bits}, true, false")
    library = msl.compile_kernel(source, "affine_qmm_t", build)
    sizes = {"K": k, "N": n, "M": rows}
    # Tiles of 32 x 32 by 2 x 2 SIMD-groups.
    grid = (n // 32 * 32, (rows + 31) // 32 * 2, 2)
    y = launch(library, weight, x, n, sizes, grid, (32, 2, 2), dtype)
    assert error(y, expected) < TOLERANCE[dtype]
    assert error(y, np.roll(expected, 1, axis=1)) > 0.1


@pytest.mark.parametrize("kernel", ["affine_qmv_fast", "affine_qmm_t"])
@pytest.mark.parametrize("version", msl.LANGUAGES)
def test_the_lint_finds_no_fault(kernel, version):
    aligned = "" if kernel == "affine_qmv_fast" else "true, "
    source = instantiated(kernel, mx.bfloat16, f"{GROUP}, 4, {aligned}false")
    assert msl.check(source, kernel, version) == ()


def test_a_fault_in_the_kernel_is_found():
    k, n = 1024, 64
    x, weight, _ = quantized_problem(1, k, n, mx.float32, 4)
    source = instantiated("affine_qmv_fast", mx.float32, f"{GROUP}, 4, false")
    library = msl.compile_kernel(source, "affine_qmv_fast", "checked")
    sizes = {"in_vec_size": k + 512, "out_vec_size": n}  # a row is said to be longer than it is
    with pytest.raises(msl.MslRunError, match="of buffer '") as e:
        launch(library, weight, x, n, sizes, (32, n // 8 * 2, 1), (32, 2, 1), mx.float32)
    assert e.value.kind == "out-of-bounds"


def test_the_preamble_is_mlx_own():
    text = msl.preamble()
    if mx.__version__ == "0.32.4":  # compared with the text in the macOS wheel's libmlx.dylib
        assert hashlib.sha256(text.encode()).hexdigest() == (
            "ec70ca7b8330eaf43786cdbeba2b816440611341c2ea48cfdef55ae8e4d358b1"
        )
        assert len(text.encode()) == 55112
    headers = re.findall(rf'^#line 1 "{KERNELS}(\w+\.h)"$', text, re.M)
    assert headers == ["bf16.h", "bf16_math.h", "complex.h", "defines.h", "logging.h", "utils.h"]
    assert "#pragma once" not in text
    assert not INCLUDE.search(text)
    assert "#include <metal_stdlib>" in text
