"""The counts against kernels whose figures can be worked out by hand."""

from __future__ import annotations

from dataclasses import asdict

import mlx.core as mx
import numpy as np
import pytest

from tests import msl
from tests.msl import instructions, mlx_kernels, ptx

I = "const uint i = thread_position_in_grid.x;\n"  # noqa: E741


def kernel(body, header=""):
    return msl.metal_kernel(
        name="counted", input_names=["x", "n"], output_names=["y"], source=I + body, header=header
    )


def call(threads=64):
    return {
        "grid": (threads, 1, 1),
        "threadgroup": (64, 1, 1),
        "output_shapes": [(threads,)],
        "output_dtypes": [mx.float32],
    }


def counted(body, *, threads=64, **options):
    with msl.counting() as counts, msl.using(**options):
        (y,) = kernel(body)(inputs=[mx.arange(1024.0), mx.array([3])], **call(threads))
    (found,) = counts
    return found, np.array(y)


# body, then of `x`: lanes' loads and bytes, distinct bytes, loads of SIMD-groups and their bytes,
# 32-byte segments and fewest, 128-byte segments and fewest; for 64 threads, two SIMD-groups.
CASES = {
    "coalesced": ("y[i] = x[i];", (64, 256, 256, 2, 256, 8, 8, 2, 2)),
    "shifted": ("y[i] = x[i + 1];", (64, 256, 256, 2, 256, 10, 8, 4, 2)),
    "reversed": ("y[i] = x[63 - i];", (64, 256, 256, 2, 256, 8, 8, 2, 2)),
    "strided by 2": ("y[i] = x[2 * i];", (64, 256, 256, 2, 256, 16, 8, 4, 2)),
    "strided by 8": ("y[i] = x[8 * i];", (64, 256, 256, 2, 256, 64, 8, 16, 2)),
    "broadcast": ("y[i] = x[5];", (64, 256, 4, 2, 8, 2, 2, 2, 2)),
    "read twice": ("y[i] = x[i] + x[63 - i];", (128, 512, 256, 4, 512, 16, 16, 4, 4)),
    "pairs share": ("y[i] = x[i / 2];", (64, 256, 128, 2, 128, 4, 4, 2, 2)),
    "partial lanes": (
        "float v = 0; if (i < 40) { v = x[i]; } y[i] = v;",
        (40, 160, 160, 2, 160, 5, 5, 2, 2),
    ),
    "every other lane": (
        "float v = 0; if (i % 2 == 0) { v = x[i]; } y[i] = v;",
        (32, 128, 128, 2, 128, 8, 4, 2, 2),
    ),
    "wide": (
        "y[i] = ((const device float4*)x)[i].y;",
        (64, 256, 256, 2, 256, 32, 8, 8, 2),
    ),
    "whole vectors": (
        "float4 v = ((const device float4*)x)[i]; y[i] = v.x + v.y + v.z + v.w;",
        (64, 1024, 1024, 2, 1024, 32, 32, 8, 8),
    ),
    "a loop": (
        "float v = 0; for (int j = 0; j < n[0]; j++) { v += x[i + 64 * j]; } y[i] = v;",
        (192, 768, 768, 6, 768, 24, 24, 6, 6),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("order", msl.ORDERS)
def test_loads_are_counted_exactly(name, order):
    body, expected = CASES[name]
    counts, _ = counted(body, order=order)
    found = {k: v for k, v in asdict(counts.buffers["x"]).items() if v}
    names = ("loads", "read_bytes", "distinct_read", "group_loads", "group_bytes")
    names += ("short_segments", "short_ideal", "long_segments", "long_ideal")
    assert found == dict(zip(names, expected, strict=True))


def test_ratios_follow_from_the_counts():
    by_name = {name: counted(body)[0].buffers["x"] for name, (body, _) in CASES.items()}
    ratios = {
        name: (t.times_read, t.times_fetched, t.coalescing, t.coalescing_128)
        for name, t in by_name.items()
    }
    assert ratios["coalesced"] == (1, 1, 1, 1)
    assert ratios["shifted"] == (1, 1, 0.8, 0.5)
    assert ratios["strided by 2"] == (1, 1, 0.5, 0.5)
    assert ratios["broadcast"] == (64, 2, 1, 1)
    assert ratios["read twice"] == (2, 2, 1, 1)
    assert ratios["pairs share"] == (2, 1, 1, 1)


def test_stores_and_the_least_to_move():
    counts, y = counted("y[i] = x[i];", threads=100)
    stores = counts.buffers["y"]
    assert (stores.stores, stores.write_bytes, stores.distinct_written) == (100, 400, 400)
    assert counts.distinct_bytes == 800
    np.testing.assert_array_equal(y, np.arange(100, dtype=np.float32))
    twice, _ = counted("y[i] = 0; if (x[i] > 3) { y[i] = x[i]; }")
    assert twice.buffers["y"].stores == 64 + 60
    assert twice.buffers["y"].times_written == 124 / 64


def test_segments_of_stores_are_counted():
    """Of 32 bytes: one for 8 neighbours, and one for each store that has none."""
    for body, expected in (
        ("y[i] = x[i];", (8, 8)),
        ("y[i / 2 + 32 * (i % 2)] = x[i];", (8, 8)),
        ("y[i * 8 % 64 + i / 8] = x[i];", (16, 8)),
    ):
        y = counted(body)[0].buffers["y"]
        assert (y.store_segments, y.store_ideal) == expected


def test_threadgroup_memory_barriers_and_simd_operations():
    counts, y = counted(
        "threadgroup float shared[64];\n"
        "const uint t = thread_position_in_threadgroup.x;\n"
        "shared[t] = x[i];\n"
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
        "simdgroup_barrier(mem_flags::mem_threadgroup);\n"
        "y[i] = simd_sum(simd_max(shared[63 - t]));\n",
        threads=128,
    )
    assert counts.threadgroup_bytes == 256
    assert (counts.threadgroup.loads, counts.threadgroup.read_bytes) == (128, 512)
    assert (counts.threadgroup.stores, counts.threadgroup.write_bytes) == (128, 512)
    assert (counts.barriers, counts.simdgroup_barriers, counts.simd_operations) == (2, 4, 8)
    np.testing.assert_array_equal(y, np.repeat([63, 31, 127, 95], 32) * 32.0)
    assert (counts.threadgroup.group_loads, counts.threadgroup.bank_turns) == (4, 4)
    without, _ = counted("y[i] = x[i];", threads=128)
    assert without.threadgroup == msl.Traffic()
    assert (without.barriers, without.simdgroup_barriers, without.simd_operations) == (0, 0, 0)


@pytest.mark.parametrize(
    ("load", "turns"),
    [
        ("shared[t]", 1),
        ("shared[0]", 1),  # one word for all lanes
        ("shared[t / 2]", 1),
        ("shared[2 * t]", 2),
        ("shared[32 * t]", 32),
        ("shared[32 * (t % 4) + 1]", 4),
        ("length(((threadgroup float2*)shared)[t])", 2),  # 64 words of 32 banks
    ],
)
def test_lanes_that_meet_in_a_bank_take_turns(load, turns):
    counts, _ = counted(
        "threadgroup float shared[1024];\n"
        "const uint t = thread_position_in_threadgroup.x;\n"
        "for (uint k = t; k < 1024; k += 32) { shared[k] = x[i]; }\n"
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
        f"y[i] = {load};\n",
        threads=32,
    )
    assert counts.threadgroup.bank_conflicts == turns


def test_constant_tables_are_apart():
    with msl.counting() as counts:
        table = "constant float values[4] = {1, 5, 2, 7};\n"
        kernel("y[i] = x[i] + values[int(x[i]) & 3];", table)(
            inputs=[mx.arange(64.0), mx.array([3])], **call()
        )
    assert counts[0].tables == msl.Traffic(loads=64, read_bytes=256)
    assert counts[0].buffers["x"].read_bytes == 256


def test_only_a_build_that_sees_accesses_counts():
    with msl.counting() as counts, msl.using(build="fast"), pytest.raises(ValueError, match="fast"):
        kernel("y[i] = x[i];")(inputs=[mx.arange(64.0), mx.array([3])], **call())
    assert counts == []


LOOP = "float v = 0; for (int j = 0; j < n[0]; j++) { v += %s; } y[i] = v;"


def loop_of(expression):
    captured = msl.capture(kernel(LOOP % expression), [mx.arange(1024.0), mx.array([3])], **call())
    return instructions.largest_loop(captured.source, captured.name)


@pytest.fixture
def libdevice():
    try:
        return ptx.libdevice()
    except msl.MslSetupError as e:
        pytest.skip(str(e))


@pytest.mark.usefixtures("libdevice")
def test_instructions_of_the_inner_loop():
    plain = loop_of("x[64 * j + i]")
    assert (plain.loads, plain.load_bytes) == (1, 4)
    # The sum, the counter and the address, a comparison and the jump.
    assert 5 <= plain.instructions <= 9
    assert loop_of("x[64 * j + i] * 3.0f").instructions == plain.instructions  # an fma
    assert loop_of("(x[64 * j + i] + 1.0f) * 3.0f").instructions == plain.instructions + 1
    vector = loop_of("length(((const device float4*)x)[64 * j + i])")
    assert (vector.loads, vector.load_bytes) == (1, 16)
    captured = msl.capture(kernel("y[i] = x[i];"), [mx.zeros(64), mx.array([3])], **call())
    with pytest.raises(ValueError, match="no loop"):
        instructions.largest_loop(captured.source, captured.name)


def test_loops_of_a_graph():
    ptx_text = """.visible .entry f(.param .u64 a)
{
	bra.uni $A;
$A:
	add.s32 %r1, %r1, 1;
	ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1];
	@%p1 bra $B;
	mul.f32 %f1, %f1, %f2;
$B:
	st.global.f32 [%rd1], %f1;
$C:
	@%p2 ld.global.nc.u16 %rs1, [%rd2];
	@!%p2 bra $C;
	@%p1 bra $A;
	ret;
}
"""
    assert instructions.inner_loops(ptx_text) == [instructions.Loop(1, 2, 1)]
    flat = ptx_text.replace("@!%p2 bra $C;", "")
    assert instructions.inner_loops(flat) == [instructions.Loop(4, 18, 2)]


def test_mlx_reads_its_own_weight_once():
    weight = mlx_kernels.Affine(*mx.quantize(mx.random.normal((16, 1024)), 64, 4), 64, 4)
    case = mlx_kernels.qmv_fast(mx.random.normal((1, 1024)), weight)
    _, report = case.run("counted", count=True)
    assert report.counts.buffers["w"].times_read == 1
    assert report.counts.buffers["w"].distinct_read == weight.codes.nbytes
    # 2-byte loads of lanes 8 bytes apart: a quarter of what they touch.
    assert report.counts.buffers["w"].coalescing == 0.25
    assert report.counts.buffers["x"].loads / (16 * 1024) == 0.25
