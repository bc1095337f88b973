"""`mlxfuse bench kernels`: what is timed beside what, and that a floor has the kernel's loads."""

import json
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from mlxfuse.bench import cases, kernels, output, static
from mlxfuse.bench.cases import SMALL
from mlxfuse.bench.floor import floor
from mlxfuse.formats import BY_NAME
from mlxfuse.kernels.matmul.dequantize import dequantize
from mlxfuse.kernels.matmul.int8_matmul import int8_matmul
from mlxfuse.kernels.matmul.quantized_matmul import quantized_matmul
from mlxfuse.kernels.norm.quantize_int8 import quantize_int8
from mlxfuse.kernels.runtime import kernel as _kernel
from mlxfuse.kernels.runtime import self_test
from mlxfuse.kernels.runtime.source import metal_dir
from mlxfuse.kernels.weight import QuantizedWeight

from .. import msl
from ..cli.test_cli import invoke
from ..kernels.variants import MLX, NAMES, capture, segment
from ..msl.instructions import largest_loop

FEW = [BY_NAME["Q4_0"]]
TABLE = [(self_test.calls(case.ours[0])[0], case) for case in cases.cases(SMALL, FEW)]
FLOORS = [
    (quantized_matmul, "Q4_0", 1),
    (quantized_matmul, "Q6_K", 4),
    (quantized_matmul, "IQ4_XS", 1),
    (quantized_matmul, "affine4", 4),
    (int8_matmul, "Q8_0", 1),
    (int8_matmul, "Q6_K", 4),
]


def both(operation, name, rows, n=16):
    """The launch of a product with ``n`` rows of W, and that of its floor."""
    x = mx.ones((rows, 2048), mx.float16)
    given = quantize_int8(x) if operation is int8_matmul else x
    weight = QuantizedWeight.whole(segment(name, n, 2048))
    (recorded,) = self_test.calls(lambda: operation(given, weight))
    return recorded[0].launch(*recorded[1]), *kernels.floors_of(recorded)


def traffic(launch):
    with msl.installed(), msl.counting() as found:
        _kernel.run(launch, emulated=True)
    return found[0].buffers


@pytest.mark.parametrize(("operation", "name", "rows"), FLOORS)
def test_a_floor_has_the_loads_of_its_kernel(operation, name, rows):
    counted = []
    for launch in both(operation, name, rows):
        buffers = traffic(launch)
        del buffers["size"]  # a few numbers, which the compiler may keep in registers
        counted.append({n: (t.read_bytes, t.times_read) for n, t in buffers.items()})
    assert counted[0] == counted[1]
    assert counted[0]["codes0"][1] == 1.0
    with msl.installed(build="checked"):  # and no other: 19 rows fill no last tile
        _kernel.run(both(operation, name, rows, 19)[1], emulated=True)


@pytest.mark.parametrize(("operation", "name", "rows"), FLOORS)
def test_a_floor_has_no_arithmetic_to_speak_of(operation, name, rows):
    loops = []
    for launch in both(operation, name, rows):
        captured = capture(launch)
        loops.append(largest_loop(captured.source, captured.name))
    kernel, least = loops
    assert least.load_bytes == kernel.load_bytes
    assert least.instructions < 0.5 * kernel.instructions


def test_floors_compile_in_every_language_version():
    moved = next(floor(k.launch(*a)) for (k, a), _ in TABLE if k.name == "quantize_int8")
    products = [both(operation, "Q6_K", 4)[1] for operation in (quantized_matmul, int8_matmul)]
    for launch in (moved, both(quantized_matmul, "Q4_0", 1)[1], *products):
        found = capture(launch)
        assert msl.check_languages(found.source, found.name) == dict.fromkeys(msl.LANGUAGES, ())


