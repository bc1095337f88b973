"""The bench runs MLX's generated source as a GPU would: two small kernels and MLX's call rules."""

from __future__ import annotations

import multiprocessing
import os
import stat
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests import msl
from tests.msl.build import with_lines

RMS_NORM = """
  threadgroup float partial[32];
  const uint row = threadgroup_position_in_grid.x;
  const uint tid = thread_position_in_threadgroup.x;
  const uint lane = thread_index_in_simdgroup;
  const uint n = uint(x_shape[1]);
  float sum = 0.0f;
  for (uint i = tid; i < n; i += threads_per_threadgroup.x) {
    const float v = float(x[row * n + i]);
    sum += v * v;
  }
  sum = simd_sum(sum);
  if (lane == 0) partial[simdgroup_index_in_threadgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sum = simd_sum(lane < simdgroups_per_threadgroup ? partial[lane] : 0.0f);
  const float scale = metal::precise::rsqrt(sum / float(n) + eps);
  for (uint i = tid; i < n; i += threads_per_threadgroup.x)
    y[row * n + i] = static_cast<T>(float(x[row * n + i]) * scale * float(w[i]));
"""

GEMV = """
  const uint row = threadgroup_position_in_grid.x * 2 + simdgroup_index_in_threadgroup;
  const uint lane = thread_index_in_simdgroup;
  const uint rows = uint(w_shape[0]);
  const uint cols = uint(w_shape[1]);
  float sum = 0.0f;
  if (row < rows)
    for (uint i = lane; i < cols; i += 32) sum += float(w[row * cols + i]) * float(x[i]);
  sum = simd_sum(sum);
  if (lane == 0 && row < rows) y[row] = static_cast<T>(sum);
"""

# Largest difference over largest reference value: half a unit of the type's last place, and some
# for the order of a float32 sum.
TOLERANCE = {mx.float32: 2e-6, mx.float16: 6e-4, mx.bfloat16: 4.5e-3}
DTYPES = list(TOLERANCE)

pytestmark = pytest.mark.usefixtures("kernels")
emulated_only = pytest.mark.skipif(mx.metal.is_available(), reason="tests the emulation itself")


def random(shape, dtype, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return mx.array(values).astype(dtype)


def float64(a):
    return np.array(a.astype(mx.float32)).astype(np.float64)


def error(got, expected):
    return np.abs(float64(got) - expected).max() / np.abs(expected).max()


def rms_norm(x, w, eps=1e-5, threads=64, source=RMS_NORM):
    kernel = mx.fast.metal_kernel(
        name="rms_norm", input_names=["x", "w", "eps"], output_names=["y"], source=source
    )
    return kernel(
        inputs=[x, w, mx.array(eps)],
        template=[("T", x.dtype)],
        grid=(x.shape[0] * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )[0]


def gemv(w, x):
    kernel = mx.fast.metal_kernel(
        name="gemv", input_names=["w", "x"], output_names=["y"], source=GEMV
    )
    return kernel(
        inputs=[w, x],
        template=[("T", x.dtype)],
        grid=((w.shape[0] + 1) // 2 * 64, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(w.shape[0],)],
        output_dtypes=[x.dtype],
    )[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 257), (2, 5), (1, 1024)])
def test_rms_norm(shape, dtype):
    x, w = random(shape, dtype), random(shape[1:], dtype, seed=1)
    exact = float64(x)
    exact = exact / np.sqrt((exact**2).mean(1, keepdims=True) + 1e-5) * float64(w)
    assert error(rms_norm(x, w), exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 33), (64, 576), (1, 3)])
