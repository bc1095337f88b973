"""The static figures: right on kernels whose figures are known, and no program's got worse."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace

import mlx.core as mx
import pytest

from mlxfuse.bench import static
from mlxfuse.bench.cases import Sizes, cases
from mlxfuse.formats import BY_NAME
from mlxfuse.kernels.runtime.self_test import calls
from tests import msl
from tests.bench import bench_static
from tests.msl import ptx
from tests.msl.registers import ptxas, registers


@pytest.fixture(autouse=True, scope="module")
def _compilers() -> None:
    try:
        ptxas()
        ptx.libdevice()
    except msl.MslSetupError as e:
        pytest.skip(str(e))


def of(body: str) -> tuple[str, str]:
    """A kernel's text and name."""
    kernel = msl.metal_kernel(name="k", input_names=["x"], output_names=["y"], source=body)
    found = msl.capture(
        kernel, [mx.zeros(4096)], template=[], grid=(32, 1, 1), threadgroup=(32, 1, 1),
        output_shapes=[(32,)], output_dtypes=[mx.float32],
    )  # fmt: skip
    return found.source, found.name


_MANY = """
const uint i = thread_position_in_grid.x;
float v[{n}];
_Pragma("clang loop unroll(full)")
for (int j = 0; j < {n}; j++) {{ v[j] = x[i + 32 * j]; }}
threadgroup_barrier(mem_flags::mem_device);
float sum = 0.0f;
_Pragma("clang loop unroll(full)")
for (int k = 1; k < 3; k++) {{
  _Pragma("clang loop unroll(full)")
  for (int j = 0; j < {n}; j++) {{ sum = sum * v[j] + v[(j * k) % {n}]; }}
}}
y[i] = sum;
"""


def test_registers_stack_and_spills_are_seen() -> None:
    few = registers(*of("y[thread_position_in_grid.x] = 2.0f * x[thread_position_in_grid.x];"))
    assert few.registers <= 32
    assert (few.stack, few.spilled) == (0, 0)
    some = registers(*of(_MANY.format(n=64)))
    assert 64 <= some.registers <= 128
    assert (some.stack, some.spilled) == (0, 0)
    many = registers(*of(_MANY.format(n=160)))
    assert many.registers > 160
    assert many.stack == 0
    assert many.spilled > 0
    indexed = registers(
        *of(
            "float v[8]; for (int j = 0; j < 8; j++) { v[j] = x[j]; }\n"
            "for (int j = 0; j < 32; j++) { v[int(x[j]) & 7] += 1.0f; }\n"
            "y[thread_position_in_grid.x] = v[int(x[9]) & 7];"
        )
    )
    assert indexed.stack == 32


def test_a_core_holds_what_fits() -> None:
    assert static.resident(32, 0, 64) == 1664 - 1664 % 64
    assert static.resident(16, 0, 128) == 3072
    assert static.resident(128, 0, 128) == 384
    assert static.resident(32, 20 << 10, 128) == 3 * 128


BEFORE = json.loads(static.TABLE.read_text("utf-8"))
CHOSEN = [BY_NAME[name] for name in bench_static.GOLDEN_FORMATS]
# Of the other formats, whose programs differ in how a unit is decoded.
OTHERS = re.compile("|".join(f.name for f in BY_NAME.values() if f.kernel and f not in CHOSEN))


@pytest.fixture(scope="module")
def programs():
    return dict(bench_static.programs([f for f in BY_NAME.values() if f.kernel]))


def _stale(programs, formats) -> list[str]:
    names = [name for name, _ in bench_static.programs(formats)]
    return [n for n in names if BEFORE.get(n, {}).get("text") != static.digest(programs[n])]


@pytest.mark.parametrize(
    "formats",
    [CHOSEN, pytest.param([f for f in BY_NAME.values() if f.kernel], marks=pytest.mark.slow)],
    ids=["chosen", "every"],
)
def test_the_table_is_of_the_programs_there_are(programs, formats) -> None:
    """`python -m tests.bench.bench_static --golden` makes it so."""
    assert not _stale(programs, formats)
    assert BEFORE.keys() <= programs.keys()


def test_a_text_that_changed_is_seen(programs) -> None:
    name = "dequantize Q4_K 32x4096 out"
    launch = programs[name]
    body = launch.program.body.replace(";", ";;", 1)
    other = replace(launch, program=replace(launch.program, body=body))
    assert _stale({**programs, name: other}, CHOSEN) == [name]
    assert static.figures([launch])[0]["program"]
    assert static.figures([other]) == [{"program": None, "text": static.digest(other)}]


def test_what_is_timed_is_in_the_table(programs) -> None:
    """Shapes choose a program; the small ones of the table must choose those of the real ones."""
    sizes = replace(Sizes(), matrices=Sizes().matrices[:1], cold=0)
    timed = {
        static.digest(launch)
        for case in cases(sizes, CHOSEN[:1])
        for kernel, arguments in calls(case.ours[0])
        for launch in kernel.launch(*arguments).chain()
    }
    assert timed <= {static.digest(launch) for launch in programs.values()}


def test_only_what_changed_is_read_again(programs, monkeypatch) -> None:
    """And only of the formats that are asked for."""
    read = []

    def figures(launch):
        read.append(launch)
        return bench_static.Figures(1, 2, 3)

    monkeypatch.setattr(bench_static, "figures", figures)
    names = [n for n, _ in bench_static.programs(CHOSEN[:1])]
    before = {n: {"text": static.digest(programs[n]), "registers": 9} for n in names}
    before[names[0]]["text"] = "other"
    before |= {"gone": {"text": ""}, "quantized_matmul Q5_0 32x4096, 1 row out0": {"text": "old"}}
    found = bench_static.golden(before, CHOSEN[:1])
    assert read == [programs[names[0]]]
    first = {"text": static.digest(programs[names[0]]), "registers": 1, "stack": 2, "spilled": 3}
    assert found.pop(names[0]) == first
    del before[names[0]], before["gone"]
    assert found == before


def test_what_attention_holds_is_in_registers() -> None:
    found = [f for name, f in BEFORE.items() if "sdpa" in name or "_kv" in name]
    assert len(found) > 20
    assert not [f for f in found if f["stack"] or f["spilled"]]


# What another version of clang or ptxas may make of the same text.
SLACK = {"registers": 8, "loads": 0.02, "stores": 0.02, "table_loads": 0.02}


# What takes ptxas long, and what is as the others.
_SLOW = re.compile(
    rf"MXFP4|{OTHERS.pattern}|(256|257|512) rows|rows (8|32)$|33 rows|k8v8|k4v4"
    r"|tiles of (64|128|192)"
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * bool(_SLOW.search(n))) for n in sorted(BEFORE)],
)
def test_no_program_got_worse(name, programs) -> None:
    before = BEFORE[name]
    found = asdict(bench_static.figures(programs[name]))
    worse = {
        key: (value, found[key])
        for key, value in before.items()
        if key not in ("threads", "text") and found[key] > value + SLACK.get(key, 0)
    }
    assert not worse