@pytest.mark.parametrize("build", msl.BUILDS)
def test_the_floor_of_bytes_moves_each_once(build):
    """Also where the last threads have nothing to do; arrays of less than 16 bytes are left out."""
    part = segment("Q4_0", 9, 1056)
    small = mx.zeros(3, mx.float16)
    (recorded,) = self_test.calls(lambda: dequantize(part, None, mx.float16))
    launch = recorded[0].launch(*recorded[1])
    least = floor(replace(launch, arrays=(*launch.arrays, small)))
    with msl.installed(build=build):
        (out,) = _kernel.run(least, emulated=True)
    assert out.nbytes == 16 * -(-9 * 1056 * 2 // 16)
    # 16 bytes of each array, and those a whole grid later, in the first thread's result.
    want = np.zeros(4, np.uint32)
    for array in launch.arrays:
        raw = np.frombuffer(np.array(array).tobytes(), np.uint8)
        if len(raw) >= 16:
            words = raw[: len(raw) // 16 * 16].view(np.uint32).reshape(-1, 4)
            want ^= np.bitwise_xor.reduce(words[:: least.grid[0]], axis=0)
    assert np.array_equal(np.array(out[:4]), want)
    if build == "fast":
        found = traffic(least)
        assert [t.times_read for n, t in found.items() if n.startswith("in")] == [1.0] * (
            len(least.arrays) - 1
        )


class Clock:
    """Each launch takes its own time."""

    def __init__(self, monkeypatch, kernel, floor):
        self.now = 0.0
        self.turns = []

        def run(launch, *, emulated=False):
            is_floor = any(p.endswith("floor") for p in launch.program.parts)
            self.turns.append("floor" if is_floor else "kernel")
            self.now += floor if is_floor else kernel
            return [mx.zeros(s, d) for s, d in zip(launch.shapes, launch.dtypes, strict=True)]

        monkeypatch.setattr(_kernel, "run", run)

    def __call__(self):
        return self.now


def test_a_row(monkeypatch):
    monkeypatch.setattr(self_test, "compare", lambda *a, **k: "")
    case = next(c for _, c in TABLE if c.name == "Q4_0 16x512, 1 row")
    clock = Clock(monkeypatch, 4e-6, 2e-6)

    def mlx():
        clock.turns.append("mlx")
        clock.now += 8e-6
        return mx.zeros(1)

    row, failure = kernels.measure(replace(case, mlx=[mlx]), 2, clock=clock)
    turns = ["kernel", "kernel", "floor", "mlx", "kernel", "floor", "mlx"]
    assert clock.turns == [*turns, "mlx", "floor", "kernel"]
    assert (failure, row["first_ms"]) == ("", pytest.approx(4e-3))
    # 16 x 512 weights of 4.5 bits, 512 float16 of x, 9 numbers of sizes, 16 float16 of y.
    assert row["bytes"] == 16 * 512 * 9 // 16 + 1024 + 36 + 32
    assert (row["median_ns"], row["floor_ns"]) == (pytest.approx(4000), pytest.approx(2000))
    assert row["floor_ratio"] == pytest.approx(2)
    assert row["mlx_ratio"] == pytest.approx(0.5)
    assert row["gb_s"] == pytest.approx(row["bytes"] / 4000)
    assert (row["kernel"], row["mlx"]) == ("quantized_matmul", "quantized_matmul affine4g64")


@pytest.mark.parametrize(
    "name",
    [
        *dict.fromkeys(kernel.name for (kernel, _), _ in TABLE),
        *("2 of 4 experts", "summed", "17 rows"),
    ],
)
def test_every_kernel_is_right_before_it_is_timed(name, monkeypatch):
    case = next(c for (k, _), c in TABLE if k.name == name or name in c.name)
    with msl.installed(build="fast"):
        row, _ = kernels.measure(case, 1, emulated=True)
        assert row["median_ns"] > 0
        assert (row["floor_ns"] or 0) > 0 or name == "17 rows"
        real = _kernel.run
        wrong = partial(map, lambda y: y ^ 1 if mx.issubdtype(y.dtype, mx.integer) else y * 1.1)
        monkeypatch.setattr(_kernel, "run", lambda *a, **k: list(wrong(real(*a, **k))))
        row, failure = kernels.measure(case, 1, emulated=True)
        assert "median_ns" not in row
        assert failure.startswith(("largest error", "100.0% of the words"))


def test_the_table_has_every_kernel_in_every_format():
    found = [self_test.calls(case.ours[0])[0][0].name for case in cases.cases(SMALL)]
    assert set(found) == {p.stem for p in metal_dir().glob("*.metal")} - {"floor"}
    names = [case.name.split()[0] for case in cases.cases(SMALL)]
    of_gguf = set(NAMES) - set(MLX)
    # Whole, with 1 and 4 rows and of experts 3 times; those with integers twice more.
    assert {name: names.count(name) for name in of_gguf} == {
        name: 8 if BY_NAME[name].traits.integers else 6 for name in of_gguf
    }


def test_tensor_operations_are_in_a_report_of_an_m5(monkeypatch):
    """One that has them tells whether they compile, are right and are fast."""
    assert not any("tensor" in case.name for _, case in TABLE)
    monkeypatch.setattr(cases, "tensors", lambda: True)
    (case,) = (c for c in cases.cases(SMALL, FEW) if "tensor" in c.name)
    with msl.installed(build="fast"):
        row, failure = kernels.measure(case, 1, emulated=True)
    assert (failure, row["variant"]) == ("", "tensor")
    assert row["floor_ns"] is None


@pytest.mark.parametrize("place", range(len(TABLE)), ids=lambda i: TABLE[i][1].name)
def test_mlx_does_the_same_work(place):
    """Outputs as many and as large as the kernel's, for each pair of calls."""
    (kernel, arguments), case = TABLE[place]
    assert len(case.ours) == len(case.mlx) >= 1
    theirs = case.mlx[0]()
    mx.eval(theirs)
    if kernel.name in ("quantize_kv", "quantize_int8") or "to int8" in case.name:
        return  # in codes of another layout
    theirs = [theirs] if isinstance(theirs, mx.array) else theirs
    shapes = kernel.launch(*arguments).results(_kernel.Launch.blank)
    sizes = [y.size for y in shapes]
    assert [y.size for y in theirs] == (sizes[1:] if "add" in case.against else sizes)


def test_bytes_of_experts_are_those_of_the_chosen():
    given = [kernels.nbytes(recorded) for recorded, case in TABLE if "experts" in case.name]
    each = 16 * 512 * 9 // 16  # of 16 x 512 weights of 4.5 bits
    # Of 4 experts 2, 2 and all; x, sizes, ids, scores and y.
    assert given == [
        2 * each + 1024 + 36 + 2 * 4 + 2 * 32,
        2 * each + 2 * 1024 + 36 + 2 * 4 + 2 * 2 + 32,
        4 * each + 17 * (1024 + 32) + 2 * 4 * 4 + 36,  # where the rows and tiles of each end
    ]


def test_bytes_of_a_second_dispatch_count():
    recorded = next(r for r, _ in TABLE if r[0].name == "compressed_sdpa")
    first, second = recorded[0].launch(*recorded[1]).chain()
    assert kernels.nbytes(recorded) == sum(
        sum(a.nbytes for a in launch.arrays) + sum(y.nbytes for y in launch.blank())
        for launch in (first, second)
    )
    assert len(kernels.floors_of(recorded)) == 2


def test_arrays_are_read_again_only_when_caches_have_forgotten_them():
    found = cases._copies(cases.sample(FEW[0], 32, 512), replace(SMALL, cold=40_000))
    assert sum(s.nbytes for s in found) >= 40_000
    arrays = [s.arrays["codes"] for s in found]
    assert len({id(a) for a in arrays}) == len(found) == 5
    assert all(mx.array_equal(a, arrays[0]) for a in arrays)


MESSAGES = """[metal::Device] Unable to build metal library from source
program_source:7:3: warning: unused variable 'a'
program_source:9:3: error: no member named 'b' in 'c'
"""


def test_a_report_has_the_figures_the_messages_and_what_is_wrong(tmp_path, monkeypatch):
    """One kernel that Metal refuses does not keep the others from being timed."""
    table = [case for _, case in TABLE if case.name in ("Q4_0 16x512, 1 row", "Q4_0 16x512")]
    for name, stand_in in {
        "on_device": lambda what: None,
        "environment": lambda: ENVIRONMENT,
        "cases": lambda sizes: table,
        "_times": lambda *_: {**TIMES, "floor_ratio": 1.3},
    }.items():
        monkeypatch.setattr(kernels, name, stand_in)
    real = self_test.compare
    monkeypatch.setattr(self_test, "compare", lambda *a, **k: "")

    def run(launch, *, emulated=False):
        if launch.program.op == "dequantize":
            raise RuntimeError(MESSAGES)
        return launch.blank()

    monkeypatch.setattr(_kernel, "run", run)
    monkeypatch.setattr(static, "table", lambda: {})
    result = invoke("bench", "kernels", "--report", tmp_path / "report.json", "-r", "1")
    assert result.exit_code != 0
    assert "1 kernels do not compile or are wrong" in result.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    (refused,), rows = found["refused"], found["rows"]
    assert (refused["kernel"], refused["failure"]) == ("dequantize", MESSAGES.strip())
    assert {r["kernel"] for r in rows} == {"quantized_matmul"}
    assert rows[0]["estimate"] == "no figures of this text"
    assert "is not timed: [metal::Device] Unable to build" in result.stdout
    (recorded,) = self_test.calls(table[0].ours[0])
    assert (
        real(*recorded, emulated=False) == "program_source:9:3: error: no member named 'b' in 'c'"
    )


FIGURES = {
    **{"program": "p", "text": "0", "registers": 40, "memory": 0, "threads": 64},
    **{"stack": 0, "spilled": 0, "loads": 1.0, "stores": 1.0, "barriers": 0.0, "table_loads": 0.0},
    "resident": 1024,
}


@pytest.mark.parametrize(
    ("changed", "ratio", "estimate"),
    [
        ({}, 1.1, "as its figures say"),
        ({}, 1.2, "SLOWER than its figures explain"),
        ({"spilled": 84}, 1.2, "slow, as its figures say: 84 bytes spilled"),
        ({"spilled": 84}, 1.0, "faster than its figures: 84 bytes spilled"),
        ({"resident": 256}, 1.2, "slow, as its figures say: 256 threads to a core"),
        ({"stores": 4.0}, None, "no floor to compare with; figures: 4 times the fewest pieces st"),
        ({"program": None}, 1.0, "no figures of this text"),
    ],
)
def test_what_a_time_says_of_the_figures(changed, ratio, estimate):
    assert static.judge([FIGURES, {**FIGURES, **changed}], ratio).startswith(estimate)


ENVIRONMENT = {
    **{"device": {"name": "Apple M9", "kind": "metal"}, "system": "macOS", "date": "today"},
    **{"mlxfuse": "1", "mlx": "2", "mlx_lm": "3", "bandwidth": 376e9, "thermal": "hot\n"},
    "kernels": {"source": "abc"},
}
TIMES = {"median_ns": 1500.0, "gb_s": 321.04, "floor_ratio": 1.004, "mlx_ratio": None}


def test_the_table():
    row = {
        **{"kernel": "quantized_matmul", "case": "Q4_K", "variant": "rows8", "share": 0.854},
        **{**TIMES, "mlx": "rms_norm", "estimate": "as its figures say"},
    }
    given = {"bench": "kernels", "environment": ENVIRONMENT, "rows": [row]}
    lines = output.render({**given, "refused": [], "notes": ["a note"]}, "md")
    cells = [c.strip() for c in next(x for x in lines.splitlines() if "Q4_K" in x).split("|")]
    assert cells[1:-1] == [
        *("quantized_matmul", "Q4_K", "rows8", "1.5", "321.0", "85%", "1.00", "", "rms_norm"),
        "as its figures say",
    ]
    assert lines.endswith("\na note")
    assert "thermal: hot\\x0a" in lines
    assert "376.0 GB/s" in lines
    assert "On the CPU" not in lines
