"""`mlxfuse bench kernels`: what is timed beside what, and that a floor has the kernel's loads."""

import itertools
from dataclasses import replace

import mlx.core as mx
import pytest

from mlxfuse.bench import kernels, output
from mlxfuse.errors import KernelError
from mlxfuse.kernels import _kernel, self_test
from mlxfuse.kernels.quantized_matmul import quantized_matmul
from mlxfuse.kernels.weight import QuantizedWeight

from . import msl
from .kernels.variants import NAMES, capture, segment
from .msl.instructions import largest_loop

SMALL = [(32, 512)]


def cases(registered, count):
    return list(itertools.islice(registered(SMALL, 0), count))


def launches(name, rows=16, columns=2048):
    """The kernel's launch for one row, and that of its floor."""
    x = mx.ones((1, columns), mx.float16)
    weight = QuantizedWeight.whole(segment(name, rows, columns))
    ((kernel, (call,)),) = self_test.calls(lambda: quantized_matmul(x, weight))
    return kernel.launch(call), kernel.launch(replace(call, floor=True))


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "Q8_0", "IQ4_XS", "affine4"])
def test_a_floor_has_the_loads_of_its_kernel(name):
    counted = []
    for launch in launches(name):
        with msl.installed(), msl.counting() as found:
            _kernel.run(launch, emulated=True)
        counted.append({n: (t.read_bytes, t.times_read) for n, t in found[0].buffers.items()})
    assert counted[0] == counted[1]
    assert counted[0]["codes0"][1] == 1.0


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
def test_a_floor_has_no_arithmetic_to_speak_of(name):
    loops = []
    for launch in launches(name):
        captured = capture(launch)
        loops.append(largest_loop(captured.source, captured.name))
    kernel, floor = loops
    assert floor.load_bytes == kernel.load_bytes
    assert floor.instructions < 0.5 * kernel.instructions


class Clock:
    """Each launch takes its own time."""

    def __init__(self, monkeypatch, kernel, floor):
        self.now = 0.0
        self.turns = []

        def run(launch, *, emulated=False):
            is_floor = ", 4, 4>(" in launch.program.body
            self.turns.append("floor" if is_floor else "kernel")
            self.now += floor if is_floor else kernel
            return [mx.zeros(s, d) for s, d in zip(launch.shapes, launch.dtypes, strict=True)]

        monkeypatch.setattr(_kernel, "run", run)

    def __call__(self):
        return self.now


def test_a_row(monkeypatch):
    monkeypatch.setattr(self_test, "compare", lambda *a, **k: "")
    case = cases(kernels.matmul_cases, 1)[0]
    clock = Clock(monkeypatch, 4e-6, 2e-6)

    def mlx():
        clock.turns.append("mlx")
        clock.now += 8e-6
        return mx.zeros(1)

    row = kernels.measure(replace(case, mlx=[mlx]), 2, clock=clock)
    assert clock.turns == ["kernel", "floor", "mlx"] * 2 + ["mlx", "floor", "kernel"]
    # 32 x 512 weights of 4.5 bits, 512 float16 of x, 9 numbers of sizes, 32 float16 of y.
    assert row["bytes"] == 32 * 512 * 9 // 16 + 1024 + 36 + 64
    assert (row["median_ns"], row["floor_ns"]) == (pytest.approx(4000), pytest.approx(2000))
    assert row["floor_ratio"] == pytest.approx(2)
    assert row["mlx_ratio"] == pytest.approx(0.5)
    assert row["gb_s"] == pytest.approx(row["bytes"] / 4000)
    assert (row["kernel"], row["case"]) == (
        "quantized_matmul",
        "Q4_0 32x512, 1 row (MLX: affine4g64)",
    )


@pytest.mark.parametrize("registered", kernels.REGISTRY)
def test_every_kernel_is_right_before_it_is_timed(registered, monkeypatch):
    case = cases(registered, 1)[0]
    with msl.installed(build="fast"):
        row = kernels.measure(case, 1, emulated=True)
        assert row["median_ns"] > 0
        real = _kernel.run
        monkeypatch.setattr(_kernel, "run", lambda *a, **k: [y * 1.1 for y in real(*a, **k)])
        with pytest.raises(KernelError, match=r"is not timed: largest error"):
            kernels.measure(case, 1, emulated=True)


def test_every_format_with_a_kernel_is_timed():
    names = [case.name.split()[0] for case in kernels.matmul_cases(SMALL, 0)]
    assert sorted(set(names)) == sorted(set(NAMES) - {"affine4", "affine8", "mlx mxfp4"})
    assert len(names) == len(kernels.ROWS) * len(set(names))


def test_arrays_are_read_again_only_when_caches_have_forgotten_them():
    found = kernels._copies(kernels.sample(kernels.BY_NAME["Q4_0"], 32, 512), 40_000)
    assert sum(s.nbytes for s in found) >= 40_000
    arrays = [s.arrays["codes"] for s in found]
    assert len({id(a) for a in arrays}) == len(found) == 5
    assert all(mx.array_equal(a, arrays[0]) for a in arrays)


def test_the_table():
    row = {
        **{"kernel": "quantized_matmul", "case": "Q4_K", "variant": "rows8", "median_ns": 1500.0},
        **{"gb_s": 321.04, "share": 0.854, "floor_ratio": 1.004, "mlx_ratio": None},
    }
    env = {
        **{"device": {"name": "Apple M9", "kind": "metal"}, "system": "macOS", "date": "today"},
        **{"mlxfuse": "1", "mlx": "2", "mlx_lm": "3", "bandwidth": 376e9, "thermal": "hot\n"},
        "kernels": {"source": "abc"},
    }
    lines = output.render({"bench": "kernels", "environment": env, "rows": [row]}, "md")
    cells = [c.strip() for c in next(x for x in lines.splitlines() if "Q4_K" in x).split("|")]
    assert cells[1:-1] == [
        *("quantized_matmul", "Q4_K", "rows8", "1.5", "321.0", "85%", "1.00", "", "yes")
    ]
    assert "thermal: hot\\x0a" in lines
    assert "376.0 GB/s" in lines
    assert "On the CPU" not in lines