def test_gemv(shape, dtype):
    w, x = random(shape, dtype), random(shape[1:], dtype, seed=1)
    assert error(gemv(w, x), float64(w) @ float64(x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed_input_is_copied(dtype):
    w, x = random((33, 8), dtype).T, random((33,), dtype, seed=1)
    assert error(gemv(w, x), float64(w) @ float64(x)) < TOLERANCE[dtype]


STRIDED_COPY = """
  const uint i = thread_position_in_grid.x;
  y[i] = x[elem_to_loc(i, x_shape, x_strides, x_ndim)] + s;
"""


def test_strides_reach_the_kernel():
    kernel = mx.fast.metal_kernel(
        name="strided",
        input_names=["x", "s"],
        output_names=["y"],
        source=STRIDED_COPY,
        ensure_row_contiguous=False,
    )
    x = mx.arange(40, dtype=mx.float32).reshape(5, 8).T[1:7:2]
    (y,) = kernel(
        inputs=[x, mx.array(0.5)],
        grid=(x.size, 1, 1),
        threadgroup=(4, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    np.testing.assert_array_equal(np.array(y), np.array(x) + 0.5)


GRID = """
  const uint3 p = thread_position_in_grid;
  const uint i = p.x + threads_per_grid.x * (p.y + threads_per_grid.y * p.z);
  y[i] = threads_per_threadgroup.x * 10000 + threadgroup_position_in_grid.y * 100
      + thread_index_in_threadgroup;
"""


def test_edge_threadgroups_are_smaller():
    kernel = mx.fast.metal_kernel(name="grid", input_names=[], output_names=["y"], source=GRID)
    (y,) = kernel(
        inputs=[],
        grid=(5, 3, 2),
        threadgroup=(4, 2, 1),
        output_shapes=[(2, 3, 5)],
        output_dtypes=[mx.uint32],
    )
    z, row, col = np.meshgrid(range(2), range(3), range(5), indexing="ij")
    width = np.where(col < 4, 4, 1)
    index = col % 4 + width * (row % 2)
    np.testing.assert_array_equal(np.array(y), width * 10000 + row // 2 * 100 + index + 0 * z)


def test_atomics_add_to_the_initial_value():
    source = """
      const uint i = thread_position_in_grid.x;
      atomic_fetch_add_explicit(&h[x[i] % 16], 1, memory_order_relaxed);
    """
    kernel = mx.fast.metal_kernel(
        name="histogram",
        input_names=["x"],
        output_names=["h"],
        source=source,
        atomic_outputs=True,
    )
    x = np.random.default_rng(0).integers(0, 1000, 5000).astype(np.uint32)
    (h,) = kernel(
        inputs=[mx.array(x)],
        grid=(x.size, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(16,)],
        output_dtypes=[mx.int32],
        init_value=3,
    )
    np.testing.assert_array_equal(np.array(h), np.bincount(x % 16, minlength=16) + 3)


def test_an_input_below_8_elements_is_in_constant_memory():
    kernel = mx.fast.metal_kernel(
        name="pick",
        input_names=["p"],
        output_names=["y"],
        source="const uint i = thread_position_in_grid.x; y[i] = pick(p, i);",
        header="inline float pick(device const float* p, uint i) { return p[i]; }\n",
    )

    def call(n):
        return kernel(
            inputs=[mx.arange(n, dtype=mx.float32)],
            grid=(n, 1, 1),
            threadgroup=(n, 1, 1),
            output_shapes=[(n,)],
            output_dtypes=[mx.float32],
        )[0]

    assert call(8).tolist() == list(range(8))
    with pytest.raises((msl.MslCompileError, RuntimeError), match="no matching function"):
        mx.eval(call(4))


# ---- negative controls: each check fails on a broken kernel -----------------------------------


@emulated_only
def test_a_missing_barrier_is_found(kernels):
    broken = RMS_NORM.replace("threadgroup_barrier(mem_flags::mem_threadgroup);", "")
    x, w = random((2, 256), mx.float32), random((256,), mx.float32, seed=1)
    if kernels == "checked":
        with pytest.raises(msl.MslRunError, match=r"'partial'(.|\n)*kernel\.metal:\d+") as e:
            rms_norm(x, w, source=broken)
        assert e.value.kind == "uninitialised-read"
    else:
        with pytest.raises(msl.MslRunError, match="output 'y' of custom_kernel_rms_norm") as e:
            rms_norm(x, w, source=broken)
        assert e.value.kind == "order-dependent"


@emulated_only
def test_an_order_dependent_kernel_is_found():
    # The threads of a SIMD-group are not in step: which one is last is the schedule's choice.
    source = "y[0] = float(thread_position_in_grid.x);"
    kernel = mx.fast.metal_kernel(name="last", input_names=[], output_names=["y"], source=source)
    with pytest.raises(msl.MslRunError) as e:
        kernel(
            inputs=[],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[mx.float32],
        )
    assert e.value.kind == ("data-race" if msl.options.build == "checked" else "order-dependent")


@emulated_only
def test_a_lint_error_stops_a_launch():
    x, w = random((1, 64), mx.bfloat16), random((64,), mx.bfloat16)
    broken = RMS_NORM.replace("static_cast<T>", "")
    with pytest.raises(msl.MslCompileError, match="implicit conversion from 'float' to bfloat"):
        rms_norm(x, w, source=broken)


# ---- the bench itself ---------------------------------------------------------------------------


@emulated_only
def test_the_log_names_each_launch():
    msl.log.clear()
    gemv(random((7, 33), mx.float16), random((33,), mx.float16))
    (entry,) = msl.log
    assert entry.name == "custom_kernel_gemv__float16_t_float16_t_float16_t_float16_t"
    assert (entry.grid, entry.threadgroup) == ((256, 1, 1), (64, 1, 1))
    assert (entry.threadgroup_bytes, entry.seconds > 0) == (0, True)


def capture_gemv(source=GEMV):
    kernel = msl.metal_kernel(
        name="gemv", input_names=["w", "x"], output_names=["y"], source=source
    )
    return msl.capture(
        kernel,
        [mx.zeros((7, 33)), mx.zeros((33,))],
        template=[("T", mx.float32)],
        grid=(256, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(7,)],
        output_dtypes=[mx.float32],
    )


@emulated_only
def test_generated_text_compiles_in_every_language_version():
    found = capture_gemv()
    assert msl.check_languages(found.source, found.name) == {310: (), 320: (), 400: ()}
    lambda_ = GEMV.replace(
        "float sum = 0.0f;", "auto f = [](float a) { return a; };\nfloat sum = f(0.0f);"
    )
    found = capture_gemv(lambda_)
    errors = msl.check_languages(found.source, found.name)
    assert [len(errors[v]) for v in msl.LANGUAGES] == [1, 0, 0]
    constant = GEMV.replace("if (row < rows)", "if (const uint n = rows; row < n)", 1)
    found = capture_gemv(constant)
    errors = msl.check_languages(found.source, found.name)
    assert [len(errors[v]) for v in msl.LANGUAGES] == [1, 1, 0]


@emulated_only
def test_only_what_is_counted_has_unrolled_loops():
    found = capture_gemv()
    source = found.source.replace("for (", '_Pragma("clang loop unroll(full)") for (')
    assert source != found.source
    builds = (*msl.BUILDS, "counted")
    texts = {b: msl.compile_kernel(source, found.name, b).translation.text for b in builds}
    assert [b for b, text in texts.items() if "unroll" in text] == ["counted"]


@emulated_only
@pytest.mark.parametrize("build", msl.BUILDS)
def test_line_tables_change_no_code(build, tmp_path):
    """A fault is told with the lines of a second library: its addresses must be the first's."""
    found = capture_gemv()
    codes = []
    library = msl.compile_kernel(found.source, found.name, build)
    other = msl.compile_kernel(found.source, found.name, "checked" if build == "fast" else "fast")
    for path in (library.path, with_lines(library), other.path):
        code = tmp_path / "code"
        command = ["objcopy", "-O", "binary", "--only-section=.text", str(path), str(code)]
        subprocess.run(command, check=True)
        codes.append(code.read_bytes())
    assert codes[0] == codes[1]
    assert codes[0] != codes[2]


@emulated_only
def test_cache_is_private_and_refused_when_it_is_not(tmp_path):
    assert stat.S_IMODE(msl.cache_dir().stat().st_mode) == 0o700
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    shared.chmod(0o755)
    code = "from tests import msl; msl.cache_dir()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MSL_CACHE": str(shared)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "must be a directory of user" in done.stderr
    assert "found mode 0755" in done.stderr


def _compile(cache, source, name, results):
    os.environ["MSL_CACHE"] = cache
    msl.cache_dir.cache_clear()
    msl.compile_kernel.cache_clear()
    results.put(str(msl.compile_kernel(source, name).path))


@emulated_only
def test_two_processes_may_build_the_same_kernel(tmp_path):
    found = capture_gemv()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (str(tmp_path / "cache"), found.source, found.name, results)
    workers = [context.Process(target=_compile, args=arguments) for _ in range(2)]
    for w in workers:
        w.start()
    paths = {results.get(timeout=120) for _ in workers}
    for w in workers:
        w.join(timeout=60)
        assert w.exitcode == 0
    (path,) = paths
    assert Path(path).is_file()
    kinds = sorted(p.suffix for p in Path(path).parent.iterdir())
    assert kinds == [".h", ".pch", ".so", ".so"]  # no temporary file is left
