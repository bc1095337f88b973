"""The static figures: right on kernels whose figures are known, and no program's got worse."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import mlx.core as mx
import pytest

from mlxfuse.formats import BY_NAME
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
    assert bench_static.resident(32, 0, 64) == 1664 - 1664 % 64
    assert bench_static.resident(16, 0, 128) == 3072
    assert bench_static.resident(128, 0, 128) == 384
    assert bench_static.resident(32, 20 << 10, 128) == 3 * 128


BEFORE = json.loads(bench_static.GOLDEN.read_text("utf-8"))


@pytest.fixture(scope="module")
def programs():
    chosen = [f for f in BY_NAME.values() if f.name in bench_static.GOLDEN_FORMATS]
    return dict(bench_static.programs(chosen))


def test_the_table_is_of_the_programs_there_are(programs) -> None:
    assert sorted(BEFORE) == sorted(programs)


def test_what_attention_holds_is_in_registers() -> None:
    found = [f for name, f in BEFORE.items() if "sdpa" in name or "_kv" in name]
    assert len(found) > 20
    assert not [f for f in found if f["stack"] or f["spilled"]]


# What another version of clang or ptxas may make of the same text.
SLACK = {"registers": 8, "loads": 0.02, "stores": 0.02, "table_loads": 0.02}


# What takes ptxas long, and what is as the others.
_SLOW = re.compile(r"MXFP4|(256|512) rows|rows 32|k8v8|k4v4")


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
        if key != "threads" and found[key] > value + SLACK.get(key, 0)
    }
    assert not worse
